"""Which settings get more seeds: the best rate of two seeds, with its neighbours."""

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from studies.common import records
from studies.common.tables import valid_loss

GRID_SEEDS = (0, 1)  # of every setting


def around_the_best(file: Path, sweeps: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """The labels of three rates of each sweep: the one with the lowest loss in the grid's seeds and
    those beside it, moved inside where the best is at an end.

    Args:
      file: The records so far. Where a sweep is not complete yet the middle stands for the best.
      sweeps: The labels of each, their rates rising.
    """
    found = records.read(file)
    chosen = []
    for labels in sweeps:
        runs = [[(label, seed) for seed in GRID_SEEDS] for label in labels]
        middle = (len(labels) - 1) // 2
        if all(run in found for seeds in runs for run in seeds):
            losses = [np.mean([valid_loss(found[run]) for run in seeds]) for seeds in runs]
            finite = np.where(np.isfinite(losses), losses, np.inf)
            middle = int(np.clip(finite.argmin(), 1, len(labels) - 2))
        chosen += labels[middle - 1 : middle + 2]
    return tuple(chosen)
