"""Which device orthogonalizes what: the stored and the working sharding of a stack on a mesh.

Every mesh axis, or a factor of one, splits a stack `[k, n, m]` in one of these ways:

    stack       each device has other matrices
    rows        each device has other rows of the same matrices (of the shorter side, n)
    cols        each device has other columns (of the longer side, m)
    replicated  all devices have the same
    unknown     only XLA knows

The stored sharding is that of the parameters. In the working sharding, in which matrices are
orthogonalized, the devices along `stack` work on their own matrices, those along `cols` are a
device group, each with some columns of the same matrices, and those along `replicated` all do the
same work.

Which machine the mesh is made of decides the device groups, and by them the rounding of results:
nothing else in them depends on it.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal, NamedTuple

from muonclip_jax._spread.machine import UNKNOWN, Machine

Split = Literal["stack", "rows", "cols", "replicated", "unknown"]

# How many devices make a device group; by matrix shape {(n, m): devices} where they differ.
DevicesPerMatrix = int | Mapping[tuple[int, int], int]

# What to make a device group of: least to move first.
_GROUP_FIRST: tuple[Split, ...] = ("cols", "replicated", "rows", "stack")


@dataclass(frozen=True)
class MatrixStack:
    """Matrices of one shape that have the same stored sharding.

    Attributes:
      count: How many, over all devices.
      n: The shorter side.
      m: The longer side.
      mesh: The mesh's axes and their sizes.
      stored: The stored sharding: how each of the mesh's axes splits the stack.
      item_bytes: Bytes of an entry on its way between devices.
      sent: Bytes that a device sends so that parameters are in the stored sharding, and back:
        those that are split across their matrices come to another one first (`moves`).
    """

    count: int
    n: int
    m: int
    mesh: tuple[tuple[str, int], ...] = ()
    stored: tuple[Split, ...] = ()
    item_bytes: int = 2
    sent: int = 0

    @property
    def devices(self) -> int:
        return math.prod(size for _, size in self.mesh)

    @property
    def split(self) -> dict[str, Split]:
        """The stored sharding by the names of the mesh's axes."""
        return dict(zip((axis for axis, _ in self.mesh), self.stored, strict=True))

    def local(self, axis: Split) -> int:
        """Matrices, rows or columns on one device in the stored sharding."""
        whole = {"stack": self.count, "rows": self.n, "cols": self.m}[axis]
        along = zip(self.mesh, self.stored, strict=True)
        return whole // math.prod(size for (_, size), split in along if split == axis)


@dataclass(frozen=True)
class Factor:
    """A mesh axis, or a factor of one: how it splits the stack in either sharding."""

    size: int
    stored: Split
    working: Split

    @property
    def moves(self) -> bool:
        """Whether matrices are exchanged along it, for it to split them otherwise."""
        return self.stored not in (self.working, "replicated")

    @property
    def shared(self) -> bool:
        """Whether its devices have the same, and work on a share each."""
        return self.stored == "replicated" != self.working

    @property
    def grouped(self) -> bool:
        """Whether its devices work on the same matrices, as a device group."""
        return self.working == "cols"


class Sent(NamedTuple):
    """Bytes that a device sends to a group of others, or receives from it.

    Attributes:
      bytes: How many.
      along: The factors in which the group's devices differ.
      same: Whether all get the same, as in an all-gather, or each a part of its own.
    """

    bytes: int
    along: Callable[[Factor], bool]
    same: bool


@dataclass(frozen=True)
class Plan:
    """The stored and the working sharding of a stack, and what they cost, per device.

    Without factors there is one device, or XLA decides.

    Attributes:
      stack: The matrices.
      factors: The mesh, in its axes' order.
      steps: Of the iteration.
      cubic: How many of them are cubic, which need no square of the Gram matrix.
      machine: What the devices are.
    """

    stack: MatrixStack
    factors: tuple[Factor, ...]
    steps: int
    cubic: int = 0
    machine: Machine = UNKNOWN

    @property
    def devices_per_matrix(self) -> int:
        return self._size(lambda f: f.grouped)

    @property
    def matrices_per_device(self) -> int:
        """Including the zeros that make the shares equal."""
        coming = self.matrices_to_share
        leaving = self._size(lambda f: f.stored == "stack" != f.working)
        return self._padded("stack") // coming * leaving

    @property
    def matrices_to_share(self) -> int:
        """How many of a device's matrices, as stored, give every device one to work on."""
        return self._size(lambda f: f.working == "stack" != f.stored)

    @property
    def flops(self) -> int:
        """2n³ + 4n²m for each step and matrix (4n²m of a cubic), shared by a device group: those
        of the standard iteration. What one device holds may take fewer (`Method`)."""
        return self.matrices_per_device * self._flops // self.devices_per_matrix

    @property
    def ratio_to_even_share(self) -> float:
        """FLOPs over those of a device if all devices did equal parts of the work."""
        return self.flops * self.stack.devices / (self.stack.count * self._flops)

    @property
    def bytes_sent(self) -> int:
        """Per device: to the stored sharding, the working one and back, and within groups."""
        return sum(sent.bytes for sent in self._sent)

    @property
    def collectives(self) -> int:
        """How many times devices wait for each other."""
        split = self._size(lambda f: f.stored in ("rows", "cols")) > 1  # for the largest entry
        shared = self._size(lambda f: f.shared) > 1
        in_group = 3 * self.steps - self.cubic + 1  # the one is for the norm
        in_group *= self.devices_per_matrix > 1
        return 2 * self._exchanges + split + shared + in_group

    @property
    def seconds_of_products(self) -> float:
        """At the machine's peak."""
        return self.flops / self.machine.flops

    @property
    def seconds_of_sending(self) -> float:
        """At the peaks of the machine's links, and without any products meanwhile."""
        return sum(map(self._seconds, self._sent)) + self.collectives * self.machine.latency

    @property
    def seconds(self) -> float:
        """One after the other: for comparing plans."""
        return self.seconds_of_products + self.seconds_of_sending

    @property
    def _sent(self) -> tuple[Sent, ...]:
        share = math.prod(map(self._padded, ("stack", "rows", "cols"))) * self.stack.item_bytes
        shared = self._size(lambda f: f.shared)
        in_groups = self.matrices_per_device * self._bytes_in_group
        return (
            Sent(self.stack.sent, lambda _: True, same=False),
            Sent(2 * share // shared * self._exchanges, lambda f: f.moves, same=False),
            Sent(share * (shared > 1), lambda f: f.shared, same=True),
            Sent(in_groups, lambda f: f.grouped, same=True),
        )

    def _seconds(self, sent: Sent) -> float:
        """What stays within a domain goes at its rate, the rest at that of the network, over which
        what is the same for all comes into each domain once."""
        machine, group = self.machine, self._size(sent.along)
        near = self._near(sent.along)
        beyond = sent.bytes * (1 - near / group)
        if sent.same:
            within, beyond = sent.bytes, beyond / near
        else:
            within = (sent.bytes - beyond) * machine.hops(group, self.stack.devices)
        return within / machine.near + (beyond / machine.far if beyond else 0.0)

    def _near(self, along: Callable[[Factor], bool]) -> int:
        """How many of the devices that differ in some factors are in one domain."""
        # Domains of 8, factors 4, 2 and 4 in the mesh's order: a device's neighbours along the last
        # are 1 apart, so all 4 are near; along the second 4, so both are; along the first 8: none.
        domain = self.machine.domain or self.stack.devices
        near, apart = 1, 1
        for factor in reversed(self.factors):
            if along(factor):
                near *= min(factor.size, max(1, domain // apart))
            apart *= factor.size
        return near

    @property
    def _exchanges(self) -> bool:
        return any(f.moves for f in self.factors)

    @property
    def _flops(self) -> int:
        """Of a matrix."""
        n, m = self.stack.n, self.stack.m
        return self.steps * (2 * n**3 + 4 * n**2 * m) - self.cubic * 2 * n**3

    @property
    def _bytes_in_group(self) -> int:
        """Of a matrix: at every step the Gram matrix is summed in float32 (float64 if that is what
        is sent), and the polynomial's rows are shown to all; its own too where it is squared."""
        group, sent = self.devices_per_matrix, self.stack.item_bytes
        n = _up_to_multiple(self.stack.n, group)
        entry = self.steps * (max(4, sent) + 2 * sent) - self.cubic * sent
        return entry * n**2 * (group > 1)

    def _padded(self, axis: Split) -> int:
        """`MatrixStack.local`, with the zeros that make the working sharding's shares equal."""
        coming = self._size(lambda f: f.working == axis != f.stored)
        return _up_to_multiple(self.stack.local(axis), coming)

    def _size(self, which: Callable[[Factor], bool]) -> int:
        return math.prod(f.size for f in self.factors if which(f))


def check_devices_per_matrix(value: Any) -> None:
    """Raises TypeError for what is no `DevicesPerMatrix`, None excepted."""
    entries = value if isinstance(value, Mapping) else {(1, 1): 1 if value is None else value}
    for shape, devices in entries.items():
        if not _are_counts(shape, 2) or not _are_counts((devices,), 1):
            raise TypeError(
                "devices_per_matrix must be a whole number of at least 1, or {(n, m): number}, "
                f"got {value!r}. (Under optax.inject_hyperparams name it in static_args.)"
            )


def _are_counts(numbers: Any, how_many: int) -> bool:
    return (
        isinstance(numbers, tuple)
        and len(numbers) == how_many
        and all(isinstance(n, Integral) and not isinstance(n, bool) and int(n) > 0 for n in numbers)
    )


def choose(
    stack: MatrixStack,
    steps: int,
    devices_per_matrix: DevicesPerMatrix | None = None,
    cubic: int = 0,
    machine: Machine = UNKNOWN,
) -> Plan:
    """The plan that takes the least time by `Plan.seconds`.

    Args:
      stack: What to orthogonalize.
      steps: Steps of the iteration.
      devices_per_matrix: Only plans with device groups of so many; by shape `{(n, m): devices}`
        for those that differ, either side first. None: all plans. One device makes no groups.
      cubic: How many of the steps are cubic.
      machine: What the devices are.

    Raises:
      ValueError: No device group of that size can be made of the mesh's axes.
    """
    forced = devices_per_matrix if stack.devices > 1 else None
    if isinstance(forced, Mapping):
        forced = forced.get((stack.n, stack.m), forced.get((stack.m, stack.n)))
    every = [Plan(stack, factors, steps, cubic, machine) for factors in _all_factors(stack)]
    plans = [plan for plan in every if forced in (None, plan.devices_per_matrix)]
    if not plans:
        shown = " × ".join(f"{axis}={size}" for axis, size in stack.mesh)
        possible = sorted({plan.devices_per_matrix for plan in every})
        raise ValueError(
            f"devices_per_matrix={forced} for matrices [{stack.n}, {stack.m}]: no device group of "
            f"so many can be made of the mesh {shown}; choose from {possible}."
        )
    return min(plans, key=lambda plan: plan.seconds)


def _all_factors(stack: MatrixStack) -> Iterator[tuple[Factor, ...]]:
    """Every size of device group, of devices between which the least moves or which are nearest;
    with replicated work shared or repeated."""
    axes = list(zip(stack.mesh, stack.stored, strict=True))
    least_to_move = sorted(axes, key=lambda axis: _GROUP_FIRST.index(axis[1]))
    nearest = axes[::-1]
    sizes = [size for size in range(1, stack.devices + 1) if stack.devices % size == 0]
    options: tuple[Split, ...] = ("stack", "replicated")
    for size, replicated, first in itertools.product(sizes, options, (least_to_move, nearest)):
        inner = {}
        for (axis, length), _ in first:
            inner[axis] = math.gcd(size, length)
            size //= inner[axis]
        if size == 1:
            yield _factors(stack, inner, replicated)


def _factors(stack: MatrixStack, inner: Mapping[str, int], replicated: Split) -> tuple[Factor, ...]:
    """The mesh's axes, each cut in two where only its faster part, `inner`, belongs to the device
    group."""
    # Mesh fsdp=4 × tp=2, stored as ("rows", "cols"), a group of 4: tp first, of "cols", takes 2;
    # 2 of fsdp's 4 are left to take. Factors: 2 rows → stack, 2 rows → cols, 2 cols → cols.
    factors = []
    for (axis, size), stored in zip(stack.mesh, stack.stored, strict=True):
        outer = replicated if stored == "replicated" else "stack"
        factors += [Factor(size // inner[axis], stored, outer), Factor(inner[axis], stored, "cols")]
    return tuple(factor for factor in factors if factor.size > 1)


def _up_to_multiple(number: int, of: int) -> int:
    return -(-number // of) * of
