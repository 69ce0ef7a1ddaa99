"""The devices that hold parts of the same matrices, and what they tell each other."""

from dataclasses import dataclass

import jax
from jax import lax


@dataclass(frozen=True)
class Team:
    """A group of devices inside `jax.shard_map`, or one device.

    Attributes:
      axes: The axes of the mesh.
      groups: All teams, as indices of devices along these axes together.
    """

    axes: tuple[str, ...] = ()
    groups: tuple[tuple[int, ...], ...] = ((0,),)

    @property
    def size(self) -> int:
        return len(self.groups[0])

    def largest(self, x: jax.Array) -> jax.Array:
        """The maximum over the team, entry by entry."""
        return x if self.size == 1 else lax.pmax(x, self.axes, axis_index_groups=self.groups)

    def sum(self, x: jax.Array) -> jax.Array:
        """The sum over the team, entry by entry."""
        return x if self.size == 1 else lax.psum(x, self.axes, axis_index_groups=self.groups)

    def sum_rows(self, x: jax.Array) -> jax.Array:
        """Of the sum `[..., n, m]` this device's share of the rows, `[..., n/size, m]`."""
        if self.size == 1:
            return x
        return lax.psum_scatter(
            x,
            self.axes,
            scatter_dimension=x.ndim - 2,
            axis_index_groups=self.groups,
            tiled=True,
        )

    def all_rows(self, x: jax.Array) -> jax.Array:
        """All devices' shares `[..., n/size, m]` below each other, `[..., n, m]`."""
        return self.joined(x, x.ndim - 2)

    def joined(self, x: jax.Array, axis: int) -> jax.Array:
        """All devices' shares side by side along an axis."""
        if self.size == 1:
            return x
        return lax.all_gather(x, self.axes, axis=axis, axis_index_groups=self.groups, tiled=True)

    def exchange(self, x: jax.Array) -> jax.Array:
        """Sends `x[i]` to the team's device i: `[size, ...]`, by receiver, to `[size, ...]`, by
        sender."""
        if self.size == 1:
            return x
        return lax.all_to_all(x, self.axes, 0, 0, axis_index_groups=self.groups, tiled=True)


ALONE = Team()
