"""Momentum: Optax's own `trace`, held to the parameters' shardings and dtypes."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._core.dtypes import accumulation_dtype, widest
from muonclip_jax._core.options import as_dtype, check_flag, check_float, check_number
from muonclip_jax._core.paths import dtype_of
from muonclip_jax._core.shardings import Shardings, check_shardings, placed, zeros_like
from muonclip_jax._core.states import check_same
from muonclip_jax._transforms.quantized import (
    QuantizedTrace,
    dequantized,
    requantized,
    zero_trace,
)


class CorrectedTraceState(NamedTuple):
    """State of momentum with `bias_correction`: what Optax's `TraceState` has, and int32 the steps
    taken."""

    trace: Any
    step: jax.Array


def momentum_trace(
    decay: ArrayLike,
    nesterov: bool,
    *,
    bias_correction: bool = False,
    mu_dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
) -> optax.GradientTransformation:
    """`M ← μM + G`; the updates are `G + μM` with Nesterov, `M` without.

    As `optax.trace`, but the state stays where the parameters are and in the dtype in which it
    started. Updates are computed in the wider of the momentum's and the gradients' dtypes and come
    out in it.

    Args:
      decay: μ in [0, 1).
      nesterov: See above.
      bias_correction: Nesterov's two terms are `μ M/(1-μ^{t+1})` and `G/(1-μ^t)`. Without Nesterov
        nothing changes.
      mu_dtype: The dtype of the momentum; None keeps the parameter's; "int8", as in
        `scale_by_muon`.
      shardings: How the parameters are split, as in `scale_by_muon`.

    Returns:
      A transformation with the state `optax.TraceState`, or `CorrectedTraceState`; in 8 bits its
      `trace` is a `QuantizedTrace`.

    Raises:
      ValueError: When built, μ outside [0, 1); at update, a state of other matrices, or one in 8
        bits where floats are wanted, or the other way around.
    """
    check_number(
        "momentum", decay, lambda x: 0 <= x < 1, "in [0, 1) (0.95 is usual)", "the transformation"
    )
    check_flag("nesterov", nesterov)
    check_flag("bias_correction", bias_correction)
    in_bits = as_dtype(mu_dtype) == jnp.int8
    if not in_bits:
        check_float("mu_dtype", mu_dtype, beside=("int8",))
    check_shardings(shardings)
    plain = optax.trace(decay, nesterov)
    corrected = optax.trace(decay, nesterov=False)

    def init(params: optax.Params) -> optax.TraceState | CorrectedTraceState:
        trace: Any
        if in_bits:
            trace = zero_trace(params, shardings)
        else:
            trace = placed(zeros_like(params, mu_dtype), shardings)
        if bias_correction:
            return CorrectedTraceState(trace, jnp.zeros([], jnp.int32))
        return optax.TraceState(trace)

    def update(updates, state, params=None):
        del params
        cause = (
            "the routing (rules=, layout=, dimension_numbers=, what is masked) or the parameters"
        )
        before = _floats(state.trace, in_bits)
        check_same("momentum", before, updates, cause)
        trace, updates = _widened(before, updates), _widened(updates, before)
        if not bias_correction:
            after: Any
            new, after = plain.update(updates, optax.TraceState(trace))
            return new, optax.TraceState(_kept(after.trace, state.trace, shardings))
        sums, _ = corrected.update(updates, optax.TraceState(trace))
        step = jnp.asarray(optax.safe_increment(state.step))
        after = CorrectedTraceState(_kept(sums, state.trace, shardings), step)
        if not nesterov:
            return sums, after
        count = step.astype(jnp.float32)
        ahead, gradient_weight = decay / (1 - decay ** (count + 1)), 1 / (1 - decay**count)

        def look_ahead(m: jax.Array, g: jax.Array) -> jax.Array:
            dtype = accumulation_dtype(m.dtype)
            weights = jnp.asarray(ahead, dtype), jnp.asarray(gradient_weight, dtype)
            return weights[0] * m.astype(dtype) + weights[1] * g.astype(dtype)

        return jax.tree.map(look_ahead, sums, updates), after

    return optax.GradientTransformation(init, update)


def _floats(trace: Any, in_bits: bool) -> Any:
    """The momentum of before, of a state as this transformation makes it."""
    if isinstance(trace, QuantizedTrace) != in_bits:
        found, wanted = ("floats", '"int8"') if in_bits else ('"int8"', "floats")
        raise ValueError(
            f"This state has momentum in {found}, and mu_dtype= asks for {wanted}. Build the "
            "optimizer as it was then; upgrade_state(state, like=tx.init(params)) brings floats "
            "into 8 bits."
        )
    return dequantized(trace) if in_bits else trace


def _kept(new: Any, old: Any, shardings: Shardings | None) -> Any:
    """The new momentum, typed and split as the old."""
    if isinstance(old, QuantizedTrace):
        return requantized(new, old, shardings)
    return placed(jax.tree.map(lambda a, m: a.astype(m.dtype), new, old), shardings)


def _widened(tree: Any, other: Any) -> Any:
    """Each leaf in a dtype that has room for the other tree's leaf as well."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, widest(dtype_of(x), dtype_of(y))), tree, other)
