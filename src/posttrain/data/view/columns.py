"""Two texts beside one another on a terminal, wrapped to half its width each."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator
from itertools import zip_longest

Fragment = tuple[str, str]
"""A style and a text in it."""
BETWEEN = " | "


def beside(left: list[Fragment], right: list[Fragment], width: int) -> Iterator[list[Fragment]]:
    """The lines, each in fragments, of `width` columns at most."""
    half = (width - len(BETWEEN)) // 2
    nothing: list[Fragment] = []
    for one, other in zip_longest(_wrapped(left, half), _wrapped(right, half), fillvalue=nothing):
        yield [*one, ("", " " * (half - sum(columns(text) for _, text in one)) + BETWEEN), *other]


def columns(text: str) -> int:
    """The cells that `text` takes: East Asian characters and most emoji take two, combining ones none."""
    return sum(
        0 if unicodedata.combining(character) else 2 if unicodedata.east_asian_width(character) in "WF" else 1
        for character in text
    )


def _wrapped(fragments: list[Fragment], width: int) -> list[list[Fragment]]:
    lines: list[list[Fragment]] = [[]]
    filled = 0
    for style, text in fragments:
        piece = ""
        for character in text:
            size = columns(character)
            if character == "\n" or filled + size > width:
                lines[-1].append((style, piece))
                lines.append([])
                piece, filled = "", 0
            if character != "\n":
                piece, filled = piece + character, filled + size
        lines[-1].append((style, piece))
    written = [[(style, text) for style, text in line if text] for line in lines]
    return written if written[-1] else written[:-1]  # what ends with a line break
