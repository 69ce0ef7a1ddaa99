"""Where the contract holds: on one device, and on meshes whose axes are Auto or Explicit."""

import contextlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

_AXES = (2, 2), ("data", "model")


@dataclass(frozen=True)
class Place:
    """One device, or a mesh of 2 × 2.

    Attributes:
      name: For the cell's name.
      axis_type: Of the mesh's axes; None: no mesh.
    """

    name: str
    axis_type: AxisType | None = None

    @property
    def mesh(self) -> jax.sharding.Mesh:
        return jax.make_mesh(*_AXES, axis_types=(self.axis_type,) * 2, devices=jax.devices()[:4])

    def active(self) -> contextlib.AbstractContextManager[Any]:
        """The context in which a trainer on this mesh runs."""
        return contextlib.nullcontext() if self.axis_type is None else jax.set_mesh(self.mesh)

    def put(self, tree: Any, lead: int = 0) -> Any:
        """Every array where it lies; `lead` axes in front of the parameter's own are not split."""
        if self.axis_type is None:
            return jax.tree.map(jnp.asarray, tree)
        return jax.tree.map(lambda x: jax.device_put(x, self._sharding(x.shape, lead)), tree)

    def shardings(self, tree: Any) -> Any:
        """What `shardings=` is given: Auto meshes need it."""
        if self.axis_type is not AxisType.Auto:
            return None
        return jax.tree.map(lambda x: self._sharding(x.shape, 0), tree)

    def _sharding(self, shape: tuple[int, ...], lead: int) -> NamedSharding:
        """FSDP on the first axis, tensor parallelism on the second: kernels [8, heads, 4] by input
        and head, [8, 16] by input and output; vectors whole."""
        own = shape[lead:]
        axes = [
            name if len(own) >= 2 and length % size == 0 else None
            for length, size, name in zip(own, *_AXES, strict=False)
        ]
        return NamedSharding(self.mesh, P(*[None] * lead, *axes))


ONE_DEVICE = Place("one device")
PLACES = [ONE_DEVICE, Place("Auto mesh", AxisType.Auto), Place("Explicit mesh", AxisType.Explicit)]
