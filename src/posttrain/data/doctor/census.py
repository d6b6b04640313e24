"""Lengths: in characters, which are there anyway, and with a tokenizer in tokens, as training would make them.

Of pairs each answer counts as a row of its own, as it does in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.codes import REASONS, Row
from posttrain.data.columns import rename_columns
from posttrain.data.doctor.content import RowReader
from posttrain.data.doctor.findings import Finding, finding, rows, share
from posttrain.data.pipeline import Pipeline
from posttrain.data.ratings import ratings_of
from posttrain.data.report import Cases, DataReport, number
from posttrain.data.settings import DataSettings
from posttrain.data.sources import Rows, read_rows
from posttrain.data.tokens import is_tokenized
from posttrain.errors import DataError, UserError
from posttrain.types import Content, Example, Origin, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Lengths:
    """Of all usable rows. `cut` are longer than `limit`, `lost` are trained tokens that go with that, `emptied` rows of
    which nothing is left to train, so that training leaves them out; `unusable` rows are right in themselves, but not
    with this model."""

    unit: str
    values: np.ndarray
    limit: int | None = None
    supervised: int = 0
    lost: int = 0
    cut: Cases | None = None
    emptied: Cases = field(default_factory=Cases)
    unusable: int = 0
    findings: tuple[Finding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        if not len(self.values):
            return {"unit": self.unit, "rows": 0}
        low, median, high, most = (int(np.percentile(self.values, at)) for at in (0, 50, 95, 100))
        about: dict[str, Any] = {"unit": self.unit, "rows": len(self.values), "shortest": low, "median": median}
        about |= {"percentile_95": high, "longest": most, "total": int(self.values.sum())}
        if self.unit == "tokens":
            about |= {"limit": self.limit, "supervised": self.supervised, "cut": self.cut.count if self.cut else 0,
                      "supervised_lost": self.lost, "emptied": self.emptied.count}  # fmt: skip
        return about

    def in_words(self) -> str:
        about = self.to_dict()
        if not about["rows"]:
            return "no usable row"
        text = f"median {number(about['median'])} {self.unit}, 95 % up to {number(about['percentile_95'])}, "
        return text + f"longest {number(about['longest'])}"


def in_tokens(
    sources: list[Any], tokenizer: PreTrainedTokenizerBase, settings: DataSettings, whole_answers: bool = False
) -> Lengths:
    """A second pass over the rows, through what training does with them. Of sources that break off, the part before.
    `whole_answers`: they are pairs or ratings."""
    counting = _Counting(settings)
    report = _RowReport("data")
    pipeline = Pipeline(tokenizer, as_trained(settings, "skip"), report, whole_answers, is_read=True)
    problems: list[Finding] = []
    try:
        for source in sources:
            for tokenized in pipeline.run_rows(trainable_rows(source, RowReader(settings))):
                counting.add(tokenized)
    except UserError as error:  # no chat template, say: it is the model's fault and not the rows'
        sentence = f"tokens were not counted: {error.message}"
        problems = [Finding(error.code, "error", 0, (), sentence, error.hint or "try another model")]
    found = (*problems, *_unusable(report, settings.on_bad_row), *_remarks(report))
    return counting.lengths(len(report.bad), found)


def as_trained(settings: DataSettings, on_bad_row: str) -> DataSettings:
    """For rows whose columns were renamed and whose format was told already."""
    return DataSettings(assistant_only=None, on_bad_row=on_bad_row, chat_template=settings.chat_template)


class _RowReport(DataReport):
    """A pair is two sequences and may fail twice, but is one row."""

    def __init__(self, source: str):
        super().__init__(source)
        self.bad: set[tuple[str, int]] = set()

    def drop(self, code: str, origin: Origin, why: str | None = None) -> None:
        if (origin.source, origin.row) not in self.bad:
            self.bad.add((origin.source, origin.row))
            super().drop(code, origin, why)


class _Counting:
    """Tokens of whole rows, and what a limit would leave of them."""

    def __init__(self, settings: DataSettings):
        self.limit, self.mode = settings.max_length, settings.truncation_mode
        self.values: list[int] = []
        self.emptied_rows: set[Origin] = set()
        self.supervised = self.lost = 0
        self.cut, self.emptied = Cases(), Cases()

    def add(self, tokenized: Tokenized) -> None:
        self.values.append(tokenized.num_tokens)
        self.supervised += tokenized.num_supervised
        supervised, limit = tokenized.branches[0].supervised, self.limit
        if limit is None or len(supervised) <= limit:
            return
        kept = supervised[:limit] if self.mode == "keep_start" else supervised[-limit:]
        left = int(kept[1:].sum())  # nothing comes before the first that could predict it
        self.lost += tokenized.num_supervised - left
        if left == 0 and tokenized.origin not in self.emptied_rows:  # once for both answers of a pair
            self.emptied_rows.add(tokenized.origin)
            self.emptied.add(tokenized.origin)
        self.cut.add(tokenized.origin)  # once for each answer of a pair

    def lengths(self, unusable: int, found: tuple[Finding, ...]) -> Lengths:
        values = np.array(self.values, dtype=np.int64)
        limited = (self.limit, self.supervised, self.lost, self.cut, self.emptied)
        return Lengths("tokens", values, *limited, unusable, found)


def _unusable(report: DataReport, on_bad_row: str) -> Iterator[Finding]:
    """Rows that are right in themselves, and that this model's template or tokenizer cannot use."""
    severity = "warning" if on_bad_row == "skip" else "error"
    codes = {reason: code for code, reason in REASONS.items()}
    hint = (report.first_error.hint if report.first_error else None) or "try --chat-template, or another model"
    for reason, cases in report.skipped.items():
        code = codes.get(reason, reason)
        shown = [line for why_code, why in report.left_out if why_code == code for line in why.splitlines()][:2]
        sentence = f"{rows(cases.count)} cannot be used with this model: {reason}"
        yield Finding(code, severity, cases.count, tuple(map(str, cases.first)), sentence, hint, {"shown": shown})


REMARKED = {
    "endless": "W-DATA-0121",
    "boundary_moved": "W-DATA-0122",
    "given_otherwise": "W-DATA-0123",
    "thought_lost": "W-DATA-0124",
    "thought_after_none": "W-DATA-0160",
    "tools_left_out": "W-DATA-0125",
    "special_in_text": "W-DATA-0126",
    "without_bos": "W-DATA-0127",
    "arguments_quoted": "W-DATA-0130",
    "stops_in_answers": "W-DATA-0150",
    "marks_in_text": "W-DATA-0151",
    "flags_cut": "W-DATA-0154",
    "unknown_arguments": "W-DATA-0159",
}


def _remarks(report: DataReport) -> Iterator[Finding]:
    """What training would remark on before it begins."""
    for name, code in REMARKED.items():
        cases: Cases = getattr(report, name)
        if cases.count:
            sequences = f"{number(cases.count)} sequence{'' if cases.count == 1 else 's'}"
            yield finding(code, cases.count, cases.first, f"{sequences}: these {report.remark(name)}")
    if report.written_as_text:
        tokens = ", ".join(report.written_as_text)
        sentence = f"the chat template writes {tokens}, which the tokenizer has not as tokens: they stay text"
        yield finding("W-DATA-0128", max(report.written_as_text.values()), [], sentence)


def judge_lengths(lengths: Lengths, usable: int) -> Iterator[Finding]:
    """`usable` rows there are without a limit."""
    yield from lengths.findings
    if lengths.emptied.count:
        yield _emptied(lengths, usable)
    if lengths.cut is None or not lengths.cut.count:
        return
    total, lost = len(lengths.values), share(lengths.lost, lengths.supervised)
    sentence = (
        f"{number(lengths.cut.count)} of {number(total)} sequences ({share(lengths.cut.count, total)}) are longer than "
        f"{number(lengths.limit or 0)} tokens: {number(lengths.lost)} trained tokens ({lost}) are cut off"
    )
    if lengths.emptied.count:
        sentence += f", with them the whole answer of {number(lengths.emptied.count)}"
    longest = int(lengths.values.max())
    fix = f"--max-length {longest} would cut nothing; or shorten the rows, or split them"
    first = list(dict.fromkeys(map(str, lengths.cut.first)))
    yield finding("W-DATA-0107", lengths.cut.count, first, sentence, fix)


def _emptied(lengths: Lengths, usable: int) -> Finding:
    """Rows that training leaves out under any policy, and says so; where none is left it refuses."""
    count, is_all = lengths.emptied.count, lengths.emptied.count == usable
    sentence = f"{rows(count, 'have')} no token to train within {number(lengths.limit or 0)} tokens, and are left out"
    fix = f"--max-length {int(lengths.values.max())} would leave none out; or shorten the prompts"
    where = tuple(map(str, lengths.emptied.first))
    return Finding("E-DATA-0030", "error" if is_all else "warning", count, where,
                   sentence + (": nothing is left" if is_all else ""), fix)  # fmt: skip


def trainable_rows(source: Any, reader: RowReader) -> Rows:
    """The usable rows of a source in the shape that supervised training reads."""
    try:
        for origin, row in read_rows(source, reject=_ignore):
            try:
                yield from ((origin, part) for part in trained_rows(row, reader, origin))
            except DataError:
                continue  # counted in the first pass
    except (DataError, RecursionError):
        return  # said in the first pass


def trained_rows(row: Row, reader: RowReader, origin: Origin) -> list[Row]:
    """`row` as supervised training reads it: a row for each answer. Raises its DataError."""
    named = rename_columns(row, reader.names, origin)
    if is_tokenized(named):
        reader.read(row, origin)
        return [named]
    example, said = reader.trainable(row, origin)
    if said.method == "rated":
        (example,) = ratings_of(example)
    return [_row(example, completion) for completion in example.completions]


def _row(example: Example, completion: Content) -> Row:
    row: Row = {}
    if example.tools:
        row["tools"] = example.tools
    if example.template_kwargs:
        row["chat_template_kwargs"] = dict(example.template_kwargs)
    if example.prompt is None:
        return {**row, ("text" if isinstance(completion, str) else "messages"): completion}
    return {**row, "prompt": example.prompt, "completion": completion}


def _ignore(error: DataError, origin: Origin) -> None:
    """Such rows were counted in the first pass."""
