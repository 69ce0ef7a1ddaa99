"""Tables and pictures of `rank`, from the records."""

from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.records import Json, Runs
from studies.common.tables import last, last_peak, measured, spread, table

NORMED = ", QK-norm"
HEAT_MAPS = 4  # settings shown head by head, the first ones


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    ratios, heads = folder / "ratios.png", folder / "heads.png"
    with pictures.picture(ratios, 3, width=4.8) as (over_time, by_layer, loss):
        pictures.curves(over_time, runs, lambda r: (tokens(r), mean_ratio(r)))
        over_time.set(xlabel="tokens", ylabel="participation ratio of the keys, mean")
        pictures.curves(by_layer, runs, lambda r: (layers(r), last(r, "key_ratio").mean(axis=1)))
        by_layer.set(xlabel="layer", ylabel="participation ratio at the end")
        pictures.curves(loss, runs, lambda r: (tokens(r)[1:], measured(r, "valid_loss")[1:]))
        loss.set(xlabel="tokens", ylabel="validation loss (nats per token)")
    shown = dict(list(runs.items())[:HEAT_MAPS])
    with pictures.picture(heads, len(shown), width=2.8, height=3.2) as axes:
        pictures.heat_maps(
            axes,
            {
                label: np.mean([last(r, "key_ratio") for r in seeds], axis=0)
                for label, seeds in shown.items()
            },
            label="participation ratio at the end",
            low=1,
        )
    parts = (summary(runs), gaps(runs), pictures.link(ratios), pictures.link(heads))
    return "\n\n".join(parts)


def summary(runs: Runs) -> str:
    """A line a setting."""
    features = next(iter(runs.values()))[0]["model"]["rope"]
    header = (
        "",
        "validation loss",
        f"participation ratio of the keys (of {features})",
        "lowest layer",
        "which",
        "by eigenvalues",
        "largest max logit, last fifth",
    )
    rows = []
    for label, seeds in runs.items():
        by_layer = [last(r, "key_ratio").mean(axis=1) for r in seeds]
        rows.append(
            (
                label,
                spread((last(r, "valid_loss") for r in seeds), ".3f"),
                spread((each.mean() for each in by_layer), ".1f"),
                spread((each.min() for each in by_layer), ".1f"),
                ", ".join(str(each.argmin()) for each in by_layer),
                spread((last(r, "key_eigenvalue_ratio").mean() for r in seeds), ".1f"),
                spread(map(last_peak, seeds), ".1f"),
            )
        )
    return table(header, rows)


def gaps(runs: Runs) -> str:
    """QK-norm minus none, seed by seed; the source has a positive rank gap the other way round."""
    header = (
        "QK-norm minus none, of the same seed",
        "validation loss",
        "participation ratio",
        "of each seed",
    )
    rows = []
    for label, seeds in runs.items():
        pairs = list(zip(runs.get(label + NORMED, ()), seeds, strict=False))
        if pairs:
            ratios = [mean_ratio(normed)[-1] - mean_ratio(plain)[-1] for normed, plain in pairs]
            losses = (
                last(normed, "valid_loss") - last(plain, "valid_loss") for normed, plain in pairs
            )
            each = ", ".join(f"{ratio:+.1f}" for ratio in ratios)
            rows.append((label, spread(losses, "+.3f"), spread(ratios, "+.1f"), each))
    return table(header, rows)


def tokens(record: Json) -> np.ndarray:
    """Trained on before each measurement."""
    plan = record["plan"]
    return measured(record, "step") * plan["batch"] * plan["context"]


def mean_ratio(record: Json) -> np.ndarray:
    """Over layers and heads, `[measurements]`."""
    return measured(record, "key_ratio").mean(axis=(1, 2))


def layers(record: Json) -> np.ndarray:
    return np.arange(record["model"]["layers"])
