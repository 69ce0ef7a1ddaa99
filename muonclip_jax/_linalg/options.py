"""How the functions of a matrix are computed: checks, defaults, and the schedule that is accurate
enough."""

import functools
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.options import check_choice, check_number
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz, check_matrices
from muonclip_jax._orthogonalize.schedules import Schedule, polar_express

By = Literal["newton_schulz", "svd"]
RootBy = Literal["newton_schulz", "eigh"]
Shaped = jax.Array | jax.ShapeDtypeStruct


@dataclass(frozen=True)
class Accuracy:
    """How a sign or a root is computed. Frozen and hashable: a static argument of `jax.jit`.

    Attributes:
      lower: Singular values (eigenvalues of a root's matrix) from this times the largest on are
        treated as they are; smaller ones may count as zero.
      newton_schulz: By which iteration; None for a factorization.
    """

    lower: float
    newton_schulz: NewtonSchulz | None


# The least singular value over the largest that Newton–Schulz brings to 1, by dtype: the polar
# factor of a smaller one is noise, because rounding moves it by about the dtype's eps over it.
_LOWER = {"bfloat16": 1e-4, "float16": 1e-4, "float32": 1e-6, "float64": 1e-12}


def accuracy(
    owner: str, x: Shaped, by: Any, lower: float | None, exactly: By | RootBy, power: int = 1
) -> Accuracy:
    """Reads `by=` and `lower=`.

    Args:
      owner: The function that was called.
      x: Its matrices.
      by: "newton_schulz", the name of a factorization, or for signs a `NewtonSchulz`.
      lower: As in `Accuracy`; None for the default of the dtype.
      exactly: The name of the factorization.
      power: Of the singular value that `lower` is said of: 2 for the eigenvalues of a root's
        matrix, which are squares of what the iteration sees.
    """
    if exactly == "svd" and isinstance(by, NewtonSchulz):
        if lower is not None:
            raise ValueError(
                f"{owner}: lower={lower} beside by={by!r}, whose schedule has its own; leave one "
                "of them out."
            )
        return Accuracy(by.schedule.lower, by)
    beside = ", or a muonclip_jax.NewtonSchulz" if exactly == "svd" else ""
    check_choice(f"{owner}: by", by, ("newton_schulz", exactly), beside)
    if lower is not None:
        wanted = "between 0 and 1, a part of the largest singular value or eigenvalue"
        check_number(f"{owner}: lower", lower, lambda x: 0 < x < 1, wanted)
    if by == exactly:
        # Four times what rounding makes of singular values that are zero.
        noise = 4 * max(x.shape[-2:]) ** 0.5 * float(jnp.finfo(accumulation_dtype(x.dtype)).eps)
        return Accuracy(float(lower or noise), None)
    lower = float(lower or _LOWER[x.dtype.name])
    schedule = schedule_for(x, lower ** (1 / power))
    # The Gram iteration squares singular values, of which float32 then loses the small ones.
    dtype, method = accumulation_dtype(x.dtype).name, "standard"
    return Accuracy(lower, NewtonSchulz(schedule, dtype, method))


def schedule_for(x: Shaped, lower: float | None = None) -> Schedule:
    """The shortest `polar_express` that brings σ ≥ lower · σmax to 1 within rounding of the dtype;
    without `lower`, from the dtype's own."""
    lower = lower or _LOWER[x.dtype.name]
    return _schedule_to(lower, min(x.shape[-2:]), float(jnp.finfo(x.dtype).eps))


@functools.cache
def _schedule_to(lower: float, n: int, error: float) -> Schedule:
    """The shortest `polar_express` that brings σ ≥ lower · σmax to 1 ± 4 `error` in n × m matrices.

    The schedule divides by the Schatten-4 norm, which may be n^¼ times the largest singular value.
    """
    steps, normalized = 1, lower / (1.01 * n**0.25)
    while (schedule := polar_express(steps, normalized)).worst_error() > 4 * error:
        steps += 1
    return schedule


def check_square(owner: str, x: Any) -> None:
    """Raises TypeError or ValueError for what is no array of square matrices."""
    check_matrices(owner, x)
    if x.shape[-2] != x.shape[-1]:
        raise ValueError(
            f"{owner}: x has shape {x.shape}, but square matrices [..., n, n] are needed."
        )
