"""Dots on lanes: one lane a case, one colour and shape of dot a method."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.mla.figures import INK, SERIES, STYLE

# Edge, face, shape and size of dots. Ours are filled, and smaller where they would hide each other.
OURS = [(color, color, "o", size) for color, size in zip(SERIES[:4], (12, 9, 6, 4), strict=True)]
PEERS = [(INK, "white", marker, 7) for marker in "sD^v"]

Lanes = Mapping[str, Mapping[str, float]]  # method → case → figure


def lanes(
    panels: Mapping[str, tuple[Lanes, Lanes]],
    path: Path | None,
    *,
    title: str,
    label: str,
    reference: str,
) -> None:
    """Draws a panel for each title, if there is a path.

    Args:
      panels: Title → our methods' figures and the peers', of four methods each at most.
      path: Where to; its suffix is the format.
      title: Of the whole.
      label: What the figure is.
      reference: What a figure of 1 is.
    """
    if not path:
        return
    every = (lanes for both in panels.values() for group in both for lanes in group.values())
    cases = list(dict.fromkeys(case for lanes in every for case in lanes))
    with rc_context(STYLE):
        figure = Figure(
            figsize=(4.6 * len(panels) + 1, 1.9 + 0.42 * len(cases)), layout="constrained"
        )
        row = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (name, (ours, peers)) in zip(row, panels.items(), strict=True):
            _draw(axes, ours, peers, cases)
            axes.axvline(1, color=INK, lw=1, zorder=0)
            axes.set(title=name, xlabel=label)
            axes.set_xlim(0, 1.05 * axes.get_xlim()[1])
        row[0].invert_yaxis()
        handles = {
            text: handle
            for axes in row
            for handle, text in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=8)
        figure.suptitle(f"{title}\n(1 is {reference})", fontsize="medium")
    figure.savefig(path, dpi=150)


def spreads(
    figures: Mapping[str, tuple[float, float, float]], path: Path | None, *, title: str, label: str
) -> None:
    """A lane for each case, with a dot and a line from a low to a high value, if there is a path.

    Args:
      figures: Case → value, low, high.
      path: Where to; its suffix is the format.
      title: Of the whole.
      label: What the figure is. That of 1 is marked.
    """
    if not path:
        return
    with rc_context(STYLE):
        figure = Figure(figsize=(7, 1.5 + 0.42 * len(figures)), layout="constrained")
        axes = figure.subplots()
        values, lows, highs = zip(*figures.values(), strict=True)
        axes.hlines(range(len(figures)), lows, highs, color=OURS[0][0], lw=2)
        axes.plot(values, range(len(figures)), "o", ms=7, color=OURS[0][0])
        axes.axvline(1, color=INK, lw=1, zorder=0)
        axes.set(title=title, xlabel=label)
        _lane_axis(axes, list(figures))
        axes.invert_yaxis()
    figure.savefig(path, dpi=150)


def _lane_axis(axes: Axes, cases: Sequence[str]) -> None:
    axes.set_yticks(range(len(cases)), cases)
    axes.set_ylim(-0.6, len(cases) - 0.4)
    axes.grid(visible=False, axis="y")


def _draw(axes: Axes, ours: Lanes, peers: Lanes, cases: Sequence[str]) -> None:
    for group, styles, order in ((ours, OURS, 3), (peers, PEERS, 2)):
        for i, (method, figures) in enumerate(group.items()):
            edge, face, marker, size = styles[i]
            axes.plot(
                list(figures.values()),
                [cases.index(case) for case in figures],
                marker,
                ms=size,
                mec=edge,
                mfc=face,
                label=method,
                zorder=order,
            )
    _lane_axis(axes, cases)
