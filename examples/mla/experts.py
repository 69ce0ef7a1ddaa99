"""Tokens through the experts they were sent to, each device those it has.

    tokens ─► sorted by expert ─► one ragged product for all experts ─► weighed, back in order

Shapes are fixed whatever the router says, so nothing waits for the host and no token is dropped.
Axes as in model.py.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from examples.mla.mesh import batch_parts, batch_spec

ACTIVE = 2  # experts that a token is sent to


def mix(
    x: jax.Array, chosen: jax.Array, weights: jax.Array, kernels: Sequence[jax.Array]
) -> jax.Array:
    """The weighed sum of what the chosen experts give, `b t d`.

    On a mesh, tokens stay where they are. Where the axis tp splits the experts evenly, a device
    computes what its own ones give, and the sums over tp are added up.

    Args:
      x: Tokens `b t d`.
      chosen: Their experts `b t j`.
      weights: What each of these counts `b t j`.
      kernels: Of gates, ups and downs: `e in out`.
    """
    mesh, experts = jax.sharding.get_abstract_mesh(), len(kernels[0])
    if mesh.empty:
        return _of_some(x, chosen, weights, kernels, 0)
    tp = "tp" if "tp" in mesh.shape and experts % mesh.shape["tp"] == 0 else None
    tokens = PartitionSpec() if x.shape[0] % batch_parts(mesh.shape) else batch_spec(mesh.shape)

    def of_own(x, chosen, weights, kernels):
        if tp is None:
            return _of_some(x, chosen, weights, kernels, 0)
        first = jax.lax.axis_index(tp) * len(kernels[0])
        # Else JAX 0.10 forgets the sum over tp in the gradient of what a gather reads.
        x, chosen, weights = jax.lax.pcast((x, chosen, weights), tp, to="varying")
        return jax.lax.psum(_of_some(x, chosen, weights, kernels, first), tp)

    whole = jax.shard_map(
        of_own,
        in_specs=(tokens, tokens, tokens, PartitionSpec(tp)),
        out_specs=tokens,
    )
    return whole(x, chosen, weights, list(kernels))


def _of_some(
    x: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    kernels: Sequence[jax.Array],
    first: jax.Array | int,
) -> jax.Array:
    """The part of the sum that the experts from `first` on give, as many as there are kernels."""
    gate, up, down = kernels
    expert = chosen.reshape(-1) - first
    there = (expert >= 0) & (expert < len(gate))
    order = jnp.argsort(jnp.where(there, expert, len(gate)))  # others' tokens come last
    sizes = jnp.sum(expert[:, None] == jnp.arange(len(gate)), axis=0, dtype=jnp.int32)
    token = order // ACTIVE
    tokens = x.reshape(-1, x.shape[-1])
    rows = tokens[token]
    inside = jax.nn.silu(jax.lax.ragged_dot(rows, gate, sizes))
    inside *= jax.lax.ragged_dot(rows, up, sizes)
    given = jax.lax.ragged_dot(inside, down, sizes) * weights.reshape(-1)[order, None]
    given = jnp.where(there[order, None], given, 0)
    return jnp.zeros_like(tokens).at[token].add(given).reshape(x.shape)
