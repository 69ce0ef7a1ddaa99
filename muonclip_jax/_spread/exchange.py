"""A plan carried out: a stack of matrices to where it is orthogonalized, and back.

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
from jax import lax

from muonclip_jax._orthogonalize.gram import with_margins
from muonclip_jax._orthogonalize.iteration import in_slices, iterate_stack, pad
from muonclip_jax._orthogonalize.methods import iteration_for
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._orthogonalize.normalization import in_range
from muonclip_jax._spread import iteration as in_team
from muonclip_jax._spread.device_group import Team
from muonclip_jax._spread.plan import Place, Plan

# Of a stack's share on one device of a team: smaller ones would wait for each other more often.
_ENTRIES_AT_ONCE = 2**24

_AXES: tuple[Place, ...] = ("stack", "rows", "cols")


def orthogonalize_spread(x: jax.Array, plan: Plan, how: NewtonSchulz) -> jax.Array:
    """Orthogonalizes a stack whose matrices lie on several devices.

    Args:
      x: This device's share `[stack, rows, cols]`, as the parameters lie.
      plan: Where each matrix goes meanwhile.
      how: The polynomials; the dtype, also of what devices send each other; the method, of matrices
        that one device holds, teams have one method.

    Returns:
      This device's share as it lay, in `how.dtype`.
    """
    schedule, dtype = how.schedule, jnp.dtype(how.dtype)
    split = [i for i, f in enumerate(plan.factors) if f.here in ("rows", "cols")]
    x = in_range(x, dtype, _team(plan, split))
    together = _team(plan, [i for i, f in enumerate(plan.factors) if f.there == "cols"])
    there = _there(x, plan)
    if together.size == 1:
        done = iterate_stack(there, how)
    else:
        if iteration_for(how.method, plan.stack.n, plan.stack.m) == "gram":
            schedule = with_margins(schedule, dtype)  # for the numbers that one device gets
        run = functools.partial(in_team.iterate, schedule=schedule, team=together)
        done = in_slices(run, pad(there, 1, together.size), _ENTRIES_AT_ONCE)[:, : there.shape[1]]
    return _back(done, plan)[: x.shape[0], :, : x.shape[2]]


def _there(x: jax.Array, plan: Plan) -> jax.Array:
    """To the devices that orthogonalize it, with zeros where shares would not be equal."""
    for axis, place in enumerate(_AXES):
        coming = [f.size for f in plan.factors if f.there == place != f.here]
        x = pad(x, axis, math.prod(coming))
        x = _own_share(x, axis, _team(plan, _copies_for(plan, place)))
    here, there = zip(*((f.here, f.there) for f in plan.factors), strict=True)
    return _exchange(x, plan, here, there)


def _back(x: jax.Array, plan: Plan) -> jax.Array:
    here, there = zip(*((f.here, f.there) for f in plan.factors), strict=True)
    x = _exchange(x, plan, there, here)
    for axis, place in enumerate(_AXES):
        x = _team(plan, _copies_for(plan, place)).joined(x, axis)
    return x


def _exchange(
    x: jax.Array, plan: Plan, source: tuple[Place, ...], target: tuple[Place, ...]
) -> jax.Array:
    """One all-to-all, after which each factor splits what `target` says, not what `source` says.

    Rows and columns of a matrix may come in another order, the same in all its parts, which its
    polar factor follows; the way back restores it.
    """
    moving = [
        i
        for i, places in enumerate(zip(source, target, strict=True))
        if places[0] != places[1] and "copies" not in places
    ]
    sizes = {f"f{i}": plan.factors[i].size for i in moving}
    by_receiver = f"({' '.join(sizes)}) stack rows cols"
    x = rearrange(x, f"{_split(moving, target)} -> {by_receiver}", **sizes)
    x = _team(plan, moving).exchange(x)
    return rearrange(x, f"{by_receiver} -> {_split(moving, source)}", **sizes)


def _split(moving: list[int], places: tuple[Place, ...]) -> str:
    """`(f0 stack) rows (f1 cols)`: each axis behind the factors that split it."""
    split = {place: [f"f{i}" for i in moving if places[i] == place] for place in _AXES}
    return " ".join(f"({' '.join([*split[place], place])})" for place in _AXES)


def _team(plan: Plan, factors: list[int]) -> Team:
    """The devices that differ in these factors' coordinates only, in their order."""
    sizes = [f.size for f in plan.factors]
    devices = np.arange(math.prod(sizes)).reshape(sizes)
    last = np.moveaxis(devices, factors, range(-len(factors), 0))
    groups = last.reshape(-1, math.prod(sizes[i] for i in factors))
    axes = tuple(axis for axis, _ in plan.stack.mesh)
    return Team(axes, tuple(map(tuple, groups.tolist())))


def _copies_for(plan: Plan, place: Place) -> list[int]:
    """The factors along which devices have the same, and share it for the work."""
    return [i for i, f in enumerate(plan.factors) if f.here == "copies" and f.there == place]


def _own_share(x: jax.Array, axis: int, team: Team) -> jax.Array:
    if team.size == 1:
        return x
    ranks = np.zeros(sum(map(len, team.groups)), np.int32)
    for group in team.groups:
        ranks[list(group)] = np.arange(len(group))
    rank = jnp.asarray(ranks)[lax.axis_index(team.axes)]
    length = x.shape[axis] // team.size
    return lax.dynamic_slice_in_dim(x, rank * length, length, axis)
