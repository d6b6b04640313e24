"""What the model sees of a row: every token with its piece of text, and whether it is trained, special or cut off.

`token_view` is for one row that supervised training reads, `any_view` for one of any method (pairs.py), `view_rows` for
some rows of a file; text.py, html.py and svg.py show what they return. A row that cannot be used gives its error in
place of tokens. The first token of a sequence is never trained, for nothing stands before it to predict it from.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.data.codes import Row
from posttrain.data.columns import read_columns
from posttrain.data.formats import choose, detect, formats
from posttrain.data.pipeline import Pipeline
from posttrain.data.report import DataReport
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.data.tokens import is_tokenized
from posttrain.errors import ConfigError, DataError
from posttrain.types import Origin

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN_ON = ("assistant", "completion", "all")
ESCAPED = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")


@dataclass(frozen=True)
class Piece:
    """One token. `text` is the part of the text that it stands for, as it is: `visible` makes it safe to show. Of
    several tokens that make up one character, the first has it and the others are empty. `shared`: both answers of a
    pair begin with it."""

    id: int
    text: str
    trained: bool
    special: bool
    cut: bool
    shared: bool = False

    @property
    def state(self) -> str:
        return "cut" if self.cut else "trained" if self.trained else "masked"


@dataclass(frozen=True)
class RowView:
    """A row's tokens, in order, what the report has to say of them, or why there are none. `label` is how a rated
    answer is rated."""

    origin: str
    pieces: tuple[Piece, ...] = ()
    notes: tuple[str, ...] = ()
    error: DataError | None = None
    label: bool | None = None

    @cached_property
    def counts(self) -> dict[str, int]:
        """Tokens by state, `special` ones in addition, and `trained_lost`: those cut off that were to be trained."""
        states = [piece.state for piece in self.pieces]
        return {
            "tokens": len(self.pieces),
            **{state: states.count(state) for state in ("trained", "masked", "cut")},
            "special": sum(piece.special for piece in self.pieces),
            "trained_lost": sum(piece.trained and piece.cut for piece in self.pieces),
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        if self.error is not None:
            error = {"code": self.error.code, "message": self.error.message, "hint": self.error.hint}
            return {"row": self.origin, "error": error}
        tokens = [
            {"id": piece.id, "text": piece.text, "state": piece.state, "special": piece.special}
            for piece in self.pieces
        ]
        rated = {} if self.label is None else {"label": self.label}
        return {"row": self.origin, "tokens": tokens, "counts": self.counts, "notes": list(self.notes), **rated}


@dataclass(frozen=True)
class PairView:
    """Two answers to one prompt, each as a whole sequence, whose first `num_shared` tokens are the same."""

    origin: str
    chosen: RowView
    rejected: RowView
    num_shared: int
    error: None = None

    @property
    def sides(self) -> tuple[tuple[str, RowView], ...]:
        return ("chosen", self.chosen), ("rejected", self.rejected)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        sides = {name: {k: v for k, v in side.to_dict().items() if k != "row"} for name, side in self.sides}
        return {"row": self.origin, **sides, "shared": self.num_shared}


View = RowView | PairView


def token_view(
    row: Row,
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings | None = None,
    train_on: str = "assistant",
    origin: Origin | None = None,
    whole_answers: bool = False,
    is_read: bool = False,
) -> RowView:
    """The tokens of `row`, as training with `settings` would have them. `train_on`: "assistant" (a conversation's
    assistant turns, else what follows the prompt), "completion" (what follows the prompt, else all), or "all".
    `whole_answers`: the row is one answer of a pair, or a rated one. `is_read`: its columns were read (columns.py).

    Raises ConfigError for settings that do not fit; a DataError is part of what is returned."""
    settings, origin = settings or DataSettings(), origin or Origin("row", 0)
    report = DataReport(origin.source)
    try:
        wanted = replace(
            settings,
            max_length=None,
            packing=False,
            on_bad_row="error",
            **_masks(row, settings, train_on, origin, is_read),
        )
        tokenized = Pipeline(tokenizer, wanted, report, whole_answers, is_read).one(row, origin)
    except DataError as error:
        return RowView(str(origin), error=error)
    branch = tokenized.branches[0]
    kept = _kept(len(branch.ids), settings)
    special = set(tokenizer.all_special_ids) | set(tokenizer.get_added_vocab().values())
    pieces = tuple(
        Piece(token, text, bool(trained) and i > 0, token in special, i not in kept)
        for i, (token, text, trained) in enumerate(
            zip(branch.ids.tolist(), texts(branch.ids, tokenizer), branch.supervised, strict=True)
        )
    )
    return RowView(str(origin), pieces, tuple(report.notes()))


def view_rows(
    source: Any,
    rows: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: DataSettings | None = None,
    train_on: str = "assistant",
) -> list[View]:
    """The views of these rows (counted from 0) of a file or data set, in the order asked for. Raises ConfigError where
    there are not as many."""
    from posttrain.data.view.pairs import any_view  # which is made of the views of this module

    found: dict[int, View] = {}

    def reject(error: DataError, origin: Origin) -> None:
        found[origin.row] = RowView(str(origin), error=error)

    last, seen = max(rows), -1
    for origin, row in read_rows(source, "train", reject):
        seen = origin.row
        if seen in rows:
            found[seen] = any_view(row, tokenizer, settings, train_on, origin)
        if seen >= last:
            break
    missing = [row for row in rows if row not in found]
    if missing:
        raise ConfigError(f"{source} has no row {missing[0]}", hint=f"its rows are 0 to {max(seen, *found, 0)}")
    return [found[row] for row in rows]


def texts(ids: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The piece of text of each id. A character that is several tokens is with the first of them."""
    found: list[str] = []
    group: list[int] = []
    for token in ids.tolist():
        group.append(token)
        text = str(tokenizer.decode(group, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if text.endswith("\ufffd") and len(group) < 4:
            continue
        if str(tokenizer.convert_ids_to_tokens(group[0])).startswith("▁") and not text.startswith(" "):
            text = " " + text  # SentencePiece leaves out the space in front of what it takes for a beginning
        found += [text, *[""] * (len(group) - 1)]
        group = []
    return found + ["\ufffd"] * len(group)


def visible(text: str) -> str:
    """`text` with characters that are not seen, or that change how others are seen, written as escapes; line ends are
    left, after a mark."""
    return "".join(_visible(character) for character in text)


def _visible(character: str) -> str:
    if character == "\n":
        return "↵\n"
    if unicodedata.category(character) in ESCAPED:
        return character.encode("unicode_escape").decode("ascii")
    return character


def _masks(row: Row, settings: DataSettings, train_on: str, origin: Origin, is_read: bool) -> dict[str, Any]:
    if train_on not in TRAIN_ON:
        raise ConfigError(f"train_on is {train_on!r}", hint=f"known: {', '.join(TRAIN_ON)}")
    if train_on == "all":
        return {"completion_only": False, "assistant_only": False}
    if train_on == "completion" or is_tokenized(row) or settings.formatting_func is not None:
        return {"assistant_only": False}
    table, row = formats(settings.text_field), row if is_read else read_columns(row, settings.column_map, origin)
    example = (choose(settings.format, table) or detect(row, origin, table)).parse(row, origin)
    return {"assistant_only": example.is_conversational and example.prompt is None}


def _kept(length: int, settings: DataSettings) -> range:
    limit = settings.max_length
    if limit is None or length <= limit:
        return range(length)
    return range(limit) if settings.truncation_mode == "keep_start" else range(length - limit, length)


def parse_rows(text: str) -> list[int]:
    """The row numbers of `0,3,5-9`. Raises ConfigError."""
    numbers: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or (dash and int(last) - int(first) > 10_000):
            raise ConfigError(f"rows {text!r} cannot be read", hint="write row numbers and ranges, e.g. 0,3,5-9")
        numbers += range(int(first), int(last) + 1) if dash else [int(first)]
    if not numbers:
        raise ConfigError(f"rows {text!r} are none", hint="the smaller number of a range comes first")
    return list(dict.fromkeys(numbers))
