"""QK-Clip: the factor, the table of roles, the transformation and its state."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import muonclip_jax as mc
from muonclip_jax._transforms.clip import clip_factor


def mha_params(key, stack=(), heads=4, width=8, size=6, dtype=jnp.float32):
    """One attention block at `attn`, with biases."""
    keys = iter(jax.random.split(key, 8))
    normal = lambda *shape: jax.random.normal(next(keys), (*stack, *shape)).astype(dtype)  # noqa: E731
    projection = lambda: {"kernel": normal(width, heads, size), "bias": normal(heads, size)}  # noqa: E731
    return {
        "attn": {
            "query": projection(),
            "key": projection(),
            "value": projection(),
            "out": {"kernel": normal(heads, size, width)},
        },
        "mlp": {"kernel": normal(width, width)},
    }


# Milliseconds of run time: compiling fast is all that counts, and eager calls compile every step.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def qk_clip(*args, **options):
    tx = mc.qk_clip(*args, **options)
    return optax.GradientTransformationExtraArgs(tx.init, quick_jit(tx.update))


def apply_qk_clip(params, sown, *args, **options):
    return quick_jit(lambda p, s: mc.apply_qk_clip(p, s, *args, **options))(params, sown)


class ClipFactorTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_every_kind_of_maximum(self):
        maxima = jnp.array([50.0, 100.0, 200.0, 0.0, -300.0, -jnp.inf, jnp.inf, jnp.nan, 1e38])
        gamma = self.variant(lambda s: clip_factor(s, 100.0))(maxima)
        # float32 division is correctly rounded, so these are exact.
        np.testing.assert_array_equal(
            gamma, np.float32([1, 1, 0.5, 1, 1, 1, 1, 1, np.float32(100) / np.float32(1e38)])
        )

    @chex.variants(with_jit=True, without_jit=True)
    def test_layer_scope_takes_the_smallest_factor(self):
        gamma = self.variant(lambda s: clip_factor(s, 1.0, "layer"))(
            jnp.array([[4.0, 2.0], [0.5, 1]])
        )
        np.testing.assert_array_equal(gamma, [[0.25, 0.25], [1, 1]])

    def test_no_gradient_trouble_at_any_maximum(self):
        maxima = jnp.array([50.0, 200.0, 0.0, -jnp.inf, jnp.inf])
        gradient = jax.grad(lambda s: clip_factor(s, 100.0).sum())(maxima)
        assert np.isfinite(gradient).all()


class ApplyTest(chex.TestCase):
    @chex.variants(with_jit=True, without_jit=True)
    def test_mha_scales_kernels_and_biases_of_clipped_heads_only(self):
        params = mha_params(jax.random.key(0))
        maxima = jnp.array([400.0, 100.0, -5.0, 101.0])
        clip = self.variant(
            lambda p, s: mc.apply_qk_clip(p, {"attn": {"max_logits": s}}, mc.layouts.mha())
        )
        clipped = clip(params, maxima)
        factor = np.sqrt(100 / np.array([400.0, 100, 100, 101]))[:, None]
        expected = jax.tree.map(lambda x: x, params)
        for name in ("query", "key"):
            for leaf in ("kernel", "bias"):
                expected["attn"][name][leaf] = params["attn"][name][leaf] * factor
        # One rounding of the factor and one of the product, float32.
        chex.assert_trees_all_close(clipped, expected, rtol=3e-7)
        chex.assert_trees_all_equal_dtypes(clipped, params)
        # Heads at or below the threshold: the same bits.
        for name in ("query", "key"):
            np.testing.assert_array_equal(
                clipped["attn"][name]["kernel"][:, 1:3], params["attn"][name]["kernel"][:, 1:3]
            )
        chex.assert_trees_all_equal(clipped["mlp"], params["mlp"])
        chex.assert_trees_all_equal(clipped["attn"]["value"], params["attn"]["value"])

    def test_alpha_one_leaves_keys_alone(self):
        params = mha_params(jax.random.key(0))
        clipped = apply_qk_clip(
            params, {"attn": {"max_logits": jnp.full(4, 200.0)}}, mc.layouts.mha(), alpha=1.0
        )
        chex.assert_trees_all_equal(clipped["attn"]["key"], params["attn"]["key"])
        np.testing.assert_allclose(
            clipped["attn"]["query"]["kernel"], params["attn"]["query"]["kernel"] * 0.5
        )


@pytest.mark.parametrize("layout", [mc.layouts.mha(), mc.layouts.gqa()], ids=["MHA", "a group"])
@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_a_side_without_a_share_keeps_its_bits_and_loses_nothing(alpha, layout):
    """A factor of γ/γ that is 1 but for rounding would move float32, and seem lost in bfloat16."""
    for dtype in (jnp.float32, jnp.bfloat16):
        params = mha_params(jax.random.key(0), dtype=dtype)
        if layout.shared_keys:
            for leaf in ("kernel", "bias"):
                params["attn"]["key"][leaf] = params["attn"]["key"][leaf][..., :2, :]
                params["attn"]["value"][leaf] = params["attn"]["value"][leaf][..., :2, :]
        sown = {"attn": {"max_logits": jnp.array([130.0, 130.0, 170.0, 170.0])}}
        tx = qk_clip(layout, alpha=alpha, shared_keys="split")
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zeros, tx.init(params), params, max_logits=sown)
        moved = {side: bool(updates["attn"][side]["kernel"].any()) for side in ("query", "key")}
        assert moved == {"query": alpha > 0, "key": alpha < 1}
        assert int(state.heads_clipped) == 4 and int(state.lost_heads) == 0


def test_mla_table():
    """q_nope √γ, q_rope γ, k_nope √γ, and not a bit of v or of the shared rotary key."""
    nope, rope, v, heads, rank = 4, 2, 3, 2, 5
    rng = np.random.default_rng(0)
    params = {
        "attn": {
            "wq_b": {"kernel": rng.normal(size=(rank, heads * (nope + rope))).astype(np.float32)},
            "wkv_a": {"kernel": rng.normal(size=(8, rank + rope)).astype(np.float32)},
            "wkv_b": {"kernel": rng.normal(size=(rank, heads * (nope + v))).astype(np.float32)},
        }
    }
    maxima = {"attn": {"max_logits": jnp.array([40.0, 1.0])}}
    layout = mc.layouts.mla(nope, rope, v, query="wq_b", out=None)
    clipped = apply_qk_clip(params, maxima, layout, threshold=10.0)
    before, after = (
        {k: np.asarray(x["kernel"]) for k, x in tree["attn"].items()} for tree in (params, clipped)
    )
    np.testing.assert_array_equal(after["wkv_a"], before["wkv_a"])
    query = after["wq_b"].reshape(rank, heads, -1) / before["wq_b"].reshape(rank, heads, -1)
    key_value = after["wkv_b"].reshape(rank, heads, -1) / before["wkv_b"].reshape(rank, heads, -1)
    gamma = 0.25
    np.testing.assert_allclose(query[:, 0, :nope], gamma**0.5, rtol=3e-7)
    np.testing.assert_allclose(query[:, 0, nope:], gamma, rtol=3e-7)
    np.testing.assert_allclose(key_value[:, 0, :nope], gamma**0.5, rtol=3e-7)
    np.testing.assert_array_equal(key_value[:, 0, nope:], 1)
    np.testing.assert_array_equal(query[:, 1], 1)
    np.testing.assert_array_equal(key_value[:, 1], 1)


def test_update_arrives_where_apply_does_and_counts():
    params = mha_params(jax.random.key(1))
    updates = jax.tree.map(lambda p: 0.01 * jnp.sin(p), params)
    maxima = {"attn": {"max_logits": jnp.array([400.0, 1.0, jnp.nan, jnp.inf])}}
    tx = qk_clip(mc.layouts.mha())
    clipped, state = tx.update(updates, tx.init(params), params, max_logits=maxima)
    moved = optax.apply_updates(params, updates)
    # The sum p + u' rounds once more than the product: two float32 roundings of p's size.
    chex.assert_trees_all_close(
        optax.apply_updates(params, clipped),
        apply_qk_clip(moved, maxima, mc.layouts.mha()),
        atol=5e-7,
    )
    np.testing.assert_array_equal(state.gamma["attn"], [0.25, 1, 1, 1])
    np.testing.assert_array_equal(state.max_logits["attn"], [400, 1, np.nan, np.inf])
    assert int(state.heads_clipped) == 1
    assert int(state.nonfinite_heads) == 2
    assert int(state.lost_heads) == 0
    # Updates of heads that were not clipped: the same bits.
    np.testing.assert_array_equal(
        clipped["attn"]["query"]["kernel"][:, 1:], updates["attn"]["query"]["kernel"][:, 1:]
    )
    _, state = tx.update(updates, state, params, max_logits=maxima)
    assert int(state.heads_clipped) == 1 and int(state.nonfinite_heads) == 4


def test_all_masked_head_is_neither_clipped_nor_a_fault():
    params = mha_params(jax.random.key(1))
    tx = qk_clip(mc.layouts.mha())
    maxima = {"attn": {"max_logits": jnp.full(4, -jnp.inf)}}
    updates, state = tx.update(params, tx.init(params), params, max_logits=maxima)
    chex.assert_trees_all_equal(updates, params)
    assert int(state.heads_clipped) == 0 and int(state.nonfinite_heads) == 0


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("dtype", "maximum", "lost"),
    [
        # sqrt(100/100.1) is 0.05% below 1, an eighth of bfloat16's spacing: nothing moves.
        (jnp.bfloat16, 100.1, 4),
        (jnp.bfloat16, 400.0, 0),
        (jnp.float16, 100.001, 4),
        (jnp.float16, 400.0, 0),
        (jnp.float32, 100.1, 0),
    ],
)
def test_clips_lost_to_rounding_are_counted(dtype, maximum, lost, jit):
    params = mha_params(jax.random.key(2), dtype=dtype)
    updates = jax.tree.map(jnp.zeros_like, params)
    tx = mc.qk_clip(mc.layouts.mha())
    maxima = {"attn": {"max_logits": jnp.full(4, maximum)}}
    update = jax.jit(tx.update) if jit else tx.update  # XLA may keep more precision than dtype has
    clipped, state = update(updates, tx.init(params), params, max_logits=maxima)
    assert int(state.lost_heads) == lost
    chex.assert_trees_all_equal_dtypes(clipped, params)
    unchanged = optax.apply_updates(params, clipped)["attn"]["query"]["kernel"]
    assert bool((unchanged == params["attn"]["query"]["kernel"]).all()) == bool(lost)


def test_a_grouped_clip_that_scales_one_query_up_is_not_lost():
    """κ = ¼ for the group, so the second query takes 0.8 / ¼: upwards, and far enough to count."""
    kernel = lambda heads: jax.random.normal(jax.random.key(heads), (32, heads, 8), jnp.bfloat16)  # noqa: E731
    params = {"attn": {"query": {"kernel": kernel(2)}, "key": {"kernel": kernel(1)}}}
    tx = qk_clip(mc.layouts.gqa(value=None, out=None), shared_keys="split")
    maxima = {"attn": {"max_logits": jnp.array([1600.0, 125.0])}}
    updates = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(updates, tx.init(params), params, max_logits=maxima)
    assert int(state.heads_clipped) == 2 and int(state.lost_heads) == 0


# --- keys that heads share

GROUPS = mc.layouts.gqa(value=None, out=None)


def grouped_params(query=jnp.float32, key=jnp.float32, shape=(8, 4, 6)):
    kernel = lambda heads, dtype: jax.random.normal(  # noqa: E731
        jax.random.key(heads), (shape[0], heads, shape[2])
    ).astype(dtype)
    return {"attn": {"query": {"kernel": kernel(4, query)}, "key": {"kernel": kernel(2, key)}}}


def test_no_pass_over_a_shared_key_is_compiled():
    """Its update goes through as it came, and all that is read and written is less by it."""
    params = grouped_params(shape=(256, 4, 64))
    sown = {("attn",): jnp.full(4, 400.0)}

    def compiled(**options):
        tx = mc.qk_clip(GROUPS, **options)
        state = tx.init(params)
        update = lambda u, p: tx.update(u, state, p, max_logits=sown)  # noqa: E731
        # Donated, since else what goes through is copied.
        return jax.jit(update, donate_argnums=0).lower(params, params).compile().cost_analysis()

    untouched, split = compiled(), compiled(shared_keys="split")
    size = params["attn"]["key"]["kernel"].nbytes
    # Of a split key the parameter and the update are read, and the update is written.
    assert split["bytes accessed"] - untouched["bytes accessed"] >= 3 * size
    assert untouched["flops"] < split["flops"]
    tx = mc.qk_clip(GROUPS)
    traced = jax.make_jaxpr(lambda u: tx.update(u, tx.init(params), params, max_logits=sown)[0])
    key, query = traced(params).jaxpr.invars
    found = traced(params).jaxpr.outvars
    assert found[0].aval.shape == params["attn"]["key"]["kernel"].shape
    assert [str(found[0]) == str(key), str(found[1]) == str(query)] == [True, False]


def test_a_shared_key_that_is_frozen_or_quantized_stays_so():
    """Nothing is asked of what is not scaled: no dtype, and no room for rounding."""
    params, sown = grouped_params(key=jnp.int8), {("attn",): jnp.array([400.0, 1, 1, 1])}
    clipped = apply_qk_clip(params, sown, GROUPS)
    chex.assert_trees_all_equal(clipped["attn"]["key"], params["attn"]["key"])
    query = params["attn"]["query"]["kernel"].at[:, 0].multiply(0.25)
    chex.assert_trees_all_equal(clipped["attn"]["query"]["kernel"], query)
    for options in ({"shared_keys": "split"}, {"scope": "layer"}):
        with pytest.raises(TypeError, match=r"attn/key/kernel .* is int8"):
            apply_qk_clip(params, sown, GROUPS, **options)

    params = grouped_params()
    frozen = optax.partition(
        {"frozen": optax.set_to_zero(), "trained": optax.sgd(0.1)},
        {"attn": {"query": "trained", "key": "frozen"}},
    )
    tx = qk_clip(GROUPS)
    updates, _ = frozen.update(params, frozen.init(params), params)
    updates, _ = tx.update(updates, tx.init(params), params, max_logits=sown)
    after = optax.apply_updates(params, updates)
    chex.assert_trees_all_equal(after["attn"]["key"], params["attn"]["key"])
    query = 0.9 * params["attn"]["query"]["kernel"].at[:, 0].multiply(0.25)
    chex.assert_trees_all_close(after["attn"]["query"]["kernel"], query, atol=5e-7)


def test_a_half_precision_key_that_is_not_scaled_neither_loses_clips_nor_floors_them():
    """A mild clip and a drastic one, of float32 queries over bfloat16 keys."""
    params = grouped_params(key=jnp.bfloat16)
    zeros = jax.tree.map(jnp.zeros_like, params)
    sown = {("attn",): jnp.array([100.1, 1, 1, 1e6])}
    found = {}
    for shared_keys in ("untouched", "split"):
        tx = qk_clip(GROUPS, shared_keys=shared_keys)
        _, found[shared_keys] = tx.update(zeros, tx.init(params), params, max_logits=sown)
    gamma = found["untouched"].gamma["attn"]
    np.testing.assert_allclose(gamma, [100 / 100.1, 1, 1, 1e-4], rtol=1e-6)
    assert int(found["untouched"].lost_heads) == 0
    assert float(found["split"].gamma["attn"][3]) == 1 / 16  # 8 times bfloat16's spacing
    assert int(found["split"].lost_heads) == 1


def test_blocks_of_one_model_share_by_their_own_heads():
    """MHA beside GQA in one chain: alpha splits the one and leaves the other's key."""
    params = {
        "full": {"query": {"kernel": jnp.ones((8, 4, 6))}, "key": {"kernel": jnp.ones((8, 4, 6))}},
        "grouped": grouped_params()["attn"],
    }
    sown = {(name,): jnp.array([400.0, 1, 1, 1]) for name in params}
    clipped = apply_qk_clip(params, sown, GROUPS, alpha=0.25)
    for side, factor in (("query", 0.25**0.25), ("key", 0.25**0.75)):
        found = clipped["full"][side]["kernel"][0, :, 0]
        np.testing.assert_allclose(found, [factor, 1, 1, 1], rtol=3e-7)
    chex.assert_trees_all_equal(clipped["grouped"]["key"], params["grouped"]["key"])


def test_layer_scope_clips_every_head_of_the_layer_alike():
    params = mha_params(jax.random.key(0), stack=(2,))
    maxima = {"attn": {"max_logits": jnp.array([[400.0, 1, 1, 1], [1, 1, 1, 1]])}}
    clipped = apply_qk_clip(params, maxima, mc.layouts.mha(), scope="layer")
    before, after = params["attn"]["key"]["kernel"], clipped["attn"]["key"]["kernel"]
    np.testing.assert_array_equal(after[0], before[0] * 0.5)
    np.testing.assert_array_equal(after[1], before[1])


@pytest.mark.parametrize(
    "layouts",
    [
        [mc.layouts.mha(block="outer"), mc.layouts.ignore("outer/inner")],
        mc.layouts.mha(block="outer"),
    ],
    ids=["ignored", "outside the pattern"],
)
@pytest.mark.parametrize("where", ["inner", "inner/op"])
def test_attention_that_is_left_out_does_not_clip_the_block_around_it(layouts, where):
    inner = mha_params(jax.random.key(0))["attn"]
    params = {"outer": {**mha_params(jax.random.key(1))["attn"], "inner": inner}}
    sown = {
        ("outer", "op"): jnp.full(4, 1.0),  # a sub-module of the block counts
        ("outer", *where.split("/")): jnp.full(4, 1e4),
    }
    chex.assert_trees_all_equal(apply_qk_clip(params, sown, layouts), params)
    sown["outer", "op"] *= 400
    clipped = apply_qk_clip(params, sown, layouts)
    chex.assert_trees_all_equal(clipped["outer"]["inner"], inner)
    factor = clipped["outer"]["query"]["kernel"] / params["outer"]["query"]["kernel"]
    np.testing.assert_allclose(factor, 0.5, rtol=1e-6)


def test_hyperparameters_of_half_precision():
    """`inject_hyperparams` casts them to the parameters' dtype."""
    params = mha_params(jax.random.key(0), dtype=jnp.bfloat16)
    tx = optax.inject_hyperparams(mc.qk_clip, static_args="layout")(mc.layouts.mha(), threshold=8.0)
    maxima = {"attn": {"max_logits": jnp.full(4, 16.0)}}
    _, state = tx.update(params, tx.init(params), params, max_logits=maxima)
    assert int(mc.qk_clip_state(state).heads_clipped) == 4


def test_nested_blocks_keep_their_own_maxima():
    inner = mha_params(jax.random.key(0))["attn"]
    params = {"outer": {**mha_params(jax.random.key(1))["attn"], "inner": inner}}
    maxima = {
        "outer": {"max_logits": jnp.full(4, 200.0), "inner": {"max_logits": jnp.full(4, 400.0)}}
    }
    tx = qk_clip(mc.layouts.mha())
    _, state = tx.update(params, tx.init(params), params, max_logits=maxima)
    np.testing.assert_array_equal(state.gamma["outer"], 0.5)
    np.testing.assert_array_equal(state.gamma["outer/inner"], 0.25)


@pytest.mark.slow
def test_float64_weights_clip_in_float64_by_float32_maxima():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), mha_params(jax.random.key(0)))
        maxima = {"attn": {"max_logits": jnp.full(4, 300.0, jnp.float32)}}
        clipped = apply_qk_clip(params, maxima, mc.layouts.mha())
        np.testing.assert_allclose(
            clipped["attn"]["key"]["kernel"],
            params["attn"]["key"]["kernel"] * np.sqrt(1 / 3),
            rtol=1e-15,
        )


def test_clips_are_not_lost_with_float32_masters_of_a_bfloat16_model():
    """The documented cure: float32 parameters, bfloat16 computation."""
    attention = nn.MultiHeadDotProductAttention(4, dtype=jnp.bfloat16, attention_fn=mc.attention_fn)
    x = jax.random.normal(jax.random.key(0), (2, 5, 16))
    params = attention.init(jax.random.key(1), x)["params"]
    _, sown = attention.apply({"params": params}, x, sow_weights=True, mutable=["intermediates"])
    largest = float(mc.read_max_logits(sown)[()].max())
    tx = qk_clip(mc.layouts.mha(), threshold=largest / 1.0001)
    updates = jax.tree.map(jnp.zeros_like, params)
    clipped, state = tx.update(updates, tx.init(params), params, max_logits=sown)
    assert int(state.heads_clipped) == 1 and int(state.lost_heads) == 0
    assert float(optax.tree.norm(clipped)) > 0


def test_one_trace_no_host_callback():
    params = mha_params(jax.random.key(1))
    tx = mc.muonclip(0.01, layout=mc.layouts.mha(), threshold=10.0)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state, maxima):
        maxima = {"attn": {"max_logits": maxima}}
        updates, state = tx.update(params, state, params, max_logits=maxima)
        return optax.apply_updates(params, updates), state

    state = jax.jit(tx.init)(params)
    text = step.lower(params, state, jnp.ones(4)).as_text()
    assert "callback" not in text and "outfeed" not in text
    for maximum in (1.0, 1e3, np.nan):
        params, state = step(params, state, jnp.asarray(np.full(4, maximum, np.float32)))
    chex.assert_tree_all_finite(params)
    assert int(mc.qk_clip_state(state).nonfinite_heads) == 4


def test_state_is_found_by_name_in_any_optimizer():
    params = mha_params(jax.random.key(1))
    adam_clip = optax.chain(optax.adamw(1e-3), mc.qk_clip(mc.layouts.mha()))
    state = adam_clip.init(params)
    assert set(mc.qk_clip_state(state).gamma) == {"attn"}
    chex.assert_shape(mc.qk_clip_state(state).max_logits["attn"], (4,))
    assert optax.tree.get(state, "heads_clipped") == 0


def test_adamclip_is_adamw_then_clip():
    params = mha_params(jax.random.key(1))
    grads = jax.tree.map(jnp.cos, params)
    maxima = {"attn": {"max_logits": jnp.array([400.0, 1.0, 1.0, 1.0])}}
    adam_clip = optax.chain(optax.adamw(1e-3), mc.qk_clip(mc.layouts.mha()))
    updates, _ = adam_clip.update(grads, adam_clip.init(params), params, max_logits=maxima)
    plain, _ = optax.adamw(1e-3).update(grads, optax.adamw(1e-3).init(params), params)
    expected = apply_qk_clip(optax.apply_updates(params, plain), maxima, mc.layouts.mha())
    # Two float32 roundings at the size of the parameters (up to 4).
    chex.assert_trees_all_close(optax.apply_updates(params, updates), expected, atol=5e-7)


def test_states_can_be_donated():
    """XLA refuses to donate one buffer twice, so every counter has its own."""
    params = mha_params(jax.random.key(1))
    tx = mc.muonclip(0.01, layout=mc.layouts.mha())
    maxima = {"attn": {"max_logits": jnp.full(4, 400.0)}}

    def step(params, state):
        updates, state = tx.update(params, state, params, max_logits=maxima)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step, donate_argnums=(0, 1))
    state = tx.init(params)
    for _ in range(2):
        params, state = step(params, state)
    assert int(mc.qk_clip_state(state).heads_clipped) == 4


def test_traced_threshold():
    params = mha_params(jax.random.key(1))
    maxima = {"attn": {"max_logits": jnp.full(4, 400.0)}}
    clip = jax.jit(lambda tau: mc.apply_qk_clip(params, maxima, mc.layouts.mha(), tau))
    chex.assert_trees_all_close(
        clip(100.0), mc.apply_qk_clip(params, maxima, mc.layouts.mha(), 100.0), rtol=3e-7
    )


def test_an_infinite_weight_of_an_unclipped_head_spreads_no_further():
    params = mha_params(jax.random.key(1))
    params["attn"]["query"]["kernel"] = params["attn"]["query"]["kernel"].at[0, 0, 0].set(jnp.inf)
    updates = jax.tree.map(jnp.ones_like, params)
    tx = qk_clip(mc.layouts.mha())
    maxima = {"attn": {"max_logits": jnp.ones(4)}}
    clipped, _ = tx.update(updates, tx.init(params), params, max_logits=maxima)
    chex.assert_trees_all_equal(clipped, updates)


def test_blocks_left_out_by_the_pattern_may_sow_and_two_layouts_may_follow_each_other():
    params = {name: mha_params(jax.random.key(1))["attn"] for name in ("a", "b")}
    maxima = {name: {"max_logits": jnp.full(4, 400.0)} for name in ("a", "b")}
    tx = optax.chain(
        mc.qk_clip(mc.layouts.mha(block="a")), mc.qk_clip(mc.layouts.mha(block="b"), 200.0)
    )
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, max_logits=maxima)
    moved = optax.apply_updates(params, updates)
    for name, gamma in (("a", 0.25), ("b", 0.5)):
        np.testing.assert_allclose(
            moved[name]["key"]["kernel"], gamma**0.5 * params[name]["key"]["kernel"], rtol=1e-6
        )


def test_inside_optax_wrappers():
    params = mha_params(jax.random.key(1))
    maxima = {"attn": {"max_logits": jnp.full(4, 400.0)}}
    make = optax.inject_hyperparams(mc.qk_clip, static_args=("layout", "scope"))
    tx = optax.apply_if_finite(
        optax.chain(optax.sgd(0.1), make(mc.layouts.mha(), threshold=100.0)),
        max_consecutive_errors=2,
    )

    @jax.jit
    def step(params, state):
        return tx.update(jax.tree.map(jnp.zeros_like, params), state, params, max_logits=maxima)

    updates, _ = step(params, tx.init(params))
    np.testing.assert_allclose(
        updates["attn"]["query"]["kernel"], -0.5 * params["attn"]["query"]["kernel"], rtol=1e-6
    )


def test_updates_of_another_dtype_keep_it():
    params = mha_params(jax.random.key(1), dtype=jnp.bfloat16)
    updates = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    tx = qk_clip(mc.layouts.mha())
    maxima = {"attn": {"max_logits": jnp.full(4, 400.0)}}
    clipped, _ = tx.update(updates, tx.init(params), params, max_logits=maxima)
    chex.assert_trees_all_equal_dtypes(clipped, updates)
    # bfloat16 parameters with float32 updates: the sum rounds once, to 2**-8 relative.
    chex.assert_trees_all_close(
        optax.apply_updates(params, clipped)["attn"]["query"],
        jax.tree.map(lambda p: p * 2 * jnp.bfloat16(0.5), params["attn"]["query"]),
        rtol=2**-8,
    )


@pytest.mark.parametrize("shape", [(3, 4), (3, 2, 4), (2, 3, 4)])
def test_extra_axes_of_stacked_maxima_are_reduced(shape):
    """Layers stacked by 3; a vmapped call or a batch adds an axis inside or outside."""
    params = mha_params(jax.random.key(1), stack=(3,))
    sown = jax.random.uniform(jax.random.key(3), shape, minval=50, maxval=200)
    tx = qk_clip(mc.layouts.mha())
    _, state = tx.update(params, tx.init(params), params, max_logits={"attn": {"max_logits": sown}})
    axis = {2: (), 3: 1 if shape[0] == 3 else 0}[len(shape)]
    np.testing.assert_array_equal(state.max_logits["attn"], sown.max(axis=axis))


def linen_model_and_sown():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = nn.MultiHeadDotProductAttention(
                4, attention_fn=mc.attention_fn, name="attn"
            )
            return x + attention(x, sow_weights=True)

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            scanned = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0, "intermediates": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = scanned(Layer(name="layers"), x, None)
            return Layer(name="last")(x)

    model, x = Model(), jax.random.normal(jax.random.key(0), (2, 5, 16)) * 9
    variables = model.init(jax.random.key(1), x)
    return model, x, {"params": variables["params"]}


def test_linen_scanned_end_to_end_with_either_tree():
    model, x, variables = linen_model_and_sown()
    _, sown = model.apply(variables, x, mutable=["intermediates"])
    for params in (variables, variables["params"]):
        clipped = apply_qk_clip(params, sown, mc.layouts.mha(), threshold=1.0)
        inner = clipped if params is variables else {"params": clipped}
        _, after = model.apply(inner, x, mutable=["intermediates"])
        first = mc.read_max_logits(after)[("layers", "attn")][0]
        # The first layer's input is the same, so its maxima are exactly at the threshold or
        # below, up to float32 rounding.
        assert float(first.max()) <= 1 + 1e-5


def test_nnx_optimizer_forwards_max_logits():
    class Layer(nnx.Module):
        def __init__(self, rngs):
            self.attn = nnx.MultiHeadAttention(
                4, 16, decode=False, attention_fn=mc.attention_fn, rngs=rngs
            )

        def __call__(self, x):
            return x + self.attn(x, sow_weights=True)

    class Model(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([Layer(rngs) for _ in range(2)])

        def __call__(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model(nnx.Rngs(0))
    layout = mc.find_layout(nnx.state(model, nnx.Param))
    tx = mc.muonclip(0.01, layout=layout, threshold=0.1)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (2, 5, 16)) * 5

    @nnx.jit
    @chex.assert_max_traces(n=1)
    def step(model, optimizer, x):
        def loss_fn(model):
            y, intermediates = nnx.capture(lambda model: model(x), nnx.Intermediate)(model)
            return (y**2).mean(), intermediates

        (loss, intermediates), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
        optimizer.update(model, grads, max_logits=intermediates)
        return loss

    losses = [float(step(model, optimizer, x)) for _ in range(4)]
    assert losses[-1] < losses[0]
    state = mc.qk_clip_state(optimizer.opt_state)
    assert set(state.gamma) == {"layers/0/attn", "layers/1/attn"}
    assert int(state.heads_clipped) > 0
