"""Numeric answers: the number that a completion gives is the row's, however it is written.

The number is read from what is marked as the answer (`####`, `\\boxed{}`, `<answer>`), there the first one after the
last `=`; where nothing is marked it is the last of the completion. One number is compared, so listing many wins
nothing. Read are thousands separators (1,234 and 1'234 and thin blanks), decimals, fractions (3/4, \\frac{3}{4},
\\frac34, 1 1/2), percent (5% is 5, and 0.05), money and units around it, minus signs, and powers of ten (1.5e3,
1.5 × 10^3). Numbers are compared exactly, as fractions.

Left out: decimal commas, number words, roots and functions (`math_answer` reads them), and numbers of more than 300
digits, which are no one's answer.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from posttrain.rewards.answers import LONGEST, against_gold, marked_answer
from posttrain.rewards.functions import RewardFunction

DIGITS = 300
SEPARATORS = r"(?:,|\{,\}|\\,|'|\u2019|\u00a0|\u202f|\u2009)"
PLAIN = rf"(?:[0-9]{{1,3}}(?:{SEPARATORS}[0-9]{{3}})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+"
POWER = (
    r"(?:[eE](?P<e>[+-]?[0-9]+)(?![A-Za-z])"
    r"|\s?(?:×|x|\*|\\times|\\cdot)\s?10\s?(?:\^|\*\*)\s?\{?(?P<p>[+-]?[0-9]{1,4})\}?)"
)
FRACTION = (
    rf"\s?(?:\{{(?P<fa>-?[0-9]{{1,{DIGITS}}})\}}|(?P<fc>[0-9]))"
    rf"\s?(?:\{{(?P<fb>[0-9]{{1,{DIGITS}}})\}}|(?P<fd>[0-9])(?![0-9]))"
)
"""What follows `\\frac`: each part in braces or, as LaTeX reads it without them, a single digit."""
NUMBER = re.compile(
    rf"(?<![\w^.])(?<!\^\{{)(?P<sign>-)?(?P<money>\\?[$€£¥]\s?)?(?P<sign2>-)?(?:"
    rf"\\[dtc]?frac{FRACTION}"
    rf"|(?P<whole>[0-9]{{1,{DIGITS}}})\s(?P<ma>[0-9]{{1,9}})\s?/\s?(?P<mb>[0-9]{{1,9}})(?![0-9])"
    r"|10\s?(?:\^|\*\*)\s?(?:\{(?P<ta>-?[0-9]{1,4})\}|(?P<tb>-?[0-9]{1,4}))(?![0-9])"
    rf"|(?P<number>{PLAIN})(?:{POWER}|\s?/\s?(?P<over>[0-9]{{1,{DIGITS}}}(?:\.[0-9]{{1,{DIGITS}}})?))?"
    r")(?P<percent>\s?\\?%)?"
)
NO_NUMBER = re.compile(r"\\(?:sqrt|pi|log|ln|sin|cos|tan|exp|infty)|[√π∞]")
MINUS = str.maketrans({"−": "-", "﹣": "-", "－": "-"})


@dataclass(frozen=True)
class Number:
    value: Fraction
    is_percent: bool = False

    def is_same(self, other: Number, tolerance: float = 0.0) -> bool:
        """5% is 5% and, where the other has no percent sign, 5 or 0.05."""
        values = (self.value,)
        if self.is_percent != other.is_percent:
            both = [one / 100 if one_is else one for one, one_is in
                    ((self.value, self.is_percent), (other.value, other.is_percent))]  # fmt: skip
            if _near(both[0], both[1], tolerance):
                return True
        return any(_near(value, other.value, tolerance) for value in values)


def _near(one: Fraction, other: Fraction, tolerance: float) -> bool:
    return one == other or (tolerance > 0 and abs(one - other) <= Fraction(tolerance) * abs(other))


def find_number(text: str) -> Number | None:
    """The number that `text` gives as its answer; None where it gives none."""
    marked = marked_answer(text)
    if marked is not None:
        return None if NO_NUMBER.search(marked) else _first(marked.rpartition("=")[2])
    last = None
    for last in NUMBER.finditer(text[-LONGEST:].translate(MINUS)):  # noqa: B007 - the last one
        pass
    return None if last is None else _read(last)


def _first(text: str) -> Number | None:
    text = re.sub(r"\A\s*-\s+", "-", text[:LONGEST].translate(MINUS))
    found = NUMBER.search(text)
    return None if found is None else _read(found)


def _read(found: re.Match[str]) -> Number | None:
    part = found.groupdict()
    try:
        value = _value(part)
    except (ValueError, ZeroDivisionError):
        return None
    if value is None:
        return None
    return Number(-value if part["sign"] or part["sign2"] else value, part["percent"] is not None)


def _value(part: dict[str, str | None]) -> Fraction | None:
    if above := part["fa"] or part["fc"]:
        return Fraction(int(above), int(part["fb"] or part["fd"] or ""))
    if part["whole"] is not None:
        return int(part["whole"]) + Fraction(int(part["ma"] or ""), int(part["mb"] or ""))
    if ten := part["ta"] or part["tb"]:
        return Fraction(10) ** int(ten) if abs(int(ten)) <= DIGITS else None
    written = re.sub(SEPARATORS, "", part["number"] or "")
    if len(written) > DIGITS:
        return None
    value = Fraction(written)
    if power := part["e"] or part["p"]:
        if len(power) > 9 or abs(int(power)) > DIGITS:
            return None
        value *= Fraction(10) ** int(power)
    return value / Fraction(part["over"]) if part["over"] else value


def gold_number(gold: Any) -> Number | None:
    """A right answer of any kind as a number; None where it is none."""
    if isinstance(gold, bool):
        return None
    if isinstance(gold, int | float):
        return Number(Fraction(str(gold))) if math.isfinite(gold) else None
    return find_number(gold) if isinstance(gold, str) else None


def numeric(column: str | None = None, tolerance: float = 0.0) -> RewardFunction:
    """1.0 where the completion's number is the row's, 0.0 where it is another or there is none, None where the row has
    no number. `column` has the right answers (default: ground_truth, answer or solution); `tolerance` is relative."""

    def judge(text: str, gold: Any) -> float | None:
        right = gold_number(gold)
        if right is None:
            return None
        said = find_number(text)
        return float(said is not None and said.is_same(right, tolerance))

    return against_gold("numeric_answer", judge, column)


numeric_answer = numeric()
