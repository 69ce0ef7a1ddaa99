"""A step of the chain on odd meshes, parameters split in any way, is that of one device."""

import functools
import math

import chex
import jax
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from tests.fuzz.draws import cases, choose
from tests.spread.test_sharded_step import nested

MESHES = [(3, 2), (5,), (7,), (2, 2, 2), (6,), (2, 3)]


def draw_specs(rng, shapes, mesh):
    """For each parameter, mesh axes on axes of it that they divide, each at most once."""
    specs = {}
    for path, shape in shapes.items():
        entries = [()] * len(shape)
        for axis in rng.permutation(mesh.axis_names):
            places = [
                i
                for i, length in enumerate(shape)
                if length % math.prod(mesh.shape[a] for a in (*entries[i], axis)) == 0
            ]
            if places and rng.random() < 0.7:
                i = choose(rng, places)
                entries[i] = (*entries[i], str(axis))
        specs[path] = P(*(entry or None for entry in entries))
    return specs


def draw_shapes(rng, devices):
    """Attention, stacked or not, and dense kernels, with lengths that the devices divide."""
    heads = choose(rng, [devices, 2])
    width, features = choose(rng, [devices, 2 * devices]), choose(rng, [devices, 3])
    stack = choose(rng, [(), (devices,), (2,)])
    projection = (*stack, width, heads, features)
    return {
        **{f"layers/attn/{name}/kernel": projection for name in ("query", "key", "value")},
        "layers/attn/key/bias": (*stack, heads, features),
        "layers/attn/out/kernel": (*stack, heads, features, width),
        "layers/norm/scale": (*stack, width),
        "dense/kernel": (width, 2 * devices),
        "embed/embedding": (3 * devices, width),
    }


def step(tx, state, params, grads, maxima):
    updates, state = tx.update(grads, state, params, max_logits=maxima)
    return optax.apply_updates(params, updates), state


@cases(few=2)
def test_sharded_equals_single(rng):
    shape, kind = choose(rng, MESHES), choose(rng, [AxisType.Auto, AxisType.Explicit])
    devices = math.prod(shape)
    names = ("x", "y", "z")[: len(shape)]
    mesh = jax.make_mesh(
        shape, names, axis_types=(kind,) * len(shape), devices=jax.devices()[:devices]
    )
    shapes = draw_shapes(rng, devices)
    shardings = nested(
        {path: NamedSharding(mesh, spec) for path, spec in draw_specs(rng, shapes, mesh).items()}
    )
    some = lambda: nested({p: rng.normal(size=s).astype("float32") for p, s in shapes.items()})  # noqa: E731
    params, grads = some(), some()
    maxima_shape = shapes["layers/attn/key/bias"][:-1]
    drawn = rng.uniform(1, 3, maxima_shape).astype(np.float32)
    drawn.flat[0] = 3  # one at least is clipped
    maxima = {("layers", "attn"): drawn}

    def chain(shardings):
        layout = mc.layouts.mha(block="layers/attn")
        return mc.muonclip(
            1e-2,
            layout=layout,
            threshold=2.0,
            newton_schulz=mc.NewtonSchulz(mc.schedules.polar_express(2), dtype="float32"),
            shardings=shardings,
        )

    alone = chain(None)
    expected = jax.jit(functools.partial(step, alone))(alone.init(params), params, grads, maxima)
    given = [jax.device_put(tree, shardings) for tree in (params, grads)]
    tx = chain(shardings if kind == AxisType.Auto else None)
    maxima = jax.device_put(maxima, NamedSharding(mesh, P()))
    found = jax.jit(functools.partial(step, tx))(tx.init(given[0]), *given, maxima)
    assert 0 < int(mc.qk_clip_state(expected[1]).heads_clipped) <= math.prod(maxima_shape)
    # float32: rounding of sums in another order, times the slope of two Newton–Schulz steps.
    chex.assert_trees_all_close(found, expected, rtol=1e-5, atol=1e-5)
