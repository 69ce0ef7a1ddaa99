"""The largest singular value that `orthogonalize` leaves, by random search and by climbing.

    python -m benchmarks.largest_singular_values --json PATH

Rounding errors do not average out in matrices of few rows, and there the Gram iteration can leave
its interval. Each schedule, dtype and method is tried on matrices of several kinds and shapes; then
the worst are changed at random again and again, and what makes them worse is kept. No result may be
more than 0.1 above the top of the schedule's own exact polynomial on [0, 1].
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import tyro
from rich.table import Table

import muonclip_jax as mc
from muonclip_jax import schedules
from muonclip_jax._orthogonalize import lean, methods
from muonclip_jax.schedules import Schedule

# By how much rounding may take a singular value above the top of the exact polynomial.
ALLOWED = 0.1
_AT_ONCE = 512  # matrices
Name = Literal["bfloat16", "float16", "float32"]
MethodName = Literal["auto", "standard", "gram", "lean standard", "lean gram"]
METHODS: dict[str, mc.Method] = {
    f"lean {iteration}": mc.Method(iteration, lean=True)
    for iteration in get_args(methods.Iteration)
}

CLASSIC = Schedule("classic cubic", ((1.5, -0.5, 0.0),) * 12, lower=0.1)
SCHEDULES = {
    schedule.name: schedule
    for schedule in (
        schedules.polar_express(5),
        *(schedules.polar_express(k) for k in (3, 4, 6, 7, 8, 9, 10)),
        *(schedules.polar_express(k, lower=2e-3) for k in (5, 7, 8, 10)),
        *(schedules.polar_express(k, lower=1e-5) for k in (6, 10)),
        schedules.polar_express(4, lower=5e-3),
        schedules.polar_express(3, lower=2e-2),
        dataclasses.replace(
            schedules.polar_express(5, lower=1e-3, normalization="frobenius"), name="published"
        ),
        schedules.jordan(),
        schedules.jordan(20),
        schedules.you(),
        schedules.cans(),
        schedules.aol(),
        schedules.deepseek_v4(),
        CLASSIC,
        schedules.cubic(),
        schedules.cubic(5, lower=2e-2),
    )
}


@dataclasses.dataclass(frozen=True)
class Options:
    """What is searched, and for how long."""

    schedules: tuple[str, ...] = ()
    """Their names; none: all."""
    dtypes: tuple[Name, ...] = ("bfloat16", "float16", "float32")
    methods: tuple[MethodName, ...] = get_args(MethodName)
    """"lean" is what GPUs take, computed here, in the form for large matrices."""
    shapes: tuple[tuple[int, int], ...] = ((2, 3), (3, 6), (6, 12), (8, 8), (8, 64), (16, 24))
    count: int = 2000
    """Random matrices of each shape, kind and draw."""
    draws: int = 1
    generations: int = 30
    """Of the climb, each of 512 matrices; 0 for none."""
    inside: tuple[int, int] = (16, 64)
    """Every matrix is put into zeros of so many rows and columns, which changes no product, so that
    one program does for all. From 64 rows on "auto" takes the Gram iteration."""
    seed: int = 0
    json: Path | None = None
    """Write the figures there as well."""


def matrices(rng: np.random.Generator, count: int, n: int, m: int) -> np.ndarray:
    """Random matrices `[kinds * count, n, m]`, of the kinds at which the iterations go wrong."""

    def with_spectrum(sigma):
        u = np.linalg.qr(rng.standard_normal((count, n, n)))[0]
        v = np.linalg.qr(rng.standard_normal((count, m, n)))[0]
        return (u * sigma[:, None]) @ v.swapaxes(-1, -2)

    def powers(low, high, *shape):
        return 10 ** rng.uniform(low, high, (count, *shape))

    noise = rng.standard_normal((count, n, m))
    one = rng.standard_normal((count, n, 1)) * rng.standard_normal((count, 1, m))
    some = rng.uniform(size=(count, n)) < 0.5
    falling = 10 ** (rng.uniform(-5, -0.3, (count, 1)) * rng.uniform(size=(count, n)))
    kinds = [
        with_spectrum(falling),
        with_spectrum(np.where(some, 1.0, powers(-3.2, -0.8, 1))),
        with_spectrum(np.where(np.arange(n) < n / 2, 1.0, 2.0**-8) * np.ones((count, n))),
        noise * powers(-3, 0, n, 1) * powers(-2, 0, 1, m),
        one,
        one + powers(-4, -1, 1, 1) * noise,  # momentum whose gradients point one way
        noise[:, :1] + powers(-2.5, 0, n, 1) * noise,
    ]
    return np.concatenate(kinds).astype(np.float32)


@functools.partial(jax.jit, static_argnames=("schedule", "method", "dtype"))
def largest(x: jax.Array, schedule: Schedule, method: str | mc.Method, dtype: str) -> jax.Array:
    """Bounds each result's largest singular value from above, by n^(1/128) at most: `[count]`.

    The Schatten-128 norm, tr(G⁶⁴)^(1/128), G the result's Gram matrix: no eigenvalues are needed.
    """
    out = mc.orthogonalize(x, schedule, method=method, dtype=dtype).astype(jnp.float32)
    power, log_norm = jnp.matmul(out, out.mT, precision="highest"), jnp.zeros(len(x))
    for doubled in range(7):
        size = jnp.max(jnp.abs(power), (-2, -1))
        log_norm += jnp.log(size) / 2**doubled
        power /= jnp.where(size == 0, 1, size)[:, None, None]
        power = jnp.matmul(power, power, precision="highest")
    trace = jnp.trace(power, axis1=-2, axis2=-1)
    norm = jnp.exp((log_norm + jnp.log(trace) / 128) / 2)
    finite = jnp.isfinite(out).all((-2, -1))
    return jnp.where(finite, jnp.where(out.any((-2, -1)), norm, 0), jnp.inf)


def tops(x: np.ndarray, inside: tuple[int, int], *how: Any) -> np.ndarray:
    """`largest` of matrices of any shape, by one program."""
    n, m = x.shape[1:]
    missing = -len(x) % _AT_ONCE
    x = np.pad(x, ((0, missing), (0, inside[0] - n), (0, inside[1] - m)))
    parts = np.split(x, len(x) // _AT_ONCE)
    found = np.concatenate([largest(part, *how) for part in parts])
    return found[: len(found) - missing]


def exactly(
    x: np.ndarray,
    inside: tuple[int, int],
    schedule: Schedule,
    method: str | mc.Method,
    dtype: str,
) -> float:
    """The largest singular value of one result, in float64."""
    x = np.pad(x, [(0, size - length) for size, length in zip(inside, x.shape, strict=True)])
    out = np.asarray(mc.orthogonalize(x, schedule, method=method, dtype=dtype), np.float64)
    return float(np.linalg.norm(out, 2)) if np.isfinite(out).all() else math.inf


def climb(
    x: np.ndarray, generations: int, rng: np.random.Generator, *how: Any
) -> tuple[np.ndarray, int]:
    """Changes matrices `[parents, n, m]`, and keeps what makes a result larger.

    Returns:
      The parents of the last generation, the worst first; how many matrices were tried.
    """
    children, shape = _AT_ONCE // len(x), x.shape[1:]
    found = tops(x, *how)
    for _ in range(generations):
        noise = rng.standard_normal((children, *x.shape))
        size = 10 ** rng.uniform(-3.5, 0, (children, len(x), 1, 1))
        size = size * np.abs(x).max((-2, -1), keepdims=True)
        entries = (
            rng.uniform(size=noise.shape)
            < rng.choice([1.0, 0.3, 0.05], noise.shape[:2])[:, :, None, None]
        )
        rows = 10 ** (size * rng.standard_normal((children, len(x), shape[0], 1)))
        scaled = rng.uniform(size=(children, len(x), 1, 1)) < 0.3
        tried = np.where(scaled, x * np.clip(rows, 0.1, 10), x + size * noise * entries)
        tried = tried.astype(np.float32)
        values = tops(tried.reshape(-1, *shape), *how).reshape(children, -1)
        best, at = values.argmax(0), np.arange(len(x))
        better = values[best, at] > found
        x = np.where(better[:, None, None], tried[best, at], x)
        found = np.where(better, values[best, at], found)
    return x[np.argsort(-found)], generations * children * len(x)


def search(schedule: Schedule, method: str, dtype: str, options: Options) -> dict[str, Any]:
    """A row: the worst matrix of both searches."""
    rng = np.random.default_rng(options.seed)
    how = (options.inside, schedule, METHODS.get(method, method), dtype)
    row = {"schedule": schedule.name, "dtype": dtype, "method": method, "exact": schedule.top}
    row |= {"random": 0.0, "climbed": 0.0, "matrices": 0, "allowed": row["exact"] + ALLOWED}
    for (n, m), _ in itertools.product(options.shapes, range(options.draws)):
        x = matrices(rng, options.count, n, m)
        found = tops(x, *how)
        worst = x[np.argsort(-found)[:32]]
        row["random"] = max(row["random"], exactly(worst[0], *how))
        row["matrices"] += len(x)
        worst, tried = climb(worst, options.generations, rng, *how)
        row["matrices"] += tried
        value = exactly(worst[0], *how)
        if value > row["climbed"]:
            row |= {"climbed": value, "shape": [n, m]}
    return row


def rows(options: Options) -> Iterator[dict[str, Any]]:
    for name, dtype, method in itertools.product(
        options.schedules or SCHEDULES, options.dtypes, options.methods
    ):
        yield search(SCHEDULES[name], method, dtype, options)


def main(options: Options) -> list[dict[str, Any]]:
    """Runs the command."""
    lean._MANY = lean._LARGE = 1  # all forms at once
    console, found = rich.console.Console(width=110), []
    table = Table("schedule", "dtype", "method", title="largest singular values")
    for column in ("exact", "allowed", "random", "climbed", "shape", "matrices"):
        table.add_column(column, justify="right")
    for row in rows(options):
        found.append(row)
        figures = [f"{row[name]:.4g}" for name in ("exact", "allowed", "random", "climbed")]
        bad = " !" if max(row["random"], row["climbed"]) > row["allowed"] else ""
        cells = [row["schedule"], row["dtype"], row["method"], *figures[:3], figures[3] + bad]
        table.add_row(*cells, str(row.get("shape", "")), f"{row['matrices']:,}")
        console.print(" ".join(cells))
    console.print(table)
    if options.json:
        record = {"date": date.today().isoformat(), "jax": jax.__version__, "rows": found}
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
