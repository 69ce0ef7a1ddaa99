"""`mc.orthogonalize` next to the iterations of Optax and PyTorch, on the same matrices.

    python -m benchmarks.orthogonalize --json PATH

For each shape all methods take turns in one process. optax is `optax.contrib.muon`'s iteration, in
float32 as it comes and fed bfloat16; torch is `torch.optim.Muon`'s, which always computes in
bfloat16, eager and compiled. Both run the five steps that they come with.

In a row the ratios are a peer's seconds over the row's; `fraction_of_matmul_peak` is what the
standard iteration computes, over the row's seconds and over the rate of the machine's fastest
matrix product in that dtype, which took its turns as well.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import tyro
from rich import box
from rich.table import Table

import muonclip_jax as mc
from benchmarks import peers, pictures, targets, timing
from benchmarks.targets import Target

OPTAX, OPTAX_BF16 = "optax", "optax, bfloat16"
RATIOS = {
    "ratio_vs_optax": OPTAX,
    "ratio_vs_optax_bf16": OPTAX_BF16,
    "ratio_vs_torch": "torch",
    "ratio_vs_torch_compiled": "torch.compile",
}
SHAPES = {
    "cpu": ((768, 768), (768, 3072), (1024, 1024), (1024, 4096), (2048, 2048), (2048, 8192)),
    "gpu": ((1024, 1024), (1024, 4096), (2048, 2048), (2048, 8192), (4096, 4096), (4096, 16384)),
}
SCHEDULES = {
    "polar_express": mc.schedules.polar_express(),
    # A fifth cheaper; further from orthogonal only where one singular value dominates.
    "polar_express_4": mc.schedules.polar_express(4, lower=5e-3),
    # For flat spectra, such as those of these benchmarks, only.
    "polar_express_3": mc.schedules.polar_express(3, lower=2e-2),
    "you": mc.schedules.you(),
    "cans": mc.schedules.cans(),
}
# What method "auto" is to reach: kind of device → (shape, dtype) → figure → at least. Of a CPU the
# dtype that `orthogonalize` takes as it comes is asked for, and float32 everywhere.
ASKED: dict[timing.Kind, dict[tuple[tuple[int, int], str], dict[str, float]]] = {
    "cpu with AMX": {
        ((1024, 1024), "bfloat16"): {
            "ratio_vs_optax": 6.0,
            "ratio_vs_optax_bf16": 1.2,
            "ratio_vs_torch": 1.1,
        },
        ((1024, 4096), "bfloat16"): {"ratio_vs_optax": 10.0, "ratio_vs_optax_bf16": 2.0},
        ((2048, 2048), "bfloat16"): {"ratio_vs_torch": 0.9},
        ((2048, 8192), "bfloat16"): {
            "ratio_vs_optax": 8.0,
            "ratio_vs_optax_bf16": 2.5,
            "ratio_vs_torch": 1.2,
        },
        ((1024, 1024), "float32"): {"ratio_vs_optax": 1.4},
        ((1024, 4096), "float32"): {"ratio_vs_optax": 2.5},
        ((2048, 8192), "float32"): {"ratio_vs_optax": 2.5},
    },
    "cpu without AMX": {
        ((1024, 1024), "float32"): {"ratio_vs_optax": 1.7},
        ((1024, 4096), "float32"): {"ratio_vs_optax": 2.8},
        ((2048, 8192), "float32"): {"ratio_vs_optax": 2.5},
    },
    "gpu": {
        ((4096, 4096), "bfloat16"): {
            "fraction_of_matmul_peak": 0.8,
            "ratio_vs_optax_bf16": 1.5,
            "ratio_vs_torch_compiled": 1.0,
        },
        ((4096, 16384), "bfloat16"): {
            "fraction_of_matmul_peak": 1.3,
            "ratio_vs_optax_bf16": 1.5,
            "ratio_vs_torch_compiled": 1.0,
        },
    },
}


@dataclass(frozen=True)
class Options:
    """How fast matrices are orthogonalized, and how well."""

    shapes: tuple[tuple[int, int], ...] = ()
    """Of the matrices; none: those that the project's figures are for, on this kind of device."""
    dtypes: tuple[Literal["bfloat16", "float16", "float32"], ...] = ("bfloat16", "float32")
    """What our iteration's factors are rounded to."""
    methods: tuple[Literal["auto", "standard", "gram"], ...] = ("auto", "standard", "gram")
    """Of `mc.orthogonalize`."""
    schedule: Literal["polar_express", "polar_express_4", "polar_express_3", "you", "cans"] = (
        "polar_express"
    )
    """Our polynomials, five steps but for polar_express_4 and _3."""
    torch: tuple[Literal["torch", "torch.compile"], ...] = ("torch", "torch.compile")
    """PyTorch's iterations to compare with."""
    repeats: int = 9
    """Calls of each that are timed."""
    seconds_per_shape: float = 60.0
    """After so many no new turn of calls begins."""
    json: Path | None = None
    """Write the figures there as well."""
    picture: Path | None = None
    """Draw them there."""


class Entry(NamedTuple):
    """Something that orthogonalizes a matrix.

    Attributes:
      method: What the row is called.
      dtype: What it computes in.
      on: Of a float32 matrix the function that orthogonalizes it.
      schedule: Its polynomials; the peers' by default.
      steps: How many.
    """

    method: str
    dtype: str
    on: Callable[[jax.Array], Callable[[], Any]]
    schedule: str = "jordan"
    steps: int = peers.STEPS


def entries(options: Options) -> dict[str, Entry]:
    """Ours, and those of the peers that are there, by label."""
    schedule = SCHEDULES[options.schedule]
    found = {}
    for dtype in options.dtypes:
        for method in options.methods:
            run = jax.jit(
                functools.partial(mc.orthogonalize, schedule=schedule, dtype=dtype, method=method)
            )
            found[f"{method}, {dtype}"] = Entry(
                method,
                dtype,
                functools.partial(functools.partial, run),
                schedule.name,
                len(schedule.coefficients),
            )
    for label, dtype in ((OPTAX, "float32"), (OPTAX_BF16, "bfloat16")):
        found[label] = Entry(OPTAX, dtype, functools.partial(_optax, dtype=dtype))
    for label, on in peers.torch_iterations(options.torch).items():
        found[label] = Entry(label, "bfloat16", on)
    return found


def _optax(x: jax.Array, dtype: str) -> Callable[[], jax.Array]:
    return functools.partial(peers.optax_orthogonalize, x.astype(dtype))


def gaussian(n: int, m: int) -> jax.Array:
    """Singular values as gradients' are not: all within a decade or three of the largest."""
    return jax.random.normal(jax.random.key(0), (n, m))


def graded(n: int, m: int) -> jax.Array:
    """Singular values over seven decades: a Gaussian matrix's rows, scaled by 1 down to 1e-7."""
    return gaussian(n, m) * jnp.logspace(0, -7, n)[:, None]


def standard_flops(n: int, m: int, steps: int) -> int:
    """Of the standard iteration, which multiplies everything out."""
    n, m = sorted((n, m))
    return steps * (4 * n**2 * m + 2 * n**3)


def compare(
    shape: tuple[int, int],
    entries: Mapping[str, Entry],
    peaks: Mapping[str, Sequence[timing.Matmul]],
    options: Options,
) -> list[dict[str, Any]]:
    """A row for each entry; `peaks` are the fastest matrix products in each dtype."""
    x = gaussian(*shape)
    functions = {label: entry.on(x) for label, entry in entries.items()}
    products = {product.label: product for each in peaks.values() for product in each}
    seconds = timing.medians(
        timing.interleaved(
            {**functions, **{label: product.run for label, product in products.items()}},
            options.repeats,
            options.seconds_per_shape,
        )
    )
    errors = {label: quality(entry, shape) for label, entry in entries.items()}
    peak = {
        dtype: max(product.flops / seconds[product.label] for product in each)
        for dtype, each in peaks.items()
    }
    return [
        {
            "shape": shape,
            "dtype": entry.dtype,
            "method": entry.method,
            "schedule": entry.schedule,
            "seconds_median": seconds[label],
            **{
                ratio: seconds[peer] / seconds[label] if peer in seconds else None
                for ratio, peer in RATIOS.items()
            },
            "fraction_of_matmul_peak": standard_flops(*shape, entry.steps)
            / seconds[label]
            / peak[entry.dtype],
            "matmul_peak_flops_per_second": peak[entry.dtype],
            **errors[label],
            **{f"optax_{name}": error for name, error in errors[OPTAX].items()},
        }
        for label, entry in entries.items()
    ]


def quality(entry: Entry, shape: tuple[int, int]) -> dict[str, float]:
    """On a Gaussian matrix, and on one that is harder."""
    easy, hard = (peers.as_array(entry.on(make(*shape))()) for make in (gaussian, graded))
    return {
        "orthogonality_error": float(mc.orthogonality_error(easy)),
        "hard_orthogonality_error": float(mc.orthogonality_error(hard)),
        "hard_largest_singular_value": float(_largest_singular_value(hard)),
    }


@jax.jit
def _largest_singular_value(x: jax.Array) -> jax.Array:
    x = x.mT if x.shape[0] > x.shape[1] else x
    return jnp.sqrt(jnp.linalg.eigvalsh(jnp.matmul(x, x.mT, precision="highest"))[-1])


def asked(rows: Sequence[Mapping[str, Any]]) -> list[Target]:
    """What there are targets for among the rows of method auto. At no worse error than Optax's."""
    found = []
    for row in rows:
        figures = ASKED[timing.kind()].get((tuple(row["shape"]), row["dtype"]), {})
        if row["method"] != "auto" or not figures:
            continue
        what = f"{_case(row)}, {row['dtype']}"
        for name, at_least in figures.items():
            if row[name] is not None:
                found.append(Target(f"{what}: {name}", row[name], ">=", at_least))
        error, optaxs = row["orthogonality_error"], row["optax_orthogonality_error"]
        found.append(Target(f"{what}: orthogonality_error", error, "<=", optaxs))
    return found


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(
        title=f"Orthogonalization on {timing.device()}, ours by {rows[0]['schedule']}",
        caption="× are the seconds of a peer over those of the row.",
        box=box.SIMPLE_HEAD,
    )
    for header in ("shape", "method", "dtype"):
        table.add_column(header)
    ratios = ("×\noptax", "× optax\nbfloat16", "×\ntorch", "× torch\ncompiled")
    for header in ("ms", *ratios, "of matmul\npeak", "error"):
        table.add_column(header, justify="right")
    for row in rows:
        table.add_row(
            _case(row),
            row["method"],
            row["dtype"],
            f"{row['seconds_median'] * 1e3:.1f}",
            *(f"{row[ratio]:.2f}" if row[ratio] else "" for ratio in RATIOS),
            f"{row['fraction_of_matmul_peak']:.2f}",
            f"{row['orthogonality_error']:.3f}",
        )
    timing.console().print(table)


def draw(rows: Sequence[Mapping[str, Any]], path: Path | None) -> None:
    """A panel a dtype."""
    panels = {}
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        both: tuple[dict, dict] = {}, {}
        for row in rows:
            if row["dtype"] == dtype:
                of_peer = row["method"] in RATIOS.values()
                figures = both[of_peer].setdefault(row["method"], {})
                figures[_case(row)] = row["fraction_of_matmul_peak"]
        panels[dtype] = both
    pictures.lanes(
        panels,
        path,
        title=f"The standard iteration's FLOPs a second, on {timing.device()}",
        label="fraction of the matmul peak",
        reference="the fastest matrix product of that dtype in the same run",
    )


def _case(row: Mapping[str, Any]) -> str:
    return "×".join(map(str, row["shape"]))


def main(options: Options) -> dict[str, Any]:
    found = entries(options)
    peaks = {
        dtype: timing.fastest_matmuls(dtype)
        for dtype in dict.fromkeys(entry.dtype for entry in found.values())
    }
    rows = [
        row
        for shape in options.shapes or SHAPES[timing.backend()]
        for row in compare(shape, found, peaks, options)
    ]
    reached, missing = asked(rows), peers.missing(options.torch)
    show(rows)
    targets.show(reached)
    for why in missing:
        timing.console().print(why)
    record = timing.record(
        options,
        rows,
        matmuls={dtype: [product.label for product in each] for dtype, each in peaks.items()},
        targets=targets.as_rows(reached),
        missing=missing,
    )
    timing.write(record, options.json)
    draw(rows, options.picture)
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
