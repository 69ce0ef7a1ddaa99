"""A plan carried out: a stack goes from its stored to its working sharding, is orthogonalized, and
goes back.

All functions run inside `jax.shard_map` over every axis of the mesh, on this device's share.

Axis names:  stack  matrices on this device
             rows   those of a matrix that are on this device; its shorter side
             cols   likewise, of its longer side
             f0, …  the plan's factors of the mesh
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from muonclip_jax._orthogonalize.iterations import iterate, with_margins
from muonclip_jax._orthogonalize.methods import DENSE, iteration_for
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._orthogonalize.normalization import in_range
from muonclip_jax._orthogonalize.orthogonalize import in_chunks, orthogonalize_stack
from muonclip_jax._orthogonalize.products import ONE_DEVICE
from muonclip_jax._spread.device_group import DeviceGroup
from muonclip_jax._spread.plan import Plan, Split

# The chunk size of a device group, in entries on one device: with smaller chunks the devices would
# wait for each other more often.
_CHUNK_ENTRIES = 2**24

_AXES: tuple[Split, ...] = ("stack", "rows", "cols")


def orthogonalize_spread(x: jax.Array, plan: Plan, how: NewtonSchulz) -> jax.Array:
    """Orthogonalizes a stack whose matrices lie on several devices.

    Args:
      x: This device's share `[stack, rows, cols]`, in the stored sharding.
      plan: The stored and the working sharding.
      how: The polynomials; the dtype, also of what devices send each other; the method of matrices
        that one device holds. Device groups have one method.

    Returns:
      This device's share in the stored sharding, in `how.dtype`.
    """
    # Eight matrices [32, 64] on a mesh fsdp=4 × tp=2, stored as P(None, "fsdp", "tp"):
    #   this device has x [8, 8, 32], a quarter of the rows and half of the columns of all eight
    #   devices_per_matrix=1: both factors work as "stack". One all-to-all gives [1, 32, 64], a
    #     whole matrix, which is iterated as on one device
    #   devices_per_matrix=2: tp works as "cols", fsdp as "stack". One all-to-all gives
    #     [2, 32, 32], and the two devices along tp iterate two matrices as a device group
    #   another all-to-all brings [8, 8, 32] back
    schedule, dtype = how.schedule, jnp.dtype(how.dtype)
    split = [i for i, f in enumerate(plan.factors) if f.stored in ("rows", "cols")]
    x = in_range(x, dtype, _group(plan, split) or ONE_DEVICE)
    working = _to_working(x, plan)
    if group := _group(plan, [i for i, f in enumerate(plan.factors) if f.working == "cols"]):
        if iteration_for(how.method, plan.stack.n, plan.stack.m) == "gram":
            # For the numbers that one device gets.
            schedule = with_margins(schedule, dtype)
        run = functools.partial(iterate, schedule=schedule, method=DENSE, group=group)
        done = in_chunks(run, _padded(working, 1, group.size), _CHUNK_ENTRIES)
        done = done[:, : working.shape[1]]
    else:
        done = orthogonalize_stack(working, how)
    return _to_stored(done, plan)[: x.shape[0], :, : x.shape[2]]


def _to_working(x: jax.Array, plan: Plan) -> jax.Array:
    """Brings shares to the working sharding, with zeros where they would not be equal."""
    for axis, split in enumerate(_AXES):
        coming = [f.size for f in plan.factors if f.working == split != f.stored]
        x = _padded(x, axis, math.prod(coming))
        if group := _sharing(plan, split):
            x = group.own_share(x, axis)
    return _exchanged(x, plan, [(f.stored, f.working) for f in plan.factors])


def _to_stored(x: jax.Array, plan: Plan) -> jax.Array:
    x = _exchanged(x, plan, [(f.working, f.stored) for f in plan.factors])
    for axis, split in enumerate(_AXES):
        if group := _sharing(plan, split):
            x = group.gathered(x, axis)
    return x


def _exchanged(x: jax.Array, plan: Plan, splits: list[tuple[Split, Split]]) -> jax.Array:
    """One all-to-all, after which each factor splits its second axis instead of its first.

    Rows and columns of a matrix may come in another order, the same in all its parts, which its
    polar factor follows; the way back restores it.
    """
    # The example above, devices_per_matrix=1, on the way there: f0 = 4 goes from rows to stack,
    # f1 = 2 from cols to stack.
    #   rearrange "(f0 f1 stack) (rows) (cols) -> (f0 f1) stack rows cols":  [8, 8, 32] to
    #     [8, 1, 8, 32], matrix i for device i
    #   exchange: the same shape, part j of this device's matrix from device j
    #   rearrange "(f0 f1) stack rows cols -> (stack) (f0 rows) (f1 cols)":  to [1, 32, 64]
    moving = [i for i, both in enumerate(splits) if both[0] != both[1] and "replicated" not in both]
    group = _group(plan, moving)
    if group is None:
        return x

    def axes(side: int) -> str:
        """`(f0 stack) (rows) (f1 cols)`: each axis behind the factors that split it."""
        names = {axis: [f"f{i}" for i in moving if splits[i][side] == axis] for axis in _AXES}
        return " ".join(f"({' '.join([*names[axis], axis])})" for axis in _AXES)

    sizes = {f"f{i}": plan.factors[i].size for i in moving}
    by_device = f"({' '.join(sizes)}) stack rows cols"
    x = rearrange(x, f"{axes(1)} -> {by_device}", **sizes)
    return rearrange(group.exchange(x), f"{by_device} -> {axes(0)}", **sizes)


def _group(plan: Plan, factors: list[int]) -> DeviceGroup | None:
    """The devices that differ in these factors' coordinates only, in their order; None: one."""
    # Mesh a=2 × b=3, factors of sizes (2, 3). Those that differ in factor 0 only are the groups
    # (0, 3), (1, 4), (2, 5); in factor 1 only (0, 1, 2), (3, 4, 5).
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
    shared = [
        i for i, f in enumerate(plan.factors) if (f.stored, f.working) == ("replicated", split)
    ]
    return _group(plan, shared)


def _padded(x: jax.Array, axis: int, multiple: int) -> jax.Array:
    """With zeros at the end of an axis, up to a multiple of a length."""
    missing = -x.shape[axis] % multiple
    widths = [(0, missing if i == axis else 0) for i in range(x.ndim)]
    return jnp.pad(x, widths) if missing else x
