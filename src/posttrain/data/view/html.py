"""Tokens as a page of its own: no script, nothing fetched, all text escaped, and a policy that says so to the browser.

Trained text is bold on green and underlined, masked text grey, cut text struck out, special tokens framed. A token
tells its number and state where the mouse rests on it. The two answers of a pair stand beside one another, what both
begin with faint.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape

from posttrain.data.view import PairView, Piece, RowView, View, visible
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
h2, h3 { font-size: 1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 2rem; }
.shared { opacity: 0.45; }
"""
HEAD = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'sha256-{digest}'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>{style}</style></head><body>
<h1>{title}</h1>
<p><span class="trained">trained</span> <span class="masked">masked</span> <span class="cut">cut off</span>
<span class="special">special token</span>{shared}</p>
"""
SHARED = ' <span class="masked shared">alike in both answers</span>'


def as_html(views: Sequence[View], title: str = "What the model sees") -> str:
    """The whole page."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    shared = SHARED if any(isinstance(view, PairView) for view in views) else ""
    rows = "".join(_row(view) for view in views)
    return (
        HEAD.format(title=escape(visible(title)), digest=digest, style=STYLE, shared=shared) + rows + "</body></html>\n"
    )


def _row(view: View) -> str:
    if isinstance(view, PairView):
        sides = "".join(f"<div><h3>{name}</h3>{_text(side)}</div>" for name, side in view.sides)
        return f'<h2>{escape(visible(head(view)))}</h2><div class="pair">{sides}</div>\n'
    if view.error is not None:
        message = escape(visible(f"{view.error.code} {view.error.message}\n{view.error.hint or ''}").replace("↵", ""))
        return f"<h2>{escape(visible(view.origin))}</h2><pre>{message}</pre>\n"
    return f"<h2>{escape(visible(head(view)))}</h2>{_text(view)}\n"


def _text(view: RowView) -> str:
    notes = "".join(f'<p class="note">{escape(visible(note))}</p>' for note in view.notes)
    return f"<pre>{''.join(_span(piece) for piece in view.pieces)}</pre>{notes}"


def _span(piece: Piece) -> str:
    classes = piece.state + " special" * piece.special + " shared" * piece.shared
    return f'<span class="{classes}" title="{piece.id} {piece.state}">{escape(visible(piece.text))}</span>'
