"""Which settings get more seeds: the best rate of two seeds, with its neighbours."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from studies.common import records
from studies.common.tables import valid_loss

GRID_SEEDS = (0, 1)  # of every setting


def label_of(rule: str, width: int, rate: float) -> str:
    """A setting's label."""
    return f"{rule}, width {width}, {rate:g}"


def around_the_best(
    file: Path, rates: Mapping[str, Sequence[float]], widths: Sequence[int]
) -> tuple[str, ...]:
    """The labels of three rates for each rule and width: the one with the lowest loss in the
    grid's seeds and those beside it, moved inside where the best is at an end.

    Args:
      file: The records so far. Where a rule's grid is not complete yet the middle stands for it.
      rates: Rule → the rates of its grid, rising.
      widths: The widths that a verdict compares.
    """
    found = records.read(file)
    labels = []
    for rule, each in rates.items():
        for width in widths:
            runs = [[(label_of(rule, width, rate), s) for s in GRID_SEEDS] for rate in each]
            middle = (len(each) - 1) // 2
            if all(run in found for seeds in runs for run in seeds):
                losses = [np.mean([valid_loss(found[run]) for run in seeds]) for seeds in runs]
                finite = np.where(np.isfinite(losses), losses, np.inf)
                middle = int(np.clip(finite.argmin(), 1, len(each) - 2))
            labels += [label_of(rule, width, rate) for rate in each[middle - 1 : middle + 2]]
    return tuple(labels)
