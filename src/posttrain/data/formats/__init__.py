"""The formats rows come in. Each is told by the shape of a row, explains itself, and becomes an `Example`.

A new format is one file with `SHAPE`, `matches`, `parse` and `describe`, and one line in the table. The table is in
order of precedence: as in TRL, a row that has both messages and text is a conversation. `FORMATS` are those that
supervised training reads; `OTHER_METHODS` are told as well, so that they are refused by name, and read by the doctor.
"""

from __future__ import annotations

import difflib
from typing import Protocol

from posttrain.data.codes import FILL, UNFORESEEN, Row, bad_row, excerpt
from posttrain.data.formats import alpaca, messages, preference, prompt_completion, rated, sharegpt, single
from posttrain.data.formats.renaming import likely_names
from posttrain.data.formats.text import TextFormat
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example, Origin


class Format(Protocol):
    """A module of this package, or an object like one. `SHAPE` says in a few words what its rows look like."""

    @property
    def SHAPE(self) -> str: ...
    def matches(self, row: Row) -> bool: ...
    def parse(self, row: Row, origin: Origin) -> Example: ...
    def describe(self, row: Row) -> str: ...


FORMATS: dict[str, Format] = {
    "prompt-completion": prompt_completion,
    "sharegpt": sharegpt,
    "messages": messages,
    "text": TextFormat("text"),
    "alpaca": alpaca,
}

OTHER_METHODS: dict[str, Format] = {"preference": preference, "rated": rated}
REFUSED = {
    "preference": ("preference pairs: train them with DPO, ORPO or a reward model", None),
    "rated": ("ratings: train them with KTO", "to train on all answers alike, name the format: {format}"),
}
"""What is said of another method's rows, and the way out."""
IMAGES = ("image", "images")
CONVERSATIONS = ("messages", "conversations", "conversation")


def formats(text_field: str = "text") -> dict[str, Format]:
    """The table, with plain text read from column `text_field`."""
    return {**FORMATS, "text": TextFormat(text_field)}


def formats_of(method: str, text_field: str = "text") -> dict[str, Format]:
    """Those that training with `method` reads."""
    if method == "rated":  # a pair is two ratings
        return dict(OTHER_METHODS)
    return formats(text_field) if method == "sft" else {method: OTHER_METHODS[method]}


def all_formats(text_field: str = "text") -> dict[str, Format]:
    """Those of every method, for whoever looks at data and does not train on them."""
    return {**OTHER_METHODS, **formats(text_field)}


def choose(name: str, known: dict[str, Format]) -> Format | None:
    """The format called `name`; None for "auto", which asks each row."""
    if name == "auto":
        return None
    if name not in known:
        similar = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {similar[0]!r}?" if similar else f"known: auto, {', '.join(known)}"
        raise ConfigError(f"unknown data format {name!r}", hint=hint)
    return known[name]


def detect(row: Row, origin: Origin, known: dict[str, Format]) -> Format:
    """The first format whose shape `row` has."""
    preference.check_whole(row, origin)
    for name, other in OTHER_METHODS.items():
        if name in known and other.matches(row):  # a pair may have a column `label` of its own
            if name == "preference":
                _check_asked(row, origin)
            break
        if name not in known and other.matches(row):
            if name == "rated":
                rated.check_label(row, origin)
            raise _another_method(name, row, origin, known)
    _check_no_images(row, origin)
    found = next((fmt for fmt in known.values() if fmt.matches(row)), None)
    if found == FORMATS["text"] and "alpaca" in known and alpaca.is_rendered(row):
        found = alpaca
    is_text = isinstance(found, TextFormat)
    if found is None or is_text:
        single.check_not_single(row, origin, is_text)
    if found is None:
        if "rated" in known and "label" in row and any(fmt.matches(row) for fmt in rated.ANSWERS):
            rated.check_label(row, origin)
        raise _unknown(row, origin, known)
    return found


def _check_no_images(row: Row, origin: Origin) -> None:
    """Without its images a row would be trained as something that its author did not write."""
    for column in IMAGES:
        if row.get(column):
            what = "holds images, which are not supported: only text can be trained on for now"
            hint = f"drop such rows; a column of another meaning wants another name: --map {column}=own_{column}"
            raise bad_row("E-DATA-0018", origin, what, field=column, row=excerpt(sorted(row)), hint=hint)


def _check_asked(row: Row, origin: Origin) -> None:
    """Raises DataError (E-DATA-0160) for a pair whose question stands in a column of another name: its answers would be
    compared without it."""
    column = preference.question_beside(row)
    names = likely_names(row, lambda renamed: _reads(renamed, origin)) if column else {}
    if column and (names or isinstance(row["chosen"], str)):
        pasted = ",".join(f"{old}={new}" for old, new in names.items()) or f"{column}=prompt"
        what = "is in neither answer, and there is no `prompt`: the answers would be compared without their question"
        hint = f"--map {pasted} (dataset.columns) reads it; if it is no question, --map {column}=own_{column}"
        raise bad_row("E-DATA-0160", origin, what, field=column, seen=row[column], row=row, hint=hint)


def _check_not_empty(row: Row, origin: Origin) -> None:
    """An empty conversation is told by no shape."""
    for column in CONVERSATIONS:
        if row.get(column) == []:
            raise bad_row("E-DATA-0011", origin, "is an empty conversation", field=column, row=row, hint=FILL)


def require(found: Format, name: str, row: Row, origin: Origin) -> None:
    """Raises DataError where `row` is not of the format that was asked for by `name`."""
    if found.matches(row):
        if found is OTHER_METHODS["preference"] and name != "auto":
            _check_asked(row, origin)
        _check_no_images(row, origin)
        return
    _check_not_empty(row, origin)
    if found is OTHER_METHODS["rated"]:
        rated.check_label(row, origin)
    if found is OTHER_METHODS["preference"]:
        preference.check_whole(row, origin)
    what = f"is not of format {name!r}, {found.SHAPE} (columns {', '.join(row)})"
    raise bad_row("E-DATA-0010", origin, what, row=row, hint="format auto tells by the shape of each row")


def _another_method(name: str, row: Row, origin: Origin, known: dict[str, Format]) -> DataError:
    what, hint = REFUSED[name]
    columns = {"preference": {"chosen", "rejected"}, "rated": {"label"}}[name]
    if hint is not None:
        own = next((own for own, fmt in known.items() if fmt.matches(row)), None)
        hint = hint.format(format=own) if own else None
    return bad_row("E-DATA-0017", origin, f"has columns {_names(columns)}: {what}", row=row, hint=hint)


def _unknown(row: Row, origin: Origin, known: dict[str, Format]) -> DataError:
    _check_not_empty(row, origin)
    columns = [column for column, value in row.items() if value is not None]
    nulls = sorted(set(row) - set(columns))
    hint = "known formats: " + "; ".join(f"{name} ({fmt.SHAPE})" for name, fmt in known.items())
    if columns == ["prompt"] and not nulls:
        hint = "a prompt alone is data for GRPO, RLOO or PPO; supervised training wants a completion beside it"
    elif names := likely_names(row, lambda renamed: _reads(renamed, origin)):
        renames = ", ".join(f"{old} → {new}" for old, new in names.items())
        pasted = ",".join(f"{old}={new}" for old, new in names.items())
        of_pairs = "" if "preference" in known or "chosen" not in names.values() else f"; {REFUSED['preference'][0]}"
        hint = f"rename {renames} (--map {pasted}, or dataset.columns){of_pairs}, or pass a formatting_func; {hint}"
    what = f"columns {_names(columns)} are of no known format" + (f" (null: {_names(nulls)})" if nulls else "")
    return bad_row("E-DATA-0010", origin, what, row=row, hint=hint)


def _reads(row: Row, origin: Origin) -> bool:
    """Whether any method reads it."""
    known = {**OTHER_METHODS, **FORMATS}
    found = next((fmt for fmt in known.values() if fmt.matches(row)), None)
    try:
        return found is not None and bool(found.parse(row, origin).completions)
    except (DataError, *UNFORESEEN):
        return False


def _names(columns: list[str] | set[str]) -> str:
    return ", ".join(f"`{column}`" for column in sorted(columns)) or "(none)"
