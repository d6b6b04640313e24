"""Every complaint about data: a code that stays, a short reason for the counts, and one way to word it.

A complaint reads `train.jsonl:417:83  "messages[2].role" is "assitant"`, then an excerpt of what was seen, then the way
out. Codes are never reused; a new complaint gets the next free number.
"""

from __future__ import annotations

import json
import os
import re
from array import array
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from posttrain.errors import DataError
from posttrain.types import Origin

REASONS: dict[str, str] = {
    "E-DATA-0001": "unusable source",
    "E-DATA-0002": "broken JSON",
    "E-DATA-0003": "not UTF-8",
    "E-DATA-0004": "not an object",
    "E-DATA-0005": "NaN or infinity",
    "E-DATA-0006": "no rows",
    "E-DATA-0007": "broken table row",
    "E-DATA-0008": "repeated key",
    "E-DATA-0009": "line too long",
    "E-DATA-0010": "unknown format",
    "E-DATA-0011": "malformed field",
    "E-DATA-0012": "unknown role",
    "E-DATA-0013": "empty completion",
    "E-DATA-0014": "empty text",
    "E-DATA-0015": "broken tool call",
    "E-DATA-0016": "text and messages mixed",
    "E-DATA-0017": "another method's data",
    "E-DATA-0018": "content that is no text",
    "E-DATA-0019": "formatting function",
    "E-DATA-0020": "chat template",
    "E-DATA-0021": "assistant turns not found",
    "E-DATA-0022": "nothing to train on",
    "E-DATA-0023": "tool call not rendered",
    "E-DATA-0024": "tokenizer",
    "E-DATA-0025": "malformed tokens",
    "E-DATA-0026": "not what its format promises",
    "E-DATA-0028": "label that is no boolean",
    "E-DATA-0029": "chosen and rejected are the same",
    "E-DATA-0030": "nothing left to train within max_length",
    "E-DATA-0031": "nothing left",
    "E-DATA-0032": "two system messages",
    "E-DATA-0033": "half a pair",
    "E-DATA-0040": "end-of-turn token missing",
    "E-DATA-0041": "chat template out of bounds",
    "E-DATA-0042": "broken train flag",
    "E-DATA-0043": "message left out by the template",
    "E-DATA-0044": "two beginning-of-sequence tokens",
    "E-DATA-0045": "no process for chat templates",
    "E-DATA-0046": "turns out of order",
    "E-DATA-0047": "broken chat template",
    "E-DATA-0050": "two columns of one name",
    "E-DATA-0051": "rows that make no table",
    "E-DATA-0052": "not to be written in that format",
    "E-DATA-0053": "not to be split",
    "E-DATA-0054": "not read back as written",
    "E-DATA-0150": "tool call of another than the assistant",
    "E-DATA-0151": "several splits in one folder",
    "E-DATA-0152": "one message of a conversation",
    "E-DATA-0160": "a pair beside its question",
}

SKIP = "on_bad_row=skip"
"""The way to go on without bad rows, in hints; a command says it in its own words (commands/reading.py)."""
AS_TEXT = f'write it as text (12 as "12"), or drop the row ({SKIP} drops and counts such rows)'
WRITE_JSON = f"write it with json.dumps(...), or drop the row ({SKIP} drops and counts such rows)"
FILL = f"fill it or drop the row ({SKIP} drops and counts such rows)"
MEND = f"mend it or drop the row ({SKIP} drops and counts such rows)"
"""The way out where no better one is known."""
MAX_SEARCHED = 16 * 2**20
"""Bytes of a file in which the column of a value is looked for: where its lines begin has to be known."""

Row = dict[str, Any]
Reject = Callable[[DataError, Origin], None]
"""What to do about a row that cannot be used: raise, or count it and go on."""


def refuse(error: DataError, origin: Origin) -> None:
    raise error


def bad_row(
    code: str,
    origin: Origin,
    what: str,
    *,
    field: str | None = None,
    seen: object = None,
    row: object = None,
    hint: str | None = None,
) -> DataError:
    """The complaint about one row: where (with the column, if `seen` can be found again in the file), what, an excerpt
    of `row` around `seen`, and the way out, which no complaint is without."""
    subject = f'"{field}" {what}' if field else what
    lines = [f"{locate(origin, seen, field)}  {subject}"]
    if row is not None:
        lines.append(f"  | {excerpt(row, around=seen)}")
    return DataError("\n".join(lines), hint=hint or MEND, code=code)


def broken_promise(error: Exception, row: Row, origin: Origin) -> DataError:
    """What no check foresaw is still a complaint about the row."""
    what = f"is not what its format promises ({type(error).__name__}: {error})"
    hint = "compare it with a row that works; format=... names the format by hand"
    return bad_row("E-DATA-0026", origin, what, row=row, hint=hint)


UNFORESEEN = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
"""What a row that nobody thought of may raise."""


def kind(value: object) -> str:
    """What `value` is, in words: `a number`, `an object`, `null`."""
    names = {type(None): "null", str: "text", dict: "an object", list: "a list", bool: "a boolean"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else f"a {type(value).__name__}")


def excerpt(value: object, around: object = None, width: int = 110) -> str:
    """One line of at most `width` characters of `value`, cut around `around` if that is in it."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = text.replace("\r", "\\r").replace("\n", "\\n")
    if len(text) <= width:
        return text
    needle = json.dumps(around, ensure_ascii=False, default=str) if around is not None else ""
    middle = max(text.find(needle), 0) + min(len(needle), width) // 2
    start = min(max(middle - width // 2, 0), len(text) - width)
    return ("…" if start > 0 else "") + text[start : start + width] + ("…" if start + width < len(text) else "")


@lru_cache(maxsize=4)
def _line_starts(path: str, size: int, changed: int) -> array[int]:
    """Where each line begins. Kept, so that many complaints about one file do not read it anew each time."""
    starts = array("Q", [0])
    with open(path, "rb") as file:
        for line in file:
            starts.append(starts[-1] + len(line))
    return starts


def _lines(path: str, first: int, count: int) -> str:
    """`count` lines from number `first` on; nothing of a file that is not there or too large to be searched."""
    try:
        about = os.stat(path)
        if about.st_size > MAX_SEARCHED:
            return ""
        starts = _line_starts(path, about.st_size, about.st_mtime_ns)
        with open(path, "rb") as file:
            file.seek(starts[first - 1])
            raw = file.read(starts[min(first - 1 + count, len(starts) - 1)] - starts[first - 1])
    except (OSError, IndexError):
        return ""
    return raw.decode("utf-8-sig" if first == 1 else "utf-8", "replace")


def locate(origin: Origin, seen: object, field: str | None = None) -> str:
    """`file:line:column` of the value `seen` where the row's text still holds it (after its key, if `field` ends in
    one), else what the origin knows."""
    if origin.line is None or not isinstance(seen, str) or not seen:
        return str(origin)
    num_lines = 1000 if origin.source.endswith(".json") else 1  # an object of a JSON array may run over many lines
    text = _lines(origin.source, origin.line, num_lines)
    value = json.dumps(seen, ensure_ascii=False)
    key = json.dumps((field or "").rpartition(".")[2], ensure_ascii=False)
    after_key = re.search(rf"{re.escape(key)}\s*:\s*(?={re.escape(value)})", text)
    index = after_key.end() if after_key else text.find(value)
    if index < 0:
        return str(origin)
    line = origin.line + text.count("\n", 0, index)
    return f"{origin.source}:{line}:{index - text.rfind(chr(10), 0, index)}"
