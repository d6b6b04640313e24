"""What a run logged, as curves: a picture that any browser shows, made of text alone, the same bytes every time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, GAP = 640, 180, 64, 28, 30, 18
INK = ("#2563eb", "#b45309", "#059669", "#9333ea")


def curves(
    log_history: Sequence[Mapping[str, Any]], panels: Sequence[Sequence[str]], title: str, smoothing: float = 0.0
) -> str:
    """An SVG with a panel for each of `panels`, the names that share it; steps go to the right. `smoothing` (0 to 1)
    draws a running mean over the values, which then stand pale behind it."""
    drawn = [_panel(log_history, names, number, smoothing) for number, names in enumerate(panels)]
    height = len(panels) * (HEIGHT + TOP + BOTTOM + GAP) + TOP
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH + LEFT + 20}" height="{height}" '
        f'viewBox="0 0 {WIDTH + LEFT + 20} {height}" role="img" font-family="system-ui, sans-serif" font-size="12">\n'
        f'<title>{escape(title)}</title>\n<rect width="100%" height="100%" fill="#ffffff"/>\n'
        f'<text x="{LEFT}" y="18" font-size="14" font-weight="600">{escape(title)}</text>\n{"".join(drawn)}</svg>\n'
    )


def _panel(log_history: Sequence[Mapping[str, Any]], names: Sequence[str], number: int, smoothing: float) -> str:
    lines = {name: _points(log_history, name) for name in names}
    seen = [value for points in lines.values() for _, value in points]
    if not seen:
        return ""
    last = max(step for points in lines.values() for step, _ in points)
    low, high = min(0.0, *seen), max(seen)
    high = high if high > low else low + 1
    top = TOP + number * (HEIGHT + TOP + BOTTOM + GAP) + TOP

    def at(step: float, value: float) -> str:
        return f"{LEFT + WIDTH * step / last:.1f} {top + HEIGHT * (high - value) / (high - low):.1f}"

    parts = [
        f'<path d="M{LEFT} {top}V{top + HEIGHT}H{LEFT + WIDTH}" fill="none" stroke="#9ca3af"/>',
        f'<text x="{LEFT - 6}" y="{top + 4}" text-anchor="end">{high:.3g}</text>',
        f'<text x="{LEFT - 6}" y="{top + HEIGHT}" text-anchor="end">{low:.3g}</text>',
        f'<text x="{LEFT + WIDTH}" y="{top + HEIGHT + 16}" text-anchor="end">step {last:.0f}</text>',
    ]
    for place, (name, points) in enumerate(lines.items()):
        ink = INK[place % len(INK)]
        if smoothing:
            parts.append(_line(points, at, ink, 0.25))
        parts.append(_line(_smoothed(points, smoothing), at, ink, 1.0))
        parts.append(f'<text x="{LEFT + 8 + 200 * place}" y="{top - 8}" fill="{ink}">{escape(name)}</text>')
    return "\n".join(parts) + "\n"


def _line(points: Sequence[tuple[float, float]], at: Any, ink: str, opacity: float) -> str:
    places = "L".join(at(step, value) for step, value in points)
    return f'<path d="M{places}" fill="none" stroke="{ink}" stroke-width="1.8" stroke-opacity="{opacity}"/>'


def _points(log_history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    found = [(float(entry["step"]), entry.get(name)) for entry in log_history if "step" in entry]
    return [(step, float(value)) for step, value in found if value is not None and math.isfinite(value)]


def _smoothed(points: Sequence[tuple[float, float]], smoothing: float) -> list[tuple[float, float]]:
    """Running means that forget, corrected for their beginning."""
    made, total, weight = [], 0.0, 0.0
    for step, value in points:
        total, weight = smoothing * total + (1 - smoothing) * value, smoothing * weight + (1 - smoothing)
        made.append((step, total / weight))
    return made
