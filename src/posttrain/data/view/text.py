"""Tokens on a terminal: colours with underlining, or marks alone where there are no colours.

Trained tokens stand between ⟦ and ⟧, those cut off between ✂ and ✂ (`[[`, `]]` and `%%` where the output is no
Unicode); everything else is masked. With colours, trained text is also underlined and cut text struck out, so that
nothing hangs on telling green from red.
"""

from __future__ import annotations

from itertools import groupby

from posttrain.data.view import Piece, RowView, visible

RESET = "\x1b[0m"
STYLES = {"trained": "1;4;32", "masked": "2", "cut": "9;31"}
SPECIAL = "35"
MARKS = {"trained": ("⟦", "⟧"), "masked": ("", ""), "cut": ("✂", "✂")}
ASCII_MARKS = {"trained": ("[[", "]]"), "masked": ("", ""), "cut": ("%%", "%%")}


def as_text(view: RowView, color: bool, encoding: str = "utf-8") -> str:
    """The view as lines: a head with the counts, the text, and the notes."""
    if view.error is not None:
        hint = f"\n  = {view.error.hint}" if view.error.hint else ""
        return _encodable(f"{view.error.code} {visible(view.error.message).replace('↵', '')}{hint}\n", encoding)
    body = _colored(view.pieces) if color else _marked(view.pieces, encoding)
    notes = "".join(f"  note: {note}\n" for note in view.notes)
    return _encodable(f"{head(view)}\n{body}\n{notes}", encoding)


def head(view: RowView) -> str:
    """`train.jsonl:1  48 tokens: 12 trained, 36 masked (6 special)`"""
    counts = view.counts
    parts = [f"{counts['trained']} trained", f"{counts['masked']} masked"]
    if counts["cut"]:
        parts.append(f"{counts['cut']} cut off, {counts['trained_lost']} of them to be trained")
    return f"{view.origin}  {counts['tokens']} tokens: {', '.join(parts)} ({counts['special']} special)"


def legend(color: bool, encoding: str = "utf-8") -> str:
    """What the colours or marks mean, in one line."""
    if color:
        return "  ".join(
            [*(f"\x1b[{style}m{name}{RESET}" for name, style in STYLES.items()), f"\x1b[{SPECIAL}mspecial{RESET}"]
        )
    (a, b), (c, d) = (_marks(encoding)[name] for name in ("trained", "cut"))
    return f"{a}trained{b}  masked  {c}cut off{d}"


def _colored(pieces: tuple[Piece, ...]) -> str:
    return "".join(
        f"\x1b[{STYLES[piece.state]}{';' + SPECIAL if piece.special else ''}m{visible(piece.text)}{RESET}"
        for piece in pieces
    )


def _marked(pieces: tuple[Piece, ...], encoding: str) -> str:
    marks, out = _marks(encoding), []
    for state, group in groupby(pieces, key=lambda piece: piece.state):
        opening, closing = marks[state]
        text = visible("".join(piece.text for piece in group))
        body = text.removesuffix("\n")
        out.append(opening + body + closing + text[len(body) :])
    return "".join(out)


def _marks(encoding: str) -> dict[str, tuple[str, str]]:
    try:
        "⟦⟧✂".encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return ASCII_MARKS
    return MARKS


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except LookupError:
        return text.encode("ascii", "backslashreplace").decode("ascii")
    except UnicodeEncodeError:
        return text.replace("↵", "").encode(encoding, "backslashreplace").decode(encoding)
    return text
