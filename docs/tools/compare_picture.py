"""README's picture: the largest logit with and without the clip, as `make compare` measured it.

python -m docs.tools.compare_picture RUN   # the folder that make compare wrote, runs/NAME

A SVG of its own, since what draws figures knows neither dark mode nor phones: letters are as large
as a phone needs at its width, and colours follow the reader's.
"""

import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from examples.mla import metrics
from examples.mla.compare import UNCLIPPED

FILE = Path(__file__).parents[1] / "pictures" / "compare.svg"
LEFT, RIGHT, TOP, BOTTOM = 44, 404, 76, 262  # the axes, in a picture of 420 × 300
LOWEST, HIGHEST = 5, 200  # max logits that are drawn
SHOWN = "Largest attention logit of any head"
STYLE = """
  .card { fill: #ffffff } .ink { fill: #1f2328 } .faint { fill: #59636e }
  .grid { stroke: #d1d9e0 } .threshold { stroke: #59636e; stroke-dasharray: 5 4 }
  .clipped { stroke: #0969da } .unclipped { stroke: #bc4c00 } path, line { fill: none }
  text.clipped { fill: #0969da; stroke: none } text.unclipped { fill: #bc4c00; stroke: none }
  @media (prefers-color-scheme: dark) {
    .card { fill: #0d1117 } .ink { fill: #f0f6fc } .faint { fill: #9198a1 }
    .grid { stroke: #3d444d } .threshold { stroke: #9198a1 }
    .clipped { stroke: #4493f8 } .unclipped { stroke: #f0883e }
    text.clipped { fill: #4493f8 } text.unclipped { fill: #f0883e }
  }"""


def main(folder: Path) -> None:
    """Reads the two runs, and writes the picture."""
    clipped = next(name for name in UNCLIPPED if (folder / name).exists())
    names = clipped, UNCLIPPED[clipped]
    runs = [metrics.read(folder / name) for name in names]
    peaks = [metrics.peak(metrics.select(rows, "step")) for rows in runs]
    (start,) = metrics.select(runs[0], "start")
    FILE.write_text(picture(peaks, start["settings"]["threshold"]))


def picture(peaks: Sequence[np.ndarray], threshold: float) -> str:
    """The SVG of the run that clips, then of the one that does not, from max logits `[steps]`."""
    steps = max(map(len, peaks))
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="560" height="400" viewBox="0 0 420 300" '
        'font-family="system-ui, sans-serif" font-size="14" role="img">',
        f"<title>{title(peaks, threshold)}</title><style>{STYLE}</style>",
        '<rect class="card" width="420" height="300" rx="8"/>',
        f'<text class="ink" x="12" y="24" font-weight="600">{SHOWN}</text>',
        f'<text class="unclipped" x="12" y="46">Muon alone: up to {peaks[1].max():.0f}</text>',
        f'<text class="clipped" x="12" y="66">MuonClip, τ = {threshold:g}: up to '
        f"{peaks[0].max():.0f}</text>",
    ]
    for value in (10, 30, 100):
        lines.append(horizontal("grid", value))
        lines.append(
            f'<text class="faint" x="{LEFT - 6}" y="{height(value) + 5:.1f}" '
            f'text-anchor="end">{value}</text>'
        )
    for step in range(0, steps + 1, 100):
        lines.append(
            f'<text class="faint" x="{across(step, steps):.1f}" y="{BOTTOM + 20}" '
            f'text-anchor="middle">{step}</text>'
        )
    lines.append(horizontal("threshold", threshold))
    lines.append(f'<text class="faint" x="{LEFT}" y="{BOTTOM + 36}" font-size="12">step</text>')
    for name, values in zip(("clipped", "unclipped"), peaks, strict=True):
        points = " ".join(f"{across(i, steps):.1f},{height(v):.1f}" for i, v in enumerate(values))
        lines.append(f'<path class="{name}" stroke-width="2" d="M{points}"/>')
    return "\n".join([*lines, "</svg>", ""])


def across(step: int, steps: int) -> float:
    """Where a step is drawn, from the left."""
    return LEFT + (RIGHT - LEFT) * step / steps


def height(value: float) -> float:
    """Where a max logit is drawn, from above."""
    share = math.log(max(value, LOWEST) / LOWEST) / math.log(HIGHEST / LOWEST)
    return BOTTOM - (BOTTOM - TOP) * share


def horizontal(kind: str, value: float) -> str:
    y = f"{height(value):.1f}"
    return f'<line class="{kind}" x1="{LEFT}" x2="{RIGHT}" y1="{y}" y2="{y}"/>'


def title(peaks: Sequence[np.ndarray], threshold: float) -> str:
    """What a reader who cannot see it hears."""
    return (
        f"{SHOWN} over {len(peaks[0])} steps: with MuonClip up to {peaks[0].max():.0f}, near the "
        f"threshold {threshold:g}; with Muon alone up to {peaks[1].max():.0f}."
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
