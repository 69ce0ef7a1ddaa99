"""What the functions of a matrix cost: products, time next to an SVD's, and programs for TPUs.

    python -m benchmarks.linalg --json PATH
    python -m benchmarks.linalg --topology v5e:2x2      # compiles for TPU as well; needs libtpu

A product is 2n³ FLOPs, that of two square matrices, read from the compiled program. Factorizations
and inverses come on top: on CPU they are LAPACK's. Times are ratios to `jnp.linalg.svd` (with U and
V) of the same matrix in float32, the least of calls in turns; `taskset -c 0` in front keeps to one
core. "derivative" is the function's value with its
vector–Jacobian product.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.sharding import NamedSharding, PartitionSpec
from rich import box
from rich.table import Table

from benchmarks import timing, tpu
from benchmarks.compiled import dots, flops
from muonclip_jax import linalg

Function = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True)
class Options:
    """Products of each function, and its time over an SVD's."""

    sizes: tuple[int, ...] = (128, 512)
    """Of the square matrices."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    repeats: int = 9
    """Calls of each that are timed."""
    seconds_per_size: float = 120.0
    """After so many no new turn of calls begins."""
    topology: str = ""
    """TPUs to compile the first size for, such as v5e:2x2; nothing is run there. Of 512 × 512 the
    SVD alone takes their compiler more than five minutes."""
    json: Path | None = None
    """Write the figures there as well."""


def triangle(x: jax.Array) -> jax.Array:
    """With rank 16, as in a head of linear attention."""
    q = x[..., : min(16, x.shape[-1])]
    return linalg.inverse_low_rank_triangular(jnp.ones_like(x[..., 0]), q, q)


def sylvester(x: jax.Array, symmetric: bool) -> jax.Array:
    return linalg.solve_sylvester(x, x, x, symmetric=symmetric)


def functions() -> dict[str, Function]:
    """Label → what is called with a positive definite matrix, of which all of them are defined."""
    by_svd = {"by": "svd"}
    return {
        "msign": linalg.msign,
        "msign, svd": functools.partial(linalg.msign, **by_svd),
        "mclip, polar": linalg.mclip,
        "mclip, nested": functools.partial(linalg.mclip, form="nested"),
        "mclip, squared": functools.partial(linalg.mclip, form="squared"),
        "mclip, low > 0": functools.partial(linalg.mclip, low=0.5),
        "mclip, svd": functools.partial(linalg.mclip, **by_svd),
        "matrix_sqrt": linalg.matrix_sqrt,
        "matrix_sqrt, eigh": functools.partial(linalg.matrix_sqrt, by="eigh"),
        "inverse_root, p = 4": functools.partial(linalg.inverse_root, p=4),
        "inverse_root, p = 4, products": functools.partial(
            linalg.inverse_root, p=4, by="newton_schulz"
        ),
        "mcsgn": linalg.mcsgn,
        "mcsgn, products": functools.partial(linalg.mcsgn, by="newton_schulz"),
        "solve_sylvester": functools.partial(sylvester, symmetric=False),
        "solve_sylvester, symmetric": functools.partial(sylvester, symmetric=True),
        "inverse_low_rank_triangular": triangle,
    }


def matrix(n: int, dtype: str) -> jax.Array:
    """Positive definite, eigenvalues from 0.01 to 10, spread evenly in logarithm."""
    q, _ = jnp.linalg.qr(jax.random.normal(jax.random.key(0), (n, n)))
    return ((q * jnp.geomspace(1e-2, 10.0, n)) @ q.T).astype(dtype)


def pullback(function: Function) -> Function:
    """Its value's vector–Jacobian product with a matrix of ones."""

    def pulled(x: jax.Array) -> jax.Array:
        value, pull = jax.vjp(function, x)
        return pull(jnp.ones_like(value))[0]

    return pulled


def products(compiled: jax.stages.Compiled, n: int) -> float | None:
    """In units of 2n³ FLOPs; None where a loop goes on as long as the data asks."""
    try:
        return flops(dots(compiled)) / (2 * n**3)
    except ValueError:
        return None


def compare(n: int, dtype: str, options: Options) -> list[dict[str, Any]]:
    """A row for each function."""
    x = matrix(n, dtype)
    svd = jax.jit(jnp.linalg.svd).lower(x.astype("float32")).compile()
    calls: dict[str, Callable[[], Any]] = {"svd": functools.partial(svd, x.astype("float32"))}
    counts = {}
    for name, function in functions().items():
        for kind, run in (("value", function), ("derivative", pullback(function))):
            compiled = jax.jit(run).lower(x).compile()
            counts[name, kind] = products(compiled, n)
            calls[f"{name}/{kind}"] = functools.partial(compiled, x)
    times = timing.interleaved(calls, options.repeats, options.seconds_per_size)
    # LAPACK's threads wait for each other: where others share the machine, medians tell of them.
    seconds = {label: min(each) for label, each in times.items()}
    return [
        {
            "n": n,
            "dtype": dtype,
            "function": name,
            **{f"products_of_{kind}": counts[name, kind] for kind in ("value", "derivative")},
            **{
                f"{kind}_over_svd": seconds[f"{name}/{kind}"] / seconds["svd"]
                for kind in ("value", "derivative")
            },
        }
        for name in functions()
    ]


def compile_for_tpu(n: int, dtype: str, options: Options) -> list[dict[str, Any]]:
    """A row for each function: what the TPU's compiler makes of it, on one device."""
    everywhere = NamedSharding(tpu.make_mesh(options.topology, data=4), PartitionSpec())
    x = jax.ShapeDtypeStruct((n, n), jnp.dtype(dtype), sharding=everywhere)
    rows = []
    for name, function in functions().items():
        compiled = jax.jit(function, out_shardings=everywhere).lower(x).compile()
        cost = compiled.cost_analysis()
        rows.append(
            {
                "n": n,
                "dtype": dtype,
                "function": name,
                "tpu_products_of_value": products(compiled, n),
                "tpu_bytes_of_loops_counted_once": cost.get("bytes accessed"),
                "tpu_temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
            }
        )
    return rows


HEADERS = {
    "function": "function",
    "products_of_value": "products",
    "products_of_derivative": "with derivative",
    "value_over_svd": "time / SVD's",
    "derivative_over_svd": "with derivative",
    "tpu_products_of_value": "products on TPU",
    "tpu_bytes_of_loops_counted_once": "bytes (loops once)",
    "tpu_temporary_bytes": "temporary bytes",
}


def show(rows: Sequence[Mapping[str, Any]], title: str) -> None:
    columns = [name for name in HEADERS if name in rows[0]]
    table = Table(title=title, box=box.SIMPLE_HEAD)
    for name in columns:
        table.add_column(HEADERS[name], justify="left" if name == "function" else "right")
    for row in rows:
        table.add_row(*(_text(row[name]) for name in columns))
    timing.console().print(table)


def _text(value: Any) -> str:
    if value is None:
        return "as data asks"
    return value if isinstance(value, str) else f"{value:,.3g}" if value < 1e3 else f"{value:,.0f}"


def main(options: Options) -> dict[str, Any]:
    rows, on_tpu = [], []
    for n in options.sizes:
        for dtype in options.dtypes:
            here = compare(n, dtype, options)
            show(here, f"{n} × {n}, {dtype}, on {timing.device()}")
            rows += here
            if options.topology and n == options.sizes[0]:
                there = compile_for_tpu(n, dtype, options)
                show(there, f"{n} × {n}, {dtype}, compiled for {options.topology}")
                on_tpu += there
    record = timing.record(options, rows, tpu=on_tpu)
    timing.write(record, options.json)
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
