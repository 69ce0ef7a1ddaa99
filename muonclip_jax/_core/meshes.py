"""The mesh on which a tree of arrays lives, and code that need not know how they are sharded.

JAX types every array with its mesh. An axis of a mesh is Explicit (an array's type says how it is
split over it, and each operation must be told or able to say the same of its result), Auto (the
compiler decides) or Manual (inside `jax.shard_map` and `jax.pmap`: only this device's part is
seen).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec


def mesh_of(tree: Any) -> AbstractMesh | None:
    """Finds the mesh on which the arrays of a tree live, else the mesh of `jax.set_mesh`.

    Args:
      tree: Arrays, NumPy's, tracers or `jax.ShapeDtypeStruct`s.

    Returns:
      The mesh, or None where one device holds everything that can be seen: there is no mesh, or
      its Auto and Explicit axes have one device.
    """
    for mesh in (*_meshes(tree), jax.sharding.get_abstract_mesh()):
        if math.prod(mesh.shape[axis] for axis in free_axes(mesh)) > 1:
            return mesh
    return None


def free_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """The Auto and Explicit axes: those that are not a `jax.shard_map`'s already."""
    return tuple(axis for axis in mesh.axis_names if axis not in mesh.manual_axes)


def on_each_device(
    fn: Callable[..., Any], mesh: AbstractMesh, in_specs: Any, out_specs: Any
) -> Callable[..., Any]:
    """`fn` of each device's shares, which tells itself what devices send each other.

    Args:
      fn: A function of arrays, as `jax.shard_map` takes it over all free axes of the mesh.
      mesh: The mesh.
      in_specs: How the arguments are split.
      out_specs: How the results are. Nobody checks that replicated ones are equal.
    """
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=set(free_axes(mesh)),
        check_vma=False,
    )


def specs_of(tree: Any) -> Any:
    """Each array's `PartitionSpec` as its type gives it: Explicit axes only."""
    return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, tree)


def in_auto_axes(fn: Callable[..., Any], out_specs: Any) -> Callable[..., Any]:
    """Makes `fn` see the Explicit axes of its arguments' mesh as Auto ones.

    Inside, any reshape, slice or product may meet any sharding, as on Auto meshes. Works eagerly
    and under `jax.jit`, with and without `jax.set_mesh`, and inside a `jax.shard_map` over other
    axes. Where no argument has an Explicit axis, it is `fn`.

    Args:
      fn: A function of trees of arrays. What it closes over must not be arrays on the mesh.
      out_specs: How the results are split over the Explicit axes: a prefix of the result's tree
        of `PartitionSpec`s; `specs_of(updates)`, `PartitionSpec()` for replicated ones.
    """

    def wrapped(*args):
        on_mesh = [x for x in jax.tree.leaves(args) if jax.typeof(x).sharding.mesh.explicit_axes]
        if not on_mesh:
            return fn(*args)
        # Of an array at hand the mesh of devices: outside of jit they must be known.
        traced = isinstance(on_mesh[0], Tracer)
        mesh = (jax.typeof(on_mesh[0]) if traced else on_mesh[0]).sharding.mesh
        shardings = jax.tree.map(
            lambda spec: NamedSharding(mesh, spec),
            out_specs,
            is_leaf=lambda node: isinstance(node, PartitionSpec),
        )
        return jax.sharding.auto_axes(fn, axes=mesh.explicit_axes, out_sharding=shardings)(*args)

    return wrapped


def _meshes(tree: Any):
    return (jax.typeof(leaf).sharding.mesh for leaf in jax.tree.leaves(tree))


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes in one entry of a `PartitionSpec`."""
    return (entry,) if isinstance(entry, str) else tuple(entry or ())
