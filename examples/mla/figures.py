"""Pictures of the metrics of runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter

from examples.mla.metrics import Row, busiest_expert, column, peak, per_head, select
from muonclip_jax import plots

POINTS = 500  # most points that a curve is drawn with
INK, FAINT, WARNING, STYLE = plots.INK, plots.FAINT, plots.WARNING, plots.STYLE
SERIES = ("#2563eb", "#d97706", "#059669")


def loss(runs: Mapping[str, Sequence[Row]]) -> Figure:
    """Label → rows: the running mean of the training loss, with the raw one behind it, and the
    loss of the held-out files as dots."""
    with _axes(height=3.8) as (figure, axes):
        for (label, rows), color in zip(runs.items(), SERIES, strict=False):
            steps, evals = select(rows, "step"), select(rows, "eval")
            x, y = thin(column(steps, "step")), column(steps, "loss")
            axes.plot(x, thin(y), color=color, lw=0.6, alpha=0.35)
            axes.plot(x, thin(running_mean(y)), color=color, label=f"{label} training".strip())
            dots = column(evals, "step"), column(evals, "loss")
            name = f"{label} held out".strip()
            axes.plot(*dots, "o", ms=5, mfc="white", color=color, label=name)
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.legend()
    return figure


def peaks(runs: Mapping[str, Sequence[Row]], threshold: float) -> Figure:
    """Label → rows: the largest max logit of any head over steps, with τ and 3τ."""
    with _axes(height=3.8) as (figure, axes):
        for (label, rows), color in zip(runs.items(), SERIES, strict=False):
            steps = select(rows, "step")
            axes.plot(*curve(steps, peak(steps)), color=color, lw=1.2, label=label)
        axes.axhline(threshold, color=WARNING, ls="--", lw=1, label="τ")
        axes.axhline(3 * threshold, color=WARNING, ls=":", lw=1, label="3τ")
        axes.set(xlabel="step", ylabel="largest max logit")
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.legend()
    return figure


def max_logits(steps: Sequence[Row], threshold: float) -> Figure:
    """Every head's max logit over steps, a panel a block, with the threshold."""
    thinned = {
        block: np.stack([thin(head, np.nanmax) for head in maxima.T], axis=-1)
        for block, maxima in per_head(steps, "max_logits").items()
    }
    return plots.curves(thin(column(steps, "step")), thinned, "max logit", threshold=threshold)


def heads(steps: Sequence[Row]) -> Figure:
    """Layer by head: the median max logit of the last tenth of the steps."""
    last = steps[-max(1, len(steps) // 10) :]
    maxima = per_head(last, "max_logits")
    return plots.head_map({block: np.median(m, axis=0) for block, m in maxima.items()}, "max logit")


def clip_factors(steps: Sequence[Row]) -> Figure:
    """γ as a heat map: blocks and their heads down, steps across."""
    blocks = per_head(steps, "gamma")
    heads = [thin(head, np.nanmin) for gamma in blocks.values() for head in gamma.T]
    edges = np.cumsum([0] + [gamma.shape[1] for gamma in blocks.values()])
    with _axes(height=1.2 + 0.16 * len(heads)) as (figure, axes):
        axes.grid(visible=False)
        image = axes.imshow(
            np.stack(heads),
            aspect="auto",
            interpolation="nearest",
            cmap="magma",
            vmax=1,
            extent=(steps[0]["step"] - 0.5, steps[-1]["step"] + 0.5, len(heads), 0),
        )
        axes.hlines(edges[1:-1], *axes.get_xlim(), color=FAINT, lw=0.8)
        axes.set_yticks((edges[:-1] + edges[1:]) / 2, blocks)
        axes.tick_params(axis="y", length=0)
        axes.set(xlabel="step")
        figure.colorbar(image, label="γ")
    return figure


def participation_ratio(evals: Sequence[Row]) -> Figure:
    """The participation ratio of each block's keys over steps."""
    blocks = list(evals[0]["participation_ratio"])
    with _axes(height=3.2) as (figure, axes):
        for block, color in zip(blocks, plots.shades(len(blocks)), strict=True):
            ratio = np.array([row["participation_ratio"][block] for row in evals], np.float64)
            axes.plot(column(evals, "step"), ratio, "o-", ms=4, color=color, label=block)
        axes.set(xlabel="step", ylabel="participation ratio")
        axes.legend()
    return figure


def expert_load(steps: Sequence[Row]) -> Figure:
    """What the busiest expert of each layer got over steps, in fair shares."""
    modules = busiest_expert(steps)
    with _axes(height=3.2) as (figure, axes):
        for (module, load), color in zip(modules.items(), plots.shades(len(modules)), strict=True):
            x, y = thin(column(steps, "step")), thin(running_mean(load))
            axes.plot(x, y, color=color, label=module)
        axes.axhline(1, color=FAINT, lw=0.8)
        axes.set(xlabel="step", ylabel="load / fair share")
        axes.legend()
    return figure


def curve(steps: Sequence[Row], values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates of `values` `[steps]` that keep every peak."""
    return thin(column(steps, "step")), thin(values, np.nanmax)


def thin(values: np.ndarray, reduce: Callable[[np.ndarray], Any] = np.nanmean) -> np.ndarray:
    """`[steps]` as at most `POINTS` values, each the reduction of its share."""
    parts = np.array_split(values, min(len(values), POINTS))
    return np.array([np.nan if np.isnan(part).all() else reduce(part) for part in parts])


def running_mean(values: np.ndarray, decay: float = 0.9) -> np.ndarray:
    """Exponential running mean, without the bias of its start."""
    means, mean, weight = [], 0.0, 0.0
    for value in values:
        mean, weight = decay * mean + (1 - decay) * value, decay * weight + 1 - decay
        means.append(mean / weight)
    return np.array(means)


@contextmanager
def _axes(height: float) -> Iterator[tuple[Figure, Axes]]:
    with rc_context(STYLE):
        figure = Figure(figsize=(9, height), layout="constrained")
        yield figure, figure.subplots()
