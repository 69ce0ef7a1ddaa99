"""Tables and pictures of `decay`, from the records."""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.clips import passes, threshold
from studies.common.optimizers import Optimizer
from studies.common.records import Json, Runs
from studies.common.tables import (
    by_seed,
    curve,
    last_peak,
    measured,
    paired,
    smooth,
    spread,
    steps,
    table,
    tail,
    valid_loss,
)
from studies.decay.growth import Growth, growth

SHARES = (0.5, 0.9)  # of the rise, at which a growth phase ends


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    free = {label: seeds for label, seeds in runs.items() if threshold(seeds[0]) is None}
    clipped = {label: seeds for label, seeds in runs.items() if label not in free}
    drawn = folder / "curves.png"
    with pictures.picture(drawn, 3) as (peaks, share, norms):
        pictures.curves(peaks, free, lambda r: (steps(r), smooth(maxima(r))), of=runs)
        peaks.set(xlabel="step", ylabel="largest max logit, without a clip", yscale="log")
        pictures.curves(share, clipped, lambda r: (steps(r), smooth(above(r))), of=runs)
        share.set(xlabel="step", ylabel="heads above τ (%)")
        pictures.curves(norms, runs, lambda r: (measured(r, "step"), norm_product(r)))
        norms.set(xlabel="step", ylabel="‖W_q‖₂ ‖W_k‖₂, largest of the layers")
    parts = (summary(runs), growth_table(free), turning(runs), differences(runs))
    return "\n\n".join((*parts, pictures.link(drawn)))


def summary(runs: Runs) -> str:
    """A line a setting."""
    header = (
        "",
        "validation loss",
        "largest max logit of the run",
        "reached at step",
        "last fifth of the steps",
        "last fifth / largest",
        "‖W_q‖₂ ‖W_k‖₂ at the end",
        "head-steps above τ, first half (%)",
        "last fifth (%)",
    )
    rows = []
    for label, seeds in runs.items():
        row = [
            label,
            spread(map(valid_loss, seeds), ".3f"),
            spread(map(highest, seeds), ".1f"),
            spread((smooth(maxima(r)).argmax() + 1 for r in seeds), ".0f"),
            spread(map(last_peak, seeds), ".1f"),
            spread((last_peak(r) / highest(r) for r in seeds), ".2f"),
            spread((norm_product(r)[-1] for r in seeds), ".1f"),
        ]
        if threshold(seeds[0]) is None:
            row += ["", ""]
        else:
            shares = [above(r) for r in seeds]
            row += [
                spread((share[: len(share) // 2].mean() for share in shares), ".1f"),
                spread((tail(share).mean() for share in shares), ".1f"),
            ]
        rows.append(row)
    return table(header, rows)


def growth_table(runs: Runs) -> str:
    """The power of the growth, without a clip, of two lengths of the phase."""
    header = ["", *(f"p to {share:.0%} of the rise" for share in SHARES)]
    header += [f"p - 1 to {share:.0%}, 95%" for share in SHARES]
    header += [f"linear error / best, to {SHARES[-1]:.0%}", "explained", "steps of the phase"]
    rows = []
    for label, seeds in runs.items():
        early, late = ([fit(r, share) for r in seeds] for share in SHARES)
        one = {record["seed"]: 1.0 for record in seeds}
        powers = [by_seed(seeds, lambda r, share=share: fit(r, share).power) for share in SHARES]
        rows.append(
            (
                label,
                spread((found.power for found in early), ".2f"),
                spread((found.power for found in late), ".2f"),
                *(paired(power, one, ".2f") for power in powers),
                spread((found.linear_error for found in late), ".2f"),
                spread((found.explained for found in late), ".3f"),
                spread((found.steps for found in late), ".0f"),
            )
        )
    return table(header, rows)


def turning(runs: Runs) -> str:
    """Whether logits fall by themselves: the last fifth of the steps against the third, neither of
    which is chosen by what it holds. With a clip, whether fewer heads need it."""
    header = ("last fifth of the steps less the third fifth, 95%", "log10 of the largest max logit")
    rows = []
    for label, seeds in runs.items():
        # In most steps no head is above, so that the median would always be 0.
        heads = later(seeds, above, np.mean, ".1f") if threshold(seeds[0]) else ""
        rows.append((label, later(seeds, log_maxima, np.median, ".3f"), heads))
    return table((*header, "heads above τ (%)"), rows)


def later(
    seeds: list[Json],
    of: Callable[[Json], np.ndarray],
    mean: Callable[[np.ndarray], float],
    form: str,
) -> str:
    """A curve's mean over the last fifth of the steps less that over the third, seed by seed."""
    means = (by_seed(seeds, lambda r, n=n: mean(fifth(of(r), n))) for n in (5, 3))
    return paired(*means, form)


def differences(runs: Runs) -> str:
    """Paired over equal seeds: decay against none, Q and K against all, the clip against none."""
    header = ("", "loss, 95%", "log10 of the run's largest max logit, 95%")
    rows = []
    for label, seeds in runs.items():
        name, _, rest = label.partition(" ")
        decay = rest.removesuffix(", Q and K")
        others = (
            f"{name} λ=0",
            f"{name} {decay}" if decay != rest else None,
            f"Muon {rest}" if name == "MuonClip" else None,
        )
        for other in filter(runs.get, dict.fromkeys(others)):
            if other == label:
                continue
            pairs = [
                paired(by_seed(seeds, value), by_seed(runs[other], value), ".3f")
                for value in (valid_loss, log_highest)
            ]
            rows.append((f"{label} less {other}", *pairs))
    return table(header, rows)


def fit(record: Json, share: float) -> Growth:
    """The growth of a run without a clip."""
    optimizer = Optimizer(**record["optimizer"])
    rates = np.asarray(optimizer.rate(steps(record) - 1), np.float64)
    return growth(maxima(record), rates, optimizer.warmup, share)


def maxima(record: Json) -> np.ndarray:
    """The largest max logit of all heads, `[steps]`."""
    return curve(record, "max_logits").max(axis=(1, 2))


def highest(record: Json) -> float:
    """The largest of a run, of means over ten steps."""
    return float(smooth(maxima(record)).max())


def above(record: Json) -> np.ndarray:
    """The share of heads above τ, in per cent, `[steps]`."""
    return 100 * passes(record).mean(axis=1)


def norm_product(record: Json) -> np.ndarray:
    """‖W_q‖₂ ‖W_k‖₂ of the layer with the largest, `[measurements]`."""
    return (measured(record, "wq") * measured(record, "wk")).max(axis=1)


def log_highest(record: Json) -> float:
    """Its logarithm, for differences of that are ratios."""
    return float(np.log10(highest(record)))


def log_maxima(record: Json) -> np.ndarray:
    """Logarithm of the largest max logit, `[steps]`."""
    return np.log10(maxima(record))


def fifth(values: np.ndarray, which: int) -> np.ndarray:
    """A fifth of a curve, the first being 1."""
    return np.array_split(values, 5)[which - 1]
