"""A run with and without the clip: what is said and shown of both, and where it is found again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from examples.mla import figures, metrics
from examples.mla.cli import InputError
from examples.mla.metrics import Row, select
from examples.mla.page import formatted
from examples.mla.settings import UNCLIPPED

# The settings that decide the course of a run, beside its model, its text and its optimizer.
DECISIVE = (
    *("learning_rate", "steps", "batch_size", "context_length", "threshold", "seed", "warmup"),
    *("weight_decay", "per_head", "relative_learning_rate", "tokenizer"),
)
Settings = Mapping[str, Any]  # as the metrics have them


@dataclass(frozen=True)
class Comparison:
    """Two runs that differ in the clip alone.

    Attributes:
      name: The folder's.
      runs: Optimizer → metrics, the one that clips first.
    """

    name: str
    runs: Mapping[str, Sequence[Row]]

    @property
    def settings(self) -> Settings:
        """Those of both, but for the optimizer."""
        return settings_of(next(iter(self.runs.values())))

    def verdict(self) -> str:
        """The max logits of both after the warm-up, in units of τ."""
        threshold, warmup = self.settings["threshold"], self.settings["warmup"]
        parts = []
        for name, rows in self.runs.items():
            steps = select(rows, "step")
            peaks = metrics.peak(steps)[min(warmup, len(steps) // 2) :] / threshold
            parts.append(
                f"with {name} the largest logit reached {np.nanmax(peaks):.2f} τ "
                f"({np.nanmedian(peaks):.2f} τ in the median step, beyond 3τ in "
                f"{np.nanmean(peaks > 3):.0%} of all steps)"
            )
        return f"After the warm-up, at a threshold τ of {threshold:g}: {'; '.join(parts)}."

    def picture(self) -> Figure:
        """The largest logits of both."""
        labels = ("with QK-Clip", "without it")
        labelled = {
            f"{label} ({name})": rows
            for label, (name, rows) in zip(labels, self.runs.items(), strict=False)
        }
        return figures.peaks(labelled, self.settings["threshold"])

    def differences(self, settings: Settings) -> list[str]:
        """How another run's settings differ, in words."""
        return [
            f"{name.replace('_', ' ')} {formatted(ours)} (here {formatted(settings[name])})"
            for name in DECISIVE
            if (ours := self.settings.get(name)) != settings[name]
        ]


def read(folder: Path, clipping: str) -> Comparison:
    """The comparison in a folder of an optimizer that clips with the same one without the clip.

    Raises:
      InputError: Either run is missing, or has not come to its end, or is something else.
    """
    names = (clipping, UNCLIPPED[clipping])
    runs = {name: metrics.read(folder / name) for name in names}
    for name, rows in runs.items():
        if not all(select(rows, event) for event in ("start", "step", "end")):
            raise InputError(f"{folder / name}: not a run that has come to its end")
    return Comparison(folder.name, runs)


def find(run_dir: Path, settings: Settings) -> Comparison | None:
    """The comparison with a run's model and threshold that is nearest to it in its other settings:
    of those beside the run, and of the one that the run is part of."""
    around = run_dir.absolute().parent
    found = []
    for clipping in UNCLIPPED:
        for metrics_file in (
            *around.glob(f"{clipping}/{metrics.FILE}"),
            *around.glob(f"*/{clipping}/{metrics.FILE}"),
        ):
            try:
                comparison = read(metrics_file.parent.parent, clipping)
            except InputError:  # another program's, or not there yet
                continue
            same = ("model", "threshold")
            if all(comparison.settings.get(name) == settings[name] for name in same):
                other = settings["optimizer"] not in comparison.runs
                found.append((other, len(comparison.differences(settings)), comparison))
    return min(found, key=lambda each: each[:2])[2] if found else None


def settings_of(rows: Sequence[Row]) -> Settings:
    """The settings that a run has, or had when it was continued last."""
    return select(rows, "start")[-1]["settings"]
