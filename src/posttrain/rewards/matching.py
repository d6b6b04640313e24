"""Exact match: a completion says just what the row's answer says, blanks around it aside.

An answer that is no text (a number, an object) is compared as JSON, in which 12, 12.0 and "12" differ.
"""

from __future__ import annotations

import json
from typing import Any

from posttrain.rewards.answers import against_gold, as_text
from posttrain.rewards.functions import RewardFunction


def exact(column: str | None = None, tag: str | None = None, ignore_case: bool = False) -> RewardFunction:
    """1.0 or 0.0. `column` has the right answers (default: ground_truth, answer or solution); with `tag` only what
    stands in the last `<tag>...</tag>` is compared; blanks within a line are one blank."""

    def judge(text: str, gold: Any) -> float:
        if tag is not None:
            before, found, _ = text.rpartition(f"</{tag}>")
            _, opened, text = before.rpartition(f"<{tag}>")
            if not (found and opened):
                return 0.0
        if not isinstance(gold, str) and not (isinstance(gold, list) and as_text(gold) != _json(gold)):
            return float(_canonical(text) == _json(gold))
        said, right = (" ".join(one.split()) for one in (text, as_text(gold)))
        return float(said.casefold() == right.casefold() if ignore_case else said == right)

    return against_gold("exact_match", judge, column)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)


def _canonical(text: str) -> str | None:
    try:
        return _json(json.loads(text))
    except (ValueError, RecursionError):
        return None


exact_match = exact()
