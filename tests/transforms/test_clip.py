"""Clip by any signal: W_o by the largest output, and what accumulate makes of signals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

HEADS, KV_HEADS = 4, 2
SHAPES = {"query": (8, 4, 6), "key": (8, 2, 6), "value": (8, 2, 6), "out": (4, 6, 8)}


def attention(seed=0):
    keys = jax.random.split(jax.random.key(seed), len(SHAPES))
    return {
        name: {"kernel": jax.random.normal(key, shape)}
        for key, (name, shape) in zip(keys, SHAPES.items(), strict=True)
    }


def of_group(gamma, block):
    return gamma.reshape(*block.stack, block.kv_heads, -1).min(-1)


def by_output(layout=None, threshold=10.0, **options):
    """The largest output clips W_o, and W_v by its group's smallest factor; half each."""
    layout = layout or mc.layouts.gqa()

    def factors(block, gamma):
        return {"o": gamma**0.5, "v": of_group(gamma, block) ** 0.5}

    return mc.clip_by_signal(layout, threshold, signal="max_output", factors=factors, **options)


def updated(tx, params, **signals):
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, **signals)
    return optax.apply_updates(params, updates), state


OUTPUTS = jnp.array([40.0, 1.0, 5.0, 90.0])


def test_outputs_clip_values_and_outputs_and_nothing_else():
    params = {"attn": attention(), "mlp": {"kernel": jnp.ones((8, 8))}}
    # Behind a QK-norm too, which values and outputs do not see.
    params["attn"]["query_norm"] = {"scale": jnp.ones(6)}
    moved, state = updated(by_output(), params, max_output={"attn": {"max_output": OUTPUTS}})
    gamma = np.float32([1 / 4, 1, 1, 1 / 9])
    np.testing.assert_array_equal(state.gamma["max_output"]["attn"], gamma)
    np.testing.assert_array_equal(state.maxima["max_output"]["attn"], OUTPUTS)
    assert int(state.heads_clipped) == 2
    before, after = params["attn"], moved["attn"]
    factor = gamma[:, None, None] ** 0.5
    np.testing.assert_allclose(after["out"]["kernel"], factor * before["out"]["kernel"], rtol=1e-6)
    factor = gamma[[0, 3], None] ** 0.5
    np.testing.assert_allclose(
        after["value"]["kernel"], factor * before["value"]["kernel"], rtol=1e-6
    )
    for name in ("query", "key", "query_norm"):
        np.testing.assert_array_equal(*jax.tree.leaves((before[name], after[name])))
    assert optax.tree.get(state, "ClipState") is state


def split(block, gamma):
    kappa = of_group(gamma, block) ** 0.5
    return {"k": kappa, "q": gamma / jnp.repeat(kappa, HEADS // KV_HEADS)}


@pytest.mark.parametrize(
    ("shared_keys", "factors"), [("untouched", lambda _, gamma: {"q": gamma}), ("split", split)]
)
def test_qk_clip_is_an_instance(shared_keys, factors):
    params, sown = {"attn": attention()}, {("attn",): 10 * OUTPUTS}
    general = mc.clip_by_signal(mc.layouts.gqa(), 100.0, signal="max_logits", factors=factors)
    special = mc.qk_clip(mc.layouts.gqa(), shared_keys=shared_keys)
    for ours, theirs in zip(
        jax.tree.leaves(updated(general, params, max_logits=sown)),
        jax.tree.leaves(updated(special, params, max_logits=sown)),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)  # a power, computed in two ways


@pytest.mark.parametrize(
    ("factors", "error", "words"),
    [
        (lambda block, gamma: {"q_rope": gamma}, ValueError, "'q_rope'.*does not give attn.*q, k"),
        (lambda block, gamma: {"v": gamma}, ValueError, r"'v' of attn.*\(4,\).*\(2,\).*kv_heads"),
        (lambda block, gamma: gamma, TypeError, "must return a dict by role"),
    ],
)
def test_factors_that_do_not_fit_raise(factors, error, words):
    tx = mc.clip_by_signal(mc.layouts.gqa(), 1.0, signal="max_output", factors=factors)
    with pytest.raises(error, match=words):
        tx.init({"attn": attention()})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "clip_by_signal got no max_output.*max_output=intermediates"),
        ({"max_output": {"attn": {"max_logits": OUTPUTS}}}, "No value named 'max_output'.*sow_sig"),
        ({"max_output": {("mlp",): OUTPUTS}}, "max_output were sown in mlp, where the layout"),
        ({"max_output": {("attn",): jnp.ones(3)}}, r"attn sowed max_output of shape \(3,\)"),
    ],
)
def test_a_signal_that_does_not_fit_raises(given, words):
    with pytest.raises(ValueError, match=words):
        updated(by_output(), {"attn": attention()}, **given)


def test_wrong_options_raise_when_built():
    with pytest.raises(ValueError, match="signal must be a name"):
        mc.clip_by_signal(mc.layouts.mha(), 1.0, signal="max output", factors=dict)
    with pytest.raises(TypeError, match="factors must be a function"):
        mc.clip_by_signal(mc.layouts.mha(), 1.0, signal="max_output", factors={})
    with pytest.raises(ValueError, match=r"threshold must be above 0 \(a max_output\)"):
        by_output(threshold=-1.0)


# Accumulated


def accumulated(tx, params, *batches):
    """The state after one real step, compiled once."""
    tx = mc.accumulate(tx, len(batches))
    state = tx.init(params)
    update = jax.jit(
        lambda state, batch: tx.update(params, state, params, **batch),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    for batch in batches:
        _, state = update(state, batch)
    assert bool(state.has_updated)
    return state


def test_several_clips_of_several_signals():
    params, layout = {"attn": attention()}, mc.layouts.gqa()
    tx = optax.chain(mc.qk_clip(layout, 10.0), by_output(layout), mc.qk_clip(layout, 1.0))
    batches = [
        {"max_logits": {("attn",): OUTPUTS[::sign]}, "max_output": {("attn",): -sign * OUTPUTS}}
        for sign in (1, -1)
    ]
    state = accumulated(tx, params, *batches)
    for clip, maxima in zip(
        state.inner_state,
        (jnp.maximum(OUTPUTS, OUTPUTS[::-1]), OUTPUTS, jnp.maximum(OUTPUTS, OUTPUTS[::-1])),
        strict=True,
    ):
        seen = clip.maxima["max_output"] if isinstance(clip, mc.ClipState) else clip.max_logits
        np.testing.assert_array_equal(seen["attn"], maxima)


@pytest.mark.parametrize(
    "layouts",
    [
        [mc.layouts.gqa(block="attn"), mc.layouts.ignore("attn/inner")],
        mc.layouts.gqa(block="attn"),
        [mc.layouts.gqa(block="attn"), mc.layouts.ignore("attn/inner*")],
    ],
    ids=["ignored", "outside the pattern", "ignored with all inside"],
)
@pytest.mark.parametrize("inner", ["inner", "inner/core"])
def test_an_ignored_attention_inside_another_is_nobody_s(layouts, inner):
    """What it sowed counts neither for the block around it nor for another micro-batch."""
    params = {"attn": {**attention(), "inner": attention(1)}}
    inside = ("attn", *inner.split("/"))
    batches = [
        {"max_logits": {("attn",): scale * OUTPUTS, inside: jnp.full(HEADS, 500.0)}}
        for scale in (1.0, 0.1)
    ]
    for order in (batches, batches[::-1]):
        clip = accumulated(mc.qk_clip(layouts, 100.0), params, *order).inner_state
        np.testing.assert_array_equal(clip.max_logits["attn"], OUTPUTS)
        assert int(clip.heads_clipped) == 0


def test_several_modules_of_one_block_make_one_maximum():
    params = {"attn": attention()}
    batches = [
        {"max_logits": {("attn", "a"): OUTPUTS, ("attn", "b"): jnp.stack([OUTPUTS[::-1]] * 2)}},
        {"max_logits": {("attn", "a"): jnp.ones(HEADS), ("attn", "b"): jnp.ones((2, HEADS))}},
    ]
    clip = accumulated(mc.qk_clip(mc.layouts.gqa()), params, *batches).inner_state
    np.testing.assert_array_equal(clip.max_logits["attn"], jnp.maximum(OUTPUTS, OUTPUTS[::-1]))


def test_accumulated_inside_accumulated():
    params = {"attn": attention()}
    inner = mc.accumulate(mc.qk_clip(mc.layouts.gqa(), 100.0), 1)
    batches = [{"max_logits": {("attn",): x}} for x in (OUTPUTS, OUTPUTS[::-1])]
    clip = accumulated(inner, params, *batches).inner_state.inner_state
    np.testing.assert_array_equal(clip.max_logits["attn"], jnp.maximum(OUTPUTS, OUTPUTS[::-1]))


def compiled(fn):
    """`fn`, compiled by the user, and called before."""
    fn = jax.jit(fn)

    def call(*args, **kwargs):
        fn(*args, **kwargs)
        return fn(*args, **kwargs)

    return call


def test_an_update_that_is_compiled_inside_loses_no_maxima():
    params, clip = {"attn": attention()}, mc.qk_clip(mc.layouts.gqa(), 100.0)
    inner = optax.GradientTransformationExtraArgs(clip.init, compiled(clip.update))
    batches = [{"max_logits": {("attn",): x}} for x in (OUTPUTS, OUTPUTS[::-1])]
    state = accumulated(inner, params, *batches).inner_state
    np.testing.assert_array_equal(state.max_logits["attn"], jnp.maximum(OUTPUTS, OUTPUTS[::-1]))


def test_clips_that_disagree_about_a_block_raise():
    params = {"attn": {**attention(), "inner": {"w": jnp.ones((8, 8))}}}
    block = mc.layouts.gqa(block="attn")
    tx = optax.chain(mc.qk_clip([block, mc.layouts.ignore("attn/inner")]), mc.qk_clip(block, 200.0))
    batch = {"max_logits": {("attn",): OUTPUTS, ("attn", "inner"): OUTPUTS + 1}}
    with pytest.raises(ValueError, match=r"max_logits of attn from different modules, attn and"):
        accumulated(tx, params, batch, batch)
