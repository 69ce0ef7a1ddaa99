"""How to orthogonalize, as one value: which polynomials, in which dtype, by which method."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from muonclip_jax._core.options import check_float
from muonclip_jax._orthogonalize.methods import Method, MethodName, check_method
from muonclip_jax._orthogonalize.schedules import Schedule, polar_express


@dataclass(frozen=True)
class NewtonSchulz:
    """How matrices are orthogonalized. Frozen and hashable: a static argument of `jax.jit`.

    Attributes:
      schedule: The polynomial steps, from `schedules`.
      dtype: What the factors of the products are rounded to: bfloat16, float16, float32 or float64
        (kept as its name); None for that of the matrices. Sums are float32 at least.
      method: How the steps are computed: "standard", "gram" or a `Method`, or "auto", which chooses
        by shape, dtype and the backend that it is compiled for.

    Raises:
      TypeError: `schedule` is not a `Schedule`, `method` none of the above, or `dtype` not one of
        the four.
      ValueError: `schedule` leaves no margin for rounding in `dtype` (`Schedule.escape`).

    Example:
      >>> how = mc.NewtonSchulz(mc.schedules.polar_express(steps=6), dtype="float32")
      >>> tx = mc.scale_by_muon(newton_schulz=how)
    """

    schedule: Schedule = polar_express(steps=5)  # noqa: RUF009 (frozen)
    dtype: DTypeLike | None = "bfloat16"
    method: MethodName | Method = "auto"

    def __post_init__(self):
        if not isinstance(self.schedule, Schedule):
            raise TypeError(
                f"NewtonSchulz: schedule={self.schedule!r} is not a Schedule; pass for example "
                'schedules.polar_express(steps=5), or Schedule("mine", ((a, b, c), ...))'
            )
        check_method("NewtonSchulz", self.method)
        if self.dtype is None:
            return
        check_float("NewtonSchulz: dtype", self.dtype)
        name = jnp.dtype(self.dtype).name
        object.__setattr__(self, "dtype", name)  # so that equal ones have equal hashes
        if escape := self.schedule.escape(rounding=float(jnp.finfo(name).eps)):
            raise ValueError(
                f"NewtonSchulz: schedule {self.schedule.name!r} has no margin for rounding in "
                f"{name}, with which some matrices end far from orthogonal: {escape}. Give it a "
                "larger safety factor (1.01 suits bfloat16), or run it in a dtype that rounds less"
            )

    def for_matrices(self, x: Any, owner: str = "orthogonalize") -> "NewtonSchulz":
        """The same, with the dtype that `x` is iterated in. Looks at its shape and dtype only.

        Raises:
          TypeError, ValueError: As `orthogonalize` for `x`.
        """
        check_matrices(owner, x)
        how = replace(self, dtype=x.dtype) if self.dtype is None else self
        _check_enabled(owner, "dtype", jnp.dtype(how.dtype).name)
        return how


def check_newton_schulz(given: Any) -> None:
    """Raises TypeError for what is no `NewtonSchulz`."""
    if not isinstance(given, NewtonSchulz):
        raise TypeError(
            f"newton_schulz={given!r} is not a NewtonSchulz; pass for example "
            'mc.NewtonSchulz(mc.schedules.polar_express(steps=5), dtype="bfloat16").'
        )


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
