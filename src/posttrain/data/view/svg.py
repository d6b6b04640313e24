"""Tokens as a picture for documents: a grid of characters, a box behind each token, the same bytes every time.

Trained tokens are green and underlined, masked ones grey, cut ones red with a line through them.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from posttrain.data.view import Piece, RowView, visible
from posttrain.data.view.columns import columns

WIDTH, LINE, MARGIN, COLUMNS = 8.4, 24, 12, 92
FILL = {"trained": "#c9f0d3", "masked": "#eef0f2", "cut": "#fbd5d5"}
INK = {"trained": "#05300f", "masked": "#5b6470", "cut": "#7f1d1d"}
LEGEND = (("trained", "trained"), ("masked", "masked"), ("cut", "cut off"))


def as_svg(view: RowView, title: str) -> str:
    """The picture of `view`, with `title` for those who cannot see it."""
    cells, column, line, widest = [], 0, 0, 40
    for piece in view.pieces:
        for text, is_last in _lines(visible(piece.text)):
            if column + columns(text) > COLUMNS and column:
                column, line = 0, line + 1
            if text:
                cells.append(_cell(text, piece, column, line))
            widest = max(widest, column + columns(text))
            column, line = (column + columns(text), line) if is_last else (0, line + 1)
    height = (line + 2) * LINE + 2 * MARGIN
    width = widest * WIDTH + 2 * MARGIN
    legend, at = [], 0
    for state, label in LEGEND:
        legend.append(_cell(label, Piece(0, label, state == "trained", False, state == "cut"), at, line + 1))
        at += len(label) + 2
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
        f'viewBox="0 0 {width:.0f} {height}" role="img" '
        f'font-family="ui-monospace, monospace" font-size="14">\n<title>{escape(title)}</title>\n'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n{"".join(cells)}{"".join(legend)}</svg>\n'
    )


def _cell(text: str, piece: Piece, column: int, line: int) -> str:
    x, y, width = MARGIN + column * WIDTH, MARGIN + line * LINE, columns(text) * WIDTH
    ink, fill = INK[piece.state], FILL[piece.state]
    border = f' stroke="#7c3aed" stroke-width="{1 if piece.special else 0}"'
    strokes = {"trained": y + 19, "cut": y + 11}
    stroke = strokes.get(piece.state)
    rule = f'<path d="M{x:.1f} {stroke}h{width:.1f}" stroke="{ink}"/>' if stroke else ""
    return (
        f'<rect x="{x:.1f}" y="{y}" width="{width - 1:.1f}" height="21" rx="3" fill="{fill}"{border}/>'
        f'<text x="{x:.1f}" y="{y + 15}" fill="{ink}" textLength="{width - 1:.1f}" xml:space="preserve">'
        f"{escape(text)}</text>{rule}\n"
    )


def _lines(text: str) -> Iterator[tuple[str, bool]]:
    """The lines of a piece, and whether each is the last: what follows stands beside that one."""
    lines = text.split("\n")
    for i, line in enumerate(lines):
        for start in range(0, max(len(line), 1), COLUMNS):
            yield line[start : start + COLUMNS], i + 1 == len(lines)
