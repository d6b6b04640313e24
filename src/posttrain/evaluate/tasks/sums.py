"""A task for reinforcement learning: a short sum, to be answered in tags and with nothing else.

    "4 + 9"  ->  "<answer>13</answer>"

Two examples in the prompt show how, and a small instruct model follows them one time in five: often enough for groups
of answers to differ. A program knows what is right, so nobody has to write answers down. Held-out sums are of numbers
that are added in no training prompt in that order.
"""

from __future__ import annotations

import random
from typing import Any

from posttrain.types import Content

Row = dict[str, Any]

SHOWN = ((3, 4), (6, 2))
NUMBERS = range(1, 10)


def split(held_out: int = 21, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Prompts to train on, with their `answer`, and others to test on: 81 in all."""
    pairs = [(a, b) for a in NUMBERS for b in NUMBERS]
    random.Random(seed).shuffle(pairs)
    return [row(*pair) for pair in pairs[held_out:]], [row(*pair) for pair in pairs[:held_out]]


def row(a: int, b: int) -> Row:
    shown = [message for x, y in SHOWN for message in (_said("user", f"{x} + {y}"), _said("assistant", right(x, y)))]
    return {"prompt": [*shown, _said("user", f"{a} + {b}")], "answer": right(a, b)}


def right(a: int, b: int) -> str:
    return f"<answer>{a + b}</answer>"


def _said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def correct(completions: list[Content], answer: list[str], **_: Any) -> list[float]:
    """1 for exactly the answer, 0 for anything else."""
    return [float(_text(one).strip() == wanted) for one, wanted in zip(completions, answer, strict=True)]


def _text(completion: Content) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
