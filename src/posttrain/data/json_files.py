"""Readers of JSON Lines and JSON arrays, strict (no comments, no NaN), that recognise what people write instead.

A bad line is handed to `reject`, and reading can go on. So is an element of an array that can be told from the next
one all the same (broken_json.py); where it cannot, the array raises.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from posttrain.data import lines
from posttrain.data.broken_json import end_of_element
from posttrain.data.codes import Reject, Row, bad_row, excerpt, kind
from posttrain.data.lines import decode, raw_lines
from posttrain.data.places import Place, places, repeated
from posttrain.data.strict_json import DECODER, NotANumber, Repeated, TooLarge
from posttrain.errors import DataError
from posttrain.types import Origin

Rows = Iterator[tuple[Origin, Row]]


LENIENT = json.JSONDecoder(parse_int=str, parse_float=str)
"""Finds the end of what the strict one refuses."""
SPACE = re.compile(r"[ \t\r\n]*")
UNREADABLE = re.compile("\ufffd|\0{8}")


def read_json_lines(path: Path, reject: Reject) -> Rows:
    """One JSON object a line; blank lines are passed over."""
    row = 0
    for number, raw in enumerate(raw_lines(path), start=1):
        if not raw.strip():
            continue
        origin = Origin(str(path), row, number)
        row += 1
        found = read_line(raw, origin, reject)
        if found is not None:
            yield origin, found


def read_line(raw: bytes, origin: Origin, reject: Reject) -> Row | None:
    """The object in a line, if there is one."""
    try:
        value = DECODER.decode(decode(raw, origin))
    except DataError as error:
        reject(error, origin)
    except ValueError as error:
        reject(_broken_line(error, raw.decode("utf-8"), origin), origin)
    except RecursionError:
        reject(_too_deep(str(origin)), origin)
    else:
        if isinstance(value, dict):
            return value
        reject(_not_an_object(value, origin), origin)
    return None


def read_json(path: Path, reject: Reject) -> Rows:
    """A JSON array of objects; or objects one after another, which is JSON Lines under another name."""
    text, unreadable = _text(path)
    start = _skip_space(text, 0)
    if start == len(text):
        raise DataError(f"{path}: the file holds white space only", hint="write [{...}, {...}]", code="E-DATA-0006")
    match text[start : start + 1]:
        case "[":
            return _read_array(path, text, start + 1, reject, unreadable)
        case "{":
            return _read_objects(path, text, start, reject)
    if unreadable:
        raise unreadable[0][1]
    message = f"{path}:1: expected a JSON array of objects, saw: {excerpt(text[start:])}"
    raise DataError(message, hint="write [{...}, {...}]", code="E-DATA-0002")


Unreadable = list[tuple[int, DataError]]
"""Where in the text there is something that is not UTF-8, and the complaint about it."""


def _text(path: Path) -> tuple[str, Unreadable]:
    """The whole file, with marks in place of what cannot be read."""
    parts: list[str] = []
    unreadable: Unreadable = []
    length = 0
    for index, raw in enumerate(raw_lines(path, limited=False)):
        try:
            text = decode(raw, Origin(str(path), index, index + 1))
        except DataError as error:
            text = raw.decode("utf-8", "replace")
            at = UNREADABLE.search(text)
            unreadable.append((length + (at.start() if at else 0), error))
        parts.append(text)
        length += len(text)
    return "".join(parts), unreadable


def _read_array(path: Path, text: str, position: int, reject: Reject, unreadable: Unreadable) -> Rows:
    row, line, counted = 0, 1, 0
    position = _skip_space(text, position)
    while text[position : position + 1] != "]":
        line, counted = line + text.count("\n", counted, position), position
        origin = Origin(str(path), row, line)
        value, end = _parse_at(text, position, path, unreadable, line)
        while unreadable and unreadable[0][0] < end:
            value = unreadable.pop(0)[1]
        if end - position > lines.MAX_LINE:
            value = lines.too_long(origin, text[position : position + 1000])
        if isinstance(value, dict):
            yield origin, value
        else:
            reject(value if isinstance(value, DataError) else _not_an_object(value, origin), origin)
        row += 1
        between = Origin(str(path), row, line + text.count("\n", counted, end))
        position = _next_element(text, end, between, reject)
    rest = _skip_space(text, position + 1)
    if rest < len(text):
        raise _broken_array("the array ends before this", text, rest, path)


def _next_element(text: str, end: int, between: Origin, reject: Reject) -> int:
    """Past the comma to the next element, or to the closing bracket. A comma too few or too many is rejected like a row
    of its own: those before and after it are as they should be."""
    position = _skip_space(text, end)
    here = text[position : position + 1]
    if here == "]":
        return position
    following, what = position, "expecting ',' or ']'"
    if here == ",":
        following, what = _skip_space(text, position + 1), "expecting another element"
        if text[following : following + 1] != "]":
            return following
    between = replace(between, line=(between.line or 1) + text.count("\n", end, following))
    fault = _broken_array(what, text, following, Path(between.source), between.line)
    if here not in (",", "{", "["):
        raise fault
    reject(fault, between)
    return following


def _read_objects(path: Path, text: str, start: int, reject: Reject) -> Rows:
    try:
        first, end = DECODER.raw_decode(text, start)
    except ValueError:
        return read_json_lines(path, reject)  # it will say what is wrong with the first line
    if _skip_space(text, end) < len(text):
        return read_json_lines(path, reject)
    lists = [key for key, value in first.items() if isinstance(value, list)]
    hint = f"keep only the list of rows: jq '.{lists[0]}' {path} > rows.json" if lists else "wrap it in [ ]"
    raise DataError(f"{path}: one JSON object (keys {', '.join(first)}), not a list of rows", hint=hint)


def _not_an_object(value: Any, origin: Origin) -> DataError:
    hint = 'each row is an object, e.g. {"text": "..."}'
    if isinstance(value, list) and origin.source.endswith(".jsonl"):
        hint = "here each line is one object; a whole JSON array is read from a file named .json"
    return bad_row("E-DATA-0004", origin, f"is {kind(value)}, not an object", row=value, hint=hint)


def _skip_space(text: str, position: int) -> int:
    match = SPACE.match(text, position)
    return match.end() if match else position


def _parse_at(text: str, position: int, path: Path, unreadable: Unreadable, line: int) -> tuple[Any, int]:
    """The element that begins here, in `line`, or the complaint about it, and where it ends. Raises where no end can be
    found."""
    try:
        return DECODER.raw_decode(text, position)
    except (ValueError, RecursionError) as error:
        complaint = _complaint(error, text, position, path, unreadable, line)
    end = _end(text, position)
    if end is None:
        raise complaint
    return complaint, end


def _complaint(
    error: ValueError | RecursionError, text: str, position: int, path: Path, unreadable: Unreadable, line: int
) -> DataError:
    """What to say of the element that begins at `position`."""
    where = f"{path}:{line}"
    if isinstance(error, json.JSONDecodeError):
        if unreadable and position <= unreadable[0][0] <= error.pos:
            return unreadable.pop(0)[1]
        return _broken_array(error.msg, text, error.pos, path, line + text.count("\n", position, error.pos))
    return _too_deep(where) if isinstance(error, RecursionError) else _refused(error, text, position, str(path), line)


def _refused(error: ValueError, text: str, start: int, source: str, line: int) -> DataError:
    """What is JSON by its brackets, and no value: the row at `start` of `text`, in this `line` of the file."""
    if isinstance(error, NotANumber):
        return _not_a_number(error, text, start, source, line)
    if isinstance(error, Repeated):
        return _repeated(error, text, start, source, line)
    longest = sys.get_int_max_str_digits()
    numbers = (place for place in places(text, start) if not place.is_key and not place.token.startswith('"'))
    found = next((place for place in numbers if len(place.token) > longest), None)
    what = "a number has more digits than can be read" if found else f"not valid JSON: {error}"
    hint = f"write a number of more than {longest} digits as text" if found else None
    return DataError(_said(found, what, text, start, source, line), hint=hint, code="E-DATA-0002")


def _said(found: Place | None, what: str, text: str, start: int, source: str, first_line: int) -> str:
    """What is wrong, where in the file, in which field, and what stands there."""
    position = start if found is None else found.position
    line, column = first_line + text.count("\n", start, position), position - text.rfind("\n", 0, position)
    field = f'"{found.field}": ' if found is not None and found.field else ""
    return f"{source}:{line}:{column}  {field}{what}\n  | {_around(text, position)}"


def _end(text: str, position: int) -> int | None:
    try:
        return LENIENT.raw_decode(text, position)[1]
    except (ValueError, RecursionError):
        return end_of_element(text, position)


def _too_deep(where: str) -> DataError:
    hint = "no format of training data is nested so deeply: is this the right file?"
    return DataError(f"{where}  the row is nested too deeply to be read", hint=hint, code="E-DATA-0002")


def _repeated(error: ValueError, text: str, start: int, source: str, line: int) -> DataError:
    what = f'the key "{error}" stands twice in one object'
    message = _said(repeated(text, str(error), start), what, text, start, source, line)
    return DataError(
        message, hint="keep one of them: which one counts differs from reader to reader", code="E-DATA-0008"
    )


def _broken_array(what: str, text: str, position: int, path: Path, line: int | None = None) -> DataError:
    line, column = line or 1 + text.count("\n", 0, position), position - text.rfind("\n", 0, position)
    at_end = _skip_space(text, position) == len(text)
    cut_off = "the file breaks off here: it was not written to its end" if at_end else None
    return _broken(f"{path}:{line}:{column}", what, text, position, cut_off)


def _broken_line(error: ValueError, line: str, origin: Origin) -> DataError:
    if not isinstance(error, json.JSONDecodeError):  # an integer of thousands of digits, NaN, a key twice
        return _refused(error, line, 0, origin.source, origin.line or 1)
    at_end = error.pos >= len(line.rstrip()) or error.msg.startswith("Unterminated")
    hint = None
    if line.strip() in ("{", "["):
        hint = "here each line is one object; a JSON array is read from a file named .json"
    elif at_end and not line.endswith("\n"):
        hint = "the last line breaks off: the file was not written to its end"
    return _broken(f"{origin}:{error.pos + 1}", error.msg, line, error.pos, hint)


HINTS: tuple[tuple[str, str], ...] = (
    (r"\s*(//|#|/\*)", "JSON has no comments: delete them"),
    (r"'", "JSON wants double quotes; Python's str(dict) is not JSON, json.dumps(row) is"),
    (r"(None|True|False)\b", "JSON says null, true, false"),
    (r"[}\]]", "there is a comma too many before this bracket, or a value is missing"),
    (r"\{", "there is a second object here: put each on a line of its own, or commas between those of an array"),
)


def _broken(where: str, what: str, text: str, position: int, cut_off: str | None) -> DataError:
    """`HINTS` are tried on what stands where the parser stopped."""
    here = text[position : position + 20]
    hint = cut_off or next((hint for pattern, hint in HINTS if re.match(pattern, here)), "each row is one JSON object")
    return DataError(f"{where}  not valid JSON: {what}\n  | {_around(text, position)}", hint=hint, code="E-DATA-0002")


def _not_a_number(error: ValueError, text: str, start: int, source: str, line: int) -> DataError:
    what = f"{error} is read as infinity" if isinstance(error, TooLarge) else f"{error} is not JSON"
    found = next((place for place in places(text, start) if place.token == str(error)), None)
    message = _said(found, what, text, start, source, line)
    return DataError(message, hint="write null, or leave the field out", code="E-DATA-0005")


def _around(text: str, position: int) -> str:
    """What stands around `position`, which an arrow shows."""
    return excerpt(f"{text[max(position - 50, 0) : position]} → {text[position : position + 40]}".strip(), width=120)
