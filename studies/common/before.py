"""Old figures beside new ones, of runs that were repeated because what they run has changed.

The old records stay as they were, in `results/SIZE-before.jsonl`.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

from studies.common import records
from studies.common.records import Json, Runs
from studies.common.tables import by_seed, paired, table

Cell = Callable[[list[Json]], str]  # from the records of a setting, one a seed


def old_runs(folder: Path) -> Runs:
    """The old records of a size by label; none where there is no file.

    Args:
      folder: The size's folder of pictures.
    """
    runs: Runs = {}
    for record in records.read(folder.with_name(f"{folder.name}-before.jsonl")).values():
        runs.setdefault(record["setting"], []).append(record)
    return runs


def side_by_side(
    old: Runs, new: Runs, columns: Mapping[str, Cell], loss: Callable[[Json], float]
) -> str:
    """A line a setting that both have, and for each column the figure of before and of now; last
    how much larger the loss is now, seed by seed."""
    both = [(name, when) for name in columns for when in ("before", "now")]
    header = ("", *(f"{name}, {when}" for name, when in both), "loss now, less that before")
    rows = []
    for label in old:
        if label in new:
            figures = (cell(runs[label]) for cell in columns.values() for runs in (old, new))
            change = paired(*(by_seed(runs[label], loss) for runs in (new, old)))
            rows.append((label, *figures, change))
    return table(header, rows)
