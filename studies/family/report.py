"""Tables and pictures of `family`, from the records."""

from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.records import Json, Runs
from studies.common.sweeps import (
    Sweep,
    at_best_rates,
    by_method,
    largest_logit,
    of_best_rates,
    over_rates,
    rate,
    results,
)
from studies.common.tables import by_seed, measured, spread, table, valid_loss

ADAM, MUON = "AdamW", "Muon"


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    sweep = by_method(runs)
    parts = (
        at_best_rates("at its best rate", sweep, MUON),
        at_best_rates("at its best rate", sweep, ADAM),
        tokens(sweep),
        results("validation loss (nats per token)", sweep, valid_loss, ".3f"),
        results("largest max logit of any step", sweep, largest_logit, ".3g"),
        pictures.link(draw(sweep, folder / "rates.png")),
    )
    return "\n\n".join(parts)


def tokens(sweep: Sweep) -> str:
    """How many tokens each method takes to the loss that AdamW ends with, seed by seed."""
    best = of_best_rates(sweep)
    goals = by_seed(best[ADAM], valid_loss)
    rows = []
    for method, seeds in best.items():
        shares = [share_of_tokens(record, goals[record["seed"]]) for record in seeds]
        reached = [share for share in shares if share is not None]
        told = f"{len(reached)} of {len(shares)}"
        rows.append((method, f"{rate(seeds[0]):g}", spread(reached) if reached else "", told))
    return table(("", "η", "tokens to AdamW's last loss, of AdamW's", "seeds that reach it"), rows)


def share_of_tokens(record: Json, goal: float | None) -> float | None:
    """The first share of the run at which the validation loss is at the goal, between measurements
    on a straight line; None where it never is."""
    losses = measured(record, "valid_loss")
    if goal is None or not (losses <= goal).any():
        return None
    first = int(np.argmax(losses <= goal))
    if first == 0:
        return 0.0
    before, after = losses[first - 1], losses[first]
    return float((first - 1 + (before - goal) / (before - after)) / (len(losses) - 1))


def draw(sweep: Sweep, path: Path) -> Path:
    """Losses over rates, and over tokens at each method's best rate."""
    with pictures.picture(path, 2) as (left, right):
        over = {method: over_rates(rates, valid_loss) for method, rates in sweep.items()}
        pictures.lines(left, over, of=over)
        left.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats per token)")
        rates = sorted({x for xs, _ in over.values() for x in xs})
        left.set_xticks(rates, [f"{x:g}" for x in rates])
        left.set_xticks([], minor=True)
        lowest = min(ys.min() for _, ys in over.values())
        left.set_ylim(lowest - 0.03, lowest + 0.6)
        curves = {}
        for method, seeds in of_best_rates(sweep).items():
            losses = np.array([measured(record, "valid_loss") for record in seeds])
            curves[method] = np.linspace(0, 1, losses.shape[1])[1:], losses[:, 1:]
        pictures.lines(right, curves, of=over)
        right.set(xlabel="share of all tokens", xlim=(0.4, 1.01), ylim=left.get_ylim())
    return path
