"""Where an element of a JSON array ends that is not JSON, so that the elements after it can be read.

Brackets are counted outside of strings, whatever stands between them: a comma too many, a comment, single quotes,
`None`, a line feed within a string. Where that cannot tell (a bracket or a quote too few, and all that follows would be
taken for part of this element), nothing is told: reading ends there.
"""

from __future__ import annotations

import re

TOKEN = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)
NEXT_ELEMENT = re.compile(r"[}\]\"]\s*,\s*[{\[]\s*[\"{\[]")
"""What parts two elements. Within a string it is a sign that the quotes are counted wrongly."""
PAIRS = {"}": "{", "]": "["}
AFTER = re.compile(r"\s*(?:,\s*[^\s,\]]|\])")
"""What follows an element: another one, or the end of the array."""


def end_of_element(text: str, start: int) -> int | None:
    """Where the element of an array that begins at `start` ends; None where that cannot be told."""
    opened: list[str] = []
    for token in TOKEN.finditer(text, start):
        found = token[0]
        if found in "[{":
            opened.append(found)
        elif found in "]}" and opened:
            if opened.pop() != PAIRS[found]:
                return None
            if not opened:
                return _checked(text, token.end())
        elif found in ",]" and not opened:  # of what has no brackets: `None`, or nothing
            return _checked(text, token.start())
        elif found == "}" or NEXT_ELEMENT.search(found):
            return None
    return None


def _checked(text: str, end: int) -> int | None:
    return end if AFTER.match(text, end) else None
