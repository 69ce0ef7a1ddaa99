"""Pictures: what is drawn, read back from matplotlib's objects."""

import io
import sys

import numpy as np
import pytest
from matplotlib.colors import to_rgba

import muonclip_jax as mc
from muonclip_jax import plots


def drawn(figure):
    """The figure renders."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=20)
    assert buffer.getvalue().startswith(b"\x89PNG")
    return figure.axes


def test_head_map_has_a_row_a_layer_and_a_column_a_head():
    stack = np.arange(6.0).reshape(2, 3)
    stack[1, 0] = np.inf
    axes, bar = drawn(plots.head_map({"first": [7.0, np.nan], "rest": stack}, "max logit"))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["first", "rest/0", "rest/1"]
    assert bar.get_ylabel() == "max logit" and axes.get_xlabel() == "head"
    image = axes.images[0]
    cells = image.get_array()
    np.testing.assert_array_equal(cells.mask, [[0, 0, 1], [0, 0, 0], [0, 0, 0]])
    np.testing.assert_array_equal(cells[1], [0, 1, 2])
    assert image.get_clim() == (0, 7)
    colors = image.to_rgba(cells)
    for row, column in ((0, 1), (2, 0)):  # NaN and Inf
        np.testing.assert_allclose(colors[row, column], to_rgba(plots.WARNING), atol=1 / 255)
    drawn(plots.head_map({"attn": [np.nan]}, "γ"))


def test_curves_have_a_panel_a_block_and_a_line_a_head():
    steps = np.arange(0, 50, 10)
    values = {f"layers/{i}": np.outer(steps, np.arange(3)) + i for i in range(5)}
    figure = plots.curves(steps, values | {"mean": steps / 2}, "max logit", threshold=30)
    panels = drawn(figure)
    assert [axes.get_title() for axes in panels[:6]] == [*values, "mean"]
    assert [axes.get_visible() for axes in panels] == [True] * 6 + [False] * 2
    for axes, block in zip(panels, values.values(), strict=False):
        *lines, threshold = axes.lines
        np.testing.assert_array_equal([line.get_ydata() for line in lines], block.T)
        np.testing.assert_array_equal(threshold.get_ydata(), [30, 30])
    assert len(panels[5].lines) == 2
    assert figure.get_supylabel() == "max logit"


def test_spectra_start_at_one():
    values = {"q": np.array([[4.0, 2, 1], [0, 0, 0]]), "k": np.array([3.0, 3])}
    panels = drawn(plots.spectra(values))
    np.testing.assert_array_equal(panels[0].lines[0].get_ydata(), [1, 0.5, 0.25])
    np.testing.assert_array_equal(panels[0].lines[1].get_ydata(), [0, 0, 0])
    np.testing.assert_array_equal(panels[1].lines[0].get_xdata(), [1, 2])
    assert all(axes.get_yscale() == "log" for axes in panels)


def test_other_pictures_keep_their_style():
    import matplotlib

    before = dict(matplotlib.rcParams)
    plots.spectra({"q": [1.0]})
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plots.head_map({}, "x"), r"plots\.head_map: no values"),
        (lambda: plots.head_map({"a": 3.0}, "x"), r"a has shape \(\), nothing to draw"),
        (lambda: plots.spectra({"a": np.ones((2, 0))}), r"a has shape \(2, 0\), nothing to draw"),
        (lambda: plots.curves([0, 1], {"a": [[1.0, 2]]}, "x"), r"a has shape \(1, 2\).*2 steps"),
    ],
)
def test_refuses(draw, words):
    with pytest.raises(ValueError, match=words):
        draw()


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"head_map draws.*pip install 'matplotlib"):
        mc.plots.head_map({"a": [1.0]}, "x")
