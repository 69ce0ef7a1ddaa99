"""QK-Clip where the user's code is one device's: inside `jax.shard_map` and `jax.pmap`."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._transforms.qk_clip import QKClipState

WIDTH, HEADS, FEATURES, DEVICES = 4, 8, 2, 8
LAYOUT = mc.layouts.mha(value=None, out=None)

# What XLA computes for each device it computes for one: the same float32 operations.
EXACT = {"rtol": 1e-6, "atol": 0}

FAULTY = {"NaN": np.nan, "Inf": np.inf, "no key": -np.inf}


def params(dtype=np.float32):
    rng = np.random.default_rng(0)
    projection = lambda: {  # noqa: E731
        "kernel": rng.normal(size=(WIDTH, HEADS, FEATURES)).astype(dtype),
        "bias": rng.normal(size=(HEADS, FEATURES)).astype(dtype),
    }
    return {"attn": {"query": projection(), "key": projection()}}


def updates():
    return jax.tree.map(lambda x: 0.1 * x[::-1], params())


def maxima_by_device(value=np.nan, device=3):
    """[devices, heads]. Different devices see the largest logits of different heads; head 2 is
    below the threshold everywhere, and head 5 is faulty on one device."""
    maxima = np.random.default_rng(1).uniform(0, 90, (DEVICES, HEADS)).astype(np.float32)
    for head in (0, 1, 3, 4, 6, 7):
        maxima[head, head] = 150 + 100 * head
    maxima[device, 5] = value
    return maxima


def update(tx, updates, state, params, maxima):
    return tx.update(updates, state, params, max_logits={"attn": {"max_logits": maxima}})


def on_one_device(tx, maxima):
    with np.errstate(invalid="ignore"):
        reduced = maxima.max(0)  # NumPy's keeps NaNs
    p = jax.tree.map(jnp.asarray, params())
    return jax.jit(functools.partial(update, tx))(updates(), tx.init(p), p, reduced)


def in_shard_map(tx, maxima):
    mesh = jax.make_mesh((4, 2), ("data", "context"), axis_types=(AxisType.Auto,) * 2)
    specs = (P(), P(), P(), P(("data", "context")))
    # out_specs=P() holds only for what the type system sees to be the same on all devices.
    fn = lambda u, s, p, maxima: update(tx, u, s, p, maxima)  # noqa: E731
    mapped = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=specs, out_specs=P()))
    return mapped(updates(), tx.init(params()), params(), maxima)


def in_pmap(tx, maxima):
    in_axes = (None, None, None, 0)
    mapped = jax.pmap(functools.partial(update, tx), axis_name="data", in_axes=in_axes)
    replicas = mapped(updates(), tx.init(params()), params(), maxima)
    for other in range(1, DEVICES):
        chex.assert_trees_all_equal(*(jax.tree.map(lambda x: x[i], replicas) for i in (0, other)))  # noqa: B023
    return jax.tree.map(lambda x: x[0], replicas)


@pytest.mark.parametrize("value", FAULTY.values(), ids=FAULTY)
@pytest.mark.parametrize(
    ("run", "axis_name"),
    [(in_shard_map, ("data", "context")), (in_pmap, "data")],
    ids=["shard_map", "pmap"],
)
def test_maxima_of_all_devices(run, axis_name, value):
    maxima = maxima_by_device(value)
    got = run(mc.qk_clip(LAYOUT, axis_name=axis_name), maxima)
    wanted = on_one_device(mc.qk_clip(LAYOUT), maxima)
    chex.assert_trees_all_close(got, wanted, **EXACT)
    state = got[1]
    assert state.heads_clipped == 6
    assert state.nonfinite_heads == (not np.isneginf(value))
    np.testing.assert_array_equal(state.max_logits["attn"], maxima.max(0))


@pytest.mark.parametrize("device", range(DEVICES))
def test_no_place_hides_a_nan(device):
    state = in_pmap(mc.qk_clip(LAYOUT, axis_name="data"), maxima_by_device(device=device))[1]
    np.testing.assert_array_equal(np.isnan(state.max_logits["attn"]), np.arange(HEADS) == 5)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_heads_spread_by_hand(scope):
    """Tensor parallelism: every device has two of the heads, and half of the batch."""
    mesh = jax.make_mesh((2, 4), ("data", "tp"), axis_types=(AxisType.Auto,) * 2)
    tx = mc.qk_clip(LAYOUT, scope=scope, axis_name="data", heads_axis_name="tp")
    leaves = {"kernel": P(None, "tp"), "bias": P("tp")}
    heads = {"attn": {"query": leaves, "key": leaves}}
    state = QKClipState({"attn": P("tp")}, {"attn": P("tp")}, P(), P(), P(), {"attn": P("tp")})
    mapped = jax.shard_map(
        functools.partial(update, tx),
        mesh=mesh,
        in_specs=(heads, state, heads, P("data", "tp")),
        out_specs=(heads, state),
    )
    maxima = maxima_by_device()[:2]
    got = jax.jit(mapped)(updates(), tx.init(params()), params(), maxima)
    wanted = on_one_device(mc.qk_clip(LAYOUT, scope=scope), maxima)
    chex.assert_trees_all_close(got, wanted, **EXACT)


def check_spread_heads_of_shared_keys(layout, kernels, maxima, split, **options):
    """One query head on each of eight devices, all of which have the keys: as on one device."""
    rng = np.random.default_rng(2)
    p = {"attn": {name: {"kernel": rng.normal(size=shape)} for name, shape in kernels.items()}}
    p = jax.tree.map(lambda x: x.astype(np.float32), p)
    clip = lambda p, s, **more: mc.apply_qk_clip(  # noqa: E731
        p, {"attn": {"max_logits": s}}, layout, **options, **more
    )
    specs = {"attn": {name: {"kernel": split.get(name, P())} for name in kernels}}
    mesh = jax.make_mesh((DEVICES,), ("tp",), axis_types=(AxisType.Auto,))
    mapped = jax.shard_map(
        functools.partial(clip, heads_axis_name="tp"),
        mesh=mesh,
        in_specs=(specs, P("tp")),
        out_specs=specs,  # holds only if all devices scale what they share alike
    )
    chex.assert_trees_all_close(jax.jit(mapped)(p, maxima), jax.jit(clip)(p, maxima), **EXACT)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_a_key_that_heads_of_other_devices_read(scope):
    """A device sees one query head and one key, which are not each other's alone."""
    kernels = {"query": (WIDTH, HEADS, FEATURES), "key": (WIDTH, 1, FEATURES)}
    split = {"query": P(None, "tp")}
    layout = mc.layouts.gqa(value=None, out=None)
    maxima = np.abs(maxima_by_device()[0])
    check_spread_heads_of_shared_keys(layout, kernels, maxima, split, scope=scope)


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_a_rope_key_that_heads_of_other_devices_read(scope):
    """Only `scope="layer"` scales it, by the smallest factor of all devices."""
    kernels = {
        "wq": (WIDTH, HEADS, FEATURES + 2),
        "wkv_a": (WIDTH, 3 + 2),
        "wkv_b": (3, HEADS, FEATURES + 1),
    }
    split = {"wq": P(None, "tp"), "wkv_b": P(None, "tp")}
    layout = mc.layouts.mla(FEATURES, 2, 1, query="wq", out=None)
    maxima = np.abs(maxima_by_device()[0])
    check_spread_heads_of_shared_keys(layout, kernels, maxima, split, scope=scope)


def test_the_recipe_with_heads_spread_by_hand():
    """Every head is a matrix of its own, to Muon as well."""
    mesh = jax.make_mesh((2, 4), ("data", "tp"), axis_types=(AxisType.Auto,) * 2)
    leaves = {"kernel": P(None, "tp"), "bias": P("tp")}
    heads = {"attn": {"query": leaves, "key": leaves}}
    recipe = functools.partial(
        mc.muonclip,
        0.1,
        layout=LAYOUT,
        scope="layer",
        newton_schulz=mc.NewtonSchulz(dtype="float32"),
    )
    tx = recipe(axis_name="data", heads_axis_name="tp")
    mapped = jax.shard_map(
        lambda u, p, maxima: update(tx, u, tx.init(p), p, maxima)[0],
        mesh=mesh,
        in_specs=(heads, heads, P("data", "tp")),
        out_specs=heads,
    )
    maxima = maxima_by_device()[:2]
    got = jax.jit(mapped)(updates(), params(), maxima)
    wanted, _ = on_one_device(recipe(), maxima)
    # Stacks of another size may be summed in another order.
    chex.assert_trees_all_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_lost_heads_are_counted_on_all_devices():
    """With half-precision parameters and a clip that rounds away: 1 / 1.001."""
    mesh = jax.make_mesh((8,), ("tp",), axis_types=(AxisType.Auto,))
    tx = mc.qk_clip(LAYOUT, heads_axis_name="tp")
    leaves = {"kernel": P(None, "tp"), "bias": P("tp")}
    heads = {"attn": {"query": leaves, "key": leaves}}
    half = params(jnp.bfloat16)
    none = jax.tree.map(jnp.zeros_like, half)
    run = jax.shard_map(
        lambda p, u, maxima: update(tx, u, tx.init(p), p, maxima)[1].lost_heads,
        mesh=mesh,
        in_specs=(heads, heads, P("tp")),
        out_specs=P(),
    )
    maxima = np.where(np.arange(HEADS) < 5, 100.1, 50).astype(np.float32)
    assert jax.jit(run)(half, none, maxima) == 5


def test_by_hand_over_some_axes_of_a_mesh_with_explicit_others():
    mesh = jax.make_mesh((4, 2), ("data", "tp"), axis_types=(AxisType.Explicit,) * 2)
    tx = mc.qk_clip(LAYOUT, axis_name="data")
    put = lambda tree: jax.tree.map(  # noqa: E731
        lambda x: jax.device_put(x, NamedSharding(mesh, P(*(None,) * (x.ndim - 2), "tp"))), tree
    )
    maxima = maxima_by_device()[:4]
    mapped = jax.shard_map(
        lambda u, s, p, maxima: update(tx, u, s, p, maxima),
        mesh=mesh,
        in_specs=(P(), P(), P(), P("data")),
        out_specs=P(),
        axis_names={"data"},
    )
    with jax.set_mesh(mesh):
        sown = jax.device_put(maxima, NamedSharding(mesh, P("data", "tp")))
        got = jax.jit(mapped)(put(updates()), tx.init(params()), put(params()), sown)
    chex.assert_trees_all_close(got, on_one_device(mc.qk_clip(LAYOUT), maxima), **EXACT)
    assert got[0]["attn"]["query"]["kernel"].sharding.spec == P(None, "tp", None)


def test_clipping_parameters_alike():
    maxima = maxima_by_device()
    clip = lambda p, s, **options: mc.apply_qk_clip(  # noqa: E731
        p, {"attn": {"max_logits": s}}, LAYOUT, **options
    )
    mapped = jax.pmap(
        functools.partial(clip, axis_name="data"), axis_name="data", in_axes=(None, 0)
    )
    replicas = mapped(params(), maxima)
    wanted = jax.jit(clip)(params(), maxima.max(0))
    for device in range(DEVICES):
        chex.assert_trees_all_close(jax.tree.map(lambda x: x[device], replicas), wanted, **EXACT)  # noqa: B023


@pytest.mark.parametrize("option", ["axis_name", "heads_axis_name"])
def test_an_axis_that_is_not_there(option):
    tx = mc.qk_clip(LAYOUT, **{option: ("batch",)})
    with pytest.raises(ValueError, match=rf"{option}=\('batch',\).*shard_map.*jit leave.*out"):
        on_one_device(tx, maxima_by_device())


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"axis_name": 0}, TypeError, "axis_name must be .* got 0"),
        ({"heads_axis_name": ["tp"]}, TypeError, "heads_axis_name must be .* got \\['tp'\\]"),
        ({"axis_name": ("a", "a")}, ValueError, "'a' twice"),
        ({"axis_name": "a", "heads_axis_name": "a"}, ValueError, "'a' twice"),
    ],
)
def test_wrong_axis_names(options, error, match):
    with pytest.raises(error, match=match):
        mc.qk_clip(LAYOUT, **options)
    with pytest.raises(error, match=match):
        mc.apply_qk_clip(params(), {}, LAYOUT, **options)
