"""The devices that hold parts of the same matrices, and what they tell each other."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from muonclip_jax._orthogonalize.products import OneDevice, Symmetric


@dataclass(frozen=True)
class DeviceGroup(OneDevice):
    """Several devices inside `jax.shard_map`.

    Attributes:
      axes: The axes of the mesh.
      groups: All device groups, as indices of devices along these axes together.
    """

    axes: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return len(self.groups[0])

    def largest(self, x: jax.Array) -> jax.Array:
        return lax.pmax(x, self.axes, axis_index_groups=self.groups)

    def sum(self, x: jax.Array) -> jax.Array:
        return lax.psum(x, self.axes, axis_index_groups=self.groups)

    def sum_rows(self, x: Symmetric) -> Symmetric:
        """Of the sum `[..., n, m]` this device's share of the rows, `[..., n/size, m]`."""
        assert isinstance(x, jax.Array), "device groups take whole products"
        return lax.psum_scatter(
            x,
            self.axes,
            scatter_dimension=x.ndim - 2,
            axis_index_groups=self.groups,
            tiled=True,
        )

    def all_rows(self, x: jax.Array) -> jax.Array:
        """All devices' shares `[..., n/size, m]` below each other, `[..., n, m]`."""
        return self.gathered(x, x.ndim - 2)

    def own_rows(self, x: jax.Array) -> jax.Array:
        """This device's share `[..., n/size, m]` of the rows of what all devices have."""
        return self.own_share(x, x.ndim - 2)

    def gathered(self, x: jax.Array, axis: int) -> jax.Array:
        """All devices' shares side by side along an axis."""
        return lax.all_gather(x, self.axes, axis=axis, axis_index_groups=self.groups, tiled=True)

    def own_share(self, x: jax.Array, axis: int) -> jax.Array:
        """This device's share along an axis of what all devices have: undone by `gathered`."""
        ranks = np.zeros(sum(map(len, self.groups)), np.int32)
        for group in self.groups:
            ranks[list(group)] = np.arange(self.size)
        rank = jnp.asarray(ranks)[lax.axis_index(self.axes)]
        length = x.shape[axis] // self.size
        return lax.dynamic_slice_in_dim(x, rank * length, length, axis)

    def exchange(self, x: jax.Array) -> jax.Array:
        """Sends `x[i]` to the group's device i: `[size, ...]`, by receiver, to `[size, ...]`, by
        sender."""
        return lax.all_to_all(x, self.axes, 0, 0, axis_index_groups=self.groups, tiled=True)
