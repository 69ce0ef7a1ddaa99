"""Tables and pictures of `shared_keys`, from the records."""

from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.clips import applied, halves, passes, threshold
from studies.common.records import Json, Runs
from studies.common.tables import (
    by_seed,
    curve,
    last,
    last_peak,
    measured,
    paired,
    smooth,
    spread,
    steps,
    table,
    valid_loss,
)

UPDATE_RMS = 0.2  # of Muon's updates, before the learning rate
SIDES = {"W_q": "q_rms", "W_k": "k_rms"}


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    clipped = {label: seeds for label, seeds in runs.items() if threshold(seeds[0])}
    drawn = folder / "weights.png"
    with pictures.picture(drawn, 2 + len(SIDES)) as (loss, share, *sides):
        pictures.curves(loss, runs, lambda r: (steps(r), smooth(curve(r, "loss"))))
        loss.set(xlabel="step", ylabel="training loss (nats per token)")
        pictures.curves(
            share, clipped, lambda r: (steps(r), smooth(100 * passes(r).mean(axis=1))), of=runs
        )
        share.set(xlabel="step", ylabel="heads above τ (%)")
        for axes, (side, name) in zip(sides, SIDES.items(), strict=True):
            pictures.curves(axes, runs, lambda r, name=name: (at(r), typical(r, name)))
            axes.set(xlabel="step", ylabel=f"RMS of {side}", yscale="log")
    parts = (losses(runs), clips(clipped), weights(runs), pictures.link(drawn))
    return "\n\n".join(parts)


def losses(runs: Runs) -> str:
    """The losses, and their differences seed by seed."""
    references = [label for label in ("no clip", "untouched") if label in runs]
    header = ("", "validation loss", *(f"less that of {label}" for label in references))
    by_label = {label: by_seed(seeds, valid_loss) for label, seeds in runs.items()}
    rows = [
        (
            label,
            spread(found.values(), ".3f"),
            *("" if label == other else paired(found, by_label[other]) for other in references),
        )
        for label, found in by_label.items()
    ]
    return table(header, rows)


def clips(runs: Runs) -> str:
    """How often each way has to clip."""
    header = (
        "",
        "largest max logit, last fifth, over τ",
        "head-steps above τ, first half (%)",
        "second half (%)",
        "product of all clip factors, median head",
    )
    rows = [
        (
            label,
            spread((last_peak(r) / threshold(r) for r in seeds), ".2f"),
            *(spread(half, ".1f") for half in zip(*map(halves, seeds), strict=True)),
            spread((np.median(applied(r).prod(axis=0)) for r in seeds), ".2g"),
        )
        for label, seeds in runs.items()
    ]
    return table(header, rows)


def weights(runs: Runs) -> str:
    """The sizes of the weights at the end, and of a step beside them."""
    header = (
        "RMS of weights at the end",
        *(f"{side}, × the first" for side in SIDES),
        "W_q, smallest head",
        "W_q, largest head",
        "W_k, smallest",
        "W_k, largest",
        *(f"a step over {side}, largest (%)" for side in SIDES),
    )
    rows = []
    for label, seeds in runs.items():
        ends = {name: [last(r, name) for r in seeds] for name in SIDES.values()}
        rows.append(
            (
                label,
                *(spread((grown(r, name) for r in seeds), ".2g") for name in SIDES.values()),
                *(
                    spread((of(end) for end in ends[name]), ".2g")
                    for name in SIDES.values()
                    for of in (np.min, np.max)
                ),
                *(
                    spread((100 * step_rms(r) / last(r, name).min() for r in seeds), ".2g")
                    for name in SIDES.values()
                ),
            )
        )
    return table(header, rows)


def at(record: Json) -> np.ndarray:
    """The steps of the measurements."""
    return measured(record, "step")


def typical(record: Json, name: str) -> np.ndarray:
    """The geometric mean over layers and heads, `[measurements]`: weights differ by factors."""
    return np.exp(np.log(measured(record, name)).mean(axis=(1, 2)))


def grown(record: Json, name: str) -> float:
    """The typical size at the end over that at the start."""
    sizes = typical(record, name)
    return float(sizes[-1] / sizes[0])


def step_rms(record: Json) -> float:
    """What one step of Muon moves a weight by at most, in RMS: that of a flat spectrum."""
    return UPDATE_RMS * record["optimizer"]["learning_rate"]
