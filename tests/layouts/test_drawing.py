"""Pictures of layouts: which part of each parameter is whose head's."""

import itertools
import xml.etree.ElementTree as ET

import pytest

import muonclip_jax as mc
from muonclip_jax._core.pictures import HUES
from muonclip_jax._layouts.drawing import picture_of
from tests.layouts.test_layouts import STORAGES

SVG = "{http://www.w3.org/2000/svg}"


def drawn(layout):
    """By parameter's row, (from, to, what) of every stripe, in order."""
    rows = {}
    root = ET.fromstring(picture_of(layout.pieces, shared_keys=layout.shared_keys))
    left = min(float(rect.get("x")) for rect in root.iter(f"{SVG}rect"))
    for rect in root.iter(f"{SVG}rect"):
        title = rect.find(f"{SVG}title")
        if title is not None:
            start = (float(rect.get("x")) - left) / 480
            stop = start + float(rect.get("width")) / 480
            hue = HUES.index(rect.get("fill"))
            rows.setdefault(rect.get("y"), []).append((start, stop, title.text, hue))
    return [sorted(row) for row in rows.values()]


# (layout, what stands in each parameter from left to right)
PICTURES = {
    "all queries first": (
        mc.layouts.fused_qkv(2, kernel="c_attn", out="c_proj"),
        [["q 0", "q 1", "k 0", "k 1", "v 0", "v 1"], ["o 0", "o 1"]],
    ),
    "head by head": (
        mc.layouts.fused_qkv(2, axes="in (heads part features)"),
        [["q 0", "k 0", "v 0", "q 1", "k 1", "v 1"], ["o 0", "o 1"]],
    ),
    "interleaved": (
        mc.Layout("own", (mc.layouts.Piece("q", "w", "in (features heads)", {"heads": 2}),
                          mc.layouts.Piece("k", "u"))),
        [["q 0", "q 1"] * 3, ["k 0", "k 1", "k 2", "k 3"]],
    ),
    "shared keys": (
        mc.layouts.gqa(value=None, out=None), [["q 0", "q 1", "q 2", "q 3"], ["k 0", "k 1"]]
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PICTURES)
def test_a_layout_shows_which_part_is_whose_heads(name):
    layout, expected = PICTURES[name]
    rows = drawn(layout)
    assert [[what for *_, what, _ in row] for row in rows] == expected
    for row in rows:
        assert row[0][0] == pytest.approx(0, abs=1e-4) and row[-1][1] == pytest.approx(1, abs=1e-4)
        assert all(hue == int(what[-1]) % len(HUES) for *_, what, hue in row)


@pytest.mark.parametrize("name", STORAGES)
def test_every_kind_of_layout_can_be_drawn(name):
    layout = STORAGES[name].layout
    rows = drawn(layout)
    assert {what.split()[0] for row in rows for *_, what, _ in row} == {
        piece.role for piece in layout.pieces if not piece.is_vector
    }
    for row in rows:  # no entry is two heads'
        assert all(a[1] <= b[0] + 1e-4 for a, b in itertools.pairwise(row))
