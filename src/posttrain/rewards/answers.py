"""The right answers among a row's columns, and where in a completion its own answer stands.

What a model marks as its answer counts, and of several marks the last: `\\boxed{...}`, GSM8K's `####`, or
`<answer>...</answer>`. Only the end of a very long completion is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from posttrain.errors import ConfigError
from posttrain.rewards.functions import RewardFunction, text_of
from posttrain.types import Content

COLUMNS = ("ground_truth", "answer", "solution")
"""Where right answers are looked for, in this order."""
LONGEST = 100_000
"""Characters from a completion's end that are searched for its answer."""
MARK = re.compile(r"\\boxed\s{0,3}\{|\\fbox\s{0,3}\{|####|<answer>")


def against_gold(name: str, judge: Callable[[str, Any], float | None], column: str | None) -> RewardFunction:
    """A reward that holds each completion's text against its row's right answer; None where the row has none."""

    def reward(completions: Sequence[Content], **columns: Any) -> list[float | None]:
        return [
            None if gold is None else judge(text_of(content), gold)
            for content, gold in zip(completions, gold_of(columns, column, name), strict=True)
        ]

    reward.__name__ = reward.__qualname__ = name
    return reward


def gold_column(columns: Mapping[str, Any], wanted: str | None = None) -> str | None:
    """The name of the column that has the right answers, if there is one."""
    return next((name for name in ((wanted,) if wanted else COLUMNS) if name in columns), None)


def gold_of(columns: Mapping[str, Any], wanted: str | None, name: str) -> Sequence[Any]:
    """Raises ConfigError where there is no such column."""
    found = gold_column(columns, wanted)
    if found is None:
        there = ", ".join(sorted(key for key, value in columns.items() if isinstance(value, list))) or "none"
        looked = f"column {wanted}" if wanted else "column " + ", ".join(COLUMNS[:-1]) + f" or {COLUMNS[-1]}"
        raise ConfigError(f"reward function {name!r} finds no right answers: the data has no {looked} (it has {there})",
                          hint='name it in Python, e.g. numeric(column="target"), or rename the column')  # fmt: skip
    values: Sequence[Any] = columns[found]
    return values


def as_text(gold: Any) -> str:
    """A right answer as a completion would say it."""
    if isinstance(gold, str):
        return gold
    if isinstance(gold, list) and gold and all(isinstance(one, Mapping) and "content" in one for one in gold):
        return text_of(gold)
    return json.dumps(gold, ensure_ascii=False, default=str)


def marked_answer(text: str) -> str | None:
    """What stands in the last mark; None where nothing is marked."""
    text = text[-LONGEST:]
    last = None
    for last in MARK.finditer(text):  # noqa: B007 - the last one
        pass
    if last is None:
        return None
    rest = text[last.end() :]
    if last.group() == "####":
        return rest.lstrip().partition("\n")[0].strip()
    if last.group() == "<answer>":
        return rest.partition("</answer>")[0].strip()
    return _braced(rest).strip()


def _braced(text: str) -> str:
    """Up to the brace that closes the one in front."""
    depth = 1
    for place, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
            if depth == 0:
                return text[:place]
    return text
