"""Tables and pictures of `clip`, from the records."""

from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.records import Json, Runs
from studies.common.tables import curve, last, last_peak, smooth, spread, steps, table, tail

DEAD = 0.05  # a head whose logits stay below this share of the threshold


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    clipped = {label: seeds for label, seeds in runs.items() if threshold(seeds[0])}
    drawn = folder / "curves.png"
    with pictures.picture(drawn, 3) as (peaks, share, loss):
        pictures.curves(peaks, runs, lambda r: (steps(r), max_logits(r).max(axis=1)))
        peaks.set(xlabel="step", ylabel="largest max logit", yscale="log")
        pictures.curves(
            share, clipped, lambda r: (steps(r), smooth(100 * passes(r).mean(axis=1))), of=runs
        )
        share.set(xlabel="step", ylabel="heads above τ (%)")
        pictures.curves(loss, runs, lambda r: (steps(r), smooth(curve(r, "loss"))))
        loss.set(xlabel="step", ylabel="training loss (nats per token)")
    return "\n\n".join((summary(runs), over_clipping(clipped), pictures.link(drawn)))


def summary(runs: Runs) -> str:
    """A line a setting."""
    header = (
        "",
        "validation loss",
        "largest max logit, last fifth",
        "the same over τ",
        "heads ever above τ (%)",
        "head-steps above τ, first half (%)",
        "second half (%)",
    )
    rows = []
    for label, seeds in runs.items():
        peaks = [last_peak(r) for r in seeds]
        row = [
            label,
            spread((last(r, "valid_loss") for r in seeds), ".3f"),
            spread(peaks, ".1f"),
        ]
        if tau := threshold(seeds[0]):
            halves = [np.array_split(100 * passes(r), 2) for r in seeds]
            row += [
                spread((peak / tau for peak in peaks), ".2f"),
                spread((100 * passes(r).any(axis=0).mean() for r in seeds), ".0f"),
                *(spread((each[half].mean() for each in halves), ".1f") for half in (0, 1)),
            ]
        else:
            row += [""] * 4
        rows.append(row)
    return table(header, rows)


def over_clipping(runs: Runs) -> str:
    """What the clip does to heads that did not pass the threshold themselves."""
    header = (
        "",
        "head-steps clipped for another head's logit (%)",
        "product of all clip factors, median head",
        "max logit of the smallest head, last fifth",
        f"heads below {DEAD:g} τ, last fifth (%)",
    )
    rows = []
    for label, seeds in runs.items():
        ends = [np.median(tail(max_logits(r)), axis=0) for r in seeds]
        tau = threshold(seeds[0])
        rows.append(
            (
                label,
                spread((100 * ((applied(r) < 1) & ~passes(r)).mean() for r in seeds), ".1f"),
                spread((np.median(applied(r).prod(axis=0)) for r in seeds), ".2g"),
                spread((end.min() for end in ends), ".2f"),
                spread((100 * (end < DEAD * tau).mean() for end in ends), ".0f"),
            )
        )
    return table(header, rows)


def threshold(record: Json) -> float | None:
    """τ, None without a clip."""
    return record["optimizer"]["threshold"]


def max_logits(record: Json) -> np.ndarray:
    """`[steps, heads of all layers]`, layer by layer."""
    maxima = curve(record, "max_logits")
    return maxima.reshape(len(maxima), -1)


def passes(record: Json) -> np.ndarray:
    """Which heads are above τ, `[steps, heads]`."""
    return max_logits(record) > threshold(record)


def applied(record: Json) -> np.ndarray:
    """The factors that the clip multiplied logits by, `[steps, heads]`."""
    factors = np.minimum(1, threshold(record) / curve(record, "max_logits"))
    factors = np.where(factors > 0, factors, 1)  # neither negative nor broken maxima clip
    if record["optimizer"]["scope"] == "layer":
        factors = np.broadcast_to(factors.min(axis=-1, keepdims=True), factors.shape)
    return factors.reshape(len(factors), -1)
