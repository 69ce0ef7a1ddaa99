"""A train step of the example, with and without QuacK and QK-Clip.

    python -m benchmarks.train_step --json PATH

The model, the batches and the step are those of `python -m examples.mla.train` as it comes, on
random tokens; only `--optimizer` differs. Steps take turns. All of them compute the max logits,
which the example records whatever its optimizer is.
"""

import functools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import tyro
from rich import box
from rich.table import Table

from benchmarks import pictures, targets, timing
from benchmarks.targets import Target
from examples.mla import steps
from examples.mla.model import ModelConfig
from examples.mla.settings import Settings

BASE, BOTH = "muon", "muon, QuacK, QK-Clip"
# Row → what the example calls it.
OPTIMIZERS = {BASE: "muon", "muon, QK-Clip": "muonclip", "muon, QuacK": "quack", BOTH: "quackclip"}


@dataclass(frozen=True)
class Options:
    """What QuacK and QK-Clip add to a whole train step."""

    model: ModelConfig = ModelConfig()  # noqa: RUF009 (frozen)
    batch_size: int = Settings.batch_size
    context_length: int = Settings.context_length
    repeats: int = 200
    """Steps of each that are timed."""
    seconds_at_most: float = 240.0
    """After so many no new turn of steps begins."""
    json: Path | None = None
    """Write the figures there as well."""
    picture: Path | None = None
    """Draw them there."""


def make_step(optimizer: Any, options: Options) -> Callable[[], dict[str, Any]]:
    """A training that goes on by a step at each call."""
    settings = Settings(
        optimizer=optimizer,
        batch_size=options.batch_size,
        context_length=options.context_length,
        model=options.model,
    )
    trained = steps.create(settings, options.model)
    shape = (options.batch_size, options.context_length + 1)
    batch = jax.random.randint(jax.random.key(0), shape, 0, options.model.vocab_size)
    return functools.partial(steps.train_step, *trained, batch, clips=settings.clips)


def measure(options: Options) -> list[dict[str, Any]]:
    """A row for each optimizer."""
    seconds = timing.interleaved(
        {name: make_step(optimizer, options) for name, optimizer in OPTIMIZERS.items()},
        options.repeats,
        options.seconds_at_most,
    )
    middle = timing.medians(seconds)
    return [
        {
            "optimizer": name,
            "steps": len(each),
            "seconds_median": middle[name],
            "seconds_quartiles": _quartiles(each),
            "seconds_median_over_muon": middle[name] / middle[BASE],
            # Of each turn by itself, which the machine's drift leaves alone.
            "quartiles_over_muon": _quartiles(
                [one / base for one, base in zip(each, seconds[BASE], strict=True)]
            ),
        }
        for name, each in seconds.items()
    ]


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def asked(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    both = next(row for row in rows if row["optimizer"] == BOTH)
    return [Target(f"{BOTH}: over {BASE}", both["seconds_median_over_muon"], "<=", 1.02)]


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=f"A train step of the example on {timing.device()}", box=box.SIMPLE_HEAD)
    table.add_column("optimizer")
    for header in ("steps", "ms, median", "quartiles", "over muon", "quartiles of turns"):
        table.add_column(header, justify="right")
    for row in rows:
        low, high = row["seconds_quartiles"]
        first, third = row["quartiles_over_muon"]
        table.add_row(
            row["optimizer"],
            str(row["steps"]),
            f"{row['seconds_median'] * 1e3:.2f}",
            f"{low * 1e3:.2f} to {high * 1e3:.2f}",
            f"{row['seconds_median_over_muon']:.3f}",
            f"{first:.3f} to {third:.3f}",
        )
    timing.console().print(table)


def draw(rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    pictures.spreads(
        {
            row["optimizer"]: (row["seconds_median_over_muon"], *row["quartiles_over_muon"])
            for row in rows
            if row["optimizer"] != BASE
        },
        path,
        title=f"A train step of the example on {timing.device()}",
        label="seconds over those of muon: ratio of medians, and quartiles of turns",
    )


def main(options: Options) -> dict[str, Any]:
    rows = measure(options)
    reached = asked(rows)
    show(rows)
    targets.show(reached)
    record = timing.record(options, rows, targets=targets.as_rows(reached))
    timing.write(record, options.json)
    draw(rows, options.picture)
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
