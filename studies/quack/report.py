"""Tables and pictures of `quack`, from the records."""

from pathlib import Path

from studies.common import pictures
from studies.common.before import old_runs, side_by_side
from studies.common.records import Json, Runs
from studies.common.sweeps import (
    by_method,
    cell,
    differences,
    draw,
    largest_change,
    largest_logit,
    results,
)
from studies.common.tables import table, valid_loss

VERDICTS = (  # methods whose losses the verdicts compare
    ("QuacK", "none"),
    ("QuacK", "QK-norm"),
    ("QuacK", "QK-Clip τ=30"),
    ("QuacK", "Q and K at 0.1"),
    ("Q and K at 0.1", "none"),
)


def report(runs: Runs, aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    parts = []
    for attention in dict.fromkeys(label.split(", ")[0] for label in runs):
        sweep = by_method(runs, f"{attention}, ")
        parts += [
            results(f"{attention}, validation loss (nats per token)", sweep, valid_loss, ".3f"),
            results(f"{attention}, largest max logit of any step", sweep, largest_logit, ".3g"),
            results(
                f"{attention}, largest change of a logit in a step", sweep, largest_change, ".3g"
            ),
            differences(f"{attention}, validation loss", sweep, VERDICTS),
            pictures.link(draw(sweep, folder / f"{attention.lower()}.png")),
        ]
    if aside:
        parts.append(step_times(aside))
    if old := old_runs(folder):
        parts.append(side_by_side(old, runs, COLUMNS, valid_loss))
    return "\n\n".join(parts)


def step_times(aside: Json) -> str:
    """Seconds a step, and next to QK-norm's."""
    seconds = aside["seconds_a_step"]
    rows = []
    for method, each in seconds.items():
        normed = seconds.get(f"{method.split(', ')[0]}, QK-norm")
        rows.append((method, f"{1e3 * each:.2f}", f"{each / normed:.3f}" if normed else ""))
    return table(("", "ms a step, median", "× QK-norm"), rows)


# Of the runs that were repeated when the fixed rule left alone what values share, and took the
# decay too.
COLUMNS = {
    "validation loss": lambda seeds: cell(seeds, valid_loss, ".3f"),
    "largest max logit": lambda seeds: cell(seeds, largest_logit, ".3g"),
    "largest change of a logit": lambda seeds: cell(seeds, largest_change, ".3g"),
}
