"""The record of a run in progress: rows of metrics, and a progress bar that fits 80 columns."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.mla import metrics
from examples.mla.settings import Settings
from examples.mla.steps import learning_rates


class Recorder:
    """Reads each step's numbers one step late, when the device has the next step already, so that
    the device never waits for the host."""

    def __init__(
        self,
        record: Callable[[metrics.Row], None],
        settings: Settings,
        done: int,
        console: Console,
    ):
        self.console = console
        self._record = record
        self._tokens = settings.batch_size * settings.context_length
        self._rates = np.asarray(jax.vmap(learning_rates(settings))(jnp.arange(settings.steps)))
        self._first_step = done + 1
        self._late: tuple[int, dict[str, Any]] | None = None
        self._bar = Progress(
            MofNCompleteColumn(),
            BarColumn(bar_width=None),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("", total=settings.steps, completed=done, shown="compiling")
        self._clock = time.perf_counter()

    def __enter__(self) -> "Recorder":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def step(self, step: int, numbers: dict[str, Any]) -> None:
        """Notes a step that was just started, and records the one before."""
        self.catch_up()
        self._late = step, numbers

    def catch_up(self) -> None:
        """Waits for the step that is not recorded yet, and records it."""
        if self._late is None:
            return
        (step, numbers), self._late = self._late, None
        numbers = jax.device_get(numbers)
        now = time.perf_counter()
        row = {
            "event": "step",
            "step": step,
            "tokens": self._tokens,
            "seconds": now - self._clock,
            "compiled": step == self._first_step,
            "learning_rate": float(self._rates[step - 1]),
            **numbers,
        }
        self._clock = now
        self._record(row)
        self._bar.update(self._task, completed=step, shown=_shown(row))

    def evaluation(self, step: int, loss: float, participation_ratio: dict[str, Any]) -> None:
        """Records a validation."""
        row = {"step": step, "loss": loss, "participation_ratio": participation_ratio}
        self._record({"event": "eval", **row})
        self.restart_clock()
        self.console.print(f"step {step}: validation loss {loss:.3f}")

    def restart_clock(self) -> None:
        """Starts timing the next step now, so that a save or validation does not count."""
        self._clock = time.perf_counter()


def _shown(row: metrics.Row) -> str:
    largest = max(float(heads.max()) for heads in row["max_logits"].values())
    clipped = f"  {row['heads_clipped']} clipped" if "gamma" in row else ""
    rate = row["tokens"] / row["seconds"]
    return f"loss {row['loss']:.3f}  {rate:,.0f} tok/s  max logit {largest:.1f}{clipped}"
