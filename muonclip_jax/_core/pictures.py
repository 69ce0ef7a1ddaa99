"""Small pictures as SVG text, for a notebook: no file, no other package, light or dark.

Lines and letters have the page's own colour (`currentColor`), and what has a colour is translucent
or as far from white as from black. Every mark says what it is when it is pointed at.
"""

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from muonclip_jax._core.tables import number

BLUE, RED = "#3b82f6", "#dc2626"
HUES = (BLUE, "#d97706", "#059669", "#c026d3")
_CELL, _LETTER = 16, 6.6  # of a heat map; the width of a letter
_BAR, _WIDTH = 24, 480


class Stripe(NamedTuple):
    """A part of a bar: from where to where, what stands on it, and the number of its hue."""

    start: float
    stop: float
    text: str
    hue: int


def heat_map(rows: Mapping[str, np.ndarray], outlined: Mapping[str, np.ndarray], label: str) -> str:
    """One number a cell: the larger the fuller its colour, red where it is not finite.

    Args:
      rows: By name, `[cells]`; some may be longer than others.
      outlined: By the same names, bool `[cells]`: which cells have a frame.
      label: What the numbers are, in one line.
    """
    left = _left(rows)
    every = np.concatenate([np.asarray(row, float) for row in rows.values()])
    finite = every[np.isfinite(every)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    drawn = []
    for y, (name, row) in enumerate(rows.items()):
        drawn.append(_text(left - 6, _CELL * (y + 0.75), name, "end"))
        for x, value in enumerate(map(float, row)):
            share = (value - low) / (high - low) if high > low else 0.5
            fill, opacity = (BLUE, 0.1 + 0.9 * share) if math.isfinite(value) else (RED, 1)
            frame = "currentColor" if outlined[name][x] else "none"
            drawn.append(
                f'<rect x="{left + _CELL * x + 1:g}" y="{_CELL * y + 1}" width="{_CELL - 2}" '
                f'height="{_CELL - 2}" fill="{fill}" fill-opacity="{opacity:.2f}" '
                f'stroke="{frame}" stroke-width="2">'
                f"<title>{html.escape(name)}, {x}: {value:.4g}</title></rect>"
            )
    bottom = _CELL * (len(rows) + 1.25)
    drawn.append(_text(left, bottom, f"{label}: {number(low)} (faint) to {number(high)} (full)"))
    width = left + max(_CELL * max(map(len, rows.values())), _LETTER * (len(label) + 36))
    return _svg(width, bottom + 8, f"Heat map of {label}", drawn)


def bars(rows: Mapping[str, Sequence[Stripe]], label: str) -> str:
    """Bars of stripes from 0 to 1: what is left out of a bar stays empty."""
    left = _left(rows)
    drawn = []
    for index, (name, stripes) in enumerate(rows.items()):
        y = (_BAR + 8) * index + 1
        drawn.append(_text(left - 6, y + 0.7 * _BAR, name, "end"))
        drawn += [part for stripe in stripes for part in _stripe(stripe, left, y)]
        drawn.append(
            f'<rect x="{left:g}" y="{y}" width="{_WIDTH}" height="{_BAR}" fill="none" '
            'stroke="currentColor"/>'
        )
    return _svg(left + _WIDTH + 1, (_BAR + 8) * len(rows), label, drawn)


def _stripe(stripe: Stripe, left: float, y: int) -> Iterable[str]:
    x, width = left + _WIDTH * stripe.start, _WIDTH * (stripe.stop - stripe.start)
    yield (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_BAR}" '
        f'fill="{HUES[stripe.hue % len(HUES)]}" fill-opacity="0.35" stroke="currentColor" '
        'stroke-opacity="0.3" stroke-width="0.5">'
        f"<title>{html.escape(stripe.text)}</title></rect>"
    )
    if width > _LETTER * len(stripe.text):
        yield _text(x + width / 2, y + 0.7 * _BAR, stripe.text, "middle")


def curve(x: np.ndarray, y: np.ndarray, label: str) -> str:
    """A line over a logarithmic axis, from 0 up to its top or 1, with a faint one at 1."""
    height, left = 160.0, 24.0
    top = max(1.0, float(y.max()))
    decades = np.log10(x)
    across = left + (_WIDTH - left) * (decades - decades[0]) / (decades[-1] - decades[0])
    up = lambda value: 8 + height * (1 - np.asarray(value) / top)  # noqa: E731
    points = " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up(y), strict=True))
    drawn = [
        f'<path d="M{left} 8V{height + 8}H{_WIDTH}" fill="none" stroke="currentColor"/>',
        f'<path d="M{left} {up(1.0):.1f}H{_WIDTH}" stroke="currentColor" stroke-opacity="0.4" '
        'stroke-dasharray="4 4"/>',
        f'<polyline points="{points}" fill="none" stroke="{BLUE}" stroke-width="2"/>',
        _text(left - 6, float(up(1.0)) + 4, "1", "end"),
        _text(left - 6, height + 12, "0", "end"),
    ]
    for decade in range(math.ceil(decades[0]), math.floor(decades[-1]) + 1):
        at = float(np.interp(decade, decades, across))
        drawn.append(_text(min(at, _WIDTH - 8), height + 24, f"{10.0**decade:g}", "middle"))
    drawn.append(_text(left, height + 42, label))
    return _svg(_WIDTH, height + 50, label, drawn)


def _left(names: Iterable[str]) -> float:
    """How much room names need at the left."""
    return 12 + _LETTER * max(map(len, names))


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{html.escape(text)}</text>'


def _svg(width: float, height: float, label: str, drawn: Iterable[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        f'width="{width:.0f}" role="img" aria-label="{html.escape(label)}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="currentColor">'
        + "".join(drawn)
        + "</svg>"
    )
