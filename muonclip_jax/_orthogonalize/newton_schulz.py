"""How to orthogonalize, as one value: which polynomials, in which dtype, by which method."""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from muonclip_jax._core.options import check_float
from muonclip_jax._orthogonalize.methods import Method, MethodName, check_method
from muonclip_jax._orthogonalize.rates import Rates, declared_rates
from muonclip_jax._orthogonalize.schedules import Schedule, polar_express

# What "auto" iterates in on GPUs and TPUs, and the dtype that a schedule must suit there.
_ON_ACCELERATORS = "bfloat16"


@dataclass(frozen=True)
class NewtonSchulz:
    """How matrices are orthogonalized. Frozen and hashable: a static argument of `jax.jit`.

    Attributes:
      schedule: The polynomial steps, from `schedules`.
      dtype: What the factors of the products are rounded to: bfloat16, float16, float32 or float64
        (kept as its name); None for that of the matrices. "auto" is bfloat16 on GPUs and TPUs, and
        on CPUs bfloat16 or float32, whichever multiplies faster by `rates`. Sums are float32 at
        least.
      method: How the steps are computed: "standard", "gram" or a `Method`, or "auto", which chooses
        by shape, dtype, the backend that it is compiled for, and on CPUs by `rates`.
      rates: What the CPU multiplies fast. None: `declared_rates()`, of the processor at hand.

    Raises:
      TypeError: `schedule` is not a `Schedule`, `method` none of the above, `rates` no `Rates`, or
        `dtype` not one of the four.
      ValueError: `schedule` leaves no margin for rounding in `dtype` (`Schedule.escape`), bfloat16
        where that is "auto".

    Example:
      >>> how = mc.NewtonSchulz(mc.schedules.polar_express(steps=6), dtype="float32")
      >>> tx = mc.scale_by_muon(newton_schulz=how)
    """

    schedule: Schedule = polar_express(steps=5)  # noqa: RUF009 (frozen)
    dtype: DTypeLike | Literal["auto"] | None = "auto"
    method: MethodName | Method = "auto"
    rates: Rates | None = None

    def __post_init__(self):
        if not isinstance(self.schedule, Schedule):
            raise TypeError(
                f"NewtonSchulz: schedule={self.schedule!r} is not a Schedule; pass for example "
                'schedules.polar_express(steps=5), or Schedule("mine", ((a, b, c), ...))'
            )
        check_method("NewtonSchulz", self.method)
        if not isinstance(self.rates, Rates | None):
            raise TypeError(
                f"NewtonSchulz: rates={self.rates!r}; pass for example mc.Rates(bfloat16=165, "
                "float32=291), or None for those of this processor"
            )
        if self.dtype is None:
            return
        if self.dtype != "auto":
            check_float("NewtonSchulz: dtype", self.dtype)
            # So that equal ones have equal hashes.
            object.__setattr__(self, "dtype", jnp.dtype(self.dtype).name)
        name = self.on("gpu").dtype
        if escape := self.schedule.escape(rounding=float(jnp.finfo(name).eps)):
            raise ValueError(
                f"NewtonSchulz: schedule {self.schedule.name!r} has no margin for rounding in "
                f"{name}, with which some matrices end far from orthogonal: {escape}. Give it a "
                "larger safety factor (1.01 suits bfloat16), or run it in a dtype that rounds less"
            )

    def settled(self) -> "NewtonSchulz":
        """The same, with the rates of this processor where they decide and none were given.

        Raises:
          RuntimeError: As `declared_rates`.
        """
        if self.rates is None and (self.dtype == "auto" or not isinstance(self.method, Method)):
            return replace(self, rates=declared_rates())
        return self

    def on(self, backend: str) -> "NewtonSchulz":
        """The same, with the dtype that "auto" is on a backend: "cpu", "gpu" or "tpu"."""
        if self.dtype != "auto":
            return self
        if backend != "cpu":
            return replace(self, dtype=_ON_ACCELERATORS)
        rates = self.rates or declared_rates()
        return replace(self, dtype=rates.faster)

    def for_matrices(self, x: Any, owner: str = "orthogonalize") -> "NewtonSchulz":
        """The same, with the dtype of `x` where it is iterated in that. Looks at its shape and
        dtype only.

        Raises:
          TypeError, ValueError: As `orthogonalize` for `x`.
        """
        check_matrices(owner, x)
        how = replace(self, dtype=x.dtype) if self.dtype is None else self
        if how.dtype != "auto":
            _check_enabled(owner, "dtype", jnp.dtype(how.dtype).name)
        return how


def check_newton_schulz(given: Any) -> None:
    """Raises TypeError for what is no `NewtonSchulz`, and has several processes agree on rates."""
    if not isinstance(given, NewtonSchulz):
        raise TypeError(
            f"newton_schulz={given!r} is not a NewtonSchulz; pass for example "
            'mc.NewtonSchulz(mc.schedules.polar_express(steps=5), dtype="bfloat16").'
        )
    given.settled()  # here, since several processes cannot agree where a step is traced


def check_matrices(owner: str, x: Any) -> None:
    """Raises TypeError or ValueError for what is no array of matrices in a supported dtype."""
    check_float(f"{owner}: x", x.dtype, optional=False)
    _check_enabled(owner, "x", x.dtype.name)
    if x.ndim < 2:
        raise ValueError(
            f"{owner}: x has shape {x.shape}, but matrices [..., n, m] are needed; reshape it, "
            "or leave vectors and scalars to another optimizer"
        )
    if 0 in x.shape:
        raise ValueError(f"{owner}: x has shape {x.shape}, with an axis of length zero")


def _check_enabled(owner: str, argument: str, name: str) -> None:
    if jax.dtypes.canonicalize_dtype(name) != name:
        raise TypeError(
            f"{owner}: {argument} is {name}, which JAX would silently run as float32; call "
            'jax.config.update("jax_enable_x64", True) first'
        )
