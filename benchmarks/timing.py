"""Seconds of functions that take turns in one process, and the record of such a run.

    seconds = interleaved({"ours": ours, "theirs": theirs}, repeats=9)
    medians(seconds)                            # {"ours": 0.12, "theirs": 0.31}
    write(record(options, rows), options.json)

A machine's speed drifts, by half within minutes where others share it. What takes turns suffers
alike from that, so ratios of medians hold where the seconds themselves do not.
"""

import functools
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from rich.console import Console

import muonclip_jax as mc
from benchmarks import peers
from muonclip_jax._orthogonalize.rates import processor_flags

PACKAGES = (
    *("jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt"),
    *("optax", "flax", "maxtext", "torch"),
)
LOAD_AVERAGE = os.getloadavg()[0]  # when this is imported: other processes' work, not this one's
# Seconds before each call. PyTorch's threads go on spinning for a while after its work, which would
# slow XLA's; after 50 ms they sleep so deep that the next call takes some 5 ms more.
PAUSE = 0.01

# Of the products that a machine's rate is measured with: [n, k] × [k, m], each (n, k, m).
SIZES = {
    "cpu": ((1024, 1024, 1024), (2048, 2048, 2048), (1024, 4096, 1024), (1024, 1024, 4096)),
    "gpu": ((4096, 4096, 4096), (8192, 8192, 8192), (4096, 16384, 4096), (4096, 4096, 16384)),
}

# Flags of a processor that say how it multiplies.
_MULTIPLIES = ("avx2", "avx512f", "avx512_bf16", "avx_vnni", "amx_tile", "amx_bf16", "amx_fp16")

Kind = Literal["cpu with AMX", "cpu without AMX", "gpu"]
Functions = Mapping[str, Callable[[], Any]]


def interleaved(
    functions: Functions,
    repeats: int,
    seconds_at_most: float = math.inf,
    *,
    warm_up: bool = True,
) -> dict[str, list[float]]:
    """Seconds of each call, the functions taking turns, every other turn in the other order.

    Args:
      functions: Label → what to time. A call lasts until the arrays of its result are computed; a
        function of another library than JAX waits for its own.
      repeats: Calls of each.
      seconds_at_most: No new turn begins after so many; there is one turn at least.
      warm_up: Whether each is called once before, which compiles it and touches its memory.

    Returns:
      Label → seconds of its calls, as many of each.
    """
    if warm_up:
        for function in functions.values():
            jax.block_until_ready(function())
    seconds: dict[str, list[float]] = {label: [] for label in functions}
    order = list(functions)
    begin = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - begin > seconds_at_most:
            break
        for label in order:
            _wake()
            time.sleep(PAUSE)
            start = time.perf_counter()
            jax.block_until_ready(functions[label]())
            seconds[label].append(time.perf_counter() - start)
        order.reverse()
    return seconds


def _wake() -> None:
    """A little work for the threads of each library, so that none of them sleeps at the start."""
    for product in _little():
        jax.block_until_ready(product.run())


def compilations(
    compilers: Mapping[str, Callable[[], jax.stages.Compiled]], repeats: int
) -> tuple[dict[str, jax.stages.Compiled], dict[str, float]]:
    """The compiled program of each, and the median seconds that it takes to trace, lower and
    compile it, as if it were the first thing that the process does."""
    compiled: dict[str, jax.stages.Compiled] = {}

    def compile(label: str) -> None:
        jax.clear_caches()
        compiled[label] = compilers[label]()

    functions = {label: functools.partial(compile, label) for label in compilers}
    return compiled, medians(interleaved(functions, repeats, warm_up=False))


def medians(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Label → the median of its seconds."""
    return {label: statistics.median(each) for label, each in seconds.items()}


class Matmul(NamedTuple):
    """A matrix product, and one way of computing it.

    Attributes:
      label: Such as `"bfloat16 1024×4096×1024, XLA, to float32"`.
      run: Computes it.
      flops: Of the product.
    """

    label: str
    run: Callable[[], Any]
    flops: int


def matmuls(dtype: str) -> list[Matmul]:
    """Products that a machine should be fast at, square and not, in all ways that are there.

    Args:
      dtype: Of the factors: `"bfloat16"`, `"float16"` or `"float32"`. 16-bit ones are multiplied to
        the same dtype and to float32: which of the two is fast depends on the machine.
    """
    return [product for size in SIZES[backend()] for product in _ways(size, dtype)]


def fastest_matmuls(dtype: str, count: int = 2, repeats: int = 5) -> list[Matmul]:
    """The fastest of `matmuls`, to be timed again in turn with what is compared to them."""
    products = matmuls(dtype)
    rates = matmul_rates(products, repeats)
    return sorted(products, key=lambda product: rates[product.label])[-count:]


def matmul_rates(products: Sequence[Matmul], repeats: int = 5) -> dict[str, float]:
    """Label → FLOP/s, by the median of as many calls, in turns."""
    seconds = medians(interleaved({p.label: p.run for p in products}, repeats))
    return {p.label: p.flops / seconds[p.label] for p in products}


def _ways(size: tuple[int, int, int], dtype: str) -> list[Matmul]:
    n, k, m = size
    x = jax.random.normal(jax.random.key(0), (n, k)).astype(dtype)
    y = jax.random.normal(jax.random.key(1), (k, m)).astype(dtype)
    ways = {
        f"XLA, to {out}": functools.partial(_product, x, y, out)
        for out in dict.fromkeys((dtype, "float32"))
    }
    return [
        Matmul(f"{dtype} {n}×{k}×{m}, {way}", run, 2 * n * k * m)
        for way, run in {**ways, **peers.torch_product(x, y)}.items()
    ]


@functools.cache
def _little() -> list[Matmul]:
    return _ways((512, 512, 512), "float32")


@functools.partial(jax.jit, static_argnames="out")
def _product(x: jax.Array, y: jax.Array, out: str) -> jax.Array:
    """`highest`, or GPUs and TPUs would round float32 factors."""
    return jnp.matmul(x, y, precision="highest", preferred_element_type=jnp.dtype(out))


def record(options: Any, rows: Sequence[Mapping[str, Any]], **more: Any) -> dict[str, Any]:
    """What a benchmark writes: its rows, and what they depend on.

    Args:
      options: The benchmark's dataclass of options. Those that name files are left out.
      rows: The figures.
      **more: What else belongs to the record.
    """
    return {
        "date": date.today().isoformat(),
        "device": device(),
        "processor": processor(),
        "load_average_before": LOAD_AVERAGE,
        "versions": {"python": platform.python_version(), **_versions()},
        "options": {k: v for k, v in asdict(options).items() if k not in ("json", "picture")},
        **more,
        "rows": list(rows),
    }


def backend() -> Literal["cpu", "gpu"]:
    """Which kind of device figures and sizes are for; a TPU is as large as a GPU."""
    return "cpu" if jax.default_backend() == "cpu" else "gpu"


def kind() -> Kind:
    """Which figures are asked for: what a CPU multiplies fast decides them."""
    if backend() == "gpu":
        return "gpu"
    return "cpu with AMX" if "amx_bf16" in processor_flags() else "cpu without AMX"


def processor() -> dict[str, Any]:
    """What the CPU says that it can do, and what its products reach now, in GFLOP/s."""
    return {
        "flags": [flag for flag in _MULTIPLIES if flag in processor_flags()],
        "declared_gflops": asdict(mc.declared_rates()),
        "measured_gflops": asdict(mc.measured_rates()),
    }


def device() -> str:
    """Such as `"cpu, x86_64, 2 cores"`."""
    kind = jax.devices()[0].device_kind
    return f"{kind}, {platform.machine()}, {os.cpu_count()} cores"


def console() -> Console:
    """Wide enough for the tables where it is no terminal."""
    found = Console()
    return found if found.is_terminal else Console(width=110)


def write(record: Mapping[str, Any], path: Path | None) -> None:
    """As JSON, if there is a path."""
    if path:
        path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")


def _versions() -> dict[str, str]:
    found = {d.name.replace("_", "-"): d.version for d in metadata.distributions()}
    return {package: found[package] for package in PACKAGES if package in found}
