"""A finding: what, how often, where first, in a sentence, and the way out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from posttrain.data.doctor.kinds import KINDS
from posttrain.data.report import number


@dataclass(frozen=True)
class Finding:
    code: str
    severity: str
    count: int
    first: tuple[str, ...]
    sentence: str
    fix: str
    details: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "first": list(self.first)}


def finding(
    code: str,
    count: int,
    first: list[Any],
    sentence: str,
    fix: str | None = None,
    details: dict[str, Any] | None = None,
) -> Finding:
    """One of the table's. `sentence` speaks of the rows and does not name them."""
    kind = KINDS[code]
    where = tuple(str(origin) for origin in first)
    return Finding(code, kind.severity, count, where, sentence, fix or kind.fix, details or {})


SINGULAR = {"are": "is", "have": "has"}


def rows(count: int, verb: str = "") -> str:
    """`1 row`, `12 rows`; with a verb `1 row holds`, `12 rows hold`."""
    if count == 1:
        verb = SINGULAR.get(verb, f"{verb}s" if verb else "")
    return f"{number(count)} row{'' if count == 1 else 's'} {verb}".strip()


def share(part: float, whole: float) -> str:
    """`12 %`, and one digit more for what is small."""
    percent = 100 * part / whole if whole else 0.0
    return f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"
