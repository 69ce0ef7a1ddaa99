"""Momentum in 8 bits: int8 numbers, and for each block of them the largest entry."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes, mesh_axes, specs_of
from muonclip_jax._core.shardings import Shardings, placed, shardings_of, zeros_like
from muonclip_jax._orthogonalize.normalization import nonzero

_BLOCK = 128  # entries along the last axis that share a scale
_STEPS = 127  # of int8 on either side of zero


class QuantizedTrace(NamedTuple):
    """Momentum in 8 bits, `values / 127 * scales` (arXiv 2509.23106, linear and by blocks).

        kernel [64, 300]: values int8 [64, 300], scales float32 [64, 3], of entries 0:128, 128:256
        and 256:300 of each row

    Attributes:
      values: int8, a tree like the parameters, of their shapes.
      scales: float32 (float64 of such parameters), the largest absolute value of each block of 128
        entries along the last axis, `[..., blocks]`. The last block may be shorter.
    """

    values: Any
    scales: Any


def zero_trace(params: Any, shardings: Shardings | None) -> QuantizedTrace:
    """The momentum before the first step, split as the parameters are."""
    if paths.holds_nothing(params):  # the scales are no copies of the parameters
        return QuantizedTrace(params, jnp.zeros([]))
    values = zeros_like(params, jnp.int8)

    def scales(values: Any) -> Any:
        return jax.tree.map(
            lambda x, p: _largest(x).astype(accumulation_dtype(paths.dtype_of(p))), values, params
        )

    def spec(x: jax.Array) -> PartitionSpec:
        sharding = jax.typeof(x).sharding
        return _spec_of_scales(sharding.spec, sharding.mesh.shape, x.shape)

    zeros = in_auto_axes(scales, jax.tree.map(spec, values))(values)
    return _held(QuantizedTrace(values, zeros), params, shardings)


def requantized(new: Any, old: QuantizedTrace, shardings: Shardings | None) -> QuantizedTrace:
    """New momentum in 8 bits, split and typed as the old."""
    split = QuantizedTrace(specs_of(old.values), specs_of(old.scales))
    like = jax.tree.map(lambda x, scale: x.astype(scale.dtype), new, old.scales)
    return _held(in_auto_axes(quantized, split)(like), new, shardings)


def dequantized(trace: QuantizedTrace) -> Any:
    """The momentum as a tree of float32 (or float64) arrays."""

    def one(values: jax.Array, scales: jax.Array) -> jax.Array:
        return values.astype(scales.dtype) / _STEPS * _of_each(scales, values.shape)

    def every(trace):
        return jax.tree.map(one, trace.values, trace.scales)

    return in_auto_axes(every, specs_of(trace.values))(trace)


def quantized(tree: Any) -> QuantizedTrace:
    """A tree of floats in 8 bits; in each block rounding is at most 1/254 of the largest entry."""

    def values(x: jax.Array, scales: jax.Array) -> jax.Array:
        number = jnp.round(x / nonzero(_of_each(scales, x.shape)) * _STEPS)
        # A block with NaN or infinity has such a scale, which makes NaN of all of it.
        return jnp.where(jnp.isfinite(number), number, 0).astype(jnp.int8)

    scales = jax.tree.map(_largest, tree)
    return QuantizedTrace(jax.tree.map(values, tree, scales), scales)


def floats_like(trace: QuantizedTrace) -> Any:
    """What `dequantized` gives, as `jax.ShapeDtypeStruct`s."""
    return jax.tree.map(
        lambda x, scale: jax.ShapeDtypeStruct(x.shape, scale.dtype), trace.values, trace.scales
    )


def _largest(x: jax.Array) -> jax.Array:
    """The largest absolute value of each block, `[..., blocks]`."""
    if x.ndim == 0:
        return jnp.abs(x)
    block = min(max(x.shape[-1], 1), _BLOCK)
    short = [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % block)]
    return jnp.pad(jnp.abs(x), short).reshape(*x.shape[:-1], -1, block).max(-1, initial=0)


def _of_each(scales: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The scale of each entry of an array of this shape: `[..., blocks]` becomes `[..., n]`."""
    if not shape:
        return scales
    block = min(shape[-1], _BLOCK)
    each = jnp.broadcast_to(scales[..., None], (*scales.shape, block))
    return each.reshape(*shape[:-1], -1)[..., : shape[-1]]


def _spec_of_scales(
    spec: PartitionSpec, sizes: Mapping[str, int], shape: tuple[int, ...]
) -> PartitionSpec:
    """How scales are split: as the parameter, but along the last axis only between blocks."""
    entries = (*spec, *[None] * (len(shape) - len(spec)))
    if not entries:
        return PartitionSpec()
    devices = math.prod(sizes[axis] for axis in mesh_axes(entries[-1]))
    whole_blocks = shape[-1] % (devices * _BLOCK) == 0
    return PartitionSpec(*entries[:-1], entries[-1] if whole_blocks else None)


def _held(trace: QuantizedTrace, like: Any, shardings: Shardings | None) -> QuantizedTrace:
    """The same held to the shardings given: inside `jax.jit` the compiler may choose others."""
    if shardings is None:
        return trace
    known = shardings_of(like, shardings)
    places = {}
    for path, x in paths.leaves(trace.values):
        sharding = known[path]
        if sharding is None:  # one device
            return trace
        spec = _spec_of_scales(sharding.spec, sharding.mesh.shape, x.shape)
        places[paths.show(path)] = NamedSharding(sharding.mesh, spec)
    return QuantizedTrace(placed(trace.values, shardings), placed(trace.scales, places))
