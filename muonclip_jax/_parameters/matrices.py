"""A parameter as the matrices that Muon orthogonalizes.

Flax kernels are `[in, out]`: the reduction axis of a `MuonDimensionNumbers` is the input.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._core import paths
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import entries
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import Role
from muonclip_jax._spread.stacks import MatrixArray


@dataclass(frozen=True)
class HeadMatrices:
    """A parameter split by an attention layout: each piece is one matrix, or one for each head.

    Attributes:
      parts: The pieces of the parameter; together they are all of it.
      per_head: Roles whose heads are matrices of their own, `[in, features]` (of `o`,
        `[features, out]`); `q` and `k` are also MLA's parts of them. The heads of the others
        stand side by side in one matrix, `[in, heads*features]`.
    """

    parts: tuple[Part, ...]
    per_head: frozenset[Role]

    @property
    def kernel(self) -> Path:
        return self.parts[0].kernel

    def together(self, part: Part) -> bool:
        """Whether all heads of the part make one matrix."""
        return part.heads > 1 and not self.per_head & role_and_family(part.role)

    def __repr__(self) -> str:
        return f"HeadMatrices({', '.join(part.role for part in self.parts)})"


Spec = MuonDimensionNumbers | HeadMatrices


def role_and_family(role: Role) -> set[str]:
    """`q_nope` belongs to the queries, `q`."""
    return {role, role.split("_")[0]}


def shapes(shape: tuple[int, ...], spec: Spec) -> tuple[tuple[int, int, int], ...]:
    """(count, in, out) of every kind of matrix in a parameter of this shape."""
    if isinstance(spec, MuonDimensionNumbers):
        return (tuple(math.prod(shape[axis] for axis in part) for part in axes(shape, spec)),)
    found = []
    for part in spec.parts:
        ins, outs = part.matrix
        count = math.prod(part.stack)
        if spec.together(part):
            wide = (ins * part.heads, outs) if part.role == "o" else (ins, outs * part.heads)
            found.append((count, *wide))
        else:
            found.append((count * part.heads, ins, outs))
    return tuple(found)


def split(x: Any, spec: Spec, sharding: NamedSharding | None = None) -> list[MatrixArray]:
    """The matrices in a parameter, those of each kind together, with where they are on the mesh.

    Args:
      x: The array.
      spec: How to read it.
      sharding: How it is split over a mesh, if it is.
    """
    if isinstance(spec, MuonDimensionNumbers):
        batch, ins, outs = axes(x.shape, spec)
        order = (*batch, *ins, *outs)
        return [MatrixArray(x.transpose(order), len(ins), len(outs), _permuted(sharding, order))]
    return [_matrices_of(part, x, sharding, spec.together(part)) for part in spec.parts]


def join(x: jax.Array, values: Sequence[jax.Array], spec: Spec) -> jax.Array:
    """The inverse of `split`: `x` with the values in place of its matrices."""
    if isinstance(spec, MuonDimensionNumbers):
        order = sum(axes(x.shape, spec), ())
        return values[0].transpose([order.index(axis) for axis in range(x.ndim)])
    for part, heads in zip(spec.parts, values, strict=True):
        x = part.put(x, _heads_first(heads, part) if spec.together(part) else heads)
    return x


def axes(shape: tuple[int, ...], spec: MuonDimensionNumbers) -> tuple[tuple[int, ...], ...]:
    """(batch, in, out) axes of a parameter, counted from the front."""
    as_tuple = lambda axis: (axis,) if isinstance(axis, int) else tuple(axis)  # noqa: E731
    ins, outs = (
        tuple(axis % len(shape) for axis in as_tuple(part))
        for part in (spec.reduction_axis, spec.output_axis)
    )
    return tuple(axis for axis in range(len(shape)) if axis not in ins + outs), ins, outs


def check(path: Path, shape: tuple[int, ...], spec: Spec | None) -> None:
    """Raises ValueError when `spec` does not fit a parameter of this shape."""
    if spec is None:
        return
    if isinstance(spec, HeadMatrices):
        if (spec.kernel, spec.parts[0].shape) != (path, shape):
            raise ValueError(
                f"{paths.show(path)} of shape {shape} cannot be read as {paths.show(spec.kernel)} "
                f"{spec.parts[0].shape}, for which this {spec} was made."
            )
        covered = np.sum([entries(part) for part in spec.parts], axis=0)
        if not covered.all():
            raise ValueError(
                f"{paths.show(path)} of shape {shape}: {np.sum(covered == 0)} of its "
                f"{covered.size} features belong to no piece of the layout (it names "
                f"{', '.join(part.role for part in spec.parts)}), so Muon cannot tell their "
                'matrix. Add the missing piece (role "v", "gate", ...), or give this parameter a '
                "routing rule."
            )
        return
    both = jax.tree.leaves(tuple(spec))
    in_range = all(-len(shape) <= axis < len(shape) for axis in both)
    if not in_range or len({axis % len(shape) for axis in both}) < len(both) or len(both) < 2:
        raise ValueError(
            f"{paths.show(path)} of shape {shape} cannot be read with {spec}: reduction and output "
            f"axes must be different axes in [-{len(shape)}, {len(shape) - 1}]."
        )


def is_spec(node: Any) -> bool:
    """Whether a node of a tree of dimension numbers is an entry: a spec, or None."""
    return node is None or isinstance(node, Spec)


def _matrices_of(part: Part, x: Any, sharding: NamedSharding | None, together: bool) -> MatrixArray:
    heads = part.take(x)  # [stack..., heads, in, features], of o [..., features, out]
    spec = None if sharding is None else part.split_of_heads(sharding)
    if not together:
        return MatrixArray(heads, 1, 1, spec)
    if part.role == "o":
        return MatrixArray(heads, 2, 1, spec)
    *stack, head, ins, features = spec if spec is not None else (None,) * heads.ndim
    return MatrixArray(
        heads.swapaxes(-3, -2), 1, 2, spec and PartitionSpec(*stack, ins, head, features)
    )


def _heads_first(values: jax.Array, part: Part) -> jax.Array:
    return values if part.role == "o" else values.swapaxes(-3, -2)


def _permuted(sharding: NamedSharding | None, order: Sequence[int]) -> PartitionSpec | None:
    if sharding is None:
        return None
    spec = dict(enumerate(sharding.spec))
    return PartitionSpec(*(spec.get(axis) for axis in order))
