"""How each parameter is split over a mesh: as its type says, or as the user says."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike

from muonclip_jax._core import paths
from muonclip_jax._core.meshes import in_auto_axes, mesh_axes, mesh_of
from muonclip_jax._core.options import is_function
from muonclip_jax._core.paths import Path

# A tree like the parameters, or a prefix of one, or a function from parameters to one.
Shardings = Any | Callable[[Any], Any]


def shardings_of(tree: Any, given: Shardings | None) -> dict[Path, NamedSharding | None]:
    """Every array's sharding by its path; None where nobody knows, or there is one device.

    Types know on meshes with Explicit axes, and arrays that are no tracers; `given` is for traced
    ones on meshes with Auto axes.

    Args:
      tree: Arrays, or their `jax.ShapeDtypeStruct`s.
      given: A tree like this one, or a prefix of one, or a function to one, of `NamedSharding`s or,
        when a mesh is known, `PartitionSpec`s. Others (`SingleDeviceSharding`) count as replicated.

    Raises:
      ValueError: An array without an entry, or one that does not fit it.
      TypeError: An entry that is no sharding.
    """
    if paths.holds_nothing(tree):
        return {}
    mesh = mesh_of(tree)
    told = None
    if given is not None:
        told = _entries(given(tree) if is_function(given) else given)

    def sharding(path: Path, leaf: Any) -> NamedSharding | None:
        typed = _from_type(leaf)
        if typed is not None or told is None:
            return typed
        entry = _entry(path, leaf, told)
        if isinstance(entry, PartitionSpec) and mesh is not None:
            entry = NamedSharding(mesh, entry)
        elif isinstance(entry, PartitionSpec):
            raise ValueError(
                f"shardings= gives {paths.show(path)} {entry}, and the parameters are on no mesh: "
                "call jax.set_mesh(mesh), or give a NamedSharding(mesh, spec)."
            )
        if not isinstance(entry, NamedSharding):
            return None if mesh is None else NamedSharding(mesh, PartitionSpec())
        entry = _free(entry, mesh)
        _check(path, leaf, entry, mesh)
        return entry

    return {path: sharding(path, leaf) for path, leaf in paths.leaves(tree)}


def check_shardings(given: Shardings | None) -> None:
    """Raises TypeError, when a transformation is built, for what can be no shardings."""
    if given is not None and not is_function(given):
        _entries(given)


def placed(tree: Any, given: Shardings | None) -> Any:
    """Holds arrays to the shardings given: inside `jax.jit` the compiler may choose others."""
    if given is None:
        return tree
    found = shardings_of(tree, given)

    def place(path: Path, x: jax.Array) -> jax.Array:
        sharding = found[path]
        told_in_full = _from_type(x) is not None
        if told_in_full or not isinstance(x, Tracer) or sharding is None:
            return x
        typed = jax.typeof(x).sharding
        if not typed.mesh.explicit_axes:
            return jax.lax.with_sharding_constraint(x, sharding)
        # The constraint takes Auto axes only.
        hold = functools.partial(jax.lax.with_sharding_constraint, shardings=sharding.spec)
        return in_auto_axes(hold, typed.spec)(x)

    return paths.map_with_path(place, tree)


def zeros_like(tree: Any, dtype: DTypeLike | None) -> Any:
    """Zeros in place of arrays, split as these are; None keeps their dtypes.

    On a mesh with Auto and Explicit axes, without `jax.set_mesh`, `jnp.zeros_like` gives a tracer
    of `jax.eval_shape` no mesh (JAX 0.12). A choice between the two has it.
    """

    def zeros(x: Any) -> jax.Array:
        new = jnp.zeros_like(x, dtype=dtype)
        forgot = jax.typeof(new).sharding.mesh.empty and not jax.typeof(x).sharding.mesh.empty
        return jnp.where(False, x, new).astype(new.dtype) if forgot else new

    return jax.tree.map(zeros, tree)


def _from_type(leaf: Any) -> NamedSharding | None:
    if isinstance(leaf, Tracer):
        sharding = jax.typeof(leaf).sharding
        mesh = sharding.mesh
        told_in_full = all(mesh.shape[axis] == 1 for axis in mesh.auto_axes)
        return sharding if mesh.explicit_axes and told_in_full else None
    sharding = getattr(leaf, "sharding", None)
    return sharding if isinstance(sharding, NamedSharding) else None


def _entries(given: Any) -> dict[Path, Any]:
    is_entry = lambda node: isinstance(node, Sharding | PartitionSpec)  # noqa: E731
    entries = dict(paths.leaves(given, is_leaf=is_entry))
    for path, entry in entries.items():
        if not is_entry(entry):
            raise TypeError(
                f"shardings= has {entry!r} for {paths.show(path)}; it must be a NamedSharding or a "
                "PartitionSpec: jax.tree.map(lambda p: p.sharding, params)."
            )
    return entries


def _entry(path: Path, leaf: Any, told: dict[Path, Any]) -> Any:
    if (entry := paths.entry_for(path, told)) is not None:
        return told[entry]
    raise ValueError(
        f"shardings= says nothing about {paths.show(path)} {np.shape(leaf)}; it has "
        f"{', '.join(map(paths.show, list(told)[:8]))}. Give a tree like the parameters: "
        "jax.tree.map(lambda p: p.sharding, params)."
    )


def _free(sharding: NamedSharding, mesh: AbstractMesh | None) -> NamedSharding:
    """The sharding inside of `jax.shard_map`, along whose axes the array is cut up already."""
    manual = () if mesh is None else mesh.manual_axes
    if not manual:
        return sharding
    spec = (tuple(a for a in mesh_axes(entry) if a not in manual) for entry in sharding.spec)
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))


def _check(path: Path, leaf: Any, sharding: NamedSharding, mesh: AbstractMesh | None) -> None:
    """Raises ValueError when an array on this mesh cannot be split so."""
    shape, spec, sizes = np.shape(leaf), sharding.spec, sharding.mesh.shape
    if mesh is not None and dict(sizes) != dict(mesh.shape):
        raise ValueError(
            f"shardings= gives {paths.show(path)} a sharding on the mesh {dict(sizes)}, and the "
            f"parameters are on the mesh {dict(mesh.shape)}; give those of the parameters."
        )
    _check_explicit(path, leaf, sharding)
    if PartitionSpec.UNCONSTRAINED in spec:
        raise ValueError(
            f"shardings= leaves {paths.show(path)} partly unconstrained, {spec}; say how it is "
            "split, None for an axis that is not."
        )
    even = len(spec) <= len(shape) and all(
        length % math.prod(sizes[axis] for axis in mesh_axes(entry)) == 0
        for length, entry in zip(shape, spec, strict=False)
    )
    if not even:
        raise ValueError(
            f"shardings= gives {paths.show(path)} {shape} the sharding {spec} on the mesh "
            f"{dict(sizes)}, which does not divide it."
        )


def _check_explicit(path: Path, leaf: Any, sharding: NamedSharding) -> None:
    """Raises ValueError when a tracer's type does not say how it is split over Explicit axes."""
    if not isinstance(leaf, Tracer):
        return
    typed = jax.typeof(leaf).sharding.mesh
    explicit = set(sharding.mesh.abstract_mesh.explicit_axes)
    if unknown := sorted(explicit - {*typed.explicit_axes, *typed.manual_axes}):
        raise ValueError(
            f"shardings= gives {paths.show(path)} a sharding on a mesh whose axes "
            f"{', '.join(unknown)} are Explicit, and in the parameters' types they are not: "
            "give those of the parameters, jax.tree.map(lambda p: p.sharding, params)."
        )
