"""Tables and pictures of `clip`, from the records."""

from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.before import old_runs, side_by_side
from studies.common.clips import applied, halves, max_logits, passes, threshold
from studies.common.records import Json, Runs
from studies.common.tables import (
    by_seed,
    curve,
    last_peak,
    paired,
    smooth,
    spread,
    steps,
    table,
    tail,
    valid_loss,
)

DEAD = 0.05  # a head whose logits stay below this share of the threshold
WITHOUT_CLIP = {"MuonClip": "Muon", "AdamClip": "AdamW"}


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    clipped = {label: seeds for label, seeds in runs.items() if threshold(seeds[0])}
    drawn = folder / "curves.png"
    with pictures.picture(drawn, 3) as (peaks, share, losses):
        pictures.curves(peaks, runs, lambda r: (steps(r), max_logits(r).max(axis=1)))
        peaks.set(xlabel="step", ylabel="largest max logit", yscale="log")
        pictures.curves(
            share, clipped, lambda r: (steps(r), smooth(100 * passes(r).mean(axis=1))), of=runs
        )
        share.set(xlabel="step", ylabel="heads above τ (%)")
        pictures.curves(losses, runs, lambda r: (steps(r), smooth(curve(r, "loss"))))
        losses.set(xlabel="step", ylabel="training loss (nats per token)")
    parts = [summary(runs), differences(runs), over_clipping(clipped), pictures.link(drawn)]
    if old := old_runs(folder):
        parts.append(side_by_side(old, runs, COLUMNS, valid_loss))
    return "\n\n".join(parts)


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
            loss(seeds),
            spread(peaks, ".1f"),
        ]
        if tau := threshold(seeds[0]):
            row += [
                spread((peak / tau for peak in peaks), ".2f"),
                spread((100 * passes(r).any(axis=0).mean() for r in seeds), ".0f"),
                *(spread(half, ".1f") for half in zip(*map(halves, seeds), strict=True)),
            ]
        else:
            row += [""] * 4
        rows.append(row)
    return table(header, rows)


def differences(runs: Runs) -> str:
    """Losses less those of another setting, seed by seed: of the same optimizer without a clip, and
    of the clip per head with the same threshold."""
    header = ("validation loss, less that of", "no clip", "the clip per head")
    losses = {label: by_seed(seeds, valid_loss) for label, seeds in runs.items()}
    rows = []
    for label, own in losses.items():
        others = WITHOUT_CLIP.get(label.split()[0]), label.split(", ")[0]
        cells = [
            paired(own, losses[other]) if other in losses and other != label else ""
            for other in others
        ]
        if threshold(runs[label][0]) and any(cells):
            rows.append((label, *cells))
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
        tau = threshold(seeds[0])
        rows.append(
            (
                label,
                innocent(seeds),
                spread((np.median(applied(r).prod(axis=0)) for r in seeds), ".2g"),
                smallest_head(seeds),
                spread((100 * (ends(r) < DEAD * tau).mean() for r in seeds), ".0f"),
            )
        )
    return table(header, rows)


def loss(seeds: list[Json]) -> str:
    """At the end."""
    return spread(map(valid_loss, seeds), ".3f")


def innocent(seeds: list[Json]) -> str:
    """Head-steps that were clipped though the head itself was not above τ, in percent."""
    return spread((100 * ((applied(r) < 1) & ~passes(r)).mean() for r in seeds), ".1f")


def smallest_head(seeds: list[Json]) -> str:
    """The max logit of the head that has the smallest."""
    return spread((ends(r).min() for r in seeds), ".2f")


def ends(record: Json) -> np.ndarray:
    """The max logits of the heads, in the median of the last fifth of the steps, `[heads]`."""
    return np.median(tail(max_logits(record)), axis=0)


# Of the runs that were repeated when `scope="layer"` became the source's first version.
COLUMNS = {
    "validation loss": loss,
    "head-steps clipped for another head's logit (%)": innocent,
    "smallest head": smallest_head,
}
