"""Tables and pictures of `mla_norm`, from the records."""

from pathlib import Path

from studies.common import pictures
from studies.common.clips import passes, threshold
from studies.common.records import Json, Runs
from studies.common.sweeps import (
    at_best_rates,
    by_method,
    differences,
    draw,
    largest_change,
    largest_logit,
    results,
)
from studies.common.tables import valid_loss

NONE, NORM, HIGH, LOW, QUACK, BOTH = METHODS = (
    "none",
    "QK-norm",
    "QK-Clip τ=30",
    "QK-Clip τ=10",
    "QuacK",
    "QuacK, QK-Clip τ=10",
)
VERDICTS = (  # methods whose losses the verdicts compare
    *((NORM, other) for other in (NONE, HIGH, LOW, QUACK, BOTH)),
    (HIGH, NONE),
    (LOW, NONE),
    (QUACK, LOW),
    (BOTH, QUACK),
    (BOTH, LOW),
)


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    sweep = by_method(runs)
    clipped = {method: rates for method, rates in sweep.items() if threshold(rates[0][0])}
    parts = (
        at_best_rates("at its best rate", sweep, NORM),
        results("validation loss (nats per token)", sweep, valid_loss, ".3f"),
        differences("validation loss", sweep, VERDICTS),
        results("largest max logit of any step", sweep, largest_logit, ".3g"),
        results("largest change of a logit in a step", sweep, largest_change, ".3g"),
        results("head-steps above τ (%)", clipped, lambda r: 100 * passes(r).mean(), ".1f"),
        pictures.link(draw(sweep, folder / "rates.png")),
    )
    return "\n\n".join(parts)
