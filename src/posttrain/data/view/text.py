"""Tokens on a terminal: colours with underlining, or marks alone where there are no colours.

Trained tokens stand between ⟦ and ⟧, those cut off between ✂ and ✂ (`[[`, `]]` and `%%` where the output is no
Unicode); everything else is masked. With colours, trained text is also underlined and cut text struck out, so that
nothing hangs on telling green from red.

The two answers of a pair stand beside one another, below one another where the terminal is narrow. What both begin with
is dim, or between ‹ and › (`((`, `))`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from posttrain.data.view import PairView, Piece, RowView, View, visible
from posttrain.data.view.columns import Fragment, beside

RESET = "\x1b[0m"
STYLES = {"trained": "1;4;32", "masked": "2", "cut": "9;31"}
SPECIAL = "35"
SHARED_STYLES = {"trained": "2;4;32", "masked": "2", "cut": "2;9;31"}
MARKS = {"trained": ("⟦", "⟧"), "masked": ("", ""), "cut": ("✂", "✂"), "shared": ("‹", "›")}
ASCII_MARKS = {"trained": ("[[", "]]"), "masked": ("", ""), "cut": ("%%", "%%"), "shared": ("((", "))")}
NARROW = 60
"""Columns of a terminal that two texts do not stand beside one another in."""


def as_text(view: View, color: bool, encoding: str = "utf-8", width: int = 100) -> str:
    """The view as lines: a head with the counts, the text, and the notes. Pairs are `width` columns wide."""
    if isinstance(view, PairView):
        return _pair(view, color, encoding, width)
    if view.error is not None:
        hint = f"\n  = {view.error.hint}" if view.error.hint else ""
        return _encodable(f"{view.error.code} {visible(view.error.message).replace('↵', '')}{hint}\n", encoding)
    body = "".join(_styled(*fragment) for fragment in _fragments(view.pieces, color, encoding))
    return _encodable(f"{head(view)}\n{body}\n{_notes(view)}", encoding)


def head(view: View) -> str:
    """`train.jsonl:1  48 tokens: 12 trained, 36 masked (6 special)`"""
    if isinstance(view, PairView):
        sides = ", ".join(f"{name} {_counts(side)}" for name, side in view.sides)
        return f"{view.origin}  a pair: {sides}; the first {view.num_shared} alike"
    rating = (
        "" if view.label is None else f"; rated {'good' if view.label else 'bad'} (label {str(view.label).lower()})"
    )
    return f"{view.origin}  {_counts(view)}{rating}"


def legend(color: bool, encoding: str = "utf-8", pairs: bool = False) -> str:
    """What the colours or marks mean, in one line."""
    if color:
        styles = {**STYLES, "special": SPECIAL, **({"alike in both": SHARED_STYLES["masked"]} if pairs else {})}
        return "  ".join(_styled(style, name) for name, style in styles.items())
    marks = _marks(encoding)
    named = {
        "trained": "trained",
        "masked": "masked",
        "cut": "cut off",
        **({"shared": "alike in both"} if pairs else {}),
    }
    return "  ".join(f"{marks[state][0]}{name}{marks[state][1]}" for state, name in named.items())


def _counts(view: RowView) -> str:
    counts = view.counts
    parts = [f"{counts['trained']} trained", f"{counts['masked']} masked"]
    if counts["cut"]:
        parts.append(f"{counts['cut']} cut off, {counts['trained_lost']} of them to be trained")
    return f"{counts['tokens']} tokens: {', '.join(parts)} ({counts['special']} special)"


def _notes(*views: RowView) -> str:
    return "".join(f"  note: {note}\n" for note in dict.fromkeys(note for view in views for note in view.notes))


def _pair(view: PairView, color: bool, encoding: str, width: int) -> str:
    sides = [
        [("1" if color else "", f"{name}\n"), *_fragments(side.pieces, color, encoding)] for name, side in view.sides
    ]
    if width < NARROW:
        body = "\n".join("".join(_styled(*fragment) for fragment in side) for side in sides)
    else:
        left, right = ([(style, _encodable(text, encoding)) for style, text in side] for side in sides)
        body = "\n".join("".join(_styled(*part) for part in line).rstrip() for line in beside(left, right, width))
    return _encodable(f"{head(view)}\n{body}\n{_notes(view.chosen, view.rejected)}", encoding)


def _fragments(pieces: tuple[Piece, ...], color: bool, encoding: str) -> list[Fragment]:
    """The text in parts, each with its style; without colours it is one, with marks."""
    return [(_style(piece), visible(piece.text)) for piece in pieces] if color else [("", _marked(pieces, encoding))]


def _style(piece: Piece) -> str:
    return f"{(SHARED_STYLES if piece.shared else STYLES)[piece.state]}{';' + SPECIAL if piece.special else ''}"


def _styled(style: str, text: str) -> str:
    return f"\x1b[{style}m{text}{RESET}" if style else text


def _marked(pieces: Iterable[Piece], encoding: str) -> str:
    marks, out = _marks(encoding), []
    for shared, part in groupby(pieces, key=lambda piece: piece.shared):
        texts = (
            _between(marks[state], visible("".join(piece.text for piece in group)))
            for state, group in groupby(part, key=lambda piece: piece.state)
        )
        out.append(_between(marks["shared"], "".join(texts)) if shared else "".join(texts))
    return "".join(out)


def _between(marks: tuple[str, str], text: str) -> str:
    body = text.removesuffix("\n")
    return f"{marks[0]}{body}{marks[1]}{text[len(body) :]}"


def _marks(encoding: str) -> dict[str, tuple[str, str]]:
    try:
        "⟦⟧✂‹›".encode(encoding)
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
