"""Columns under the names that formats look for: `{"question": "prompt", "answer": "completion"}`, old name to new."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.data.cells import ALWAYS, AS_TEXT, SPOKEN, parsed, with_messages, written_messages
from posttrain.data.codes import WRITE_JSON, Row, bad_row
from posttrain.errors import ConfigError
from posttrain.types import Origin

JSON = re.compile(r'\s*(\[\s*)?\{\s*"')
"""Text that is meant as an object, or as a list of them, whether or not it is whole."""
PYTHON = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")
"""A list of messages as Python prints it, which tables get that were written carelessly."""
LIST = 'write a list: [{"role": "user", "content": "..."}, ...]'
BOOLEANS = {"true": True, "false": False}
"""How tables spell a label."""


def rename_columns(row: Row, names: Mapping[str, str], origin: Origin) -> Row:
    """`row` with its columns renamed; those that it has not are passed over, for a mixture's parts may differ."""
    if not names:
        return row
    renamed = {names.get(column, column): value for column, value in row.items()}
    if len(renamed) < len(row):
        twice = sorted(new for old, new in names.items() if new in row and old in row and new not in names)
        what = f"has a column {', '.join(f'`{name}`' for name in twice)} already, which another is to be renamed to"
        raise bad_row("E-DATA-0050", origin, what, row=row, hint="rename that one as well, or leave it out of the map")
    if isinstance(rating := renamed.get("label"), str) and "label" in names.values():
        renamed["label"] = BOOLEANS.get(rating.strip().lower(), rating)  # tables have no other way to say it
    return renamed


def read_columns(row: Row, names: Mapping[str, str], origin: Origin) -> Row:
    """`row` as formats look at it: with its columns renamed, and with what only lists or objects can be meant by in
    place of the JSON in a text that some write (readers of tables have done so for columns of these names)."""
    row = with_messages(rename_columns(row, names, origin))
    written = [name for name in AS_TEXT if isinstance(row.get(name), str)]
    return {**row, **{name: _parsed(name, row, origin) for name in written}} if written else row


def read_from_json(row: Row, read: Row) -> bool:
    """Whether messages of `row` are JSON in a text, which was `read` as these messages."""
    return any(isinstance(row.get(name), str) and isinstance(read.get(name), list) for name in (*ALWAYS, *SPOKEN))


def json_left_as_text(read: Row) -> bool:
    """Whether a text that could be messages is read as text: what stands beside it is, or it is written as Python
    writes them (`[{'role': ...`)."""
    texts = [read[name] for name in (*SPOKEN, "text") if isinstance(read.get(name), str)]
    listed = [text for text in texts if text.lstrip().startswith("[")]
    return any(PYTHON.match(text) or written_messages(text) is not None for text in listed)


def _parsed(name: str, row: Row, origin: Origin) -> Any:
    try:
        value = parsed(name, row[name])
    except (ValueError, RecursionError) as error:
        if not JSON.match(row[name]) and not PYTHON.match(row[name]):  # `[USER]: Hi`
            return row[name]
        what, hint = f"is text that is not valid JSON: {error}", way_to_json(row[name])
        raise bad_row("E-DATA-0011", origin, what, field=name, seen=row[name], row=row[name], hint=hint) from None
    if name in ALWAYS and isinstance(value, dict):
        raise bad_row("E-DATA-0011", origin, "is an object, not a list of messages", field=name, row=row, hint=LIST)
    return value


def way_to_json(text: str) -> str:
    """What to do about a text that is not JSON and should be."""
    return "Python printed it: write it with json.dumps(...)" if PYTHON.match(text) else WRITE_JSON


def check_names(names: Mapping[str, str]) -> None:
    """Raises ConfigError for a map that is none, or that gives two columns one name."""
    wrong = [name for pair in names.items() for name in pair if not isinstance(name, str) or not name]
    if wrong:
        raise ConfigError(f"columns are renamed from text to text, saw {wrong[0]!r}", hint="e.g. question: prompt")
    targets = list(names.values())
    twice = sorted({name for name in targets if targets.count(name) > 1})
    if twice:
        raise ConfigError(f"two columns are to be renamed to {twice[0]!r}", hint="a row has one column of a name")


def parse_names(texts: Iterable[str]) -> dict[str, str]:
    """`question=prompt,answer=completion` as a map. Raises ConfigError for anything else."""
    names: dict[str, str] = {}
    for pair in (pair for text in texts for pair in text.split(",") if pair.strip()):
        old, equals, new = (part.strip() for part in pair.partition("="))
        if not (old and equals and new):
            raise ConfigError(f"--map {pair.strip()!r} is not of the form column=name",
                              hint="e.g. --map question=prompt,answer=completion")  # fmt: skip
        if old in names:
            raise ConfigError(f"--map names {old!r} twice")
        names[old] = new
    check_names(names)
    return names
