"""What devices compute and send in a second: what plans are compared by.

Nothing is measured. A mesh says which kind of device it is made of, alike on all processes, so that
all choose the same plan. Only ratios of the rates matter.
"""

from dataclasses import dataclass

from jax.sharding import AbstractMesh


@dataclass(frozen=True)
class Machine:
    """The peaks of one device and of its links.

    Attributes:
      name: As people call it.
      flops: FLOP/s of products in bfloat16.
      near: Bytes/s that it sends to the devices of its domain: over NVLink, or over one axis of a
        torus, both ways.
      far: Bytes/s that it sends beyond its domain: over InfiniBand.
      domain: Devices of a domain, which are neighbours in the mesh's order; None: all.
      torus: Axes of the torus that the domain is; 0: a switch, with one hop from each to each.
      latency: Seconds for which devices wait for each other in a collective.
      assumed: Whether nobody knows what the devices are.
    """

    name: str
    flops: float
    near: float
    far: float = 0.0
    domain: int | None = None
    torus: int = 0
    latency: float = 5e-6
    assumed: bool = False

    def hops(self, group: int, devices: int) -> float:
        """How often all that a device sends to the others of a group passes its links.

        On a ring of k devices, both ways, the way is k/4 on average. A torus has one for each axis,
        and is taken for one with equal sides.
        """
        if not self.torus:
            return 1.0
        return max(1.0, min(group, devices ** (1 / self.torus)) / 4)


# By how their kinds begin, as JAX calls them. A GPU's rates are those of its data sheet (NVLink's
# halved, since it adds both ways; InfiniBand as in its maker's DGX), a TPU's those of
# https://docs.cloud.google.com/tpu/docs (one axis: the rate of the chip over its axes).
_BY_KIND = {
    "NVIDIA A100-SXM": Machine("A100", 312e12, near=300e9, far=25e9, domain=8),
    "NVIDIA H100 80GB HBM3": Machine("H100", 989.4e12, near=450e9, far=50e9, domain=8),
    "NVIDIA H200": Machine("H200", 989.4e12, near=450e9, far=50e9, domain=8),
    "NVIDIA B200": Machine("B200", 2250e12, near=900e9, far=50e9, domain=8),
    "NVIDIA GB200": Machine("GB200", 2500e12, near=900e9, far=50e9, domain=72),
    "TPU v4": Machine("TPU v4", 275e12, near=100e9, torus=3),
    "TPU v5 lite": Machine("TPU v5e", 197e12, near=100e9, torus=2),
    "TPU v5": Machine("TPU v5p", 459e12, near=200e9, torus=3),
    "TPU v6 lite": Machine("TPU v6e", 918e12, near=200e9, torus=2),
}
# Most others' ratio of the two rates is within a factor of 2.
UNKNOWN = Machine("TPU v5p", 459e12, near=200e9, assumed=True)


def machine_of(mesh: AbstractMesh | None) -> Machine:
    """The machine that a mesh's devices make up; where nobody knows them, `UNKNOWN`."""
    device = mesh and mesh.abstract_device
    kind = device.device_kind if device else ""
    # "TPU v5 lite" begins with "TPU v5" as well, and comes first.
    return next((machine for name, machine in _BY_KIND.items() if kind.startswith(name)), UNKNOWN)
