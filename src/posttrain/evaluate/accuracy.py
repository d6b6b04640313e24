"""How often a model's answers are right, how sure that number is, and two models' answers beside each other."""

from __future__ import annotations

import math
import shutil
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from posttrain.evaluate.generation import generate_answers

Row = dict[str, Any]
Score = Callable[[str, Row], float]

Z_95 = 1.959964


@dataclass(frozen=True)
class TaskResult:
    """One model's answers to a task's rows, in their order, and the score of each."""

    answers: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def n(self) -> int:
        return len(self.scores)

    @property
    def accuracy(self) -> float:
        return sum(self.scores) / self.n if self.n else math.nan

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's 95 % interval, which stays inside [0, 1] and is honest for few samples and for 0 or all right."""
        return wilson(self.accuracy, self.n)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.accuracy:.1%} (95 % interval {low:.1%} to {high:.1%}, n={self.n})"


def evaluate_task(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    score: Score,
    max_new_tokens: int = 64,
    batch_size: int = 16,
    progress: bool = True,
) -> TaskResult:
    """Let the model answer every row's `prompt` greedily and score what it says."""
    prompts = [row["prompt"] for row in rows]
    answers = generate_answers(model, tokenizer, prompts, max_new_tokens, batch_size, progress)
    scores = [score(answer, row) for answer, row in zip(answers, rows, strict=True)]
    return TaskResult(tuple(answers), tuple(scores))


def wilson(share: float, n: int, z: float = Z_95) -> tuple[float, float]:
    """The score interval of a proportion (E. B. Wilson, 1927)."""
    if n == 0:
        return (0.0, 1.0)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def side_by_side(
    rows: Sequence[Row], before: TaskResult, after: TaskResult, k: int = 5, width: int | None = None
) -> str:
    """The first `k` rows as plain text: what was asked and expected, then both answers in two columns."""
    width = width or min(shutil.get_terminal_size((100, 24)).columns, 140)
    cards = [_card(row, _answer(before, index), _answer(after, index), width) for index, row in enumerate(rows[:k])]
    return f"\n{'─' * width}\n".join(cards)


def _answer(result: TaskResult, index: int) -> tuple[str, bool]:
    return result.answers[index], result.scores[index] >= 1.0


def _card(row: Row, before: tuple[str, bool], after: tuple[str, bool], width: int) -> str:
    asked = row["prompt"][-1]["content"].splitlines()[-1]  # the instruction above it is the same for every row
    expected = row["completion"][-1]["content"]
    column = max(10, (width - 3) // 2)
    left, right = (_column(name, *said, column) for name, said in (("before", before), ("after", after)))
    pairs = zip_longest(left, right, fillvalue="")
    return "\n".join(
        [
            *_wrap(f"asked     {asked}", width),
            *_wrap(f"expected  {expected}", width),
            *(f"{one:<{column}} │ {other}".rstrip() for one, other in pairs),
        ]
    )


def _column(name: str, answer: str, is_right: bool, width: int) -> list[str]:
    return [f"{name} {'✔ right' if is_right else '✘ wrong'}", *_wrap(answer or "(nothing)", width)]


def _wrap(text: str, width: int) -> list[str]:
    """Lines of at most `width`, with the text's own line breaks kept, and nothing that a terminal would obey."""
    lines = ("".join(c if c.isprintable() else " " for c in line) for line in text.splitlines())
    return [part for line in lines for part in textwrap.wrap(line, width) or [""]]
