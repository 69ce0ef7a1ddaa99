"""A layout for people: its pieces as a table, and as a picture where heads lie in parameters."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np

from muonclip_jax._core.axes import Cut, parse
from muonclip_jax._core.pictures import Stripe, bars
from muonclip_jax._core.tables import Sheet
from muonclip_jax._layouts.pieces import Part, Piece
from muonclip_jax._layouts.roles import ROLES

# Lengths of axes that a layout leaves to the shapes: enough of each to see their order.
_HEADS, _FEATURES = 4, 3


def sheet_of(name: str, pieces: Sequence[Piece]) -> Sheet:
    """What the layout says, piece by piece."""
    rows = [
        (
            piece.role,
            piece.parameter,
            piece.axes or "in heads features, or flat",
            ", ".join(f"{axis} {length}" for axis, length in dict(piece.sizes).items()),
            ", ".join(f"{axis} {_shown(cut)}" for axis, cut in dict(piece.select).items()),
        )
        for piece in pieces
    ]
    headers = ("role", "parameter", "axes", "lengths", "takes of it")
    told = [i for i, column in enumerate(zip(*rows, strict=True)) if any(column)]
    rows = [[row[i] for i in told] for row in rows]
    return Sheet([headers[i] for i in told], rows, title=f"Layout {name}")


def picture_of(pieces: Sequence[Piece], *, shared_keys: bool) -> str:
    """Each parameter as a bar along all its axes but those of inputs and outputs, as it is stored.
    Lengths that the layout does not tell are drawn as four heads of three features."""
    stripes: dict[str, list[Stripe]] = {}
    for piece in (piece for piece in pieces if not piece.is_vector):
        least: dict[str, int] = {}
        for cut in (dict(each.select) for each in pieces if each.parameter == piece.parameter):
            least |= {axis: max(least.get(axis, 0), _least(cut[axis])) for axis in cut}
        shared = shared_keys and ROLES[piece.role].side in ("key", "value") and piece.role != "o"
        part = _sketch(piece, least, heads=_HEADS // 2 if shared else _HEADS)
        stripes.setdefault(piece.parameter, []).extend(_stripes(part))
    return bars(stripes, "Which part of each parameter is whose head's")


def _sketch(piece: Piece, least: Mapping[str, int], heads: int) -> Part:
    """The piece of a parameter with few entries. What is told stays, but features that are not cut;
    `least` is how long axes are that are cut."""
    flat = "(heads features) out" if piece.role == "o" else "in (heads features)"
    axes = parse(str(piece), piece.axes or flat)
    told = dict(piece.sizes)
    lengths = {}
    for name in (name for axis in axes for name in axis):
        if name in ("in", "out"):
            lengths[name] = 1
        elif name in least:
            lengths[name] = told.get(name, least[name])
        elif name == "features":
            lengths[name] = _FEATURES
        else:
            lengths[name] = told.get(name, heads if ROLES[piece.role].per_head else 1)
    shape = tuple(math.prod(lengths[name] for name in axis) for axis in axes)
    return replace(piece, sizes=lengths).fit((piece.parameter,), shape)


def _stripes(part: Part) -> Iterator[Stripe]:
    """The entries of each head, as far as they lie side by side."""
    entries = np.arange(math.prod(part.view.shape)).reshape(part.view.shape)
    total = entries.size
    for head, positions in enumerate(part.take(entries)):
        here = np.sort(positions.ravel())
        name = f"{part.role} {head}" if part.heads > 1 else part.role
        for run in np.split(here, np.flatnonzero(np.diff(here) > 1) + 1):
            yield Stripe(run[0] / total, (run[-1] + 1) / total, name, head)


def _shown(cut: object) -> str:
    if not isinstance(cut, tuple):
        return str(cut)
    return ":".join("" if end is None else str(end) for end in cut)


def _least(cut: Cut) -> int:
    """How long an axis is at least of which this is taken; twice the part at one of its ends."""
    if isinstance(cut, int):
        return cut + 1
    start, stop = cut
    return stop if stop and stop > 0 else 2 * abs(stop or start or 1)
