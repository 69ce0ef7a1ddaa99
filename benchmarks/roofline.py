"""What an optimizer's products and bytes would take at a chip's peaks: compiled for it, not run.

    python -m benchmarks.roofline --chips h100 v5p --json PATH

An estimate is the sum over what the device runs (`benchmarks.kernels`) of the longer of two: its
products at the peak of their dtype, its bytes at the memory's rate. It knows no launches, no
caches, and no product that misses its peak. The bound is what no program with the standard
iteration could undercut: the FLOPs of five steps in bfloat16 at peak, plus every argument read and
every result written once. A program with the Gram iteration has fewer FLOPs, and may come below.

On GPU products are Triton's, as they come without a GPU to choose by; `cublas` has cuBLAS's.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich import box
from rich.table import Table

import muonclip_jax as mc
from benchmarks import gpu, optimizer_step, peers, timing, tpu
from benchmarks.chips import CHIPS, Chip
from benchmarks.kernels import Kernel, kernels, traffic

STEPS = 5  # of the default schedule
GPT2 = {"layers": 12, "width": 768, "vocab_size": 50304}
Work = Literal["4096x4096", "4096x16384", "step"]
MATRICES: dict[str, tuple[int, int]] = {"4096x4096": (4096, 4096), "4096x16384": (4096, 16384)}
STEP = "step"
OURS, OPTAX, SCHATTEN, MAXTEXT = "ours", "optax", "optax schatten", "maxtext"
# "dion", which `scale_by_muon` does not know by name.
SCHATTEN_SETTINGS = {
    "preconditioning": "schatten",
    "ns_coeffs": mc.schedules.you().coefficients,
}
PRODUCTS = {"gpu": ("triton", "cublas"), "tpu": ("xla",)}


@dataclass(frozen=True)
class Options:
    """What an optimizer would take at a chip's peaks."""

    chips: tuple[Literal["h100", "h200", "b200", "v5e", "v5p", "v6e"], ...] = ("h100", "v5p")
    """One of each. Those whose compiler is not installed are left out, with a line."""
    works: tuple[Work, ...] = ("4096x4096", "4096x16384", "step")
    """`orthogonalize` of a bfloat16 matrix, or the whole step of a decoder like GPT-2 small."""
    methods: tuple[str, ...] = ()
    """Of the rows those; all, if none is named."""
    top: int = 5
    """Operations that are listed of each row, by time."""
    compile_repeats: int = 1
    """Compilations of each; the median of their seconds is shown."""
    json: Path | None = None
    """Write the figures there as well."""


@dataclass(frozen=True)
class Estimate:
    """What a compiled program takes at a chip's peaks.

    Attributes:
      kernels: What the device runs.
      chip: On which.
    """

    kernels: Sequence[Kernel]
    chip: Chip

    def seconds(self, kernel: Kernel) -> float:
        """Of all its executions."""
        products = sum(dot.flops / self.chip.peak(dot) for dot in kernel.dots)
        return kernel.times * max(products, kernel.bytes / self.chip.hbm_rate)

    @property
    def total_seconds(self) -> float:
        return sum(map(self.seconds, self.kernels))

    @property
    def flops(self) -> dict[str, int]:
        """By the wider dtype of the factors."""
        found: Counter[str] = Counter()
        for kernel in self.kernels:
            for dot in kernel.dots:
                found[self.chip.dtype(dot)] += kernel.times * dot.flops
        return dict(found)

    def top(self, count: int) -> list[dict[str, Any]]:
        """What takes longest."""
        longest = sorted(self.kernels, key=self.seconds, reverse=True)[:count]
        return [
            {
                "name": kernel.name,
                "origin": kernel.origin,
                "times": kernel.times,
                "seconds": self.seconds(kernel),
                "flops": kernel.times * sum(dot.flops for dot in kernel.dots),
                "read_bytes": kernel.times * kernel.read,
                "written_bytes": kernel.times * kernel.written,
            }
            for kernel in longest
        ]


# What is compiled.


def orthogonalizations() -> dict[str, Callable[[jax.Array], jax.Array]]:
    """Of a matrix, by method."""

    def alone(scale_by_muon: Callable[..., optax.GradientTransformation], numbers: Any, **how: Any):
        """Without momentum XLA finds nothing else to compute."""
        tx = scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=numbers, **how)
        return lambda x: tx.update(x, tx.init(x))[0]

    theirs = functools.partial(
        alone, optax.contrib.scale_by_muon, optax.contrib.MuonDimensionNumbers()
    )
    found = {OURS: mc.orthogonalize, OPTAX: theirs(), SCHATTEN: theirs(**SCHATTEN_SETTINGS)}
    if maxtext := peers.maxtext_muon:
        found[MAXTEXT] = alone(maxtext.scale_by_muon, maxtext.ShardedMuonDimensionNumbers())
    return found


def optimizers() -> dict[str, optimizer_step.Entry]:
    """Whole ones, by method."""
    entries, settings = optimizer_step.entries(), optimizer_step.muon_settings()
    theirs = entries[optimizer_step.OPTAX]
    schatten = optax.contrib.muon(**settings, **SCHATTEN_SETTINGS)
    found = {
        OURS: entries[optimizer_step.OURS],
        OPTAX: theirs,
        SCHATTEN: theirs._replace(schedule="dion", tx=schatten),
    }
    if maxtext := peers.maxtext_muon:
        settings = optimizer_step.muon_settings(maxtext.ShardedMuonDimensionNumbers())
        found[MAXTEXT] = theirs._replace(method=MAXTEXT, tx=maxtext.muon(**settings))
    return found


def lowerings(work: Work, mesh: Mesh) -> dict[str, Callable[[], jax.stages.Lowered]]:
    """By method; each traces and lowers anew."""
    here = NamedSharding(mesh, P())
    jit = {"in_shardings": here, "out_shardings": here}
    if work == STEP:
        shapes = optimizer_step.decoder(**GPT2)
        return {
            method: functools.partial(optimizer_step.lower_step, entry, shapes, **jit)
            for method, entry in optimizers().items()
        }
    x = jax.ShapeDtypeStruct(MATRICES[work], jnp.bfloat16)
    return {
        method: lambda function=function: jax.jit(lambda x: function(x), **jit).lower(x)
        for method, function in orthogonalizations().items()
    }


# The bound.


def standard_flops(work: Work) -> int:
    """Of the default schedule's steps by the standard iteration."""
    if work == STEP:
        leaves = jax.tree.leaves_with_path(optimizer_step.decoder(**GPT2))
        shapes = [leaf.shape for path, leaf in leaves if path[-1].key == "kernel"]
    else:
        shapes = [MATRICES[work]]
    sides = [(min(shape), max(shape)) for shape in shapes]
    return STEPS * sum(4 * n**2 * m + 2 * n**3 for n, m in sides)


def bound(work: Work, compiled: jax.stages.Compiled, chip: Chip) -> float:
    """Seconds, at least, of the standard iteration with these arguments and results."""
    arrays = jax.tree.leaves((compiled.args_info, compiled.out_info))
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays)
    return standard_flops(work) / chip.flops["bfloat16"] + moved / chip.hbm_rate


# Rows.


def missing(chip: str) -> str | None:
    """Why there are no rows of it; None if there are."""
    try:
        make_mesh(chip)
    except ImportError as error:
        return f"{chip}: {error}"
    return None


def make_mesh(chip: str) -> Mesh:
    """Of one."""
    make = gpu.make_mesh if CHIPS[chip].platform == "gpu" else tpu.make_mesh
    return make(f"{chip}:1x1x1", data=1)


def rows_of(chip: str, work: Work, products: str, options: Options) -> list[dict[str, Any]]:
    """A row for each method."""
    how = gpu.CUBLAS if products == "cublas" else None
    compiled, seconds = timing.compilations(
        {
            method: lambda lower=lower: lower().compile(how)
            for method, lower in lowerings(work, make_mesh(chip)).items()
            if not options.methods or method in options.methods
        },
        options.compile_repeats,
    )
    rows = []
    for method, program in compiled.items():
        estimate = Estimate(kernels(program), CHIPS[chip])
        least = bound(work, program, CHIPS[chip])
        rows.append(
            {
                "chip": chip,
                "work": work,
                "products": products,
                "method": method,
                "flops": estimate.flops,
                "hbm_bytes": traffic(estimate.kernels),
                "temp_bytes": program.memory_analysis().temp_size_in_bytes,
                "estimate_seconds": estimate.total_seconds,
                "bound_seconds": least,
                "ratio_to_bound": estimate.total_seconds / least,
                "compile_seconds": seconds[method],
                "top": estimate.top(options.top),
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]], top: int) -> None:
    table = Table(
        title="At a chip's peaks: compiled, not run",
        caption="The bound: five standard steps in bfloat16, and every argument and result once.",
        box=box.SIMPLE_HEAD,
    )
    for header in ("chip", "work", "products", "method"):
        table.add_column(header)
    for header in ("TFLOP", "GB", "MB\ntemporary", "ms", "× bound", "compile\nseconds"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            *(row[name] for name in ("chip", "work", "products", "method")),
            "\n".join(f"{n / 1e12:.2f} {dtype}" for dtype, n in row["flops"].items()),
            f"{row['hbm_bytes'] / 1e9:.2f}",
            f"{row['temp_bytes'] / 1e6:.0f}",
            f"{row['estimate_seconds'] * 1e3:.2f}",
            f"{row['ratio_to_bound']:.2f}",
            f"{row['compile_seconds']:.1f}",
        )
    timing.console().print(table)
    for row in rows:
        if top and row["method"] == OURS:
            show_top(row)


def show_top(row: dict[str, Any]) -> None:
    what = (row[name] for name in ("work", "method", "chip", "products"))
    table = Table(title=f"What takes longest: {', '.join(what)}", box=box.SIMPLE_HEAD)
    table.add_column("operation")
    for header in ("times", "ms", "TFLOP", "GB read", "GB written"):
        table.add_column(header, justify="right")
    for each in row["top"]:
        table.add_row(
            f"{each['name']}\n  …{each['origin'][-70:]}",
            str(each["times"]),
            f"{each['seconds'] * 1e3:.3f}",
            f"{each['flops'] / 1e12:.3f}",
            f"{each['read_bytes'] / 1e9:.3f}",
            f"{each['written_bytes'] / 1e9:.3f}",
        )
    timing.console().print(table)


def main(options: Options) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")  # not to look for chips: their libraries take time
    reasons = [why for why in map(missing, options.chips) if why]
    reasons += [why for why in [peers.maxtext_missing()] if why]
    rows = [
        row
        for chip in options.chips
        if not missing(chip)
        for products in PRODUCTS[CHIPS[chip].platform]
        for work in options.works
        for row in rows_of(chip, work, products, options)
    ]
    show(rows, options.top)
    for why in reasons:
        timing.console().print(why)
    record = timing.record(options, rows, what="compiled, not run", missing=reasons)
    timing.write(record, options.json)
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
