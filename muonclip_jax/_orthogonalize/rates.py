"""What a CPU multiplies fast: by it "auto" chooses the dtype there.

Two kinds of processor are told apart by what they declare to have. Nothing is timed unless
`measured_rates` is called, so that a run starts with the same program every time.
"""

import functools
import platform
import statistics
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils

from muonclip_jax._core.dtypes import of_product
from muonclip_jax._core.options import check_count, check_number


@dataclass(frozen=True)
class Rates:
    """What a CPU's matrix products reach, in GFLOP/s: `NewtonSchulz` chooses its dtype by it there.

    Their ratio decides, not their size. A CPU of the same rates gets the same program, so keep them
    with a run that another machine may continue: `dataclasses.asdict(rates)` is plain JSON, and
    `Rates(**saved)` brings them back.

    Attributes:
      bfloat16: Of bfloat16 factors, row-major, summed in float32 and kept so.
      float32: Of float32 factors.

    Raises:
      TypeError, ValueError: One that is no finite number above 0.

    Example:
      >>> how = mc.NewtonSchulz(rates=mc.Rates(bfloat16=165, float32=291))
      >>> how.on("cpu").dtype, how.on("gpu").dtype
      ('float32', 'bfloat16')
    """

    bfloat16: float
    float32: float

    def __post_init__(self):
        for field in fields(self):
            name = f"Rates: {field.name}"
            wanted = "above 0, in GFLOP/s"
            check_number(name, getattr(self, field.name), lambda x: 0 < x < float("inf"), wanted)
            object.__setattr__(self, field.name, float(getattr(self, field.name)))

    @property
    def faster(self) -> Literal["bfloat16", "float32"]:
        """The dtype whose products are faster; of equal ones bfloat16, which needs less memory."""
        return "bfloat16" if self.bfloat16 >= self.float32 else "float32"


# Two cores each, of machines that were met: Intel's tiles for bfloat16 (Sapphire Rapids and later),
# and avx512_bf16 without them. All others are taken for the latter: where XLA finds no instruction
# for bfloat16, it converts the factors to float32, which costs time and gains none.
WITH_AMX = Rates(bfloat16=1470, float32=290)
WITHOUT_AMX = Rates(bfloat16=165, float32=291)
_AMX = {"amx_tile", "amx_bf16"}


def declared_rates() -> Rates:
    """The rates that are known of this kind of processor, by what it declares; nothing is timed.

    With several processes on CPUs they are those of process 0, so that all compile one program.
    They agree when the first optimizer is built, or `NewtonSchulz` used, after
    `jax.distributed.initialize()`.

    Raises:
      RuntimeError: Several processes would have to agree inside `jax.jit`, where they cannot.

    Example:
      >>> how = mc.NewtonSchulz(rates=mc.declared_rates())
    """
    rates = WITH_AMX if processor_flags() >= _AMX else WITHOUT_AMX
    if not jax.distributed.is_initialized() or jax.default_backend() != "cpu":
        return rates
    return _of_process_0(rates)


@functools.cache
def _of_process_0(rates: Rates) -> Rates:
    try:
        first = multihost_utils.broadcast_one_to_all(asdict(rates))
    except ValueError as error:  # of jax.set_mesh, which no traced function may call
        raise RuntimeError(
            "Several processes on CPUs orthogonalize by the rates of process 0, and cannot agree "
            "on them inside jax.jit. Build the optimizer, or call mc.declared_rates(), before "
            "that and after jax.distributed.initialize(); or give all processes the same "
            "mc.NewtonSchulz(rates=)."
        ) from error
    return Rates(**{name: float(rate) for name, rate in first.items()})


def measured_rates(n: int = 1024, repeats: int = 9) -> Rates:
    """Times products `[n, n]` on this process's first CPU device, as medians; takes about 0.3 s.

    Measure once and keep the result: two calls give two results, and perhaps two programs. Several
    processes need the same one.

    Args:
      n: Side of the matrices.
      repeats: Calls of each product.

    Raises:
      TypeError, ValueError: One that is no whole number of at least 1.

    Example:
      >>> rates = mc.measured_rates(n=64, repeats=1)
      >>> how = mc.NewtonSchulz(rates=rates)
    """
    check_count("measured_rates: n", n)
    check_count("measured_rates: repeats", repeats)
    return Rates(
        **{
            field.name: 2e-9 * n**3 / _seconds_of_product(n, field.name, repeats)
            for field in fields(Rates)
        }
    )


def _seconds_of_product(n: int, dtype: str, repeats: int) -> float:
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x = jnp.full((n, n), 1 / n, dtype)
        product = jax.jit(functools.partial(jnp.matmul, **of_product(x.dtype)))
        jax.block_until_ready(product(x, x))  # compiled
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(product(x, x))
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


@functools.cache
def processor_flags() -> frozenset[str]:
    """What Linux says that this x86 processor can do; nothing elsewhere."""
    cpus = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not cpus.exists():
        return frozenset()
    lines = cpus.read_text().splitlines()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))
