"""Tables and pictures of `rank`, from the records."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.before import Cell, old_runs, side_by_side
from studies.common.records import Json, Runs
from studies.common.tables import by_seed, last, last_peak, measured, paired, spread, table

NORMED = ", QK-norm"
SHOWN = 4  # settings shown head by head, and the first two layer by layer
SIDES = {"keys": "key_ratio", "queries": "query_ratio"}


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    ratios, by_depth, heads = (folder / f"{name}.png" for name in ("ratios", "layers", "heads"))
    with pictures.picture(ratios, 3, width=4.8) as (over_time, by_layer, loss):
        pictures.curves(over_time, runs, lambda r: (tokens(r), mean_ratio(r)))
        over_time.set(xlabel="tokens", ylabel="participation ratio of the keys, mean")
        pictures.curves(by_layer, runs, lambda r: (layers(r), last(r, "key_ratio").mean(axis=1)))
        by_layer.set(xlabel="layer", ylabel="participation ratio at the end")
        pictures.curves(loss, runs, lambda r: (tokens(r)[1:], valid_loss(r)[1:]))
        loss.set(xlabel="tokens", ylabel="validation loss (nats per token)")
    shown = dict(list(runs.items())[:SHOWN])
    draw_layers(dict(list(shown.items())[:2]), by_depth)
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
    drawn = map(pictures.link, (ratios, by_depth, heads))
    parts = [summary(runs), gaps(runs), update_sizes(runs), *drawn]
    if old := old_runs(folder):
        parts.append(side_by_side(old, runs, BEFORE, lambda record: valid_loss(record)[-1]))
    return "\n\n".join(parts)


def draw_layers(runs: Runs, path: Path) -> None:
    """Keys and queries of each setting over tokens, a line a layer."""
    with pictures.picture(path, 2 * len(runs), width=3.8) as axes:
        cells = ((label, side) for label in runs for side in SIDES)
        for each, (label, side) in zip(axes, cells, strict=True):
            by_layer = np.array([measured(r, SIDES[side]).mean(axis=2) for r in runs[label]])
            lines = {
                f"layer {i}": (tokens(runs[label][0]), by_layer[:, :, i])
                for i in range(by_layer.shape[2])
            }
            pictures.lines(each, lines, of=lines)
            each.set(title=label, xlabel="tokens", ylabel=f"participation ratio of the {side}")


def summary(runs: Runs) -> str:
    """A line a setting, at the end."""
    features = next(iter(runs.values()))[0]["model"]["rope"]
    header = (
        "",
        "validation loss",
        f"participation ratio of the keys (of {features})",
        "lowest layer",
        "which",
        "by eigenvalues",
        "of the queries",
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
                spread((last(r, "query_ratio").mean() for r in seeds), ".1f"),
                spread(map(last_peak, seeds), ".1f"),
            )
        )
    return table(header, rows)


def gaps(runs: Runs) -> str:
    """QK-norm minus none, seed by seed, at each measurement after the first."""
    pairs = [label for label in runs if label + NORMED in runs]
    if not pairs:
        return ""
    at = tokens(runs[pairs[0]][0])[1:]
    rows = [
        (f"{label}, {name}", *(gap(runs, label, of, i + 1) for i in range(len(at))))
        for label in pairs
        for name, of in OVER_TIME.items()
    ]
    return table(("QK-norm minus none, after tokens", *(f"{int(n):,}" for n in at)), rows)


def gap(runs: Runs, label: str, of: Callable[[Json], np.ndarray], index: int) -> str:
    normed, plain = (
        by_seed(seeds, lambda record: of(record)[index])
        for seeds in (runs[label + NORMED], runs[label])
    )
    return paired(normed, plain, ".3f" if of is valid_loss else ".1f")


def update_sizes(runs: Runs) -> str:
    """The RMS of the updates before the learning rate, at the end, a column a kernel."""
    names = list(dict.fromkeys(name for seeds in runs.values() for name in sizes(seeds[0])))
    rows = []
    for label, seeds in runs.items():
        found = [sizes(record) for record in seeds]
        cells = (
            spread((each[name] for each in found), ".3f") if name in found[0] else ""
            for name in names
        )
        rows.append((label, *cells))
    return table(("RMS of an update before the learning rate", *names), rows)


def sizes(record: Json) -> dict[str, float]:
    """Kernel → the RMS of its update at the end, over all layers."""
    found = record["measurements"][-1]["update_rms"]
    layers = {name: np.array(rms, np.float64) for name, rms in found.items()}
    return {name: float(np.sqrt(np.mean(rms**2))) for name, rms in layers.items()}


def tokens(record: Json) -> np.ndarray:
    """Trained on before each measurement."""
    plan = record["plan"]
    return measured(record, "step") * plan["batch"] * plan["context"]


def mean_ratio(record: Json, name: str = "key_ratio") -> np.ndarray:
    """Over layers and heads, `[measurements]`."""
    return measured(record, name).mean(axis=(1, 2))


def valid_loss(record: Json) -> np.ndarray:
    """`[measurements]`."""
    return measured(record, "valid_loss")


def layers(record: Json) -> np.ndarray:
    return np.arange(record["model"]["layers"])


OVER_TIME: dict[str, Callable[[Json], np.ndarray]] = {
    "validation loss": valid_loss,
    **{f"ratio of the {side}": partial(mean_ratio, name=name) for side, name in SIDES.items()},
}
BEFORE: dict[str, Cell] = {
    "validation loss": lambda seeds: spread((last(r, "valid_loss") for r in seeds), ".3f"),
    "ratio of the keys": lambda seeds: spread((mean_ratio(r)[-1] for r in seeds), ".1f"),
}
