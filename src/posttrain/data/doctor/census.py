"""Lengths: in characters, which are there anyway, and with a tokenizer in tokens, as training would make them.

Of pairs each answer counts as a row of its own, as it does in training.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.codes import REASONS, Row
from posttrain.data.doctor.content import RowReader
from posttrain.data.doctor.findings import Finding, finding, rows, share
from posttrain.data.pipeline import Pipeline
from posttrain.data.report import Cases, DataReport, number
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows, source_name
from posttrain.data.tokens import is_tokenized
from posttrain.errors import DataError, UserError
from posttrain.types import Content, Example, Origin, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


ORIGIN = "_origin"


@dataclass(frozen=True)
class Lengths:
    """Of all usable rows. `cut` are longer than `limit`, `lost` are trained tokens that go with that, `emptied` rows
    those of which nothing is left to train."""

    unit: str
    values: np.ndarray
    limit: int | None = None
    supervised: int = 0
    lost: int = 0
    cut: Cases | None = None
    emptied: int = 0
    unusable: tuple[Finding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        if not len(self.values):
            return {"unit": self.unit, "rows": 0}
        low, median, high, most = (int(np.percentile(self.values, at)) for at in (0, 50, 95, 100))
        about: dict[str, Any] = {"unit": self.unit, "rows": len(self.values), "shortest": low, "median": median}
        about |= {"percentile_95": high, "longest": most, "total": int(self.values.sum())}
        if self.unit == "tokens":
            about |= {"limit": self.limit, "supervised": self.supervised, "cut": self.cut.count if self.cut else 0,
                      "supervised_lost": self.lost, "emptied": self.emptied}  # fmt: skip
        return about

    def in_words(self) -> str:
        about = self.to_dict()
        if not about["rows"]:
            return "no usable row"
        text = f"median {number(about['median'])} {self.unit}, 95 % up to {number(about['percentile_95'])}, "
        return text + f"longest {number(about['longest'])}"


def in_tokens(sources: list[Any], tokenizer: PreTrainedTokenizerBase, settings: DataSettings) -> Lengths:
    """A second pass over the rows, through what training does with them."""
    counting = _Counting(settings)
    report = DataReport("data")
    pipeline = Pipeline(tokenizer, _as_trained(settings), report)
    problems: list[Finding] = []
    try:
        for source in sources:
            for tokenized in pipeline.run(_Trainable(source, RowReader(settings)), source_name(source)):
                counting.add(tokenized)
    except UserError as error:  # no chat template, say: it is the model's fault and not the rows'
        sentence = f"tokens were not counted: {error.message}"
        problems = [Finding(error.code, "error", 0, (), sentence, error.hint or "try another model")]
    return counting.lengths((*problems, *_unusable(report)))


def _as_trained(settings: DataSettings) -> DataSettings:
    """`_Trainable` has renamed columns and told formats already; where a row came from travels in a column."""
    return DataSettings(assistant_only=None, on_bad_row="skip", chat_template=settings.chat_template, columns=(ORIGIN,))


class _Counting:
    """Tokens of whole rows, and what a limit would leave of them."""

    def __init__(self, settings: DataSettings):
        self.limit, self.mode = settings.max_length, settings.truncation_mode
        self.values: list[int] = []
        self.supervised = self.lost = self.emptied = 0
        self.cut = Cases()

    def add(self, tokenized: Tokenized) -> None:
        self.values.append(tokenized.num_tokens)
        self.supervised += tokenized.num_supervised
        supervised, limit = tokenized.branches[0].supervised, self.limit
        if limit is None or len(supervised) <= limit:
            return
        kept = supervised[:limit] if self.mode == "keep_start" else supervised[-limit:]
        left = int(kept[1:].sum())  # nothing comes before the first that could predict it
        self.lost += tokenized.num_supervised - left
        self.emptied += left == 0
        self.cut.add(tokenized.columns.get(ORIGIN, tokenized.origin))  # once for each answer of a pair

    def lengths(self, unusable: tuple[Finding, ...]) -> Lengths:
        values = np.array(self.values, dtype=np.int64)
        return Lengths("tokens", values, self.limit, self.supervised, self.lost, self.cut, self.emptied, unusable)


def _unusable(report: DataReport) -> Iterator[Finding]:
    """Rows that are right in themselves, and that this model's template or tokenizer cannot use."""
    codes = {reason: code for code, reason in REASONS.items()}
    hint = (report.first_error.hint if report.first_error else None) or "try --chat-template, or another model"
    for reason, cases in report.skipped.items():
        sentence = f"{rows(cases.count)} cannot be used with this model: {reason}"
        yield Finding(codes.get(reason, reason), "error", cases.count, (), sentence, hint)


def judge_lengths(lengths: Lengths) -> Iterator[Finding]:
    yield from lengths.unusable
    if lengths.cut is None or not lengths.cut.count:
        return
    total, lost = len(lengths.values), share(lengths.lost, lengths.supervised)
    sentence = (
        f"{number(lengths.cut.count)} of {number(total)} sequences ({share(lengths.cut.count, total)}) are longer than "
        f"{number(lengths.limit or 0)} tokens: {number(lengths.lost)} trained tokens ({lost}) are cut off"
    )
    if lengths.emptied:
        sentence += f", with them the whole answer of {number(lengths.emptied)}"
    longest = int(lengths.values.max())
    fix = f"--max-length {longest} would cut nothing; or shorten the rows, or split them"
    first = list(dict.fromkeys(map(str, lengths.cut.first)))
    yield finding("W-DATA-0107", lengths.cut.count, first, sentence, fix)


class _Trainable:
    """The usable rows of a source in the shape that supervised training reads."""

    def __init__(self, source: Any, reader: RowReader):
        self.source, self.reader = source, reader

    def __iter__(self) -> Iterator[Row]:
        for origin, row in read_rows(self.source, reject=_ignore):
            if is_tokenized(row):
                yield {**row, ORIGIN: origin}
                continue
            try:
                example = self.reader.example(row, origin)
            except DataError:
                continue  # counted in the first pass
            for completion in example.completions:
                yield _row(example, completion, origin)


def _row(example: Example, completion: Content, origin: Origin) -> Row:
    row: Row = {ORIGIN: origin}
    if example.tools:
        row["tools"] = example.tools
    if example.template_kwargs:
        row["chat_template_kwargs"] = dict(example.template_kwargs)
    if example.prompt is None:
        return {**row, ("text" if isinstance(completion, str) else "messages"): completion}
    return {**row, "prompt": example.prompt, "completion": completion}


def _ignore(error: DataError, origin: Origin) -> None:
    """Such rows were counted in the first pass."""
