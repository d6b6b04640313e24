"""One row after another: read, parsed, rendered, tokenised, checked, limited in length; the report counts along.

Every row is accounted for: it comes out, or is in the report with its reason. With `on_bad_row="error"` it raises.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

from posttrain.data import margins
from posttrain.data.chat import Chat
from posttrain.data.codes import REASONS, SKIP, UNFORESEEN, Row, bad_row, broken_promise, excerpt, kind
from posttrain.data.columns import read_columns, rename_columns
from posttrain.data.conversation import is_answered, unanswered
from posttrain.data.encode import Encoded, Encoder
from posttrain.data.formats import all_formats, choose, detect, formats_of, require
from posttrain.data.formats.rated import is_unrated
from posttrain.data.mixing import Mixture, check_used
from posttrain.data.oddities import oddities
from posttrain.data.pairs import join, limit_pair, split
from posttrain.data.passed_over import of_tokens, passed_over
from posttrain.data.places import half_a_character
from posttrain.data.ratings import ratings_of
from posttrain.data.remarks import remark_on_bos, remark_on_oddities, remark_on_plain, remark_on_rest, remark_on_text
from posttrain.data.render import Rendered, Supervision, render
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.sources import Rows, read_rows
from posttrain.data.templates import is_a_program, missing_tokens, resolve_template
from posttrain.data.tokens import COLUMNS, from_tokens, is_tokenized, not_heeded
from posttrain.errors import ConfigError, DataError, UserError
from posttrain.types import Branch, Example, Origin, Tokenized

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000
Item = tuple[tuple[Rendered, ...] | Tokenized, str]
"""What is to be tokenised together, or is already; and its format, in words."""


class Pipeline:
    """Rows in, tokens out, the report on the side. Rows go through in chunks, for the tokenizer is fast on many texts
    at once. `whole_answers`: rows are answers of pairs or ratings, one by one, for whoever looks at those.
    `is_read`: their columns were read already (columns.py)."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: DataSettings,
        report: DataReport,
        whole_answers: bool = False,
        is_read: bool = False,
    ):
        self.is_read = is_read
        self.tokenizer, self.settings, self.report = tokenizer, settings, report
        whole_answers = whole_answers or settings.method != "sft"
        self.supervision = Supervision(settings.completion_only, settings.assistant_only, whole_answers)
        self.encoder = Encoder(tokenizer, settings.columns)
        self.formats = formats_of(settings.method, settings.text_field)
        self.format = choose(settings.format, self.formats)
        self.all_formats = all_formats(settings.text_field)
        self.chat: Chat | None = None
        self.missing: tuple[str, ...] = ()
        self.bad: set[Origin] | None = None
        self.lost: dict[str, Counter[str]] = {}
        if is_a_program(settings.chat_template):
            self.chat = self._open_chat()

    def run(self, dataset: Any, name: str) -> Iterator[Tokenized]:
        self.bad = set() if isinstance(dataset, Mixture) else None  # whose parts come again and again
        used_of: set[str] = set()
        for tokenized in self.run_rows(_with_progress(read_rows(dataset, name, self._reject), dataset, name)):
            used_of.add(tokenized.origin.source)
            yield tokenized
        if isinstance(dataset, Mixture):
            check_used(dataset, used_of, self.lost)

    def run_rows(self, rows: Rows) -> Iterator[Tokenized]:
        while chunk := list(islice(rows, CHUNK)):
            self.report.rows += len(chunk)
            for tokenized in self._chunk(chunk):
                self.report.used += 1
                self.report.tokens += tokenized.num_tokens
                self.report.supervised += tokenized.num_supervised
                yield tokenized

    def one(self, row: Row, origin: Origin) -> Tokenized:
        """The tokens of one row. Raises its DataError."""
        (tokenized,) = self._chunk([(origin, row)])
        return tokenized

    def _chunk(self, chunk: list[tuple[Origin, Row]]) -> list[Tokenized]:
        ready: list[Item] = []
        second: list[Item] = []  # where pairs are rated, the rejected answers come behind all chosen ones, as in TRL
        for origin, row in chunk:
            try:
                first, *others = self._read_safely(row, origin)
            except DataError as error:
                self._skip(error, origin)
                continue
            ready.append(first)
            second += others
        ready += second
        encoded = iter(self.encoder.encode([part for item, _ in ready if isinstance(item, tuple) for part in item]))
        used: list[Tokenized] = []
        for item, described in ready:
            if isinstance(item, Tokenized):
                limited = self._accept(Encoded(item, False), item)
            elif self.settings.method == "sft":
                limited = self._accept(next(encoded), item[0])
            else:
                limited = self._accept_pair([next(encoded) for _ in item], item)
            if limited is not None:
                self.report.formats[described] += 1
                used.append(limited)
        return used

    def _read_safely(self, row: Row, origin: Origin) -> list[Item]:
        """With its format, in words. What no check foresaw is still a complaint about the row; the user's own function
        fails in its own way."""
        try:
            return self._read(row, origin)
        except UserError:
            raise
        except UNFORESEEN as error:
            if self.settings.formatting_func is not None:
                raise
            raise broken_promise(error, row, origin) from error

    def _read(self, row: Row, origin: Origin) -> list[Item]:
        row = rename_columns(row, self.settings.column_map, origin)
        if is_tokenized(row):
            return [(self._read_tokens(row, origin), "read as tokens: column `input_ids`")]
        example, described = self._parse(row, origin)
        if example.is_conversational:
            self.report.conversational += 1
            self.chat = self.chat or self._open_chat()
        if self.settings.method == "rated":
            return [(self._render([one], row), described) for one in ratings_of(example)]
        return [(self._render([example] if len(example.completions) == 1 else split(example), row), described)]

    def _read_tokens(self, row: Row, origin: Origin) -> Tokenized:
        if self.settings.formatting_func is not None:
            raise ConfigError(f"{origin}: the row is tokenised already, so formatting_func has nothing to format")
        if self.settings.method != "sft":
            what = "holds token ids, which supervised training alone reads"
            hint = "give text or messages; what is tokenised is kept on disk in any case"
            raise bad_row("E-DATA-0017", origin, what, field="input_ids", row=row, hint=hint)
        tokens = from_tokens(row, origin, self.supervision, len(self.tokenizer), self.settings.columns)
        used = {*COLUMNS, *self.settings.columns}.difference(not_heeded(row, self.supervision))
        remark_on_rest(of_tokens(row, used, self.all_formats), origin, self.report)
        return tokens

    def _render(self, answers: list[Example], row: Row) -> tuple[Rendered, ...]:
        try:
            rendered = tuple(render(one, self.tokenizer, self.chat, self.supervision) for one in answers)
        except UnicodeEncodeError:
            raise half_a_character(row, answers[0].origin) from None
        for one in rendered:
            if self.chat is not None and one.is_chat:
                remark_on_text(one, self.chat, self.missing, self.report)
            else:
                remark_on_plain(one, self.tokenizer, self.report)
        return rendered

    def _open_chat(self) -> Chat:
        name = self.settings.chat_template
        self.missing = missing_tokens(self.tokenizer, name)
        chat = Chat(self.tokenizer, resolve_template(self.tokenizer, name), name)
        chat.check()
        return chat

    def _parse(self, row: Row, origin: Origin) -> tuple[Example, str]:
        if self.settings.formatting_func is not None:
            return _formatted(self.settings.formatting_func, row, origin), "read by formatting_func, as text"
        given, row = row, row if self.is_read else read_columns(row, {}, origin)
        chosen = self.format or detect(row, origin, self.formats)
        require(chosen, self.settings.format, row, origin)
        example = chosen.parse(row, origin)
        if margins.COLUMN in self.settings.columns:
            example = margins.with_margin(example)
        over = passed_over(example, self.all_formats, self.settings.columns, self.format is not None)
        remark_on_rest(over, origin, self.report)
        remark_on_oddities(oddities(example, given, row), origin, self.report)
        if self.settings.method == "sft" and is_unrated(row):
            self.report.unrated.add(origin)
        return example, chosen.describe(row)

    def _accept(self, done: Encoded, item: Rendered | Tokenized) -> Tokenized | None:
        """What of it is used: limited to `max_length`, or nothing if there is nothing to train."""
        whole, report = done.tokenized, self.report
        if whole.num_supervised == 0:
            self._skip(_nothing_supervised(whole, item), whole.origin)
            return None
        if isinstance(item, Rendered) and item.is_chat:
            try:
                remark_on_bos(whole, item, self.tokenizer, self.encoder.adds_bos, report)
            except DataError as error:
                self._skip(error, whole.origin)
                return None
        if done.boundary_moved:
            report.boundary_moved.add(whole.origin)
        if done.num_cut:
            report.flags_cut.add(whole.origin)
            report.tokens_cut += done.num_cut
        if self.settings.packing:  # packing cuts
            return whole
        limited = _limit(whole, self.settings)
        if limited.num_supervised == 0:
            if not self._is_known(whole.origin):
                self._cut_off(whole.origin)
                report.tokens_lost += whole.num_tokens
                report.supervised_lost += whole.num_supervised
            return None
        if limited is not whole:
            report.truncated.add(whole.origin)
            report.tokens_lost += whole.num_tokens - limited.num_tokens
            report.supervised_lost += whole.num_supervised - limited.num_supervised
        return limited

    def _accept_pair(self, done: list[Encoded], item: tuple[Rendered, ...]) -> Tokenized | None:
        """Both answers behind what their tokens have in common with the prompt's; as in TRL each is limited to
        `max_length` by itself, and a row is left out where its prompt leaves no room, or its answers differ no more."""
        report, origin = self.report, item[0].example.origin
        try:
            whole = join(done, item)
            for one, rendered in zip(done, item, strict=True):
                if rendered.is_chat:
                    remark_on_bos(one.tokenized, rendered, self.tokenizer, self.encoder.adds_bos, report)
        except DataError as error:
            self._skip(error, origin)
            return None
        if any(one.boundary_moved for one in done):
            report.boundary_moved.add(origin)
        if num_cut := sum(one.num_cut for one in done):
            report.flags_cut.add(origin)
            report.tokens_cut += num_cut
        settings = self.settings
        limited = limit_pair(whole, settings.max_length, settings.truncation_mode, settings.max_prompt_length)
        if limited is None:
            self._cut_off(origin)
        if limited is not whole:
            kept = (0, 0) if limited is None else (limited.num_tokens, limited.num_supervised)
            report.tokens_lost += whole.num_tokens - kept[0]
            report.supervised_lost += whole.num_supervised - kept[1]
            if limited is not None:
                report.truncated.add(origin)
        if limited is not None and self.settings.method == "rated":  # behind another prompt it is cut elsewhere
            limited = replace(limited, columns={**limited.columns, "whole_answer": whole.branches[0]})
        return limited

    def _reject(self, error: DataError, origin: Origin) -> None:
        """A row that could not even be read."""
        self.report.rows += 1
        self._skip(error, origin)

    def _skip(self, error: DataError, origin: Origin) -> None:
        if self.settings.on_bad_row == "error":
            raise error
        if not self._is_known(origin):
            self.report.skip(error, origin)
            self._lose(error.code, origin)

    def _cut_off(self, origin: Origin) -> None:
        """A row of which `max_length` leaves nothing to train."""
        self.report.drop("E-DATA-0030", origin)
        self._lose("E-DATA-0030", origin)

    def _lose(self, code: str, origin: Origin) -> None:
        self.lost.setdefault(origin.source, Counter())[REASONS.get(code, code)] += 1

    def _is_known(self, origin: Origin) -> bool:
        """Whether this row of a mixture was found bad before; it is then no other row."""
        if self.bad is None:
            return False
        if origin in self.bad:
            self.report.rows -= 1
            return True
        self.bad.add(origin)
        return False


def _formatted(function: Callable[[Row], object], row: Row, origin: Origin) -> Example:
    try:
        text = function(row)
    except Exception as error:  # the user's own code: its own error, and where it happened
        error.add_note(f"formatting_func failed on {origin}")
        raise
    if not isinstance(text, str):
        hint = "it is called with one row at a time, a dict of values; return one text"
        raise bad_row("E-DATA-0019", origin, f"formatting_func returned {kind(text)}", row=row, hint=hint)
    if not text.strip():
        raise bad_row("E-DATA-0014", origin, "formatting_func returned an empty text", row=row)
    return Example(None, (text,), origin, columns=row, is_ended=any(map(_is_chat, row.values())))


def _is_chat(value: Any) -> bool:
    """Messages: what a function makes of them has been through a template, which ends them (as TRL takes it)."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], dict) and "role" in value[0]


def _limit(example: Tokenized, settings: DataSettings) -> Tokenized:
    length, branch = settings.max_length, example.branches[0]
    if length is None or len(branch.ids) <= length:
        return example
    kept = slice(None, length) if settings.truncation_mode == "keep_start" else slice(-length, None)
    return replace(example, branches=(Branch(branch.ids[kept], branch.supervised[kept]),))


def _with_progress(rows: Rows, dataset: Any, name: str) -> Rows:
    """A bar on a terminal, once it has taken two seconds."""
    from tqdm import tqdm

    total = len(dataset) if hasattr(dataset, "__len__") and not isinstance(dataset, str) else None
    return iter(tqdm(rows, desc=name, total=total, unit=" rows", delay=2, leave=False, disable=None, file=sys.stderr))


def _nothing_supervised(whole: Tokenized, item: Rendered | Tokenized) -> DataError:
    turns = item.example.completions[0] if isinstance(item, Rendered) else None
    if isinstance(turns, list) and any(m["role"] == "assistant" for m in turns) and not is_answered(turns):
        return unanswered(turns, None, excerpt(item.full if isinstance(item, Rendered) else ""), whole.origin)
    seen = item.full if isinstance(item, Rendered) else whole.branches[0].ids.tolist()
    what, hint = "no token of the row would be trained", f"drop such rows, or skip them ({SKIP})"
    if isinstance(item, Rendered) and item.cuts:
        what += ": what its train flags ask for is in each token beside what they leave out"
        hint = (
            "a token is trained if all its characters are: let a range hold whole words, each with the space before it"
        )
    elif isinstance(item, Rendered) and item.spans is not None:
        hint = "with assistant_only_loss a row needs an assistant turn, which the chat template must not leave out"
    return bad_row("E-DATA-0022", whole.origin, what, row=excerpt(seen), hint=hint)
