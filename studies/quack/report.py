"""Tables and pictures of `quack`, from the records."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.before import old_runs, side_by_side
from studies.common.records import Json, Runs
from studies.common.tables import by_seed, curve, measured, paired, spread, table, valid_loss

Sweep = dict[str, list[list[Json]]]  # method → records of each learning rate, one a seed
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
        sweep = by_method(runs, attention)
        parts += [
            results(f"{attention}, validation loss (nats per token)", sweep, valid_loss, ".3f"),
            results(f"{attention}, largest max logit of any step", sweep, largest_logit, ".3g"),
            results(
                f"{attention}, largest change of a logit in a step", sweep, largest_change, ".3g"
            ),
            differences(attention, sweep),
            pictures.link(draw(sweep, folder / f"{attention.lower()}.png")),
        ]
    if aside:
        parts.append(step_times(aside))
    if old := old_runs(folder):
        parts.append(side_by_side(old, runs, COLUMNS, valid_loss))
    return "\n\n".join(parts)


def by_method(runs: Runs, attention: str) -> Sweep:
    """The runs with an attention, learning rates in order."""
    sweep: Sweep = {}
    for label, seeds in runs.items():
        kind, method, _ = label.split(", ")
        if kind == attention:
            sweep.setdefault(method, []).append(seeds)
    return {
        method: sorted(each, key=lambda seeds: rate(seeds[0])) for method, each in sweep.items()
    }


def results(title: str, sweep: Sweep, of: Callable[[Json], float], form: str) -> str:
    """A line a method, a column a learning rate."""
    rates = sorted({rate(seeds[0]) for each in sweep.values() for seeds in each})
    rows = []
    for method, each in sweep.items():
        cells = {rate(seeds[0]): cell(seeds, of, form) for seeds in each}
        rows.append((method, *(cells.get(r, "") for r in rates)))
    return table((title, *(f"η = {r:g}" for r in rates)), rows)


def differences(attention: str, sweep: Sweep) -> str:
    """How much larger one method's loss is than another's, seed by seed; a line a learning rate."""
    losses = {
        (method, rate(seeds[0])): by_seed(seeds, valid_loss)
        for method, each in sweep.items()
        for seeds in each
    }
    pairs = [pair for pair in VERDICTS if all(method in sweep for method in pair)]
    rates = sorted({rate for _, rate in losses})
    rows = [
        (
            f"η = {each:g}",
            *(
                paired(losses[first, each], losses[second, each])
                if (first, each) in losses and (second, each) in losses
                else ""
                for first, second in pairs
            ),
        )
        for each in rates
    ]
    names = (f"{first} less {second}" for first, second in pairs)
    return table((f"{attention}, validation loss", *names), rows)


def cell(seeds: list[Json], of: Callable[[Json], float], form: str) -> str:
    """Mean and spread over seeds, and how many of them diverged."""
    lost = sum(map(diverged, seeds))
    text = spread(map(of, seeds), form)
    return f"{text}, {lost} of {len(seeds)} diverged" if lost else text


def draw(sweep: Sweep, path: Path) -> Path:
    """The three figures over learning rates."""
    panels = {
        "validation loss (nats per token)": valid_loss,
        "largest max logit": largest_logit,
        "largest change of a logit in a step": largest_change,
    }
    with pictures.picture(path, len(panels)) as axes:
        for each, (title, of) in zip(axes, panels.items(), strict=True):
            bands = {method: over_rates(each_rate, of) for method, each_rate in sweep.items()}
            pictures.lines(each, bands, of=bands)
            each.set(xscale="log", xlabel="learning rate", ylabel=title)
        axes[1].set_yscale("log")
        axes[2].set_yscale("log")
    return path


def over_rates(
    rates: list[list[Json]], of: Callable[[Json], float]
) -> tuple[list[float], np.ndarray]:
    """Learning rates, and a figure `[seeds, rates]`: of the seeds that all of them have."""
    seeds = min(map(len, rates))
    figures = [[of(record) for record in each[:seeds]] for each in rates]
    return [rate(each[0]) for each in rates], np.array(figures).T


def step_times(aside: Json) -> str:
    """Seconds a step, and next to QK-norm's."""
    seconds = aside["seconds_a_step"]
    rows = []
    for method, each in seconds.items():
        normed = seconds.get(f"{method.split(', ')[0]}, QK-norm")
        rows.append((method, f"{1e3 * each:.2f}", f"{each / normed:.3f}" if normed else ""))
    return table(("", "ms a step, median", "× QK-norm"), rows)


def rate(record: Json) -> float:
    return record["optimizer"]["learning_rate"]


def largest_logit(record: Json) -> float:
    """Of any step, layer and head; NaN if any is not finite."""
    return float(curve(record, "max_logits").max())


def largest_change(record: Json) -> float:
    """Of any step after the warm-up."""
    return float(curve(record, "logit_change")[record["optimizer"]["warmup"] :].max())


def diverged(record: Json) -> bool:
    """Whether the model ended worse than it began, or not finite."""
    losses = measured(record, "valid_loss")
    return not losses[-1] < losses[0]


# Of the runs that were repeated when the fixed rule left alone what values share, and took the
# decay too.
COLUMNS = {
    "validation loss": lambda seeds: cell(seeds, valid_loss, ".3f"),
    "largest max logit": lambda seeds: cell(seeds, largest_logit, ".3g"),
    "largest change of a logit": lambda seeds: cell(seeds, largest_change, ".3g"),
}
