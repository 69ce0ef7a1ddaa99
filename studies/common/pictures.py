"""Curves with their spread over seeds, and heat maps."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.mla.figures import FAINT, STYLE, WARNING
from studies.common.records import Json, Runs

Curve = Callable[[Json], tuple[np.ndarray, np.ndarray]]  # x and y of a record
DASHES = ("-", "--", ":", "-.")
FEW = 12  # points of a line that are marked


@contextmanager
def picture(
    path: Path, panels: int, *, width: float = 4.6, height: float = 3.6
) -> Iterator[Sequence[Axes]]:
    """Panels side by side, with one legend, to be drawn on; written at the end."""
    with rc_context(STYLE):
        figure = Figure(figsize=(width * panels, height), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        yield axes
        entries = {}
        for each in axes:
            handles, labels = each.get_legend_handles_labels()
            entries |= dict(zip(labels, handles, strict=True))
        if entries:
            columns = min(len(entries), 2 * panels)
            figure.legend(entries.values(), entries, loc="outside lower center", ncols=columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)


def curves(axes: Axes, runs: Runs, curve: Curve, of: Runs | None = None) -> None:
    """A line a label, in the colours that labels have among those `of` a larger set."""
    bands = {}
    for label, seeds in runs.items():
        (x, *_), ys = zip(*map(curve, seeds), strict=True)
        bands[label] = x, np.array(ys)
    lines(axes, bands, of=runs if of is None else of)


def lines(axes: Axes, bands: Mapping[str, tuple[Any, np.ndarray]], of: Mapping[str, Any]) -> None:
    """A line a label, the mean over the seeds of `x`, `y[seeds, len(x)]`, in a band from the least
    to the greatest."""
    labels = list(of)
    colors = colormaps["turbo"](np.linspace(0.05, 0.95, len(labels)))
    for label, (x, y) in bands.items():
        index = labels.index(label)
        color, dashes = colors[index], DASHES[index % len(DASHES)]
        marker = "o" if len(x) <= FEW else ""
        axes.fill_between(x, y.min(axis=0), y.max(axis=0), color=color, alpha=0.15, lw=0)
        style = {"color": color, "lw": 1.4, "marker": marker, "ms": 3}
        axes.plot(x, y.mean(axis=0), ls=dashes, label=label, **style)


def level(axes: Axes, y: float, label: str) -> None:
    """A dashed line across."""
    axes.axhline(y, color=WARNING, ls="--", lw=1, label=label)


def heat_maps(
    axes: Sequence[Axes],
    maps: Mapping[str, np.ndarray],
    *,
    label: str,
    low: float | None = None,
    high: float | None = None,
) -> None:
    """Layers down and heads across, one map a panel, all in the same colours."""
    low = min(np.nanmin(values) for values in maps.values()) if low is None else low
    high = max(np.nanmax(values) for values in maps.values()) if high is None else high
    for each, (title, values) in zip(axes, maps.items(), strict=True):
        each.grid(visible=False)
        image = each.imshow(values, vmin=low, vmax=high, cmap="viridis", aspect="auto")
        each.set(title=title, xlabel="head", ylabel="layer")
        each.set_xticks(range(values.shape[1]))
        each.set_yticks(range(values.shape[0]))
    axes[0].figure.colorbar(image, ax=list(axes), label=label, shrink=0.9).outline.set_color(FAINT)


def link(picture: Path) -> str:
    """Markdown that shows a picture of a study's results in its README."""
    return f"![{picture.stem}](results/{picture.parent.name}/{picture.name})"
