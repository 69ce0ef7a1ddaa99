"""Micro-batches with `mc.accumulate` and with `optax.MultiSteps`, side by side.

    python -m benchmarks.accumulate --json PATH

Runs MuonClip's update and `apply_updates` on a decoder's parameters, without the model, in one
process and in turns. FLOPs are those of the matrix products that a real step's micro-steps execute,
read from the compiled program.
"""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
import rich
import tyro
from rich.table import Table

import muonclip_jax as mc
from benchmarks import overhead
from benchmarks.compiled import dots, flops

THRESHOLD = 100.0
WRAPPERS: dict[str, Callable[[Any, int], Any]] = {
    "accumulate": mc.accumulate,
    "MultiSteps": optax.MultiSteps,
}


@dataclass(frozen=True)
class Options:
    """What a micro-step costs, and which maxima reach QK-Clip."""

    layers: int = 4
    width: int = 512
    heads: int = 8
    vocab_size: int = 8192
    every: tuple[int, ...] = (4, 16)
    """How many micro-batches make a real step."""
    repeats: int = 5
    """Real steps of each that are timed."""
    dtype: str = "bfloat16"
    """Of the Newton–Schulz iteration."""
    json: Path | None = None
    """Write the figures there as well."""


class Training:
    """One wrapper around MuonClip, with its own parameters and state."""

    def __init__(self, name: str, every: int, options: Options):
        self.every = every
        self.params = parameters(options)
        self.gradient = jax.tree.map(jnp.cos, self.params)
        muonclip = mc.muonclip(
            1e-3,
            layout=mc.layouts.mha(),
            threshold=THRESHOLD,
            newton_schulz=mc.NewtonSchulz(dtype=options.dtype),
        )
        tx = WRAPPERS[name](muonclip, every)
        self.state = tx.init(self.params)
        blocks = [("layers", str(i), "attn") for i in range(options.layers)]
        large, small = (
            {block: jnp.full(options.heads, factor * THRESHOLD) for block in blocks}
            for factor in (2, 0.5)
        )
        self.maxima = [large] + [small] * (every - 1)

        def micro_step(params, state, gradient, maxima):
            updates, state = tx.update(gradient, state, params, max_logits=maxima)
            return optax.apply_updates(params, updates), state

        arguments = self.params, self.state, self.gradient, large
        self.micro_step = jax.jit(micro_step, donate_argnums=(0, 1)).lower(*arguments).compile()

    def real_step(self) -> float:
        """Seconds for each micro-step."""
        start = time.perf_counter()
        for maxima in self.maxima:
            self.params, self.state = self.micro_step(
                self.params, self.state, self.gradient, maxima
            )
        jax.block_until_ready(self.params)
        return (time.perf_counter() - start) / self.every

    def flops(self) -> int:
        """Of a real step: those of each micro-step, and those of the branch that one takes."""
        products = dots(self.micro_step)
        always = flops(product for product in products if not product.conditional)
        return self.every * always + flops(product for product in products if product.conditional)


def parameters(options: Options) -> Any:
    """A GPT-like decoder's, random."""
    shapes = overhead.decoder(
        overhead.Options(options.layers, options.width, options.heads, "mha", options.vocab_size)
    )
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return tree.unflatten(
        0.02 * jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)
    )


def compare(every: int, options: Options) -> list[dict[str, Any]]:
    """A row for each wrapper. Only the first micro-batch of a real step has maxima to clip by."""
    trainings = {name: Training(name, every, options) for name in WRAPPERS}
    seconds = {name: [] for name in WRAPPERS}
    for training in trainings.values():
        training.real_step()  # the first touches memory
    for _ in range(options.repeats):
        for name, training in trainings.items():
            seconds[name].append(training.real_step())
    return [
        {
            "every": every,
            "name": name,
            "seconds_per_micro_step": statistics.median(seconds[name]),
            "flops_per_real_step": training.flops(),
            "temp_bytes": training.micro_step.memory_analysis().temp_size_in_bytes,
            "heads_clipped": int(mc.qk_clip_state(training.state).heads_clipped),
            "heads_above_threshold": options.layers * options.heads,
        }
        for name, training in trainings.items()
    ]


def main(options: Options) -> dict[str, Any]:
    load = os.getloadavg()[0]  # other processes' work, which slows both
    rows = [row for every in options.every for row in compare(every, options)]
    record = {
        "date": date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "load_average_before": load,
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "options": {k: v for k, v in vars(options).items() if k != "json"},
        "rows": rows,
    }
    headers = ("every", "", "ms a micro-step", "GFLOP a real step", "MB temporary", "heads clipped")
    table = Table(title=f"MuonClip, {options.layers} layers of width {options.width}")
    for header in headers:
        table.add_column(header, justify="left" if not header else "right")
    for row in rows:
        table.add_row(
            str(row["every"]),
            row["name"],
            f"{row['seconds_per_micro_step'] * 1e3:.1f}",
            f"{row['flops_per_real_step'] / 1e9:.1f}",
            f"{row['temp_bytes'] / 1e6:.1f}",
            f"{row['heads_clipped']} of {row['heads_above_threshold']}",
        )
    rich.print(table)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
