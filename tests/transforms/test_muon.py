"""Muon: trajectories against Optax and PyTorch, batches of matrices, dtypes, wrappers."""

import functools
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers

import muonclip_jax as mc

SHAPES = {"wide": (16, 48), "tall": (48, 16), "square": (24, 24), "row": (1, 8)}


def random_tree(seed, shapes=None, dtype=jnp.float32):
    shapes = shapes or SHAPES
    keys = jax.random.split(jax.random.key(seed), len(shapes))
    return {
        name: jax.random.normal(key, shape).astype(dtype)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def run(tx, params, steps=20):
    state = tx.init(params)
    update = jax.jit(tx.update)
    for step in range(steps):
        # A slowly turning gradient, so that momentum matters.
        grads = jax.tree.map(
            lambda a, b: jnp.cos(0.2 * step) * a + b,  # noqa: B023
            random_tree(1),
            random_tree(100 + step),
        )
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


@pytest.mark.parametrize(
    ("nesterov", "bias_correction"), [(False, False), (True, True)], ids=["plain", "nesterov"]
)
@pytest.mark.parametrize(
    ("rule", "consistent_rms"),
    [("match_adam", 0.2), pytest.param("jordan", None, marks=pytest.mark.slow)],
    ids=["match_adam", "jordan"],
)
def test_twenty_steps_equal_optax(nesterov, bias_correction, rule, consistent_rms):
    params = random_tree(0)
    theirs = optax.contrib.muon(
        0.02, weight_decay=0.1, nesterov=nesterov, consistent_rms=consistent_rms
    )
    ours = optax.chain(
        mc.scale_by_muon(
            nesterov=nesterov,
            bias_correction=bias_correction,
            newton_schulz=mc.NewtonSchulz(mc.schedules.jordan(), jnp.float32),
        ),
        mc.scale_by_update_rms(rule),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.02),
    )
    # Both iterate in float32; the order of sums differs, and five quintic steps with slopes up
    # to 3.4 amplify 1e-7 to a few 1e-5 of an update, of which twenty add up to size ~1.
    chex.assert_trees_all_close(run(ours, params), run(theirs, params), atol=1e-4)


def test_first_step_is_the_polar_factor_times_its_scale():
    params = random_tree(0)
    grads = random_tree(1)
    tx = mc.muon(
        1.0,
        weight_decay=0.0,
        newton_schulz=mc.NewtonSchulz(mc.schedules.deepseek_v4(), jnp.float32),
        dimension_numbers=MuonDimensionNumbers(),
    )
    updates, _ = tx.update(grads, tx.init(params), params)
    for name, g in grads.items():
        u, _, vt = np.linalg.svd(np.asarray(g, np.float64), full_matrices=False)
        scale = 0.2 * math.sqrt(max(g.shape))
        # DeepSeek-V4's ten steps leave singular values within 6e-4 of 1.
        np.testing.assert_allclose(updates[name], -scale * u @ vt, atol=1e-3 * scale)


@pytest.mark.parametrize(
    "rule", ["match_adam", "jordan", "unit_rms_norm", "spectral", "none", lambda i, o: i / o]
)
def test_update_rms_rules_for_in_out_kernels(rule):
    ins, outs = 12, 48
    expected = {
        "match_adam": 0.2 * math.sqrt(48),
        "jordan": 2.0,
        "unit_rms_norm": 2.0,
        "spectral": math.sqrt(48),
        "none": 1.0,
    }.get(rule, 0.25)
    tx = mc.scale_by_update_rms(rule)
    ones = {"w": jnp.ones((ins, outs))}
    updates, _ = tx.update(ones, tx.init(ones))
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-6)
    # Read as [out, in], jordan would give 1 and unit_rms_norm ½: those are the flipped kernel's.
    transposed = {"w": jnp.ones((outs, ins))}
    flipped, _ = tx.update(transposed, tx.init(transposed))
    back = {
        "match_adam": 0.2 * math.sqrt(48),
        "jordan": 1.0,
        "unit_rms_norm": 0.5,
        "spectral": math.sqrt(48),
        "none": 1.0,
    }
    np.testing.assert_allclose(flipped["w"], back.get(rule, 4.0), rtol=1e-6)


@pytest.mark.slow
def test_match_adam_has_an_rms_of_a_fifth():
    for shape in [(64, 256), (256, 64), (128, 128)]:
        w = {"w": jax.random.normal(jax.random.key(0), shape)}
        tx = mc.muon(1.0, weight_decay=0.0, dimension_numbers=MuonDimensionNumbers())
        updates, _ = tx.update(w, tx.init(w), w)
        rms = float(jnp.sqrt((updates["w"] ** 2).mean()))
        # Polar Express 5 in bfloat16 leaves singular values within about 20% of 1.
        assert abs(rms - 0.2) < 0.04


def test_batches_equal_separate_matrices():
    """Stacked layers and per-head kernels: the result of each matrix alone."""
    x = jax.random.normal(jax.random.key(0), (3, 8, 4, 6))  # [stack, in, heads, head_features]
    numbers = {"w": MuonDimensionNumbers(reduction_axis=1, output_axis=3)}
    tx = optax.chain(
        mc.scale_by_muon(
            dimension_numbers=numbers, newton_schulz=mc.NewtonSchulz(dtype=jnp.float32)
        ),
        mc.scale_by_update_rms(dimension_numbers=numbers),
    )
    batched, _ = tx.update({"w": x}, tx.init({"w": x}))
    single = optax.chain(
        mc.scale_by_muon(newton_schulz=mc.NewtonSchulz(dtype=jnp.float32)), mc.scale_by_update_rms()
    )
    for layer in range(3):
        for head in range(4):
            w = {"w": x[layer, :, head]}
            alone, _ = single.update(w, single.init(w))
            np.testing.assert_allclose(batched["w"][layer, :, head], alone["w"], atol=1e-5)


def test_several_axes_make_one_matrix():
    x = jax.random.normal(jax.random.key(0), (8, 4, 6))
    numbers = MuonDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
    tx = mc.scale_by_muon(
        dimension_numbers=numbers, newton_schulz=mc.NewtonSchulz(dtype=jnp.float32)
    )
    joint, _ = tx.update({"w": x}, tx.init({"w": x}))
    flat = {"w": x.reshape(8, 24)}
    plain = mc.scale_by_muon(newton_schulz=mc.NewtonSchulz(dtype=jnp.float32))
    expected, _ = plain.update(flat, plain.init(flat))
    np.testing.assert_allclose(joint["w"].reshape(8, 24), expected["w"], atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
@pytest.mark.parametrize("mu_dtype", [None, jnp.float32, jnp.bfloat16])
def test_dtypes_are_kept(dtype, mu_dtype):
    params = random_tree(0, {"w": (8, 6)}, dtype)
    tx = mc.scale_by_muon(mu_dtype=mu_dtype)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state)
        chex.assert_trees_all_equal_dtypes(updates, params)
        assert state[0].trace["w"].dtype == (mu_dtype or dtype)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_zero_gradients_give_zero_updates(dtype):
    params = {"w": jnp.zeros((8, 6), dtype)}
    tx = mc.scale_by_muon(newton_schulz=mc.NewtonSchulz(dtype=None))
    updates, state = tx.update(params, tx.init(params))
    chex.assert_trees_all_equal(updates, params)
    chex.assert_tree_all_finite(state)


def test_nan_in_one_matrix_stays_visible_and_there():
    grads = random_tree(0, {"a": (4, 4), "b": (4, 4)})
    grads["a"] = grads["a"].at[0, 0].set(jnp.nan)
    tx = mc.scale_by_muon()
    updates, _ = tx.update(grads, tx.init(grads))
    assert jnp.isnan(updates["a"]).all() and jnp.isfinite(updates["b"]).all()


class Model(nn.Module):
    """Scanned attention layers between an embedding and an unembedding."""

    @nn.compact
    def __call__(self, tokens):
        class Layer(nn.Module):
            @nn.compact
            def __call__(self, x):
                attention = nn.MultiHeadDotProductAttention(
                    2, attention_fn=mc.attention_fn, name="attn"
                )
                return x + attention(nn.RMSNorm(name="norm")(x), sow_weights=True)

        x = nn.Embed(11, 8, name="embed")(tokens)
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = layers(Layer(name="layers"), x, None)
        return nn.Dense(11, name="lm_head")(x)


def model_step(tx):
    model, tokens = Model(), jnp.arange(10).reshape(2, 5)
    params = model.init(jax.random.key(0), tokens)["params"]

    def step(params, state):
        def loss_fn(params):
            logits, sown = model.apply({"params": params}, tokens, mutable=["intermediates"])
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
            return loss.mean(), sown

        (loss, sown), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, max_logits=sown)
        return optax.apply_updates(params, updates), state, loss

    return params, step


@pytest.mark.slow
def test_muonclip_trains_a_scanned_linen_model_in_one_trace():
    tx = mc.muonclip(0.02, layout=mc.layouts.mha(), threshold=0.05)
    params, step = model_step(tx)
    step = jax.jit(chex.assert_max_traces(step, n=1))
    state = jax.jit(tx.init)(params)
    losses = []
    for _ in range(15):
        params, state, loss = step(params, state)
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]
    clip = mc.qk_clip_state(state)
    chex.assert_shape(clip.gamma["layers/attn"], (3, 2))
    assert int(clip.heads_clipped) > 0


def test_muonclip_is_muon_then_qk_clip():
    params = {"attn": {name: {"kernel": jnp.ones((8, 2, 4))} for name in ("query", "key")}}
    params["mlp"] = {"kernel": jnp.eye(8)}
    layout = mc.layouts.mha(value=None, out=None)
    numbers = MuonDimensionNumbers(0, -1)
    maxima = {"attn": {"max_logits": jnp.array([0.5, 7.0])}}
    recipe = mc.muonclip(
        0.02, layout=layout, threshold=2.0, dimension_numbers=numbers, weight_decay=0.3
    )
    chained = optax.chain(
        mc.muon(0.02, dimension_numbers=numbers, weight_decay=0.3),
        mc.qk_clip(layout, 2.0),
    )
    ours, _ = recipe.update(params, recipe.init(params), params, max_logits=maxima)
    theirs, _ = chained.update(params, chained.init(params), params, max_logits=maxima)
    chex.assert_trees_all_equal(ours, theirs)


def test_muonclip_splits_what_its_layout_describes():
    """One matrix per head by default; a recipe that is given numbers keeps to them."""
    keys = dict(zip(("query", "key", "value", "out"), jax.random.split(jax.random.key(0), 4)))  # noqa: B905
    flat = {name: {"kernel": jax.random.normal(key, (8, 8))} for name, key in keys.items()}
    layout = mc.layouts.mha(heads=2)
    numbers = functools.partial(mc.muon_dimension_numbers, layout=layout)
    maxima = {"attn": {"max_logits": jnp.zeros(2)}}
    params = {"attn": flat}

    def update(**options):
        tx = mc.muonclip(
            0.1, layout=layout, newton_schulz=mc.NewtonSchulz(dtype="float32"), **options
        )
        return tx.update(params, tx.init(params), params, max_logits=maxima)[0]

    chex.assert_trees_all_equal(update(), update(dimension_numbers=numbers))
    whole = update(dimension_numbers=mc.muon_dimension_numbers)
    per_head = update()["attn"]["query"]["kernel"]
    assert not np.allclose(per_head, whole["attn"]["query"]["kernel"], atol=1e-3)


def test_learning_rate_schedule_and_other_optimizer():
    """`other` is a value: with SGD there, an embedding moves by exactly -η(g + λw)."""
    params = {"embed": {"embedding": jnp.ones((4, 3))}, "mlp": {"kernel": jnp.eye(3)}}
    tx = mc.muon(lambda count: 0.1 / (count + 1), other=optax.identity(), weight_decay=0.5)
    state = tx.init(params)
    for step in range(2):
        updates, state = tx.update(params, state, params)
        np.testing.assert_allclose(
            updates["embed"]["embedding"], -0.1 / (step + 1) * 1.5, rtol=1e-6
        )


def test_inject_hyperparams_changes_nothing():
    params = {
        "embed": {"embedding": jnp.ones((4, 3))},
        "mlp": {"kernel": jnp.diag(jnp.arange(3.0))},
    }
    make = optax.inject_hyperparams(mc.muon, static_args=("update_rms", "other"))
    plain, injected = mc.muon(0.1), make(learning_rate=0.1)
    expected, _ = plain.update(params, plain.init(params), params)
    updates, state = injected.update(params, injected.init(params), params)
    # The rate arrives as a float32 array instead of a Python float.
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)
    assert float(state.hyperparams["learning_rate"]) == np.float32(0.1)


def test_rules_keep_half_precision():
    half = {"w": jnp.ones((4, 8), jnp.bfloat16)}
    tx = mc.scale_by_update_rms(lambda ins, outs: np.sqrt(ins * outs))
    updates, _ = tx.update(half, tx.init(half))
    assert updates["w"].dtype == jnp.bfloat16
