"""Muon: momentum, orthogonalized."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from muonclip_jax import matrices, paths, routing
from muonclip_jax.orthogonalize import Schedule, orthogonalize, schedules


class MuonState(NamedTuple):
    """State of `scale_by_muon`.

    Attributes:
      count: int32, steps taken.
      momentum: Like the parameters, in `mu_dtype`.
    """

    count: jax.Array
    momentum: Any


def scale_by_muon(
    momentum: jax.typing.ArrayLike = 0.95,
    nesterov: bool = True,
    schedule: Schedule = schedules.polar_express(steps=5),  # noqa: B008 (frozen)
    *,
    dimension_numbers: routing.DimensionNumbers | None = None,
    bias_correction: bool = False,
    dtype: jax.typing.DTypeLike | None = "bfloat16",
    mu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformation:
    """Replaces each matrix gradient by its orthogonalized momentum.

    `M ← μM + G`, then `O = msign(G + μM)` with Nesterov, `msign(M)` without
    (K. Jordan et al. 2024; Moonlight, arXiv 2502.16982). The result has singular values near 1;
    follow it with `scale_by_update_rms` for a size that suits the matrix shape. Every leaf must
    be a matrix or a batch of matrices: `mc.muon` sends the others to another optimizer.

    Cost per matrix `[n, m]`, n <= m: about `(4m/n + 2) n³` FLOPs for each of the schedule's steps.
    Memory: one momentum array per parameter.

    Args:
      momentum: μ in [0, 1).
      nesterov: Orthogonalize `G + μM` instead of `M`.
      schedule: The Newton–Schulz polynomials.
      dimension_numbers: Which axes are input and output of which parameter: a tree of
        `optax.contrib.MuonDimensionNumbers` (or a prefix of one), or a function from the
        parameters to one, such as `muon_dimension_numbers`, which can split attention's parameters
        into pieces and heads. All other axes are batch axes. None: two axes are `[in, out]`, more
        are read as in `muon_dimension_numbers`.
      bias_correction: Weigh Nesterov's two terms as `optax.contrib.muon` does, `β M/(1-β^{t+1})`
        and `G/(1-β^t)`. Without Nesterov it changes nothing, since `msign` ignores scale.
      dtype: The dtype of the iteration, see `orthogonalize`.
      mu_dtype: The dtype of the momentum; None keeps the parameter's.

    Returns:
      A transformation whose updates have the gradients' shapes and dtypes.

    Raises:
      ValueError: momentum outside [0, 1) when built; at init and update, a parameter that is no
        matrix or that `dimension_numbers` does not fit, with its path.
    """
    if callable(momentum):
        raise TypeError(
            "momentum must be a number; for a schedule wrap the transformation in "
            "optax.inject_hyperparams."
        )
    if not isinstance(momentum, jax.core.Tracer) and not 0 <= momentum < 1:
        raise ValueError(f"momentum must be in [0, 1) (0.95 is usual), got {momentum}.")

    def init(params: optax.Params) -> MuonState:
        routing.resolve_matrices(dimension_numbers, params)
        zeros = optax.tree.zeros_like(params, dtype=mu_dtype)
        return MuonState(jnp.zeros([], jnp.int32), zeros)

    def update(updates, state, params=None):
        del params
        specs = routing.resolve_matrices(dimension_numbers, updates)
        accumulated = jax.tree.map(lambda m, g: momentum * m + g, state.momentum, updates)
        look_ahead, gradient_weight = _nesterov_weights(momentum, state.count, bias_correction)

        def direction(path, m, g):
            looked = look_ahead * m + gradient_weight * g if nesterov else m
            step = matrices.apply(
                lambda x: orthogonalize(x, schedule, dtype=dtype), looked, specs[path]
            )
            return step.astype(g.dtype)

        directions = paths.map_with_path(direction, accumulated, updates)
        kept = jax.tree.map(lambda a, m: a.astype(m.dtype), accumulated, state.momentum)
        return directions, MuonState(optax.safe_increment(state.count), kept)

    return optax.GradientTransformation(init, update)


def _nesterov_weights(momentum, count, bias_correction) -> tuple[Any, Any]:
    if not bias_correction:
        return momentum, 1.0
    step = count + 1
    return momentum / (1 - momentum ** (step + 1)), 1 / (1 - momentum**step)
