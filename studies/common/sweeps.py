"""Methods over learning rates: tables, differences and pictures that several studies show."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.records import Json, Runs
from studies.common.tables import by_seed, curve, measured, paired, spread, table, valid_loss

Sweep = dict[str, list[list[Json]]]  # method → records of each learning rate, one a seed
Pair = tuple[str, str]  # two methods whose losses are compared


def by_method(runs: Runs, prefix: str = "") -> Sweep:
    """The runs of labels `{prefix}{method}, {learning rate}`, learning rates in order."""
    sweep: Sweep = {}
    for label, seeds in runs.items():
        if label.startswith(prefix):
            method, _ = label.removeprefix(prefix).rsplit(", ", 1)
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


def differences(title: str, sweep: Sweep, compared: Sequence[Pair]) -> str:
    """How much larger the first method's loss is than the second's, seed by seed; a line a learning
    rate, a column a pair."""
    losses = {
        (method, rate(seeds[0])): by_seed(seeds, valid_loss)
        for method, each in sweep.items()
        for seeds in each
    }
    pairs = [pair for pair in compared if all(method in sweep for method in pair)]
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
    return table((title, *names), rows)


def at_best_rates(title: str, sweep: Sweep, other: str) -> str:
    """A line a method: the learning rate at which its loss is least, the loss there, and how much
    larger that is than another method's at its own best rate, seed by seed.

    The rate is chosen by the seeds that all rates have; the loss is of all seeds that it has.
    """
    best = of_best_rates(sweep)
    reference = by_seed(best.get(other, []), valid_loss)
    rows = [
        (
            method,
            f"{rate(seeds[0]):g}",
            cell(seeds, valid_loss, ".3f"),
            "" if method == other else paired(by_seed(seeds, valid_loss), reference),
        )
        for method, seeds in best.items()
    ]
    return table((title, "η", "validation loss", f"less that of {other}"), rows)


def of_best_rates(sweep: Sweep) -> dict[str, list[Json]]:
    """Method → its records at the learning rate that `at_best_rates` takes."""
    return {method: min(rates, key=_chosen_by(rates)) for method, rates in sweep.items()}


def _chosen_by(rates: list[list[Json]]) -> Callable[[list[Json]], float]:
    """The mean loss of the seeds that all rates have; infinite where one is not finite."""
    common = min(map(len, rates))

    def mean(seeds: list[Json]) -> float:
        loss = np.mean([valid_loss(record) for record in seeds[:common]])
        return float(loss) if np.isfinite(loss) else np.inf

    return mean


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
