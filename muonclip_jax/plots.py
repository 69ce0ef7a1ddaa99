"""Pictures of heads and activations, drawn with matplotlib: `pip install matplotlib`.

Each takes what the other diagnostics give, most often numbers by block, and returns a `Figure` to
save, `mc.plots.head_map(...).savefig("heads.png")`. Nothing is shown on a screen.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from jax.typing import ArrayLike

from muonclip_jax._diagnostics.coordinate_check import CoordinateCheck
from muonclip_jax._diagnostics.report import layers

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

__all__ = ["coordinates", "curves", "head_map", "spectra"]

INK, FAINT, WARNING = "#1f2933", "#9aa5b1", "#dc2626"
STYLE: "dict[RcKeyType, Any]" = {
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.titlesize": "medium",
    "grid.color": "#e4e7eb",
    "legend.frameon": False,
    "xtick.color": INK,
    "ytick.color": INK,
}
_WIDTH, _COLUMNS = 9, 4  # of a figure in inches, and of panels in it


def _drawing(draw: Callable[..., "Figure"]) -> Callable[..., "Figure"]:
    """Imports matplotlib when something is drawn, not before, and draws in our style."""

    @functools.wraps(draw)
    def in_style(*args, **options):
        try:
            import matplotlib
        except ImportError as error:
            raise ImportError(
                f"plots.{draw.__name__} draws with matplotlib, which is not installed: "
                "pip install 'matplotlib>=3.10'."
            ) from error
        with matplotlib.rc_context(STYLE):
            return draw(*args, **options)

    return in_style


@_drawing
def head_map(values: Mapping[str, ArrayLike], label: str) -> "Figure":
    """Draws one number a head as a heat map: layers down, heads across. NaN and Inf are red.

    Args:
      values: By block, `[stack..., heads]`, such as
        `{name: block.max_logits for name, block in report.blocks.items()}`.
      label: What the numbers are.

    Returns:
      The figure.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: There are no values, or a block's are a scalar.

    Example:
      >>> figure = mc.plots.head_map({"attn": sown[("attn",)]}, "max logit")
      >>> len(figure.axes)  # the map and its scale
      2
    """
    rows = {
        layer: array[index]
        for name, array in _arrays("head_map", values).items()
        for index, layer in layers(name, array.shape[:-1])
    }
    cells = np.ma.masked_all((len(rows), max(map(len, rows.values()))))
    for cell, heads in zip(cells, rows.values(), strict=True):
        cell[: len(heads)] = heads
    finite = cells.compressed()[np.isfinite(cells.compressed())]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 1)
    cells[~np.isfinite(cells)] = high + 1  # off the scale; what is not finite would not be drawn
    figure = _figure(height=1.1 + 0.28 * max(len(rows), 4))
    axes = figure.subplots()
    axes.grid(visible=False)
    colors = _colors().with_extremes(over=WARNING)
    image = axes.imshow(
        cells, aspect="auto", interpolation="nearest", cmap=colors, vmin=low, vmax=high
    )
    axes.set_yticks(range(len(rows)), rows)
    axes.locator_params("x", integer=True)
    axes.set(xlabel="head")
    figure.colorbar(image, label=label)
    return figure


@_drawing
def curves(
    steps: ArrayLike,
    values: Mapping[str, ArrayLike],
    label: str,
    *,
    threshold: float | None = None,
) -> "Figure":
    """Draws numbers of heads over time: a panel a block, a line a head, the first dark.

    Args:
      steps: When, `[steps]`.
      values: By block, `[steps, heads]`, or `[steps]` for one line.
      label: What the numbers are.
      threshold: Where to draw a dashed red line.

    Returns:
      The figure.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: There are no values, or other than one for each step.

    Example:
      >>> maxima = {"attn": jnp.ones((3, 2))}
      >>> figure = mc.plots.curves([0, 10, 20], maxima, "max logit", threshold=100.0)
      >>> len(figure.axes)
      1
    """
    steps = np.asarray(steps)
    arrays = _arrays("curves", values)
    for name, array in arrays.items():
        if array.ndim > 2 or len(array) != len(steps):
            raise ValueError(
                f"plots.curves: {name} has shape {array.shape}, expected [steps, heads] with "
                f"{len(steps)} steps."
            )
    figure, panels = _panels(list(arrays), "step", label)
    for axes, array in zip(panels, arrays.values(), strict=True):
        heads = array.reshape(len(steps), -1).T
        for head, color in zip(heads, shades(len(heads)), strict=True):
            axes.plot(steps, head, color=color, lw=1)
        if threshold is not None:
            axes.axhline(threshold, color=WARNING, ls="--", lw=1.2)
    return figure


@_drawing
def spectra(values: Mapping[str, ArrayLike], label: str = "σ over the largest") -> "Figure":
    """Draws singular values over the largest of their matrix: a panel a block, a line a matrix.

    Args:
      values: By block, `[..., k]`, the largest first, as `singular_values` gives them:
        `{name: mc.singular_values(heads["q"]) for name, heads in head_matrices(...).items()}`.
      label: What the numbers are.

    Returns:
      The figure.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: There are no values, or a block's are a scalar.

    Example:
      >>> heads = mc.head_matrices(params, layout)["attn"]
      >>> values = {role: mc.singular_values(matrices) for role, matrices in heads.items()}
      >>> len(mc.plots.spectra(values).axes)  # q, k, v, o
      4
    """
    arrays = _arrays("spectra", values)
    figure, panels = _panels(list(arrays), "singular value", label)
    for axes, array in zip(panels, arrays.values(), strict=True):
        matrices = array.reshape(-1, array.shape[-1])
        for matrix, color in zip(matrices, shades(len(matrices)), strict=True):
            axes.plot(range(1, len(matrix) + 1), matrix / (matrix[0] or 1), color=color, lw=1)
        axes.set_yscale("log")
    return figure


@_drawing
def coordinates(checks: Mapping[str, CoordinateCheck]) -> "Figure":
    """Draws how much activations change over widths: a panel a check, a line an activation.

    Args:
      checks: By a title, what `coordinate_check` gave: one for each optimizer, say. Lines are of
        the change after the last step, the mean over seeds; a change of 0 has no point.

    Returns:
      The figure.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: There are no checks.

    Example:
      >>> changes = {"mlp": np.array([[[1.0]], [[2.0]]])}
      >>> check = mc.CoordinateCheck((64, 128), {"mlp": np.ones((2, 1))}, changes, tolerance=0.25)
      >>> len(mc.plots.coordinates({"Adam": check}).axes)
      1
    """
    if not checks:
        raise ValueError("plots.coordinates: no checks to draw.")
    figure, panels = _panels(list(checks), "", "RMS of the change")
    names = list(dict.fromkeys(name for check in checks.values() for name in check.changes))
    colors = dict(zip(names, shades(len(names)), strict=True))
    for axes, check in zip(panels, checks.values(), strict=True):
        for name, change in check.changes.items():
            means = change[..., -1].mean(axis=1)
            drawn = np.where(means > 0, means, np.nan)
            axes.plot(check.widths, drawn, color=colors[name], marker="o", ms=3, lw=1, label=name)
        axes.set_xscale("log", base=2)
        axes.set(xlabel="width", yscale="log")
    entries: dict[str, Any] = {}
    for axes in panels:
        handles, labels = axes.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    figure.legend(entries.values(), entries, loc="outside lower center", ncols=_COLUMNS)
    return figure


def shades(count: int) -> np.ndarray:
    """Colours `[count, rgba]` for things in an order."""
    return _colors()(np.linspace(0, 0.85, count))


def _colors() -> "Colormap":
    import matplotlib

    return matplotlib.colormaps["viridis"]


def _figure(height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def _panels(titles: list[str], xlabel: str, ylabel: str) -> tuple["Figure", list["Axes"]]:
    """A grid of axes that share their scales."""
    columns = min(len(titles), _COLUMNS)
    rows = math.ceil(len(titles) / columns)
    figure = _figure(height=0.4 + 2.5 * rows)
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, title in zip(grid, titles, strict=False):
        axes.set_title(title)
    for unused in range(len(titles), len(grid)):
        grid[unused].set_visible(False)
        grid[unused - columns].tick_params(labelbottom=True)
    figure.supxlabel(xlabel, fontsize="medium")
    figure.supylabel(ylabel, fontsize="medium")
    return figure, list(grid[: len(titles)])


def _arrays(owner: str, values: Mapping[str, ArrayLike]) -> dict[str, np.ndarray]:
    arrays = {name: np.asarray(array, np.float64) for name, array in values.items()}
    if not arrays:
        raise ValueError(f"plots.{owner}: no values to draw.")
    for name, array in arrays.items():
        if array.ndim == 0 or array.size == 0:
            raise ValueError(f"plots.{owner}: {name} has shape {array.shape}, nothing to draw.")
    return arrays
