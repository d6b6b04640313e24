"""A file of examples in another format, from which training reads the same examples.

Every row is read again as it is written, before it is: what would come back as something else (ratings as plain
answers, a user's own column as part of the format) is refused. So is a file of which that holds, before it is in place.
"""

from __future__ import annotations

import dataclasses
from array import array
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from posttrain.data.change.essence import essence
from posttrain.data.change.reading import SKIPPED, Reading, Skipped
from posttrain.data.change.targets import TARGETS, cannot
from posttrain.data.codes import Row
from posttrain.data.conversation import is_answered
from posttrain.data.doctor.content import RowReader, Said
from posttrain.data.flags import DETAIL
from posttrain.data.ratings import ratings_of
from posttrain.data.settings import DataSettings
from posttrain.data.sources import read_rows
from posttrain.data.writing import TABLES, write_rows
from posttrain.errors import ConfigError, DataError
from posttrain.types import Example

KEEP = ("desirable", "all", "chosen", "both", "last")
"""What is to become of another method's rows in plain supervised ones: of ratings the answers rated good, or all of
them alike; of pairs the chosen answer. Or of pairs both answers, rated. And of conversations the last answer, with the
earlier ones untrained."""
FLAGS = ("train", DETAIL)
SAMPLE = 1000
"""Rows of a file of JSON that are read again from the file; of tables, whose cells have no types of their own, all."""


def convert(
    source: Any,
    to: str,
    out: Path,
    settings: DataSettings,
    keep: str | None = None,
    skipped: Skipped | None = None,
) -> dict[str, int]:
    """Write the rows of `source` in the format `to`; `skipped` takes those that were skipped.

    Raises: DataError (E-DATA-0052) for a row that the format cannot hold, unless bad rows are skipped: a pair, say, of
        which `keep` says what is wanted; DataError (E-DATA-0054) where the file that was written does not give back
        its rows.
    """
    if to not in TARGETS:
        raise ConfigError(f"--to {to!r} is no format to write", hint=f"known: {', '.join(TARGETS)}")
    if keep is not None and keep not in KEEP:
        raise ConfigError(f"--keep {keep!r} is nothing to keep", hint=f"known: {', '.join(KEEP)}")
    reading, again = Reading(source, settings, skipped), RowReader(DataSettings())
    limit = None if out.suffix.lower() in TABLES else SAMPLE
    written = array("Q")
    left_out = 0

    def converted() -> Iterator[Row]:
        nonlocal left_out
        for example, said in reading.examples():
            if keep == "desirable" and example.columns.get("label") is False:
                left_out += 1
                continue
            try:
                made = [_convert(*one, to, again) for one in _kept(example, said, keep)]
            except DataError as error:
                reading.reject(error, example.origin)
                continue
            for row, code in made:
                if limit is None or len(written) < limit:
                    written.append(code)
                yield row

    def why_empty() -> str:
        return reading.why_empty() or ("no answer is rated good" if left_out else "")

    count = write_rows(out, converted(), lambda file: read_again(file, out, written), why_empty, source)
    kept = {"left_out": left_out} if keep is not None else {}
    return {"written": count, **kept, SKIPPED: reading.skipped}


def _convert(example: Example, said: Said, to: str, again: RowReader) -> tuple[Row, int]:
    """The row, and what it says as a number."""
    if said.method == "preference":
        hint = "--keep chosen writes the chosen answers as supervised examples, --keep both both answers, rated"
        raise cannot(example, to, "its rejected answer would be lost", hint)
    own = _others(example)
    row = TARGETS[to](example)
    if twice := sorted(set(row) & set(own)):
        hint = "rename it: --map " + ",".join(f"{name}=own_{name}" for name in twice)
        raise cannot(
            example, to, f"its own column {', '.join(f'`{name}`' for name in twice)} means something there", hint
        )
    row = {**row, **own}
    code = essence(example, said)
    try:
        back = essence(*again.parsed(row, example.origin))
    except DataError as error:
        raise cannot(example, to, f"it could not be read again: {error.message}", error.hint) from error
    if back != code:
        raise _changed(example, said, again.parsed(row, example.origin)[1], to)
    return row, code


def _kept(example: Example, said: Said, keep: str | None) -> list[tuple[Example, Said]]:
    """What `keep` asks for, as supervised or rated examples."""
    if keep == "last" and said.method == "sft":
        return [(_last_answer(example), said)]
    if keep == "chosen" and said.method == "preference":
        example = dataclasses.replace(example, completions=example.completions[:1])
        return [(example, dataclasses.replace(said, method="sft"))]
    if keep == "both" and said.method == "sft":
        raise cannot(example, "--keep both", "it is no pair, and has no rating", "keep pairs and plain rows apart")
    if keep == "both" and said.method == "preference":
        if example.columns.get("label") is not None:
            raise cannot(example, "--keep both", "its own `label` would be lost", "rename it: --map label=own_label")
        return [
            (one, dataclasses.replace(said, method="rated", label=bool(one.columns["label"])))
            for one in ratings_of(example)
        ]
    if keep not in ("desirable", "all"):
        return [(example, said)]
    if said.method == "rated":  # which is of the last answer, whatever stands before
        (example,) = ratings_of(example)
        said = dataclasses.replace(said, method="sft", label=None)
    columns = {name: value for name, value in example.columns.items() if name != "label" or not isinstance(value, bool)}
    return [(dataclasses.replace(example, columns=columns), said)]


def _last_answer(example: Example) -> Example:
    """Of a conversation nothing but its last answer trained."""
    (turns,) = example.completions
    if not isinstance(turns, list):
        return example
    last = max((i for i, message in enumerate(turns) if message["role"] == "assistant"), default=0)
    if not is_answered(turns[last:]):
        raise cannot(example, "--keep last", "its last answer is not to be trained", "leave --keep out")
    before = [{key: value for key, value in message.items() if key not in FLAGS} for message in turns[:last]]
    untrained = [{**message, "train": False} if message["role"] == "assistant" else message for message in before]
    return dataclasses.replace(example, completions=([*untrained, *turns[last:]],))


def _changed(example: Example, said: Said, back: Said, to: str) -> DataError:
    """What to say of a row that would be read `back` as something else."""
    if said.method == back.method:
        return cannot(example, to, f"it would not be read back with the same words and tools ({back.format})")
    if said.method == "rated":
        hint = "--keep desirable writes the answers rated good, --keep all all of them alike; messages keep ratings"
        return cannot(
            example, to, "its rating (`label`) would be lost, and bad answers trained on like good ones", hint
        )
    names = {"sft": "a plain example", "rated": "a rated one", "preference": "a preference pair"}
    hint = "--keep all leaves `label` out" if back.method == "rated" else "choose another format"
    return cannot(example, to, f"{names[said.method]} would be read back as {names[back.method]}", hint)


def _others(example: Example) -> Row:
    """Tools, template arguments and the user's own columns go along."""
    extra: Row = {"tools": example.tools} if example.tools else {}
    if example.template_kwargs:
        extra["chat_template_kwargs"] = dict(example.template_kwargs)
    return {**extra, **{name: value for name, value in example.columns.items() if value is not None}}


def read_again(file: Path, out: Path, written: array[int], settings: DataSettings | None = None) -> None:
    """Whether the `file` that is to become `out` says what was written. Raises DataError (E-DATA-0054)."""
    reader, number = RowReader(settings or DataSettings()), 0
    try:
        for number, (origin, row) in enumerate(islice(read_rows(file), len(written))):
            if essence(*reader.parsed(row, origin)) != written[number]:
                raise DataError("it says something else")
    except DataError as error:
        why = error.message.replace(str(file), str(out))
        message = f"{out}: row {number} of the new file would not be read back as it was: {why}"
        raise DataError(message, hint="write .jsonl, which holds every row as it is", code="E-DATA-0054") from error
