"""Pictures of the metrics of runs, each for a column of a page or the width of a phone."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

from examples.mla.metrics import Row, all_heads, busiest_expert, column, peak, per_head, select
from muonclip_jax import plots

POINTS = 300  # most points that a curve is drawn with
COLUMNS = 120  # most columns of a heat map
MANY = 8  # more lines than these are summarised
PANELS = 12  # most panels of a kind
ROWS = 64  # most rows of a heat map
INK, FAINT, WARNING, STYLE = plots.INK, plots.FAINT, plots.WARNING, plots.STYLE
GRID = STYLE["grid.color"]
SERIES = (
    *("#2563eb", "#c2620a", "#059669", "#7c3aed"),
    *("#db2777", "#0284c7", "#4d7c0f", "#4b5563"),
)


def loss(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """Label → rows: the running mean of the training loss, with the raw one behind it, and the
    loss of the held-out files as dots."""
    with _axes() as (figure, axes):
        for (label, rows), color in zip(runs.items(), SERIES, strict=False):
            steps, evals = select(rows, "step"), select(rows, "eval")
            x, y = thin(column(steps, "step")), column(steps, "loss")
            axes.plot(x, thin(y), color=color, lw=0.6, alpha=0.35)
            axes.plot(x, thin(running_mean(y)), color=color, label=f"{label} training".strip())
            dots = column(evals, "step"), column(evals, "loss")
            name = f"{label} held out".strip()
            axes.plot(*dots, "o", ms=5, mfc="white", color=color, label=name)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        _legend(figure, columns=2)
    return figure


def peaks(runs: Mapping[str, Sequence[Row]], threshold: float) -> Figure:
    """Label → rows: the largest max logit of any head over steps, with τ. Where a run comes beyond
    3τ, the scale is logarithmic and 3τ is drawn too."""
    with _axes() as (figure, axes):
        highest = 0.0
        for (label, rows), color, style in zip(
            runs.items(), SERIES, ("-", "--", "-."), strict=False
        ):
            steps = select(rows, "step")
            axes.plot(*curve(steps, peak(steps)), color=color, ls=style, lw=1.4, label=label)
            highest = np.fmax.reduce([highest, *peak(steps)])
        axes.axhline(threshold, color=WARNING, lw=1, label=f"threshold τ = {threshold:g}")
        if highest > 3 * threshold:
            axes.axhline(3 * threshold, color=WARNING, ls=":", lw=1, label="3τ")
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(ScalarFormatter())
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.set_ylim(bottom=0)
        axes.set(xlabel="step", ylabel="largest max logit")
        _legend(figure, columns=2)
    return figure


def heads_clipped(steps: Sequence[Row]) -> Figure:
    """The share of all heads that were clipped, over steps."""
    share = 100 * (all_heads(steps, "gamma") < 1).mean(axis=1)
    with _axes() as (figure, axes):
        x, mean = thin(column(steps, "step")), thin(running_mean(share))
        axes.fill_between(x, thin(share), color=SERIES[1], alpha=0.2, lw=0, label="in a step")
        axes.plot(x, mean, color=SERIES[1], label="running mean")
        axes.set(xlabel="step", ylabel="heads clipped (%)", ylim=(0, max(1, 1.05 * share.max())))
        _legend(figure, columns=2)
    return figure


def max_logits(steps: Sequence[Row], threshold: float) -> dict[str, Figure]:
    """Block → its heads' max logits over steps, with the threshold: of many blocks those with the
    largest."""
    blocks = per_head(steps, "max_logits")
    largest = {block: np.fmax.reduce(maxima, axis=None) for block, maxima in blocks.items()}
    shown = sorted(blocks, key=lambda block: -largest[block])[:PANELS]
    x, top = thin(column(steps, "step")), 1.05 * max(threshold, *largest.values())
    panels = {}
    for block in (block for block in blocks if block in shown):
        with _axes(height=2.4) as (panels[block], axes):
            curves = {f"head {i}": thin(h, np.nanmax) for i, h in enumerate(blocks[block].T)}
            _told_apart(axes, x, curves)
            axes.axhline(threshold, color=WARNING, ls="--", lw=1.2)
            axes.set_title(block, loc="left")
            axes.set(xlabel="step", ylabel="max logit", ylim=(0, top if np.isfinite(top) else None))
            _legend(panels[block], columns=4)
    return panels


def clip_factors(steps: Sequence[Row]) -> Figure:
    """Where γ was below 1: heads down, steps across, and the stronger the smaller γ. Of very many
    heads the smallest γ of each block."""
    blocks = per_head(steps, "gamma")
    if sum(gamma.shape[1] for gamma in blocks.values()) > ROWS:
        blocks = {block: gamma.min(axis=1, keepdims=True) for block, gamma in blocks.items()}
    cells = np.stack([thin(h, np.nanmin, COLUMNS) for gamma in blocks.values() for h in gamma.T])
    edges = np.cumsum([0] + [gamma.shape[1] for gamma in blocks.values()])
    sides = np.linspace(steps[0]["step"] - 0.5, steps[-1]["step"] + 0.5, cells.shape[1] + 1)
    rows, columns = np.nonzero(cells < 1)
    corners = [
        [(left, row), (right, row), (right, row + 1), (left, row + 1)]
        for row, left, right in zip(rows, sides[columns], sides[columns + 1], strict=True)
    ]
    strength = (1 - cells[rows, columns]) / max(1 - cells.min(), 1e-9)
    with _axes(height=1.0 + 0.14 * len(cells)) as (figure, axes):
        axes.grid(visible=False)
        alpha = list(0.25 + 0.75 * strength)
        axes.add_collection(PolyCollection(corners, facecolor=SERIES[1], alpha=alpha, lw=0))
        axes.hlines(edges[1:-1], sides[0], sides[-1], color=FAINT, lw=0.8)
        axes.set_yticks((edges[:-1] + edges[1:]) / 2, blocks)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="step", xlim=(sides[0], sides[-1]), ylim=(len(cells), 0))
    return figure


def participation_ratio(evals: Sequence[Row]) -> Figure:
    """The participation ratio of each block's keys over steps."""
    ratios = {
        block: np.array([row["participation_ratio"][block] for row in evals], np.float64)
        for block in evals[0]["participation_ratio"]
    }
    with _axes() as (figure, axes):
        _told_apart(axes, column(evals, "step"), ratios)
        axes.set(xlabel="step", ylabel="participation ratio")
        _legend(figure, columns=2)
    return figure


def expert_load(steps: Sequence[Row]) -> Figure:
    """What the busiest expert of each layer got over steps, in fair shares."""
    loads = {name: thin(running_mean(load)) for name, load in busiest_expert(steps).items()}
    with _axes() as (figure, axes):
        _told_apart(axes, thin(column(steps, "step")), loads)
        axes.axhline(1, color=FAINT, lw=0.8)
        axes.set(xlabel="step", ylabel="load / fair share")
        _legend(figure, columns=2)
    return figure


def curve(steps: Sequence[Row], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of `values` `[steps]` that keep every peak."""
    return thin(column(steps, "step")), thin(values, np.nanmax)


def thin(
    values: np.ndarray, reduce: Callable[[np.ndarray], Any] = np.nanmean, points: int = POINTS
) -> np.ndarray:
    """`[steps]` as at most `points` values, each the reduction of its share."""
    parts = np.array_split(values, min(len(values), points))
    return np.array([np.nan if np.isnan(part).all() else reduce(part) for part in parts])


def running_mean(values: np.ndarray, decay: float = 0.9) -> np.ndarray:
    """Exponential running mean, without the bias of its start."""
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        means.append(mean / weight)
    return np.array(means)


def _told_apart(axes: Axes, x: np.ndarray, curves: Mapping[str, np.ndarray]) -> None:
    """A line each, in colours of their own; of many curves how far they reach, and their median."""
    if len(curves) <= MANY:
        for (label, y), color in zip(curves.items(), SERIES, strict=False):
            axes.plot(x, y, color=color, lw=1.2, label=label)
        return
    stacked = np.stack([*curves.values()])
    low, high = np.fmin.reduce(stacked), np.fmax.reduce(stacked)
    label = f"lowest to highest of {len(curves)}"
    axes.fill_between(x, low, high, color=SERIES[0], alpha=0.25, lw=0, label=label)
    axes.plot(x, np.nanmedian(stacked, axis=0), color=SERIES[0], lw=1.2, label="their median")


def _legend(figure: Figure, columns: int) -> None:
    figure.legend(loc="outside upper left", ncols=columns, columnspacing=1, handlelength=1.4)


@contextmanager
def _axes(height: float = 2.8) -> Iterator[tuple[Figure, Axes]]:
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, height), layout="constrained")
        yield figure, figure.subplots()
