"""A plan carried out: some of a stack's matrices go from their stored to their working sharding,
are orthogonalized, and go back, while others are on their way.

All functions run inside `jax.shard_map` over every axis of the mesh, on this device's share.

Axis names:  stack  matrices on this device
             rows   those of a matrix that are on this device; its shorter side
             cols   likewise, of its longer side
             f0, …  the plan's factors of the mesh
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax import lax

from muonclip_jax._orthogonalize.iterations import iterate
from muonclip_jax._orthogonalize.methods import DENSE, iteration_for
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._orthogonalize.normalization import in_range
from muonclip_jax._orthogonalize.orthogonalize import in_chunks, orthogonalize_stack
from muonclip_jax._orthogonalize.products import ONE_DEVICE, concatenate
from muonclip_jax._orthogonalize.restarts import with_margins
from muonclip_jax._spread.device_group import DeviceGroup
from muonclip_jax._spread.plan import Factor, Plan, Split

# The chunk size of a device group, in entries on one device: with smaller chunks the devices would
# wait for each other more often.
_CHUNK_ENTRIES = 2**24

# Stacks are cut into parts, of which one travels while another is worked on: all stacks together
# into so many; but none, in entries on one device, smaller than what is worth kernels of its own,
# or larger than what needs only more memory for temporaries.
_PARTS = 8
_SMALLEST_PART = 2**24
_LARGEST_PART = 2**27

_AXES: tuple[Split, ...] = ("stack", "rows", "cols")


class Parcel(NamedTuple):
    """Matrices of a share that travel and are orthogonalized together."""

    share: int
    matrices: slice


@dataclass(frozen=True)
class Share:
    """A device's share of a stack.

    Attributes:
      values: `[stack, rows, cols]`, in the stored sharding; brought into range and rounded.
      plan: The stored and the working sharding.
      how: The polynomials; the dtype, also of what devices send each other; the method of matrices
        that one device holds. Device groups have one method.
    """

    # Eight matrices [32, 64] on a mesh fsdp=4 × tp=2, stored as P(None, "fsdp", "tp"):
    #   this device has values [8, 8, 32], a quarter of the rows, half of the columns of all eight
    #   devices_per_matrix=1: both factors work as "stack". One all-to-all gives [1, 32, 64], a
    #     whole matrix, which is iterated as on one device
    #   devices_per_matrix=2: tp works as "cols", fsdp as "stack". One all-to-all gives
    #     [2, 32, 32], and the two devices along tp iterate two matrices as a device group
    #   another all-to-all brings [8, 8, 32] back
    values: jax.Array
    plan: Plan
    how: NewtonSchulz

    @classmethod
    def of(cls, x: jax.Array, plan: Plan, how: NewtonSchulz) -> "Share":
        """Of matrices as the user has them."""
        split = group_along(plan, lambda f: f.stored in ("rows", "cols"))
        return cls(in_range(x, jnp.dtype(how.dtype), split or ONE_DEVICE), plan, how)

    def cut(self, entries: int) -> list[slice]:
        """Into parts of at most so many entries, or of the fewest matrices of which each device
        gets one."""
        count, least = len(self.values), self.plan.matrices_to_share
        size = least * max(1, entries * count // (self.values.size * least))
        return [slice(start, min(start + size, count)) for start in range(0, count, size)]

    def packed(self, part: slice) -> jax.Array:
        """Some matrices for their way to the working sharding, with zeros where shares would not be
        equal."""
        x = self.values[part]
        for axis, split in enumerate(_AXES):
            coming = [f.size for f in self.plan.factors if f.working == split != f.stored]
            x = _padded(x, axis, math.prod(coming))
            if group := _sharing(self.plan, split):
                x = group.own_share(x, axis)
        return _packed(x, self.plan, back=False)

    def orthogonalized(self, arrived: jax.Array) -> jax.Array:
        """The work on what was packed; packs the results for their way back."""
        working, plan = _unpacked(arrived, self.plan, back=False), self.plan
        group = group_along(plan, lambda f: f.grouped)
        if group is None:
            return _packed(orthogonalize_stack(working, self.how), plan, back=True)
        schedule, dtype = self.how.schedule, jnp.dtype(self.how.dtype)
        if iteration_for(self.how.method, plan.stack.n, plan.stack.m) == "gram":
            # For the numbers that one device gets.
            schedule = with_margins(schedule, dtype)
        run = functools.partial(iterate, schedule=schedule, method=DENSE, group=group)
        done = in_chunks(run, _padded(working, 1, group.size), _CHUNK_ENTRIES)
        return _packed(done[:, : working.shape[1]], plan, back=True)

    def stored(self, part: slice, returned: jax.Array) -> "Share":
        """With results in the place of what was packed."""
        x = _unpacked(returned, self.plan, back=True)
        for axis, split in enumerate(_AXES):
            if group := _sharing(self.plan, split):
                x = group.gathered(x, axis)
        x = x[: part.stop - part.start, :, : self.values.shape[2]]
        values = lax.dynamic_update_slice_in_dim(self.values, x, part.start, 0)
        return replace(self, values=values)


def orthogonalize_spread(shares: Sequence[Share]) -> list[jax.Array]:
    """Orthogonalizes stacks: while devices work on one part of one, the next is on its way to them,
    and the results of the one before are on their way back, in one all-to-all if that is between
    the same devices.

    Returns:
      This device's shares, in the stored sharding, in `how.dtype`.
    """
    # Parts 0, 1, 2. Side by side:
    #                         0 comes
    #   0 is orthogonalized   1 comes
    #   1 is orthogonalized   2 comes, 0 goes
    #   2 is orthogonalized   1 goes
    #                         2 goes
    shares = list(shares)
    everything = sum(share.values.size for share in shares)
    entries = min(_LARGEST_PART, max(_SMALLEST_PART, everything // _PARTS))
    parts = [Parcel(i, cut) for i, share in enumerate(shares) for cut in share.cut(entries)]
    arrived: list[jax.Array] = []
    done: list[jax.Array] = []
    for coming, here, going in zip(
        [*parts, None, None], [None, *parts, None], [None, None, *parts], strict=True
    ):
        sent = [] if coming is None else [shares[coming.share].packed(coming.matrices)]
        sent += done
        groups = [exchange_group(shares[part.share].plan) for part in (coming, going) if part]
        done = [] if here is None else [shares[here.share].orthogonalized(*arrived)]
        arrived, done = _exchanged(sent, groups, done)
        if going is not None:
            shares[going.share] = shares[going.share].stored(going.matrices, arrived.pop())
    return [share.values for share in shares]


def _exchanged(
    sent: Sequence[jax.Array], groups: Sequence[DeviceGroup | None], meanwhile: list[jax.Array]
) -> tuple[list[jax.Array], list[jax.Array]]:
    """What arrives of each; all of one group and dtype travels together.

    Args:
      sent: `[device, ...]`, by receiver.
      groups: The devices of each; None: it stays here.
      meanwhile: What can be computed on the way: returned. Unless the two are tied together,
        compilers let most exchanges begin where no work is left for the meantime.
    """
    together: dict[Any, list[int]] = {}
    for i, (x, group) in enumerate(zip(sent, groups, strict=True)):
        if group is not None:
            together.setdefault((group, x.dtype), []).append(i)
    moved = [
        group.exchange(_side_by_side([sent[i] for i in some]))
        for (group, _), some in together.items()
    ]
    if moved:
        moved, meanwhile = lax.optimization_barrier((moved, meanwhile))
    arrived = dict(enumerate(sent))
    for some, x in zip(together.values(), moved, strict=True):
        arrived |= zip(some, _apart(x, [sent[i].shape for i in some]), strict=True)
    return list(arrived.values()), meanwhile


def _side_by_side(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays `[size, ...]` as one, `[size, ..., cols]` where they have equally many columns, since
    these can stay as they lie in memory."""
    if len(arrays) == 1:
        return arrays[0]
    cols = {x.shape[-1] for x in arrays}
    rows = (-1, *cols) if len(cols) == 1 else (-1,)
    return concatenate([x.reshape(len(x), *rows) for x in arrays], 1)


def _apart(x: jax.Array, shapes: Sequence[tuple[int, ...]]) -> list[jax.Array]:
    """Undoes `_side_by_side`."""
    if len(shapes) == 1:
        return [x]
    each = math.prod(x.shape[2:])
    ends = list(itertools.accumulate(math.prod(shape[1:]) // each for shape in shapes))
    parts = jnp.split(x, ends[:-1], axis=1)
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _packed(x: jax.Array, plan: Plan, back: bool) -> jax.Array:
    """For an exchange after which each factor splits its second axis instead of its first.

    Rows and columns of a matrix may come in another order, the same in all its parts, which its
    polar factor follows; the way back restores it.
    """
    # The example above, devices_per_matrix=1, on the way there: f0 = 4 goes from rows to stack,
    # f1 = 2 from cols to stack.
    #   packed, "(f0 f1 stack) (rows) (cols) -> (f0 f1) stack rows cols":  [8, 8, 32] to
    #     [8, 1, 8, 32], matrix i for device i
    #   exchanged: the same shape, part j of this device's matrix from device j
    #   unpacked, "(f0 f1) stack rows cols -> (stack) (f0 rows) (f1 cols)":  to [1, 32, 64]
    if exchange_group(plan) is None:
        return x
    _, after, by_device, sizes = _notation(plan, back)
    return rearrange(x, f"{after} -> {by_device}", **sizes)


def _unpacked(x: jax.Array, plan: Plan, back: bool) -> jax.Array:
    if exchange_group(plan) is None:
        return x
    before, _, by_device, sizes = _notation(plan, back)
    return rearrange(x, f"{by_device} -> {before}", **sizes)


def _notation(plan: Plan, back: bool) -> tuple[str, str, str, dict[str, int]]:
    """A share as `(f0 stack) (rows) (f1 cols)`, each axis behind the factors that split it before,
    and after the exchange; as `(f0 f1) stack rows cols`; the factors' sizes."""
    moving = {f"f{i}": factor for i, factor in enumerate(plan.factors) if factor.moves}

    def axes(working: bool) -> str:
        splits = {f: each.working if working else each.stored for f, each in moving.items()}
        names = {axis: [f for f, split in splits.items() if split == axis] for axis in _AXES}
        return " ".join(f"({' '.join([*names[axis], axis])})" for axis in _AXES)

    by_device = f"({' '.join(moving)}) stack rows cols"
    return axes(back), axes(not back), by_device, {f: each.size for f, each in moving.items()}


def exchange_group(plan: Plan) -> DeviceGroup | None:
    """The devices between which matrices move to their working sharding, and back."""
    return group_along(plan, lambda f: f.moves)


def group_along(plan: Plan, which: Callable[[Factor], bool]) -> DeviceGroup | None:
    """The devices that differ in some factors' coordinates only, in their order; None: one."""
    # Mesh a=2 × b=3, factors of sizes (2, 3). Those that differ in factor 0 only are the groups
    # (0, 3), (1, 4), (2, 5); in factor 1 only (0, 1, 2), (3, 4, 5).
    factors = [i for i, factor in enumerate(plan.factors) if which(factor)]
    if not factors:
        return None
    sizes = [f.size for f in plan.factors]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    last = np.moveaxis(devices, factors, range(-len(factors), 0))
    groups = last.reshape(-1, math.prod(sizes[i] for i in factors))
    axes = tuple(axis for axis, _ in plan.stack.mesh)
    return DeviceGroup(axes, tuple(map(tuple, groups.tolist())))


def _sharing(plan: Plan, split: Split) -> DeviceGroup | None:
    """The devices that have the same, and of it work on a share along an axis each."""
    return group_along(plan, lambda f: f.shared and f.working == split)


def _padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """With zeros at the end of an axis, up to a multiple of a length."""
    missing = -x.shape[axis] % multiple
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x
