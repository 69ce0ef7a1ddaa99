"""Tables and pictures of `abilities`, from the records."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from studies.abilities.measures import BINS, LENGTHS, REACH, TRAINED
from studies.common import pictures
from studies.common.records import Json, Runs
from studies.common.tables import by_seed, last, last_peak, paired, spread, table

NONE = "none"
TASKS = ("copying", "recall")


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    parts = [summary(runs), by_length(runs), differences(runs)]
    for attention, some in by_attention(runs).items():
        drawn = folder / f"{attention.lower()}.png"
        draw(some, drawn)
        parts.append(pictures.link(drawn))
    return "\n\n".join(parts)


def draw(runs: Runs, path: Path) -> None:
    """Of one attention: losses by position, and accuracies by length."""
    with pictures.picture(path, 4, width=4.2) as (code, english, copying, recall):
        for axes, name, title in (
            (code, "position_loss", "loss (nats per token)"),
            (english, "english_loss", "loss on English (nats per token)"),
        ):
            pictures.curves(axes, runs, lambda r, name=name: (positions(), last(r, name)))
            axes.set(xlabel="position / trained context", ylabel=title)
        for axes, name in zip((copying, recall), TASKS, strict=True):
            pictures.curves(axes, runs, lambda r, name=name: (np.array(LENGTHS), last(r, name)))
            axes.set(xlabel="length / trained context", ylabel=f"accuracy of {name}", ylim=(0, 1))


def summary(runs: Runs) -> str:
    """A line a setting."""
    header = ("", *MEASURES, "largest max logit, last fifth")
    rows = [
        (
            label,
            *(spread(map(measure, seeds), ".3f") for measure in MEASURES.values()),
            spread(map(last_peak, seeds), ".0f"),
        )
        for label, seeds in runs.items()
    ]
    return table(header, rows)


def by_length(runs: Runs) -> str:
    """Accuracies, a column a length."""
    shares = [f"{share:g}" for share in LENGTHS]
    rows = [
        (
            f"{label}, {task}",
            *(spread((last(r, task)[i] for r in seeds), ".2f") for i in range(len(LENGTHS))),
        )
        for task in TASKS
        for label, seeds in runs.items()
    ]
    return table(("accuracy, by length / trained context", *shares), rows)


def differences(runs: Runs) -> str:
    """Each setting minus none, of the same attention and seed."""
    rows = [
        (label, *(difference(seeds, some[none], measure) for measure in MEASURES.values()))
        for attention, some in by_attention(runs).items()
        if (none := f"{attention}, {NONE}") in some
        for label, seeds in some.items()
        if label != none
    ]
    return table(("minus none, of the same seed", *MEASURES), rows)


def difference(first: list[Json], second: list[Json], measure: Callable[[Json], float]) -> str:
    return paired(by_seed(first, measure), by_seed(second, measure), ".3f")


def by_attention(runs: Runs) -> dict[str, Runs]:
    """Attention → the runs whose label begins with it."""
    found: dict[str, Runs] = {}
    for label, seeds in runs.items():
        found.setdefault(label.partition(", ")[0], {})[label] = seeds
    return found


def positions() -> np.ndarray:
    """The middles of the stretches of positions, in contexts."""
    return (np.arange(REACH * BINS) + 0.5) / BINS


def beyond(record: Json) -> float:
    """How much higher the loss is from the second context on than in the first one's second half:
    what more to look back on should lower and never raise."""
    losses = last(record, "position_loss")
    return float(losses[BINS:].mean() - losses[BINS // 2 : BINS].mean())


def of_trained(task: str) -> Callable[[Json], float]:
    """The accuracy at lengths that were trained on, mean."""
    return lambda record: float(last(record, task)[:TRAINED].mean())


def of_longer(task: str) -> Callable[[Json], float]:
    """The accuracy at lengths that were not, mean."""
    return lambda record: float(last(record, task)[TRAINED:].mean())


MEASURES: dict[str, Callable[[Json], float]] = {
    "validation loss": lambda r: float(last(r, "valid_loss")),
    "loss on English": lambda r: float(last(r, "english_loss")[:BINS].mean()),
    "loss beyond the context, minus within": beyond,
    "copying, trained lengths": of_trained("copying"),
    "copying, longer": of_longer("copying"),
    "recall, trained lengths": of_trained("recall"),
    "recall, longer": of_longer("recall"),
}
