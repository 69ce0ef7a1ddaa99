"""The maxima alone, of every example and step or of some."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._attention.attention import dot_product_attention
from muonclip_jax._attention.measure import measure_max_logits
from tests.attention.test_attention import visibility


def operands_of(length=9, keys=None, heads=4, kv_heads=2, size=8, batch=(4,), seed=0):
    rng = np.random.default_rng(seed)
    query = rng.normal(size=(*batch, length, heads, size))
    key = rng.normal(size=(*batch, keys or length, kv_heads, size))
    return jnp.asarray(query, jnp.float32), jnp.asarray(key, jnp.float32)


def expected(query, key, scale=None, **visible):
    """In float64, the [T, S] way."""
    query, key = (np.asarray(x, np.float64) for x in (query, key))
    key = np.repeat(key, query.shape[-2] // key.shape[-2], axis=-2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = scale * np.einsum("...tnh,...snh->...nts", query, key)
    visible = visibility(logits.shape, **visible)
    heads_last = np.moveaxis(np.where(visible, logits, -np.inf), -3, -1)
    return heads_last.reshape(-1, query.shape[-2]).max(0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "scale": -0.3},
        {"local_window_size": (3, 1)},
        {"mask": np.random.default_rng(1).random((4, 1, 9, 6)) < 0.3},
        {
            "segment_ids": (np.arange(9) // 4, np.arange(24).reshape(4, 6) // 7),
            "query_seq_lengths": np.array([9, 3, 0, 5]),
            "key_value_seq_lengths": np.array([2, 6, 6, 5]),
        },
    ],
    ids=["plain", "causal", "window", "mask", "packed"],
)
def test_equals_the_plain_form(options):
    query, key = operands_of(keys=6)
    found = jax.jit(functools.partial(measure_max_logits, chunk_size=4, **options))(query, key)
    # Float32 sums of eight products of order one.
    chex.assert_trees_all_close(found, np.float32(expected(query, key, **options)), rtol=1e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_dtypes_accumulate_wide(dtype):
    with jax.enable_x64(dtype == "float64"):
        query, key = (x.astype(dtype) for x in operands_of())
        found = measure_max_logits(query, key)
        wide = jnp.promote_types(dtype, jnp.float32)
        chex.assert_type(found, wide)
        rtol = 8 * float(jnp.finfo(wide).eps)  # the products are exact, the sums are not
        np.testing.assert_allclose(found, expected(query, key), rtol=rtol)


def test_heads_that_see_nothing_negative_maxima_and_nans():
    query, key = jnp.ones((2, 5, 4, 4)), -jnp.ones((2, 5, 4, 4))
    mask = np.ones((4, 1, 5), bool)
    mask[0] = False
    key = key.at[1, 3, 2, 0].set(jnp.nan).at[0, 0, 3, 0].set(-jnp.inf)
    query = query.at[0, :, 3, 0].set(-1.0)
    found = measure_max_logits(query, key, mask, chunk_size=2)
    np.testing.assert_array_equal(found, [-np.inf, -2.0, np.nan, np.inf])


@pytest.mark.parametrize("length", [33, 300])
def test_a_nan_is_seen_in_rows_of_any_length(length):
    """A vectorized maximum may drop it, as XLA's on CPU does."""
    query, key = operands_of(length, kv_heads=4)
    found = measure_max_logits(query, key.at[1, 2, 1, 5].set(jnp.nan), is_causal=True)
    np.testing.assert_array_equal(jnp.isnan(found), [False, True, False, False])


def test_no_gradient_and_no_jvp_barrier():
    query, key = operands_of()
    gradient = jax.grad(lambda q, k: measure_max_logits(q, k).sum(), (0, 1))(query, key)
    chex.assert_trees_all_equal(gradient, (jnp.zeros_like(query), jnp.zeros_like(key)))
    _, tangent = jax.jvp(measure_max_logits, (query, key), (query, key))
    np.testing.assert_array_equal(tangent, jnp.zeros(4))


def test_no_buffer_of_all_logits():
    length = 8192
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 16), jnp.float32) for heads in (2, 1)]
    measure = jax.jit(functools.partial(measure_max_logits, is_causal=True))
    compiled = measure.lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * length * length / 20


# ---- on part of the batch, and at some steps ----


def test_some_examples_give_a_lower_bound():
    query, key = operands_of()
    mask = np.random.default_rng(1).random((4, 1, 9, 9)) < 0.5
    found = measure_max_logits(query, key, mask, examples=2)
    # Float32 sums of eight products of order one.
    part = expected(query[:2], key[:2], mask=mask[:2])
    chex.assert_trees_all_close(found, np.float32(part), rtol=1e-6)
    assert (found <= measure_max_logits(query, key, mask)).all()
    shared = measure_max_logits(query, key, mask[:1], examples=2)  # one mask for all examples
    shared_part = expected(query[:2], key[:2], mask=mask[:1])
    chex.assert_trees_all_close(shared, np.float32(shared_part), rtol=1e-6)
    packed = {
        "segment_ids": (jnp.arange(9) // 5, jnp.arange(36).reshape(4, 9) // 8),
        "key_value_seq_lengths": jnp.array([7, 2, 9, 9]),
    }
    of_two = {"segment_ids": (jnp.arange(9) // 5, packed["segment_ids"][1][:2])}
    of_two["key_value_seq_lengths"] = packed["key_value_seq_lengths"][:2]
    found = measure_max_logits(query, key, examples=2, **packed)
    part = expected(query[:2], key[:2], **of_two)
    chex.assert_trees_all_close(found, np.float32(part), rtol=1e-6)


def test_some_steps():
    query, key = operands_of()
    measure = jax.jit(
        chex.assert_max_traces(lambda step: measure_max_logits(query, key, every=3, step=step), 1)
    )
    exact = measure_max_logits(query, key)
    for step in range(7):
        wanted = exact if step % 3 == 0 else jnp.full(4, -jnp.inf)
        # The same products, perhaps in another order.
        chex.assert_trees_all_close(measure(jnp.int32(step)), wanted, rtol=1e-6)
    np.testing.assert_array_equal(measure_max_logits(query, key, every=1, step=5), exact)


def test_steps_without_a_look_cost_nothing():
    """One branch has all products."""
    query, key = operands_of()
    jaxpr = jax.make_jaxpr(lambda step: measure_max_logits(query, key, every=3, step=step))(0)
    (cond,) = (equation for equation in jaxpr.eqns if equation.primitive.name == "cond")
    assert sorted("dot_general" in str(branch) for branch in cond.params["branches"]) == [
        False,
        True,
    ]
    outside = [equation.primitive.name for equation in jaxpr.eqns if equation is not cond]
    assert "dot_general" not in outside and "scan" not in outside


def test_qk_clip_clips_late_but_never_wrongly():
    """A step that is not measured changes nothing; the next one clips as if nothing had been."""
    kernels = {name: jnp.ones((8, 4, 2)) for name in ("query", "key")}
    params = {"attn": {name: {"kernel": kernel} for name, kernel in kernels.items()}}
    layout = mc.layouts.mha(query="query", key="key", value=None, out=None)
    tx = mc.qk_clip(layout, threshold=1.0)
    x = jnp.ones((1, 3, 8))

    @jax.jit
    def clip(params, state, step):
        query, key = (
            jnp.einsum("btd,dnh->btnh", x, params["attn"][name]["kernel"])
            for name in ("query", "key")
        )
        sown = {("attn",): measure_max_logits(query, key, every=2, step=step)}
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zeros, state, params, max_logits=sown)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    late, state = clip(params, state, 1)
    chex.assert_trees_all_equal(late, params)
    np.testing.assert_array_equal(state.gamma["attn"], jnp.ones(4))
    assert (state.heads_clipped, state.nonfinite_heads) == (0, 0)
    clipped, state = clip(late, state, 2)
    # 64 · 2 / sqrt(2), which the clip makes 1; float32 products of a few factors.
    np.testing.assert_allclose(state.gamma["attn"], 2**0.5 / 128, rtol=1e-6)
    assert (state.heads_clipped, state.nonfinite_heads) == (4, 0)
    again = clip(clipped, state, 4)[1].max_logits["attn"]
    np.testing.assert_allclose(again, 1.0, rtol=1e-6)


# ---- transformations and devices ----


def test_vmap_over_examples_and_over_steps():
    query, key = operands_of()
    each = [expected(q, k) for q, k in zip(query, key, strict=True)]
    # Float32 sums of eight products of order one.
    found = jax.vmap(measure_max_logits)(query, key)
    chex.assert_trees_all_close(found, np.float32(each), rtol=1e-6)
    over_steps = jax.vmap(lambda step: measure_max_logits(query, key, every=2, step=step))
    np.testing.assert_array_equal(
        jnp.isneginf(over_steps(jnp.arange(3)))[:, 0], [False, True, False]
    )


@pytest.mark.parametrize(
    ("axis_type", "options"), [(AxisType.Auto, {}), (AxisType.Explicit, {"every": 2, "step": 4})]
)
def test_sharded_batch(axis_type, options):
    devices = jax.device_count()
    mesh = jax.make_mesh((devices, 1), ("data", "heads"), axis_types=(axis_type,) * 2)
    operands = operands_of(batch=(devices,))
    measure = jax.jit(functools.partial(measure_max_logits, chunk_size=4, **options))
    with jax.set_mesh(mesh):
        found = measure(*jax.device_put(operands, NamedSharding(mesh, P("data", None, "heads"))))
    # Float32 sums of eight products of order one.
    chex.assert_trees_all_close(np.asarray(found), np.float32(expected(*operands)), rtol=1e-6)


def test_inside_shard_map_each_device_looks_at_its_own_examples():
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def measure(query, key, step):
        return measure_max_logits(query, key, examples=1, every=2, step=step)[None]

    query, key = operands_of(batch=(2 * devices,))
    specs = {"mesh": mesh, "in_specs": (P("data"), P("data"), P()), "out_specs": P("data")}
    found = jax.jit(jax.shard_map(measure, **specs))(query, key, 4)
    # Float32 sums of eight products of order one.
    wanted = np.stack([expected(query[2 * i], key[2 * i]) for i in range(devices)])
    chex.assert_trees_all_close(np.asarray(found), np.float32(wanted), rtol=1e-6)


# ---- wrong calls ----


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (TypeError, {"query": jnp.ones((3, 4, 2), int)}, ["query", "int32"]),
        (ValueError, {"query": jnp.ones((4, 2))}, ["query and key", "query (4, 2)"]),
        (ValueError, {"key": jnp.ones((2, 3, 4, 2))}, ["batch axes", "key (2, 3, 4, 2)"]),
        (ValueError, {"key": jnp.ones((1, 3, 3, 2))}, ["4 query heads", "3 key/value"]),
        (ValueError, {"mask": jnp.ones((2, 3), bool)}, ["mask (2, 3)", "(1, 4, 3, 3)"]),
        (TypeError, {"mask": jnp.ones((3, 3))}, ["mask", "boolean"]),
        (ValueError, {"examples": 0}, ["examples", "at least 1"]),
        (ValueError, {"examples": 2}, ["examples=2", "(1, 3, 4, 2)"]),
        (ValueError, {"every": 2}, ["every=2", "step="]),
        (ValueError, {"every": 0, "step": 1}, ["every", "at least 1"]),
        (TypeError, {"every": 2, "step": 1.0}, ["step", "integer", "1.0"]),
        (TypeError, {"every": 2, "step": jnp.arange(2)}, ["step", "scalar", "(2,)"]),
        (ValueError, {"chunk_size": 0}, ["chunk_size", "at least 1"]),
        (TypeError, {"dtype": int}, ["dtype", "int"]),
    ],
)
def test_wrong_calls(error, arguments, words):
    right = {"query": jnp.ones((1, 3, 4, 2)), "key": jnp.ones((1, 3, 4, 2))}
    with pytest.raises(error) as caught:
        measure_max_logits(**right | arguments)
    for word in words:
        assert word in str(caught.value)


def test_options_are_those_of_the_attention():
    """All that hide positions are among them."""
    measured, attended = (
        inspect.signature(f).parameters for f in (measure_max_logits, dot_product_attention)
    )
    assert measured.keys() - attended.keys() == {"examples", "every", "step", "which"}
    after_the_maxima = {"value", "bias", "soft_cap", "sinks"}
    of_the_output = {"implementation", "dropout_rng", "dropout_rate", "broadcast_dropout"}
    assert attended.keys() - measured.keys() == after_the_maxima | of_the_output
