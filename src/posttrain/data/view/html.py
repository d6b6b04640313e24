"""Tokens as a page of its own: no script, nothing fetched, all text escaped, and a policy that says so to the browser.

Trained text is bold on green and underlined, masked text grey, cut text struck out, special tokens framed. A token
tells its number and state where the mouse rests on it.
"""

from __future__ import annotations

import base64
import hashlib
from html import escape

from posttrain.data.view import Piece, RowView, visible
from posttrain.data.view.text import head

STYLE = """
:root { color-scheme: light dark; }
body { font: 15px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
pre { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.trained { background: #c9f0d3; color: #05300f; font-weight: 600; text-decoration: underline; }
.masked { color: #6b7280; }
.cut { background: #fbd5d5; color: #7f1d1d; text-decoration: line-through; }
.special { outline: 1px solid #7c3aed; border-radius: 3px; }
.note { color: #92600a; }
h2 { font-size: 1rem; }
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head><body>
<h1>{title}</h1>
<p><span class="trained">trained</span> <span class="masked">masked</span> <span class="cut">cut off</span>
<span class="special">special token</span></p>
"""


def as_html(views: list[RowView], title: str = "What the model sees") -> str:
    """The whole page."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    rows = "".join(_row(view) for view in views)
    return HEAD.format(title=escape(visible(title)), digest=digest, style=STYLE) + rows + "</body></html>\n"


def _row(view: RowView) -> str:
    if view.error is not None:
        message = escape(visible(f"{view.error.code} {view.error.message}\n{view.error.hint or ''}").replace("↵", ""))
        return f"<h2>{escape(visible(view.origin))}</h2><pre>{message}</pre>\n"
    notes = "".join(f'<p class="note">{escape(visible(note))}</p>' for note in view.notes)
    spans = "".join(_span(piece) for piece in view.pieces)
    return f"<h2>{escape(visible(head(view)))}</h2><pre>{spans}</pre>{notes}\n"


def _span(piece: Piece) -> str:
    classes = f"{piece.state} special" if piece.special else piece.state
    return f'<span class="{classes}" title="{piece.id} {piece.state}">{escape(visible(piece.text))}</span>'
