"""Tables and pictures of `spectrum`, from the records."""

from pathlib import Path

import numpy as np

from studies.common import pictures
from studies.common.records import Json, Runs
from studies.common.tables import last_peak, measured, spread, table, valid_loss

QUERIES_AND_KEYS = ("q", "k")


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    drawn = folder / "spectra.png"
    panels = {
        "weights: entropy of the spectrum": "weight_entropy",
        "updates: effective rank / n": "update_rank",
        "weights: spectral norm": "weight_norm",
    }
    with pictures.picture(drawn, len(panels) + 1, width=4.2) as (*axes, meeting):
        for each, (title, name) in zip(axes, panels.items(), strict=True):
            pictures.curves(each, runs, lambda r, name=name: (at(r), of_kernels(r, name)))
            each.set(title=title, xlabel="step")
        pictures.curves(meeting, runs, lambda r: (at(r), over_chance(r)))
        pictures.level(meeting, 1, "chance")
        meeting.set(title="|uᵢᵀDvᵢ| over chance", xlabel="step")
    return "\n\n".join((summary(runs), by_kernel(runs), pictures.link(drawn)))


def summary(runs: Runs) -> str:
    """A line a setting, means over all kernels and layers."""
    header = (
        "",
        "validation loss",
        "entropy of the weights' spectrum",
        "of the updates'",
        "effective rank of the updates / n",
        "spectral norm of q and k, × the first",
        "overlap of update and weight, over chance",
        "share of the update that grows σ₁",
        "largest max logit, last fifth",
    )
    rows = []
    for label, seeds in runs.items():
        growth = (norms[-1] / norms[0] for norms in map(query_key_norms, seeds))
        rows.append(
            (
                label,
                spread(map(valid_loss, seeds), ".3f"),
                spread((of_kernels(r, "weight_entropy")[-1] for r in seeds), ".3f"),
                spread((after_start(of_kernels(r, "update_entropy")) for r in seeds), ".3f"),
                spread((after_start(of_kernels(r, "update_rank")) for r in seeds), ".2f"),
                spread(growth, ".2f"),
                spread((after_start(over_chance(r)) for r in seeds), ".2f"),
                spread((after_start(top_growth(r)) for r in seeds), "+.3f"),
                spread(map(last_peak, seeds), ".1f"),
            )
        )
    return table(header, rows)


def by_kernel(runs: Runs) -> str:
    """The weights at the end, a column a kernel."""
    kernels = list(next(iter(runs.values()))[0]["measurements"][0]["kernels"])
    rows = [
        (label, *(spread((of_kernels(r, name, [k])[-1] for r in seeds), form) for k in kernels))
        for title, name, form in (
            ("entropy", "weight_entropy", ".3f"),
            ("spectral norm", "weight_norm", ".2f"),
        )
        for label, seeds in ((f"{title}, {label}", seeds) for label, seeds in runs.items())
    ]
    return table(("at the end, mean over layers", *kernels), rows)


def at(record: Json) -> np.ndarray:
    """The steps of the measurements."""
    return measured(record, "step")


def raw(record: Json, name: str, kernel: str) -> np.ndarray:
    """`[measurements, layers, ...]` of a kernel."""
    return np.array([row["kernels"][kernel][name] for row in record["measurements"]], np.float64)


def of_kernels(record: Json, name: str, kernels: list[str] | None = None) -> np.ndarray:
    """Mean over kernels and layers, `[measurements]`."""
    kernels = list(record["measurements"][0]["kernels"]) if kernels is None else kernels
    return np.mean([raw(record, name, kernel).mean(axis=1) for kernel in kernels], axis=0)


def query_key_norms(record: Json) -> np.ndarray:
    return of_kernels(record, "weight_norm", list(QUERIES_AND_KEYS))


def over_chance(record: Json) -> np.ndarray:
    """The root mean square of uᵢᵀ D vᵢ, over what it is for a D that knows nothing of W."""
    ratios = []
    for kernel in record["measurements"][0]["kernels"]:
        found = np.sqrt((raw(record, "projections", kernel) ** 2).mean(axis=-1))
        chance = raw(record, "update_frobenius", kernel) / np.sqrt(entries(record, kernel))
        ratios.append((found / chance).mean(axis=1))
    return np.mean(ratios, axis=0)


def entries(record: Json, kernel: str) -> int:
    """Of a kernel: a random D has E (uᵀDv)² = ‖D‖²/entries for unit u and v."""
    model = record["model"]
    width = {
        "q": model["heads"] * (model["nope"] + model["rope"]),
        "k": model["kv_heads"] * (model["nope"] + model["rope"]),
        "v": model["kv_heads"] * model["v"],
        "o": model["heads"] * model["v"],
    }
    return model["d_model"] * width.get(kernel, model["d_ff"])


def top_growth(record: Json) -> np.ndarray:
    """u₁ᵀ D v₁ over ‖D‖₂, between -1 and 1."""
    shares = [
        (raw(record, "projections", kernel)[..., 0] / raw(record, "update_norm", kernel)).mean(
            axis=1
        )
        for kernel in record["measurements"][0]["kernels"]
    ]
    return np.mean(shares, axis=0)


def after_start(values: np.ndarray) -> float:
    """The mean of the measurements but the first, whose momentum is that of one step."""
    return float(values[1:].mean())
