"""The mesh of a run, and the shardings on it of all arrays but parameters.

Mesh axes:  fsdp  splits parameters and their optimizer state, and the batch
            tp    splits heads, MLP features and the vocabulary
            data  splits the batch alone

Without a mesh (`jax.set_mesh`) these functions leave arrays as they are.
"""

import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

AXES = ("fsdp", "tp", "data")
BATCH_AXES = ("data", "fsdp")

Tree = TypeVar("Tree")


def make_mesh(axes: Mapping[str, int], devices: Sequence | None = None) -> Mesh:
    """A mesh of all devices, or of `devices`. Its axes are Auto: the compiler decides where arrays
    lie that nobody has placed."""
    auto = (AxisType.Auto,) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), auto, devices=devices)


def batch_spec(mesh: Mapping[str, int]) -> PartitionSpec:
    """The sharding of an array whose first axis is the batch."""
    return PartitionSpec(tuple(name for name in BATCH_AXES if name in mesh))


def batch_parts(mesh: Mapping[str, int]) -> int:
    """How many parts of a batch a mesh of these axes has."""
    return math.prod(mesh[name] for name in BATCH_AXES if name in mesh)


def spread(batch: np.ndarray) -> jax.Array:
    """Gives each device its part of a batch, of which every process has all."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return jnp.asarray(batch)
    sharding = NamedSharding(mesh, batch_spec(mesh.shape))
    return jax.make_array_from_callback(batch.shape, sharding, lambda part: batch[part])


def split_batch(x: jax.Array) -> jax.Array:
    """Splits an activation `[batch, ...]` as the batch is, inside jit."""
    mesh = jax.sharding.get_abstract_mesh()
    return x if mesh.empty else jax.lax.with_sharding_constraint(x, batch_spec(mesh.shape))


def whole_rows(x: jax.Array) -> jax.Array:
    """Gathers the rows of a matrix, if they are split, inside jit."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(PartitionSpec.UNCONSTRAINED, None))


def everywhere() -> Sharding:
    """Replicated over the mesh; without one, on the first device."""
    mesh = jax.sharding.get_mesh()
    if mesh.empty:
        return SingleDeviceSharding(jax.devices()[0])
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Tree) -> Tree:
    """Replicates arrays, so that every process can read them, inside jit."""
    if jax.sharding.get_abstract_mesh().empty:
        return tree
    return jax.lax.with_sharding_constraint(tree, PartitionSpec())


def largest(number: int) -> jax.Array:
    """The largest number that any process gives, not waited for. All processes must call this."""
    mesh = jax.sharding.get_mesh()
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    each = np.full(mesh.size, number, np.int32)
    return _largest(jax.make_array_from_callback(each.shape, sharding, lambda part: each[part]))


@jax.jit
def _largest(numbers: jax.Array) -> jax.Array:
    return replicate(numbers.max())
