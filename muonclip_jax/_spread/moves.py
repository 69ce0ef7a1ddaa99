"""Parameters whose stored sharding cuts across their matrices: brought to one that does not."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from muonclip_jax._core.axes import View
from muonclip_jax._core.meshes import mesh_axes, mesh_of, on_each_device

Entries = tuple[tuple[str, ...], ...]  # the mesh axes that split each axis of a parameter


@dataclass(frozen=True)
class Move:
    """Mesh axes that split one axis of a parameter, and shall split another."""

    source: int
    target: int
    mesh_axes: tuple[str, ...]

    def applied(self, entries: Entries) -> Entries:
        kept = len(entries[self.source]) - len(self.mesh_axes)
        after = dict(enumerate(entries))
        after[self.source] = entries[self.source][:kept]
        after[self.target] = entries[self.target] + self.mesh_axes
        return tuple(after.values())


@dataclass(frozen=True)
class Way:
    """A parameter's way to a sharding in which each device can take matrices, or equal parts of
    them, out of what it holds, and its way back.

    Each move is one all-to-all. A sharding that all views can follow needs none; one from which no
    move leads to such a sharding stays, and XLA gathers the parameter.

    Attributes:
      stored: The parameter's sharding; None: nobody knows, or there is one device.
      sharding: That in which matrices are taken.
      moves: From the one to the other.
    """

    stored: NamedSharding | None = None
    sharding: NamedSharding | None = None
    moves: tuple[Move, ...] = ()

    def there(self, x: jax.Array) -> jax.Array:
        return self._moved(x, self.stored, self.sharding, self.moves)

    def back(self, x: jax.Array) -> jax.Array:
        turned = [Move(m.target, m.source, m.mesh_axes) for m in reversed(self.moves)]
        return self._moved(x, self.sharding, self.stored, turned)

    def bytes_sent(self, values: jax.Array, spec: PartitionSpec | None) -> int:
        """By a device, both ways, for a parameter's matrices `values` with this `spec`."""
        if self.stored is None or spec is None:
            return 0
        sizes = self.stored.mesh.shape
        split = lambda entries: {axis for entry in entries for axis in mesh_axes(entry)}  # noqa: E731
        devices = lambda axes: math.prod(sizes[axis] for axis in axes)  # noqa: E731
        stored, followed = split(self.stored.spec), split(spec)
        gathered = devices(stored - followed) > 1
        share = values.size // devices(followed) * values.dtype.itemsize
        return share * (2 * len(self.moves) + gathered)

    def _moved(self, x, before, after, moves):
        mesh = mesh_of([x])
        if mesh is None or not moves:
            return x

        def exchange(x):
            for move in moves:
                x = lax.all_to_all(x, move.mesh_axes, move.target, move.source, tiled=True)
            return x

        return on_each_device(exchange, mesh, before.spec, after.spec)(x)


def way_to_matrices(views: Sequence[View], sharding: NamedSharding | None) -> Way:
    """The moves after which every view can follow how the parameter is split.

    Args:
      views: All that is in the parameter.
      sharding: The parameter's.
    """
    # o [L=16, heads*features = 4*64, out=64] on 8 devices that split its middle axis: each has
    # half a head of every layer. After the move each has two layers. A fused [in, 3*heads*features]
    # that is split along its output holds on each device another piece: after the move each has
    # some inputs of all three.
    if sharding is None:
        return Way()
    shape = views[0].shape
    sizes = sharding.mesh.shape
    entries: Entries = tuple(mesh_axes(entry) for entry in sharding.spec)
    entries += ((),) * (len(shape) - len(entries))
    moves: list[Move] = []
    for source in range(len(shape)):
        cut = entries[source][_followed(views, sharding, entries, source) :]
        if math.prod(sizes[axis] for axis in cut) == 1:
            continue
        options = (Move(source, target, cut) for target in range(len(shape)) if target != source)
        possible = [move for move in options if _leads_to_matrices(move, views, sharding, entries)]
        if possible:
            # A batch axis leaves matrices whole. Of the others the longest.
            best = max(
                possible, key=lambda move: (_is_batch(views, move.target), shape[move.target])
            )
            moves.append(best)
            entries = best.applied(entries)
    return Way(sharding, _with(sharding, entries), tuple(moves))


def _leads_to_matrices(
    move: Move, views: Sequence[View], sharding: NamedSharding, before: Entries
) -> bool:
    after, target = move.applied(before), move.target
    devices = math.prod(sharding.mesh.shape[axis] for axis in after[target])
    even = views[0].shape[target] % devices == 0
    return even and _followed(views, sharding, after, target) == len(after[target])


def _followed(views: Sequence[View], sharding: NamedSharding, entries: Entries, axis: int) -> int:
    """How many of the mesh axes that split an axis all views can follow, from the first on."""
    splits = [(view.split(_with(sharding, entries)), view.axes[axis]) for view in views]
    return min(sum(len(split[name]) for name in names) for split, names in splits)


def _with(sharding: NamedSharding, entries: Entries) -> NamedSharding:
    return NamedSharding(sharding.mesh, PartitionSpec(*(entry or None for entry in entries)))


def _is_batch(views: Sequence[View], axis: int) -> bool:
    return all(set(view.axes[axis]) <= set(view.batch) for view in views)
