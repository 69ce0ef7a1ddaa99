"""Which device orthogonalizes what: a stack of equal matrices on a mesh, before and meanwhile.

Every mesh axis, or a factor of one, has a place in a stack `[k, n, m]`, which it splits, or not:

    stack   each device has other matrices
    rows    each device has other rows of the same matrices (of the shorter side, n)
    cols    each device has other columns (of the longer side, m)
    copies  all devices have the same
    unknown only XLA knows

While matrices are orthogonalized, the devices along `stack` work on their own matrices, those along
`cols` are a team that holds the same matrices together, those along `copies` all do the same work.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

Place = Literal["stack", "rows", "cols", "copies", "unknown"]

# How many devices hold a matrix together; by its shape {(n, m): devices} where they differ.
DevicesPerMatrix = int | Mapping[tuple[int, int], int]

# What the plans are chosen by: the rates of a TPU v5p (peak in bfloat16; one axis of its torus,
# both ways) and a collective's latency. Only their ratios matter, which other TPUs and GPUs within
# one NVLink domain share to a factor of 2.
FLOPS_PER_SECOND = 459e12
BYTES_PER_SECOND = 180e9
SECONDS_PER_COLLECTIVE = 5e-6

_TEAM_FIRST = ("cols", "copies", "rows", "stack")  # what to make a team of: least to move first


@dataclass(frozen=True)
class Stack:
    """Equal matrices that lie on a mesh in the same way.

    Attributes:
      count: How many, over all devices.
      n: The shorter side.
      m: The longer side.
      mesh: The mesh's axes and their sizes.
      here: For each of the mesh's axes how it splits the stack as the parameters lie.
      item_bytes: Bytes of an entry on its way between devices.
    """

    count: int
    n: int
    m: int
    mesh: tuple[tuple[str, int], ...] = ()
    here: tuple[Place, ...] = ()
    item_bytes: int = 2

    @property
    def devices(self) -> int:
        return math.prod(size for _, size in self.mesh)

    def local(self, place: Place) -> int:
        """Matrices, rows or columns on one device as the parameters lie."""
        whole = {"stack": self.count, "rows": self.n, "cols": self.m}[place]
        splits = (
            size for (_, size), here in zip(self.mesh, self.here, strict=True) if here == place
        )
        return whole // math.prod(splits)


@dataclass(frozen=True)
class Factor:
    """A mesh axis, or a factor of one: how it splits the stack as the parameters lie (`here`) and
    while it is orthogonalized (`there`)."""

    size: int
    here: Place
    there: Place


@dataclass(frozen=True)
class Plan:
    """How a stack is spread over the mesh while it is orthogonalized.

    Without factors it is not: one device has it all, or XLA sees to it. Costs are per device.

    Attributes:
      stack: The matrices.
      factors: The mesh, in its axes' order.
      steps: Of the iteration.
    """

    stack: Stack
    factors: tuple[Factor, ...]
    steps: int

    @property
    def devices_per_matrix(self) -> int:
        return self._size(lambda f: f.there == "cols")

    @property
    def matrices_per_device(self) -> int:
        """Including the zeros that make the shares equal."""
        coming = self._size(lambda f: f.there == "stack" != f.here)
        leaving = self._size(lambda f: f.here == "stack" != f.there)
        return -(-self.stack.local("stack") // coming) * leaving

    @property
    def flops(self) -> int:
        """2n³ + 4n²m for each step and matrix, shared by a team: those of the standard iteration.
        What one device holds may take fewer (`Method`)."""
        return self.matrices_per_device * _flops(self.stack, self.steps) // self.devices_per_matrix

    @property
    def ratio_to_even_share(self) -> float:
        """FLOPs over those of a device if all devices did equal parts of the work."""
        return self.flops * self.stack.devices / (self.stack.count * _flops(self.stack, self.steps))

    @property
    def bytes_sent(self) -> int:
        """To bring the stack there and back, and within teams."""
        share = math.prod(map(self.stack.local, ("stack", "rows", "cols"))) * self.stack.item_bytes
        shared = self._size(lambda f: f.here == "copies" != f.there)
        return (
            2 * share // shared * self._exchanges
            + share * (shared > 1)
            + self.steps * self.matrices_per_device * self._bytes_in_team
        )

    @property
    def collectives(self) -> int:
        """How many times devices wait for each other."""
        split = self._size(lambda f: f.here in ("rows", "cols")) > 1  # to tell the largest entry
        shared = self._size(lambda f: f.here == "copies" != f.there) > 1
        in_team = (3 * self.steps + 1) * (self.devices_per_matrix > 1)  # the one is for the norm
        return 2 * self._exchanges + split + shared + in_team

    @property
    def seconds(self) -> float:
        """By the rates at the top of this module: for comparing plans."""
        return (
            self.flops / FLOPS_PER_SECOND
            + self.bytes_sent / BYTES_PER_SECOND
            + self.collectives * SECONDS_PER_COLLECTIVE
        )

    @property
    def _exchanges(self) -> bool:
        return any(f.here not in (f.there, "copies") for f in self.factors)

    @property
    def _bytes_in_team(self) -> int:
        """Of a step and matrix: the Gram matrix is summed in float32 (float64 if that is what is
        sent), and its rows and the polynomial's are shown to all."""
        summed = max(4, self.stack.item_bytes)
        return (
            (summed + 2 * self.stack.item_bytes) * self.stack.n**2 * (self.devices_per_matrix > 1)
        )

    def _size(self, which: Callable[[Factor], bool]) -> int:
        return math.prod(f.size for f in self.factors if which(f))


def check_devices_per_matrix(value: Any) -> None:
    """Raises TypeError for what is no `DevicesPerMatrix`."""
    entries = value if isinstance(value, Mapping) else {(1, 1): value}
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
        and all(isinstance(n, Integral) and not isinstance(n, bool) and n > 0 for n in numbers)
    )


def choose(stack: Stack, steps: int, devices_per_matrix: DevicesPerMatrix | None = None) -> Plan:
    """The plan that takes the least time by `Plan.seconds`.

    Args:
      stack: What to orthogonalize.
      steps: Steps of the iteration.
      devices_per_matrix: Only plans with teams of so many devices; by shape `{(n, m): devices}`
        for those that differ, either side first. None: all plans. One device makes no teams.

    Raises:
      ValueError: No team of that size can be made of the mesh's axes.
    """
    forced = devices_per_matrix if stack.devices > 1 else None
    if isinstance(forced, Mapping):
        forced = forced.get((stack.n, stack.m), forced.get((stack.m, stack.n)))
    plans = [plan for plan in _plans(stack, steps) if forced in (None, plan.devices_per_matrix)]
    if not plans:
        shown = " × ".join(f"{axis}={size}" for axis, size in stack.mesh)
        possible = sorted({plan.devices_per_matrix for plan in _plans(stack, steps)})
        raise ValueError(
            f"devices_per_matrix={forced} for matrices [{stack.n}, {stack.m}]: no team of so many "
            f"devices can be made of the mesh {shown}; choose from {possible}."
        )
    return min(plans, key=lambda plan: plan.seconds)


def _plans(stack: Stack, steps: int) -> Iterator[Plan]:
    """Every size of team, with the devices that have copies at work or not."""
    sizes = [size for size in range(1, stack.devices + 1) if stack.devices % size == 0]
    for size, copies in itertools.product(sizes, dict.fromkeys(["stack", "copies"])):
        factors = _factors(stack, size, copies)
        if factors is not None:
            yield Plan(stack, factors, steps)


def _factors(stack: Stack, team: int, copies: Place) -> tuple[Factor, ...] | None:
    """The mesh's axes, each cut in two where only its faster part belongs to the team."""
    inner = {}
    for place in _TEAM_FIRST:
        for (axis, size), here in zip(stack.mesh, stack.here, strict=True):
            if here == place:
                inner[axis] = math.gcd(team, size)
                team //= inner[axis]
    if team > 1:
        return None
    factors = []
    for (axis, size), here in zip(stack.mesh, stack.here, strict=True):
        outer = copies if here == "copies" else "stack"
        factors += [Factor(size // inner[axis], here, outer), Factor(inner[axis], here, "cols")]
    return tuple(factor for factor in factors if factor.size > 1)


def _flops(stack: Stack, steps: int) -> int:
    return steps * (2 * stack.n**3 + 4 * stack.n**2 * stack.m)
