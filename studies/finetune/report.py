"""Tables and pictures of `finetune`, from the records."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.records import Json, Runs
from studies.common.tables import by_seed, curve, last, measured, paired, spread, table, valid_loss

Pair = tuple[str, str]  # what trained first, and what then
Rates = dict[Pair, dict[float, list[Json]]]
ARROW = " → "


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    rates = by_pair(runs)
    best = {pair: found[best_rate(found)] for pair, found in rates.items()}
    drawn = folder / "tuning.png"
    with pictures.picture(drawn, 3) as (tuning, weights, change):
        bands = {
            ARROW.join(pair): (list(found), loss_by_rate(found)) for pair, found in rates.items()
        }
        pictures.lines(tuning, bands, of=bands)
        tuning.set(xlabel="learning rate of the second phase", ylabel="loss on words", xscale="log")
        for axes, name, title in (
            (weights, "weight_rank", "weights: effective rank / n"),
            (change, "change_rank", "what was added: effective rank / n"),
        ):
            ranks = {
                ARROW.join(pair): (kernels(seeds[0]), np.array([by_kernel(r, name) for r in seeds]))
                for pair, seeds in best.items()
            }
            pictures.lines(axes, ranks, of=bands)
            axes.set(title=title)
    parts = (tuning_table(rates), summary(best), differences(best), rank_table(best))
    return "\n\n".join((*parts, pictures.link(drawn)))


def by_pair(runs: Runs) -> Rates:
    """The records by what trained first and then, and by the rate of the second phase."""
    found: Rates = {}
    for label, seeds in runs.items():
        names, _ = label.rsplit(", ", 1)
        first, second = names.split(ARROW)
        rate = seeds[0]["optimizer"]["learning_rate"]
        found.setdefault((first, second), {})[rate] = seeds
    return found


def best_rate(found: Mapping[float, list[Json]]) -> float:
    """The rate with the least mean loss on the second text, over the seeds that all rates have;
    none that diverged in one of these."""
    means = dict(zip(found, loss_by_rate(found).mean(axis=0), strict=True))
    return min(means, key=lambda rate: means[rate] if np.isfinite(means[rate]) else np.inf)


def loss_by_rate(found: Mapping[float, list[Json]]) -> np.ndarray:
    """The losses of the seeds that all rates have, `[seeds, rates]`; these come first."""
    losses = [each_loss(seeds) for seeds in found.values()]
    fewest = min(map(len, losses))
    return np.array([each[:fewest] for each in losses]).T


def tuning_table(rates: Rates) -> str:
    """The loss at every rate."""
    count = max(map(len, rates.values()))
    rows = []
    for pair, found in rates.items():
        best = best_rate(found)
        cells = []
        for rate, seeds in found.items():
            mark = "**" * (rate == best)
            cells.append(f"{rate:g}: {mark}{spread(each_loss(seeds), '.3f')}{mark}")
        edge = "yes" if len(found) > 1 and best in (min(found), max(found)) else ""
        rows.append((ARROW.join(pair), *cells, *[""] * (count - len(cells)), edge))
    return table(("loss on words by rate", *[""] * count, "best is the grid's edge"), rows)


def summary(best: Mapping[Pair, list[Json]]) -> str:
    """A line a pair, at its best rate."""
    header = (
        "",
        "loss on words, before",
        "after",
        "loss on code, before",
        "after",
        "effective rank of the weights / n, before",
        "after",
        "of what was added / n",
        "largest max logit, first step",
        "largest",
        "last step",
        "head-steps above τ (%)",
    )
    rows = []
    for pair, seeds in best.items():
        tau = seeds[0]["optimizer"]["threshold"]
        clipped = (100 * (curve(r, "max_logits") > tau).mean() for r in seeds) if tau else None
        rows.append(
            (
                ARROW.join(pair),
                spread((measured(r, "valid_loss")[0] for r in seeds), ".3f"),
                spread(each_loss(seeds), ".3f"),
                spread((measured(r, "first_loss")[0] for r in seeds), ".3f"),
                spread((last(r, "first_loss") for r in seeds), ".3f"),
                spread((ranks(r, "weight_rank", 0) for r in seeds), ".3f"),
                spread((ranks(r, "weight_rank") for r in seeds), ".3f"),
                spread((ranks(r, "change_rank") for r in seeds), ".3f"),
                *(spread((peak(r, of) for r in seeds), ".1f") for of in (first, np.max, end)),
                "" if clipped is None else spread(clipped, ".1f"),
            )
        )
    return table(header, rows)


def differences(best: Mapping[Pair, list[Json]]) -> str:
    """Paired over equal seeds: the mismatch, and what clip and heads change."""
    measures: dict[str, Callable[[Json], float]] = {
        "loss on words": valid_loss,
        "loss on code": lambda r: float(last(r, "first_loss")),
        "rank of the weights / n": ranks,
        "rank of what was added / n": lambda r: ranks(r, "change_rank"),
    }
    values = {
        pair: {name: by_seed(seeds, value) for name, value in measures.items()}
        for pair, seeds in best.items()
    }

    def row(label: str, one: list[Pair], other: list[Pair]) -> tuple[str, ...]:
        sides = (
            {name: mean_of([values[pair][name] for pair in side]) for name in measures}
            for side in (one, other)
        )
        found, base = sides
        return label, *(paired(found[name], base[name]) for name in measures)

    rows = [
        row(label, one, other)
        for label, one, other in comparisons()
        if values.keys() >= {*one, *other}  # half a grid compares what it has
    ]
    return table(("95%", *measures), rows)


def comparisons() -> list[tuple[str, list[Pair], list[Pair]]]:
    """What is compared with what, each the mean of its pairs."""
    mixed, matched = [("Adam", "Muon"), ("Muon", "Adam")], [("Adam", "Adam"), ("Muon", "Muon")]
    after_muon, after_adam = (
        [(first, then) for then in ("Adam", "Muon")] for first in ("Muon", "Adam")
    )
    return [
        ("mismatched less matched, mean of both", mixed, matched),
        *(
            (f"after {pre}: {other} less {pre}", [(pre, other)], [(pre, pre)])
            for pre, other in mixed
        ),
        *(
            (f"after {pre}: {kind} less Muon", [(pre, kind)], [(pre, "Muon")])
            for kind in ("MuonClip", "per-head Muon")
            for pre in ("Adam", "Muon")
        ),
        ("after Muon less after Adam, mean of Adam and Muon", after_muon, after_adam),
    ]


def mean_of(values: list[dict[int, float | None]]) -> dict[int, float | None]:
    """The mean of several values of each seed that all have."""
    seeds = set.intersection(*(set(each) for each in values))
    return {seed: float(np.mean([each[seed] for each in values])) for seed in seeds}


def rank_table(best: Mapping[Pair, list[Json]]) -> str:
    """The effective ranks of what was added, a column a kernel."""
    names = kernels(next(iter(best.values()))[0])
    rows = []
    for title, name in (("weights", "weight_rank"), ("added", "change_rank")):
        for pair, seeds in best.items():
            columns = np.array([by_kernel(r, name) for r in seeds]).T
            rows.append((f"{title}, {ARROW.join(pair)}", *(spread(c, ".3f") for c in columns)))
    return table(("effective rank / n after the second phase", *names), rows)


def each_loss(seeds: list[Json]) -> list[float]:
    """The loss on the second text at the end, of each seed."""
    return [valid_loss(record) for record in seeds]


def kernels(record: Json) -> list[str]:
    """Their names."""
    return list(record["measurements"][0]["weight_rank"])


def by_kernel(record: Json, name: str, at: int = -1) -> list[float]:
    """A rank of each kernel, the mean over layers."""
    found = record["measurements"][at][name]
    return [float(np.mean(np.array(found[kernel], np.float64))) for kernel in kernels(record)]


def ranks(record: Json, name: str = "weight_rank", at: int = -1) -> float:
    """The mean over kernels and layers."""
    return float(np.mean(by_kernel(record, name, at)))


def peak(record: Json, of: Callable[[np.ndarray], float]) -> float:
    """Of the largest max logits of all heads, `[steps]`, one."""
    return float(of(curve(record, "max_logits").max(axis=(1, 2))))


def first(values: np.ndarray) -> float:
    return values[0]


def end(values: np.ndarray) -> float:
    return values[-1]
