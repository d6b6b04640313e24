"""Where in a row, or in the text of one, something stands: as a field that a person can look for."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from posttrain.data.codes import SKIP, Row, bad_row
from posttrain.errors import DataError
from posttrain.types import Origin

HALF = re.compile("[\\ud800-\\udfff]")
"""Half of a surrogate pair, written as \\ud83d in the JSON: no character."""
TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"?|[{}\[\],:]|[^\s"{}\[\],:]+')


class Place(NamedTuple):
    """Where `token` begins in a JSON text, and its field (`messages[1].content`, or empty where it has none)."""

    position: int
    field: str
    token: str
    is_key: bool


def places(text: str, start: int = 0) -> Iterator[Place]:
    """The keys and the plain values of the JSON value that begins at `start`, as far as its brackets can be followed.
    For texts that a parser refuses."""
    path: list[str | int] = []
    for found in TOKEN.finditer(text, start):
        token = found.group()
        if token in ("{", "["):
            path.append("" if token == "{" else 0)
        elif token in ("}", "]"):
            if path:
                path.pop()
        elif token == "," and path and isinstance(path[-1], int):
            path[-1] += 1
        elif token == "," and path:
            path[-1] = ""
        elif token != ":":
            is_key = bool(path) and path[-1] == "" and token.startswith('"')
            if is_key:
                path[-1] = token[1:-1] or " "
            yield Place(found.start(), field_of(path), token, is_key)
        if not path:
            return


def repeated(text: str, key: str, start: int = 0) -> Place | None:
    """Where `key` stands for the second time in one object."""
    wanted, seen = json.dumps(key, ensure_ascii=False), set[str]()
    for place in places(text, start):
        if place.is_key and place.token == wanted:
            if place.field in seen:
                return place
            seen.add(place.field)
    return None


def field_of(path: Sequence[str | int]) -> str:
    """`messages[1].content` of `["messages", 1, "content"]`."""
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path if part != "").lstrip(".")


def half_a_character(row: Row, origin: Origin) -> DataError:
    """The complaint about a text of `row` that holds half a surrogate pair."""
    field, half = _half(row, ()) or ("", "\ud800")
    what = f"holds half a character ({half!a}), which no tokenizer takes"
    hint = f"the text was cut within a character: write all of it, or drop the row ({SKIP} drops and counts such rows)"
    return bad_row("E-DATA-0024", origin, what, field=field or None, row=ascii(row), hint=hint)


def _half(value: Any, path: tuple[str | int, ...]) -> tuple[str, str] | None:
    """The field of the first such text, and what it holds."""
    if isinstance(value, str):
        found = HALF.search(value)
        return (field_of(path), found.group()) if found else None
    items: Any = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    return next((there for key, item in items if (there := _half(item, (*path, key)))), None)
