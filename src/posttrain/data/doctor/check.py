"""`check`: files (or anything else that rows are read from) in, a report of what they are and what is wrong out."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.data.codes import REASONS
from posttrain.data.doctor import compare, near, ranges
from posttrain.data.doctor.census import Lengths, in_tokens, judge_lengths
from posttrain.data.doctor.findings import Finding, rows
from posttrain.data.doctor.judge import judge, unread
from posttrain.data.doctor.settings import DoctorSettings
from posttrain.data.doctor.tally import MASK, Counting, Tally
from posttrain.data.settings import DataSettings
from posttrain.data.sources import files_of, read_rows, source_name
from posttrain.errors import DataError
from posttrain.types import Origin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NOT_THERE = "E-DATA-0001"
ORDER = {"error": 0, "warning": 1, "info": 2}


@dataclass(frozen=True)
class CheckReport:
    """`bad_rows` are the first rows that cannot be used, in words; the findings count all of them. `unused` are columns
    that nothing is made of, and how many rows have them."""

    sources: list[str]
    rows: int
    usable: int
    formats: dict[str, int]
    unused: dict[str, int]
    languages: dict[str, int]
    labels: dict[str, int]
    lengths: Lengths
    findings: list[Finding]
    bad_rows: list[dict[str, str | None]] = field(default_factory=list)
    validation: dict[str, Any] | None = None
    seconds: float = 0.0

    @property
    def is_unread(self) -> bool:
        """Whether the rest of a file to be trained on could not be read, so that nothing is known of it."""
        return any(finding.details.get("unread") for finding in self.findings)

    @property
    def errors(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def warnings(self) -> int:
        return sum(finding.severity == "warning" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        plain = {**vars(self), "lengths": self.lengths.to_dict()}
        plain["findings"] = [finding.to_dict() for finding in self.findings]
        return {"schema_version": 1, "errors": self.errors, "warnings": self.warnings, **plain}


def check(
    sources: Any,
    *,
    val: Any = None,
    data: DataSettings | None = None,
    settings: DoctorSettings | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_errors: int = 50,
    processes: int = 1,
    progress: bool = False,
) -> CheckReport:
    """Look at `sources` (a path, or a list of paths; or rows) as one data set, and at `val` as what it is validated on.

    With a tokenizer lengths are counted in tokens and held against `data.max_length`. `processes` above 1 start new
    interpreters, so a script that asks for them needs `if __name__ == "__main__":`.
    """
    started = time.monotonic()
    data, settings = data or DataSettings(), settings or DoctorSettings()
    several = list(sources) if _is_list_of_paths(sources) else [sources]
    if tokenizer is not None:  # which makes it two passes
        several = [list(source) if isinstance(source, Iterator) else source for source in several]
    tally = Tally()
    for source in several:
        for part in _tallies(source, data, settings, max_errors, processes, progress):
            tally.add(part, settings, max_errors)
    lengths = Lengths("characters", tally.array("length"))
    if tokenizer is not None and tally.used:
        lengths = in_tokens(several, tokenizer, data, whole_answers="sft" not in tally.methods)
    findings = list(judge(tally, settings, data.on_bad_row))
    findings += [*compare.within(tally, settings), *judge_lengths(lengths, tally.used - lengths.unusable)]
    validation, held_out = None, None
    if val is not None:
        held_out = Tally()
        for part in _tallies(val, data, settings, max_errors, processes, progress):
            held_out.add(part, settings, max_errors)
        findings += compare.across(tally, held_out)
        validation = {"source": source_name(val, "validation"), "rows": held_out.rows, "usable": held_out.used}
        validation["unread"] = bool(held_out.unread)
        findings += _validation_faults(held_out, data.on_bad_row)
    findings += near.near(tally, held_out, settings)
    labels = tally.array("label")
    return CheckReport(
        sources=[source_name(source) for source in several],
        rows=tally.rows,
        usable=tally.used - lengths.unusable - lengths.emptied.count,
        formats=dict(tally.formats.most_common()),
        unused=dict(tally.unused.most_common()),
        languages={name: c.count for name, c in sorted(tally.languages.items(), key=lambda item: -item[1].count)},
        labels={"good": int((labels == 1).sum()), "bad": int((labels == 0).sum())} if (labels >= 0).any() else {},
        lengths=lengths,
        findings=sorted(findings, key=lambda found: (ORDER[found.severity], found.code)),
        bad_rows=[vars(bad) for bad in tally.bad_rows],
        validation=validation,
        seconds=time.monotonic() - started,
    )


def _is_list_of_paths(sources: Any) -> bool:
    return isinstance(sources, list | tuple) and bool(sources) and all(isinstance(s, str | Path) for s in sources)


def _validation_faults(tally: Tally, on_bad_row: str) -> Iterator[Finding]:
    severity = "warning" if on_bad_row == "skip" else "error"
    yield from unread(tally, "unread_validation")
    for code, cases in tally.bad.items():
        sentence = f"{rows(cases.count)} of the validation data cannot be used: {REASONS.get(code, 'unusable')}"
        fix = "posttrain data check VALIDATION says more"
        yield Finding(code, severity, cases.count, tuple(map(str, cases.first)), sentence, fix)


def _tallies(
    given: Any, data: DataSettings, settings: DoctorSettings, max_errors: int, processes: int, progress: bool
) -> Iterator[Tally]:
    """A tally of each file, or of each part of a large one. What is wrong with one file of several keeps none of the
    others from being looked at."""
    files = files_of(given)
    for source in files:
        yield from _tallies_of(source, data, settings, max_errors, processes, progress, alone=len(files) == 1)


def _tallies_of(
    source: Any,
    data: DataSettings,
    settings: DoctorSettings,
    max_errors: int,
    processes: int,
    progress: bool,
    alone: bool,
) -> Iterator[Tally]:
    path = Path(source) if isinstance(source, str | Path) else None
    if path is not None and processes > 1 and ranges.can_be_cut(path, settings):
        parts, lines = ranges.cut(path)
        limit = MASK if lines <= settings.near_rows else int(MASK * min(1.0, 1.1 * settings.near_rows / lines))
        orders = ranges.Orders(data, settings, max_errors, limit)
        bar = _bar(progress, path.name, path.stat().st_size, "B")
        for part, tally in zip(parts, ranges.tallies(parts, orders, processes), strict=True):
            bar.update(part.stop - part.start)
            yield tally
        bar.close()
        return
    yield _tally(source, data, settings, max_errors, progress, alone)


def _tally(
    source: Any, data: DataSettings, settings: DoctorSettings, max_errors: int, progress: bool, alone: bool
) -> Tally:
    counting = Counting(data, settings, max_errors)
    name = source_name(source)
    bar = _bar(progress, Path(name).name, None, " rows")
    try:
        for origin, row in read_rows(source, reject=counting.reject):
            counting.row(row, origin)
            bar.update()
    except (DataError, RecursionError) as error:
        if alone and isinstance(error, DataError) and error.code == NOT_THERE and not counting.tally.rows:
            raise
        counting.stopped(error, Origin(name, counting.tally.rows))
    finally:
        bar.close()
    return counting.tally


def _bar(shown: bool, name: str, total: int | None, unit: str) -> Any:
    from tqdm import tqdm

    return tqdm(desc=name, total=total, unit=unit, unit_scale=True, delay=1, leave=False, file=sys.stderr,
                disable=None if shown else True)  # fmt: skip
