"""The record of a run: one JSON object a line, from which everything shown is computed.

Every row has an `event`: `start` (the settings; one more each time the run is resumed), `step`
(one training step), `eval` (held-out loss and participation ratios) and `end` (the sample). Rows
carry the step they were taken after.
Maxima and clip factors are `{block: [heads]}`, `expert_load` is `{module: [experts]}`. A number
that is not finite is null.
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from examples.mla.cli import InputError
from examples.mla.folder import write_whole

Row = dict[str, Any]

FILE = "metrics.jsonl"
EVENTS = ("start", "step", "eval", "end")


def write(file: TextIO, row: Mapping[str, Any]) -> None:
    """Appends a row and flushes it, so that a crash loses nothing."""
    file.write(_line(row))
    file.flush()


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(_jsonable(row), allow_nan=False) + "\n"


def read(run_dir: Path) -> list[Row]:
    """All rows of a run. A last line that a crash cut short is left out, as are the zeros that a
    power failure may leave at the end.

    Raises:
      InputError: No metrics there, or something else in their place.
    """
    path = run_dir / FILE
    if not path.exists():
        raise InputError(f"{path}: no such file; give the folder of a run")
    *whole, cut_short = path.read_bytes().split(b"\n")
    if cut_short.strip(b"\0") and not cut_short.startswith(b"{"):
        whole.append(cut_short)  # no row began so: it is not ours to leave out
    return [_row(line, f"{path}, line {number}") for number, line in enumerate(whole, 1)]


def _row(line: bytes, where: str) -> Row:
    try:
        row = json.loads(line)
        if row["event"] not in EVENTS or type(row["step"]) is not int:
            raise ValueError("no event at a step")
    except (ValueError, LookupError, TypeError) as error:
        raise InputError(
            f"{where}: not the metrics of a run ({error}); take the line out, or move the file "
            "away: a run goes on without it"
        ) from error
    return row


def rewind(run_dir: Path, step: int) -> bool:
    """Drops what was recorded after `step`, where a resumed run continues.

    Returns:
      Whether there was a record.
    """
    if not (run_dir / FILE).exists():
        return False
    kept = [row for row in read(run_dir) if row["step"] <= step and row["event"] != "end"]
    write_whole(run_dir / FILE, "".join(_line(row) for row in kept).encode())
    return True


def select(rows: Sequence[Row], event: str) -> list[Row]:
    """The rows of one kind."""
    return [row for row in rows if row["event"] == event]


def column(rows: Sequence[Row], name: str) -> np.ndarray:
    """One number per row, float64 `[rows]`; NaN where it was not finite."""
    return np.array([row[name] for row in rows], np.float64)


def per_head(rows: Sequence[Row], name: str) -> dict[str, np.ndarray]:
    """Block → float64 `[rows, heads]` of the step rows' `max_logits`, `gamma` or `expert_load`."""
    return {
        block: np.array([row[name][block] for row in rows], np.float64) for block in rows[0][name]
    }


def all_heads(rows: Sequence[Row], name: str) -> np.ndarray:
    """The same of all blocks' heads side by side, float64 `[rows, heads]`."""
    return np.concatenate([*per_head(rows, name).values()], axis=1)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """All settings in one level: the model's by their names, the rates as `rates.float32`."""
    rates = {f"rates.{name}": value for name, value in settings.get("rates", {}).items()}
    run = {name: value for name, value in settings.items() if name not in ("model", "rates")}
    return run | rates | settings["model"]


def _jsonable(value: Any) -> Any:
    match value:
        case Mapping():
            return {key: _jsonable(item) for key, item in value.items()}
        case np.ndarray() | np.generic():
            return _jsonable(value.tolist())
        case list() | tuple():
            return [_jsonable(item) for item in value]
        case float() if not math.isfinite(value):
            return None
        case _:
            return value


def summary(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """The results of a run, as pairs of label and text."""
    start = select(rows, "start")[-1]
    steps, evals = select(rows, "step"), select(rows, "eval")
    loss = column(evals[-1:], "loss").item() if evals else math.nan
    found = [
        ("steps", f"{steps[-1]['step']:,}"),
        ("tokens", f"{sum(row['tokens'] for row in steps):,}"),
        ("tokens per second", f"{tokens_per_second(steps):,.0f}"),
        ("training loss, mean of the last 20 steps", f"{column(steps[-20:], 'loss').mean():.3f}"),
        *losses(loss, start["facts"]["bytes_per_token"]),
        ("largest max logit", f"{np.fmax.reduce(peak(steps)):.2f}"),
    ]
    if has_experts(steps):
        busiest = np.mean([load[-20:].mean() for load in busiest_expert(steps).values()])
        found.append(("busiest expert, of a fair share, last 20 steps", f"{busiest:.2f}"))
    if clips(steps):
        found += [
            ("threshold τ", f"{start['settings']['threshold']:g}"),
            ("head-steps clipped", f"{share_clipped(steps):.1%}"),
            ("smallest clip factor γ", f"{all_heads(steps, 'gamma').min():.3f}"),
            ("maxima that were not finite", f"{steps[-1]['nonfinite_heads']}"),
            ("clips lost to rounding", f"{steps[-1]['lost_heads']}"),
        ]
    return found


def losses(loss: float, bytes_per_token: float) -> list[tuple[str, str]]:
    """A loss on held-out text in its three units, as pairs of label and text."""
    return [
        ("validation loss (nats per token)", f"{loss:.3f}"),
        ("validation perplexity", f"{np.exp(loss):.4g}"),
        ("validation bits per byte", f"{loss / math.log(2) / bytes_per_token:.3f}"),
    ]


def tokens_per_second(steps: Sequence[Row]) -> float:
    """The mean rate, without steps that waited for the compiler (each start's first)."""
    warm = [row for row in steps if not row["compiled"]] or steps
    return sum(row["tokens"] for row in warm) / sum(row["seconds"] for row in warm)


def clips(steps: Sequence[Row]) -> bool:
    """Whether the run's optimizer ends with QK-Clip."""
    return "gamma" in steps[0]


def share_clipped(steps: Sequence[Row]) -> float:
    """The share of all heads in all steps that were clipped."""
    return float((all_heads(steps, "gamma") < 1).mean())


def has_experts(steps: Sequence[Row]) -> bool:
    """Whether the run's MLPs are mixtures of experts."""
    return "expert_load" in steps[0]


def busiest_expert(steps: Sequence[Row]) -> dict[str, np.ndarray]:
    """Module → float64 `[steps]`: how much the busiest expert got, where 1 is a fair share."""
    return {
        module: load.max(axis=1) * load.shape[1]
        for module, load in per_head(steps, "expert_load").items()
    }


def peak(steps: Sequence[Row]) -> np.ndarray:
    """The largest max logit of any head, float64 `[steps]`; NaN where none was finite."""
    return np.fmax.reduce([*per_head(steps, "max_logits").values()], axis=(0, 2))
