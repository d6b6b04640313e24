"""Columns under the names that formats look for: `{"question": "prompt", "answer": "completion"}`, old name to new."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from posttrain.data.codes import Row, bad_row, excerpt
from posttrain.data.sources import read_rows
from posttrain.errors import ConfigError, DataError
from posttrain.types import Origin


def rename_columns(row: Row, names: Mapping[str, str], origin: Origin) -> Row:
    """`row` with its columns renamed; those that it has not are passed over, for a mixture's parts may differ."""
    if not names:
        return row
    renamed = {names.get(column, column): value for column, value in row.items()}
    if len(renamed) < len(row):
        twice = sorted(new for old, new in names.items() if new in row and old in row and new not in names)
        what = f"has a column {', '.join(f'`{name}`' for name in twice)} already, which another is to be renamed to"
        raise bad_row("E-DATA-0050", origin, what, row=row, hint="rename that one as well, or leave it out of the map")
    return renamed


def check_names(names: Mapping[str, str]) -> None:
    """Raises ConfigError for a map that is none, or that gives two columns one name."""
    wrong = [name for pair in names.items() for name in pair if not isinstance(name, str) or not name]
    if wrong:
        raise ConfigError(f"columns are renamed from text to text, saw {wrong[0]!r}", hint="e.g. question: prompt")
    targets = list(names.values())
    twice = sorted({name for name in targets if targets.count(name) > 1})
    if twice:
        raise ConfigError(f"two columns are to be renamed to {twice[0]!r}", hint="a row has one column of a name")


def check_columns(names: Mapping[str, str], sources: Iterable[Any]) -> None:
    """Raises ConfigError for a column to be renamed that no row has. Most files are read for a row and no further; what
    cannot be read is for whoever reads on."""
    missing, seen = set(names), dict[str, None]()
    for source in sources:
        try:
            for _, row in read_rows(source, reject=lambda *_: None) if missing else ():
                missing.difference_update(row)
                seen.update(dict.fromkeys(row))
                if not missing:
                    return
        except DataError:
            continue
    if missing and seen:
        name = min(missing)
        similar = difflib.get_close_matches(name, seen, n=1)
        hint = f"did you mean {similar[0]}?" if similar else f"columns: {excerpt(', '.join(seen))}"
        raise ConfigError(f"--map {name}={names[name]}: no row has a column {name!r}", hint=hint)


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
