"""Where each `Method` of orthogonalization is the fastest, and how far `method="auto"` is from it.

    python -m benchmarks.methods --json PATH

The rule of `"auto"` in `muonclip_jax/_orthogonalize/methods.py` was made with this: after another
XLA or on another device run it again. In each cell, a shape and a dtype, every method and "auto"
take turns on the same stack of matrices.
"""

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import tyro
from rich import box
from rich.table import Table

import muonclip_jax as mc
from benchmarks import pictures, timing
from muonclip_jax._orthogonalize.methods import Method
from muonclip_jax._spread.stacks import MatrixArray, orthogonalize_all

SHAPES = {
    "cpu": (
        *((1, 256, 256), (1, 256, 1024), (1, 512, 512), (1, 512, 2048)),
        *((1, 768, 768), (1, 768, 3072), (1, 1024, 1024), (1, 1024, 1536), (1, 1024, 4096)),
        *((1, 2048, 2048), (1, 2048, 8192), (16, 256, 256), (8, 768, 768), (8, 768, 3072)),
    ),
    "gpu": (
        *((1, 1024, 1024), (1, 1024, 4096), (1, 2048, 2048), (1, 2048, 8192)),
        *((1, 4096, 4096), (1, 4096, 6144), (1, 4096, 16384), (16, 1024, 1024), (8, 2048, 8192)),
    ),
}


@dataclass(frozen=True)
class Options:
    """Which method is the fastest for which matrices."""

    shapes: tuple[tuple[int, int, int], ...] = ()
    """Stacks of matrices; none: a grid of them that suits the device."""
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16", "float32")
    least_block: int = 192
    """Symmetric products are tried whole, in halves, in halves of halves and so on, down to blocks
    of so many rows."""
    chunk_entries: tuple[int, ...] = (2**20, 2**21, 2**24)
    """Of stacks of several matrices."""
    repeats: int = 5
    """Calls of each that are timed."""
    seconds_per_cell: float = 40.0
    """After so many no new turn of calls begins."""
    json: Path | None = None
    """Write the figures there as well."""
    picture: Path | None = None
    """Draw them there."""


def candidates(shape: tuple[int, int, int], dtype: str, options: Options) -> list[Method]:
    """The methods to compare: for one matrix all iterations and products, for a stack of several
    all iterations and how many matrices they take at a time."""
    count, n, m = shape[0], *sorted(shape[1:])
    copies = jnp.finfo(dtype).bits == 16
    if count > 1:
        blocks, row_major = [None], [copies]
        slices = [
            *(size for size in options.chunk_entries if size < count * n * m),
            count * n * m,
        ]
    else:
        blocks = [None, *_halves(n, options.least_block)]
        row_major = [False, True] if copies else [False]
        slices = [n * m]
    return [
        Method(iteration, smallest_block=block, row_major=copy, chunk_entries=entries)
        for iteration, block, copy, entries in itertools.product(
            ("standard", "gram"), blocks, row_major, slices
        )
    ]


def _halves(n: int, least: int) -> list[int]:
    halves = (n >> k for k in itertools.count(1))
    return list(itertools.takewhile(lambda size: size >= least, halves))


def describe(method: Method) -> str:
    """Such as `gram, blocks 512, row-major`."""
    parts = {
        method.iteration: True,
        f"blocks {method.smallest_block}": method.smallest_block,
        "row-major": method.row_major,
    }
    return ", ".join(text for text, there in parts.items() if there)


def compare(shape: tuple[int, int, int], dtype: str, options: Options) -> list[dict[str, Any]]:
    """A row for each method, "auto" first."""
    x = jax.random.normal(jax.random.key(0), shape)
    methods: list[Method | Literal["auto"]] = ["auto", *candidates(shape, dtype, options)]

    def run(method: Method | Literal["auto"]) -> Any:
        @jax.jit
        def orthogonalized(x):
            how = mc.NewtonSchulz(dtype=dtype, method=method)
            return orthogonalize_all([MatrixArray(x)], how)

        return functools.partial(orthogonalized, x)

    seconds = timing.medians(
        timing.interleaved(
            {method: run(method) for method in methods}, options.repeats, options.seconds_per_cell
        )
    )
    least = min(seconds.values())
    return [
        {
            "shape": shape,
            "dtype": dtype,
            "method": method if method == "auto" else describe(method),
            **({} if method == "auto" else asdict(method)),
            "seconds_median": seconds[method],
            "over_fastest": seconds[method] / least,
        }
        for method in methods
    ]


def best(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[Any, str], dict[str, Mapping[str, Any]]]:
    """Cell → "auto" and the fastest of each iteration."""
    cells: dict[tuple[Any, str], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        cell = cells.setdefault((row["shape"], row["dtype"]), {})
        name = row.get("iteration", "auto")
        if name not in cell or row["seconds_median"] < cell[name]["seconds_median"]:
            cell[name] = row
    return cells


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=f"The fastest methods on {timing.device()}", box=box.SIMPLE_HEAD)
    for header in ("stack", "dtype", "fastest", "ms", "fastest of the other", "ms", "auto", "over"):
        right = header in ("ms", "auto", "over")
        table.add_column(header, justify="right" if right else "left")
    for (shape, dtype), cell in best(rows).items():
        auto, *others = cell["auto"], *(cell[name] for name in ("standard", "gram"))
        first, second = sorted(others, key=lambda row: row["seconds_median"])
        table.add_row(
            _case(shape),
            dtype,
            *(text for row in (first, second) for text in (_method(row), _ms(row))),
            _ms(auto),
            f"{auto['over_fastest']:.2f}",
        )
    timing.console().print(table)


def draw(rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """A panel a dtype: the speed of "auto" and of the fastest of each iteration."""
    panels: dict[str, tuple[dict, dict]] = {}
    for (shape, dtype), cell in best(rows).items():
        lanes, _ = panels.setdefault(dtype, ({}, {}))
        for name in ("auto", "standard", "gram"):
            lanes.setdefault(name, {})[_case(shape)] = 1 / cell[name]["over_fastest"]
    pictures.lanes(
        panels,
        path,
        title=f"Methods of orthogonalization on {timing.device()}",
        label="speed",
        reference="the fastest method",
    )


def _case(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


def _method(row: Mapping[str, Any]) -> str:
    """With how many matrices at a time, if there are several."""
    count, n, m = row["shape"]
    together = max(1, row["chunk_entries"] // (n * m))
    return row["method"] + (f", {together} at a time" if count > 1 else "")


def _ms(row: Mapping[str, Any]) -> str:
    return f"{row['seconds_median'] * 1e3:.1f}"


def main(options: Options) -> dict[str, Any]:
    shapes = options.shapes or SHAPES[timing.backend()]
    rows = [
        row
        for dtype in options.dtypes
        for shape in shapes
        for row in compare(shape, dtype, options)
    ]
    show(rows)
    record = timing.record(options, rows)
    timing.write(record, options.json)
    draw(rows, options.picture)
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
