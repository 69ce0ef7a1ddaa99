"""What went wrong on meshes: parameters split across their matrices, accumulation without jit."""

import contextlib
import functools
import gc
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives, totals
from tests.states.make_golden import STEPS, advance, chains, inputs

GOLDEN = pathlib.Path(__file__).parents[1] / "states"
AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)

# Float32 rounds at 6e-8, a mesh sums in another order, and five steps multiply that by up to 1e3.
FLOAT32 = mc.NewtonSchulz(dtype="float32", method=mc.Method("standard"))
TOLERANCE = 3e-5


def mesh_of(sizes, axis_type=AxisType.Explicit):
    names = ("fsdp", "tp")[: len(sizes)]
    devices = jax.devices()[: np.prod(sizes)]
    return jax.make_mesh(sizes, names, axis_types=(axis_type,) * len(sizes), devices=devices)


def some(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).normal(size=shape), jnp.float32)


# A parameter whose stored sharding cuts across its matrices

HEADS_FIRST = "... (heads features) out -> ... heads features out"
HEADS_LAST = "... in (heads features) -> ... heads in features"
FUSED = "... in (part heads features) -> ... part heads in features"
GROUPS = "... in (groups slots features) -> ... groups slots in features"


def pattern(text, select=(), **sizes):
    return mc.MatrixPattern(text, sizes, dict(select))


ACROSS = {
    # mesh, parameter, how it is split, how it is read
    "half a head of each layer": (
        (8,),
        (8, 32, 16),
        P(None, "fsdp"),
        pattern(HEADS_FIRST, heads=4),
    ),
    "a quarter of a head": ((8,), (8, 32, 16), P(None, "fsdp"), pattern(HEADS_FIRST, heads=2)),
    "six heads on eight": ((8,), (3, 48, 16), P(None, "fsdp"), pattern(HEADS_FIRST, heads=6)),
    "six heads on four": ((4,), (48, 16), P("fsdp"), pattern(HEADS_FIRST, heads=6)),
    "four heads on six": ((6,), (2, 24, 18), P(None, "fsdp"), pattern(HEADS_FIRST, heads=4)),
    "two key heads on eight": ((8,), (16, 16), P(None, "fsdp"), pattern(HEADS_LAST, heads=2)),
    "all of one head": ((8,), (8, 16, 16), P(None, None, "fsdp"), pattern(HEADS_LAST, heads=1)),
    "along tp alone": ((2, 4), (4, 16, 12), P(None, "fsdp", "tp"), pattern(HEADS_LAST, heads=2)),
    "both axes, tp minor": (
        (2, 4),
        (16, 24),
        P(None, ("fsdp", "tp")),
        pattern(HEADS_LAST, heads=6),
    ),
    "across fused parts": ((8,), (16, 48), P(None, "fsdp"), pattern(FUSED, part=3, heads=4)),
    "across fused parts, seven": (
        (7,),
        (2, 7, 42),
        P(None, None, "fsdp"),
        pattern(FUSED, part=3, heads=2),
    ),
    "pieces of each head": (
        (8,),
        (16, 32),
        P(None, "fsdp"),
        [
            pattern(HEADS_LAST, heads=4, select={"features": (0, 3)}),
            pattern(HEADS_LAST, heads=4, select={"features": (3, 8)}),
        ],
    ),
    "groups of queries, key and value": (
        (4,),
        (4, 8, 32),
        P(None, None, "fsdp"),
        [
            pattern(GROUPS, groups=2, slots=4, select={"slots": (0, 2)}),
            pattern(GROUPS, groups=2, slots=4, select={"slots": 2}),
            pattern(GROUPS, groups=2, slots=4, select={"slots": 3}),
        ],
    ),
}


def across(name, axis_type):
    sizes, shape, spec, how = ACROSS[name]
    sharding = NamedSharding(mesh_of(sizes, axis_type), spec)
    grads = {"w": some(*shape)}
    read = functools.partial(mc.muon_dimension_numbers, rules={"w": how})
    options = {"dimension_numbers": read, "newton_schulz": FLOAT32}
    return grads, jax.device_put(grads, sharding), sharding, options


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        *((name, AxisType.Auto) for name in ACROSS),
        ("half a head of each layer", AxisType.Explicit),
        ("both axes, tp minor", AxisType.Explicit),
        ("pieces of each head", AxisType.Explicit),
    ],
)
def test_split_across_its_matrices(name, axis_type):
    """Each device does its share, sends what `describe` says, and numbers are those of one."""
    grads, on_mesh, sharding, options = across(name, axis_type)
    tx = mc.scale_by_orthogonalization(**options, shardings=sharding)
    update = jax.jit(tx.update).lower(on_mesh, tx.init(on_mesh)).compile()
    found, _ = update(on_mesh, tx.init(on_mesh))
    expected, _ = mc.scale_by_orthogonalization(**options).update(grads, ())
    chex.assert_trees_all_close(found, expected, atol=TOLERANCE)
    assert found["w"].sharding.is_equivalent_to(sharding, on_mesh["w"].ndim)

    sent = totals(collectives(update))
    sent.pop("all-reduce", None)  # of norms, which the plan does not count
    assert "all-gather" not in sent
    plans = mc.describe(on_mesh, **options, shardings=sharding).stacks
    assert sum(total.bytes for total in sent.values()) == sum(plan.bytes_sent for plan in plans) > 0


def test_where_no_axis_takes_over_it_is_gathered_and_told():
    """Eight devices divide neither the three layers nor the ten outputs."""
    sharding = NamedSharding(mesh_of((8,), AxisType.Auto), P(None, "fsdp"))
    grads = {"w": some(3, 48, 10)}
    read = functools.partial(mc.muon_dimension_numbers, rules={"w": pattern(HEADS_FIRST, heads=6)})
    options = dict(dimension_numbers=read, newton_schulz=FLOAT32, shardings=sharding)
    tx = mc.scale_by_orthogonalization(**options)
    on_mesh = jax.device_put(grads, sharding)
    update = jax.jit(tx.update).lower(on_mesh, tx.init(on_mesh)).compile()
    found, _ = update(on_mesh, tx.init(on_mesh))
    expected, _ = mc.scale_by_orthogonalization(**options | {"shardings": None}).update(grads, ())
    chex.assert_trees_all_close(found, expected, atol=TOLERANCE)
    sent = totals(collectives(update))
    (plan,) = mc.describe(on_mesh, **options).stacks
    assert set(sent) == {"all-gather"}
    assert sent["all-gather"].bytes == plan.bytes_sent == 3 * 48 * 10 * 4


def test_many_devices_and_few_heads_share_the_work():
    """The case as it was found, o of 4 heads on 8 devices, and 32 heads on 64 from shapes alone."""
    for heads, devices in ((4, 8), (32, 64)):
        mesh = jax.sharding.AbstractMesh((devices,), ("fsdp",))
        layout = mc.layouts.mha(heads=heads, query="q", key="k", value="v", out="o")
        flat = {n: {"kernel": (64, 256 * heads, 64 * heads)} for n in "qkv"}
        shapes = {"attn": {**flat, "o": {"kernel": (64, 64 * heads, 256 * heads)}}}
        params = jax.tree.map(
            lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
            shapes,
            is_leaf=lambda node: isinstance(node, tuple),
        )
        plans = mc.describe(
            params, layout, shardings=NamedSharding(mesh, P(None, "fsdp", None))
        ).stacks
        assert [plan.ratio_to_even_share for plan in plans] == [1, 1]
        assert all(plan.bytes_sent > 0 for plan in plans)


# Accumulation, and other wrappers, outside of jit

LAYOUT = mc.layouts.mha()
MAXIMA = [{("attn",): jnp.array(maxima)} for maxima in ([40.0, 1.0], [2.0, 30.0])]
MESHES = {
    "Explicit": (AxisType.Explicit,) * 2,
    "Auto": (AxisType.Auto,) * 2,
    "mixed": (AxisType.Explicit, AxisType.Auto),
}


def attention():
    shapes = {"query": (8, 2, 4), "key": (8, 2, 4), "value": (8, 2, 4), "out": (2, 4, 8)}
    return {"attn": {name: {"kernel": some(*shape)} for name, shape in shapes.items()}}


def on_kernels(mesh, spec, tree):
    return jax.device_put(tree, NamedSharding(mesh, spec))


def clipped_muon(shardings=None):
    return mc.muonclip(
        0.1,
        layout=LAYOUT,
        threshold=10.0,
        newton_schulz=mc.NewtonSchulz(mc.schedules.polar_express(steps=2), "float32"),
        shardings=shardings,
    )


def two_micro_steps(tx, params, update=None):
    state = tx.init(params)
    for maxima in MAXIMA:
        updates, state = (update or tx.update)(params, state, params, max_logits=maxima)
    return updates, state


@functools.cache
def accumulated_on_one_device():
    tx = mc.accumulate(clipped_muon(), 2)
    return two_micro_steps(tx, attention(), jax.jit(tx.update))


@pytest.mark.parametrize(
    ("kind", "set_mesh"),
    [
        ("Explicit", True),
        ("Auto", True),
        ("mixed", True),
        pytest.param("mixed", False, marks=pytest.mark.versions),
        pytest.param("Explicit", False, marks=pytest.mark.slow),
        pytest.param("Auto", False, marks=pytest.mark.slow),
    ],
)
def test_accumulate_outside_of_jit(kind, set_mesh):
    """Every branch of the condition has the parameters' shardings, whatever the mesh."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=MESHES[kind], devices=jax.devices()[:4])
    params = on_kernels(mesh, P("fsdp"), attention())
    shardings = None if kind == "Explicit" else NamedSharding(mesh, P("fsdp"))
    tx = mc.accumulate(clipped_muon(shardings), 2)
    with jax.set_mesh(mesh) if set_mesh else contextlib.nullcontext():
        updates, state = two_micro_steps(tx, params)
    expected, expected_state = accumulated_on_one_device()
    chex.assert_trees_all_close(updates, expected, atol=TOLERANCE)
    assert int(mc.qk_clip_state(state).heads_clipped) == 2
    chex.assert_trees_all_close(state, expected_state, atol=TOLERANCE)
    for leaf in jax.tree.leaves(mc.accumulate_state(state).mean):
        assert leaf.sharding.spec[0] == "fsdp"


@pytest.mark.versions
@pytest.mark.parametrize("kind", MESHES)
@pytest.mark.parametrize("mu_dtype", [None, "bfloat16", "int8"])
def test_a_states_shapes_without_set_mesh(kind, mu_dtype):
    """A tracer of `jax.eval_shape` tells its mesh, and zeros like it do not, under JAX 0.12."""
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=MESHES[kind], devices=jax.devices()[:4])
    params = on_kernels(mesh, P("fsdp"), attention())
    shardings = None if kind == "Explicit" else NamedSharding(mesh, P("fsdp"))
    tx = mc.muon(0.1, layout=LAYOUT, mu_dtype=mu_dtype, shardings=shardings)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, params), tx.init(params))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: optax.MultiSteps(tx, 2).gradient_transformation(),
        lambda tx: optax.apply_if_finite(tx, 3),
        lambda tx: optax.transforms.conditionally_transform(tx, lambda step: step > 0),
    ],
    ids=["MultiSteps", "apply_if_finite", "conditionally_transform"],
)
def test_other_conditions_around_our_links(wrap):
    """Optax's own branches have one type, since our updates have the gradients' shardings."""
    mesh = mesh_of((2,))
    params = on_kernels(mesh, P("fsdp"), attention())
    tx = wrap(clipped_muon())
    with jax.set_mesh(mesh):
        updates, _ = two_micro_steps(tx, params, jax.jit(tx.update))
    alone = attention()
    expected, _ = two_micro_steps(wrap(clipped_muon()), alone, jax.jit(tx.update))
    chex.assert_trees_all_close(updates, expected, atol=TOLERANCE)


@pytest.mark.parametrize("every", [1, 2, 5])
def test_updates_outside_of_jit_keep_no_arrays(every):
    tx, params = mc.accumulate(clipped_muon(), every), attention()
    state, held = tx.init(params), []
    for maxima in (*MAXIMA, MAXIMA[0]):
        _, state = tx.update(params, state, params, max_logits=maxima)
        gc.collect()
        held.append(sum(array.nbytes for array in jax.live_arrays()))
    assert held[-1] <= held[0]


@pytest.mark.parametrize("what", ["init", "update", "both"])
def test_clips_compiled_before_are_heard(what):
    """Called before, they would be cached and tell nothing: the clip would see the last maxima."""
    params, clip = attention(), mc.qk_clip(LAYOUT, 10.0)
    init = jax.jit(clip.init) if what != "update" else clip.init
    update = jax.jit(clip.update) if what != "init" else clip.update
    zeros = jax.tree.map(jnp.zeros_like, params)
    update(zeros, init(params), params, max_logits=MAXIMA[0])
    tx = mc.accumulate(optax.GradientTransformationExtraArgs(init, update), 2)
    _, state = two_micro_steps(tx, params)
    assert int(mc.qk_clip_state(state).heads_clipped) == 2


@pytest.mark.parametrize("version", ["0.1", "0.2"])
def test_an_old_checkpoint_goes_on_on_a_mesh(version):
    name = "accumulate"
    golden = serialization.msgpack_restore(
        (GOLDEN / f"golden-{version}/{name}.msgpack").read_bytes()
    )
    mesh, tx, batches = mesh_of((2,)), chains()[name], inputs(name)[1][STEPS:]
    params = on_kernels(mesh, P(), golden["params"])
    params["attn"]["out"] = on_kernels(mesh, P("fsdp"), params["attn"]["out"])
    with jax.set_mesh(mesh):
        like = jax.jit(tx.init)(params)  # all of it on the mesh
    state = mc.upgrade_state(golden["state"], like)
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, like)
    batches = on_kernels(mesh, P(), batches)
    after, _ = advance(tx, params, state, [(typed(g, params), maxima) for g, maxima in batches])
    chex.assert_trees_all_close(after, golden["after"], atol=1e-6, rtol=0)


def typed(grads, params):
    return jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, params)
