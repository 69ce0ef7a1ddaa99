"""Accumulation: equal to one large batch, one execution of the optimizer for each real step."""

import functools
from typing import NamedTuple

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives, dots, flops

# Milliseconds of run time: compiling fast is all that counts.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})

EVERY, STEPS, BATCH, LENGTH, VOCAB, WIDTH, HEADS, LAYERS = 4, 3, 4, 8, 16, 16, 4, 2

# Float32 rounds at 6e-8, and a mean of means sums in another order than one mean. Newton–Schulz
# enlarges such a difference by at most its slope at zero, 1e3, times the learning rate of 0.02.
TOLERANCE = 1e-5


# ---- Equal to one large batch: a small model, trained


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(
            HEADS, use_bias=False, attention_fn=mc.attention_fn, name="attn"
        )
        x = x + attention(nn.RMSNorm(name="attn_norm")(x), sow_weights=True)
        return x + nn.Dense(WIDTH, use_bias=False, name="mlp")(nn.RMSNorm(name="mlp_norm")(x))


class Model(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(VOCAB, WIDTH, name="embed")(tokens)
        layers = nn.scan(
            lambda layer, x, _: (layer(x), None),
            variable_axes={"params": 0, "intermediates": 0},
            split_rngs={"params": True},
            length=LAYERS,
        )
        x, _ = layers(Layer(name="layers"), x, None)
        return nn.Dense(VOCAB, use_bias=False, name="lm_head")(x)


TOKENS = np.random.default_rng(0).integers(0, VOCAB, (STEPS, EVERY, BATCH, LENGTH))
PARAMS = Model().init(jax.random.key(0), TOKENS[0, 0])["params"]
THRESHOLD = 2.9  # some heads reach it, and not with the same micro-batch: see the first test
RATE = optax.linear_schedule(0.02, 0.005, STEPS)


def gradients(params, tokens):
    """Of the loss; and the max logits."""

    def loss(params):
        logits, sown = Model().apply({"params": params}, tokens, mutable=["intermediates"])
        targets = jnp.roll(tokens, -1, axis=1)
        return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean(), sown

    return jax.grad(loss, has_aux=True)(params)


def chain():
    layout = mc.find_layout(PARAMS)
    # Adam divides by the gradient's size, and gradients that are rounding only by eps.
    other = optax.scale_by_adam(eps=1e-3)
    direction = mc.muon_direction(
        layout=layout, newton_schulz=mc.NewtonSchulz(dtype="float32"), other=other
    )
    return optax.chain(
        mc.quack(RATE, layout=layout, direction=direction),
        mc.qk_clip(layout, THRESHOLD),
    )


class Run(NamedTuple):
    params: chex.ArrayTree
    clips: list  # the `QKClipState` of each real step
    state: chex.ArrayTree


def train(tx, batches) -> Run:
    """Scans over the micro-batches of each real step: batches are [steps, micro, batch, T]."""
    chex.clear_trace_counter()

    @functools.partial(quick_jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def real_step(params, state, batches):
        def micro_step(carry, tokens):
            params, state = carry
            grads, sown = gradients(params, tokens)
            updates, state = tx.update(grads, state, params, max_logits=sown)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(micro_step, (params, state), batches)
        return params, state

    params, clips = jax.tree.map(jnp.copy, PARAMS), []
    state = tx.init(params)
    for micro_batches in batches:
        params, state = real_step(params, state, micro_batches)
        clips.append(jax.tree.map(np.asarray, mc.qk_clip_state(state)))
    return Run(params, clips, state)


@functools.cache
def trained(how) -> Run:
    if how == "one batch":
        return train(chain(), TOKENS.reshape(STEPS, 1, EVERY * BATCH, LENGTH))
    wrap = {"accumulate": mc.accumulate, "MultiSteps": optax.MultiSteps}[how]
    return train(wrap(chain(), EVERY), TOKENS)


def test_micro_batches_are_one_batch():
    accumulated, at_once = trained("accumulate"), trained("one batch")
    chex.assert_trees_all_close(accumulated.params, at_once.params, atol=TOLERANCE, rtol=0)
    for ours, theirs in zip(accumulated.clips, at_once.clips, strict=True):
        chex.assert_trees_all_close(ours, theirs, atol=TOLERANCE, rtol=0)
    # Momentum, Adam's moments, QuacK's norms, and the count that the learning rate is made of.
    inner = mc.accumulate_state(accumulated.state).inner_state
    chex.assert_trees_all_close(inner, at_once.state, atol=TOLERANCE, rtol=0)


@pytest.mark.slow
def test_heads_were_clipped_by_micro_batches_other_than_the_last():
    """The comparison above can fail."""
    run = trained("accumulate")
    clipped = np.stack([clip.gamma["layers/attn"] < 1 for clip in run.clips])
    assert 0 < clipped.sum() < clipped.size
    _, sown = quick_jit(gradients)(PARAMS, TOKENS[0, -1])
    last = mc.read_max_logits(sown)["layers", "attn"]
    assert np.any(clipped[0] & (last < THRESHOLD))
    # MultiSteps sees the last micro-batch's only.
    wrong, right = trained("MultiSteps"), trained("one batch")
    difference = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), wrong.params, right.params)
    assert max(jax.tree.leaves(difference)) > 100 * TOLERANCE


@pytest.mark.slow
def test_nnx():
    class Block(nnx.Module):
        def __init__(self, rngs):
            self.attn = nnx.MultiHeadAttention(
                HEADS,
                WIDTH,
                decode=False,
                use_bias=False,
                attention_fn=mc.attention_fn,
                rngs=rngs,
            )

        def __call__(self, x):
            return x + self.attn(x, sow_weights=True)

    def trained(batches, wrap):
        chex.clear_trace_counter()
        model = Block(nnx.Rngs(0))
        tx = wrap(
            mc.muonclip(
                0.02,
                layout=mc.layouts.mha(),
                threshold=4.0,
                newton_schulz=mc.NewtonSchulz(dtype="float32"),
            )
        )
        optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

        @nnx.jit
        @chex.assert_max_traces(n=1)
        def train_step(model, optimizer, x):
            def loss_fn(model):
                y, sown = nnx.capture(lambda model: model(x), nnx.Intermediate)(model)
                return jnp.sin(3 * y).mean(), sown

            grads, sown = nnx.grad(loss_fn, has_aux=True)(model)
            optimizer.update(model, grads, max_logits=sown)

        for x in batches:
            train_step(model, optimizer, x)
        return nnx.state(model, nnx.Param), optimizer.opt_state

    batches = jax.random.normal(jax.random.key(0), (2, BATCH, LENGTH, WIDTH))
    params, state = trained(batches, lambda tx: mc.accumulate(tx, 2))
    expected, plain_state = trained(batches.reshape(1, -1, LENGTH, WIDTH), lambda tx: tx)
    chex.assert_trees_all_close(params, expected, atol=TOLERANCE, rtol=0)
    assert 0 < int(mc.qk_clip_state(state).heads_clipped) < HEADS
    chex.assert_trees_all_close(
        mc.qk_clip_state(state), mc.qk_clip_state(plain_state), atol=TOLERANCE, rtol=0
    )
    assert bool(mc.accumulate_state(state).has_updated)


# ---- One execution for each real step


def kernels(key=0, dtype=jnp.float32):
    """One attention block at `attn`, and a matrix."""
    shapes = {"query": (8, 4, 6), "key": (8, 4, 6), "value": (8, 4, 6), "out": (4, 6, 8)}
    keys = iter(jax.random.split(jax.random.key(key), 5))
    kernel = lambda shape: {"kernel": jax.random.normal(next(keys), shape, dtype)}  # noqa: E731
    return {"attn": jax.tree.map(kernel, shapes, is_leaf=lambda x: isinstance(x, tuple)),
            "mlp": kernel((8, 12))}  # fmt: skip


MAXIMA = jnp.array([400.0, 1.0, 50.0, 200.0])


def sown(maxima=MAXIMA):
    return {"attn": {"max_logits": jnp.asarray(maxima)}}


def muonclip(**options):
    return mc.muonclip(
        0.01, layout=mc.layouts.mha(), newton_schulz=mc.NewtonSchulz(dtype="float32"), **options
    )


def counting(calls: list) -> optax.GradientTransformation:
    """Does nothing and says so each time that it is executed."""

    def update(updates, state, params=None):
        jax.debug.callback(lambda: calls.append("executed"))
        return updates, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def compiled_update(tx):
    params = kernels()
    update = quick_jit(lambda s, p: tx.update(p, s, p, max_logits=sown()))
    return update.lower(tx.init(params), params).compile()


@pytest.mark.slow
def test_newton_schulz_is_executed_once_for_a_real_step():
    executions, of_every_micro_step, of_a_real_step = {}, {}, {}
    once = flops(dots(compiled_update(muonclip())))
    assert once > 0
    for wrap in (mc.accumulate, optax.MultiSteps):
        calls = []
        tx = wrap(optax.chain(counting(calls), muonclip()), EVERY)
        update = compiled_update(tx)
        params, state = kernels(), tx.init(kernels())
        for _ in range(2 * EVERY):
            _, state = update(state, params)
        jax.effects_barrier()
        name, products = wrap.__name__, dots(update)
        executions[name] = len(calls)
        of_every_micro_step[name] = flops(d for d in products if not d.conditional)
        of_a_real_step[name] = flops(d for d in products if d.conditional)
    assert executions == {"accumulate": 2, "MultiSteps": 2 * EVERY}
    assert of_every_micro_step == {"accumulate": 0, "MultiSteps": once}
    assert of_a_real_step == {"accumulate": once, "MultiSteps": 0}


def test_traced_once():
    traces = []

    def update(updates, state, params=None):
        traces.append("traced")
        return updates, state

    tx = mc.accumulate(optax.GradientTransformation(lambda _: optax.EmptyState(), update), 2)
    params = {"w": jnp.ones(3)}
    jax.jit(tx.update).lower(params, tx.init(params))
    assert traces == ["traced"]


# ---- The mean


def run(tx, gradients, params=None, **extra_args):
    """The updates of each micro-batch, and the last state."""
    params = jax.tree.map(jnp.zeros_like, gradients[0]) if params is None else params
    state, given = tx.init(params), []
    update = quick_jit(tx.update)
    for gradient in gradients:
        updates, state = update(gradient, state, params, **extra_args)
        given.append(updates)
    return given, state


def mean_of(gradients, **options):
    *waiting, updates = run(mc.accumulate(optax.identity(), len(gradients), **options), gradients)[
        0
    ]
    assert not any(np.any(x) for x in jax.tree.leaves(waiting))
    return updates


@settings(max_examples=20)
@given(st.integers(1, 9), st.integers(0, 10**6), st.floats(-30, 30))
def test_mean_against_float64(k, seed, exponent):
    values = np.random.default_rng(seed).normal(size=(k, 5)) * 10.0**exponent
    values = values.astype(np.float32)
    mean = mean_of_rows(values)
    # Each micro-batch rounds three times, at the size of the mean or of a value.
    tolerance = 3 * k * np.finfo(np.float32).eps * np.abs(values).max()
    np.testing.assert_allclose(mean, values.astype(np.float64).mean(0), rtol=0, atol=tolerance)


def mean_of_rows(values):
    """Of any number of rows with one compiled program: `every` is beyond them."""
    state = mc.accumulate(optax.identity(), 100).init(values[0])
    for row in values:
        _, state = update_of_rows(row, state)
    return state.mean


@quick_jit
def update_of_rows(row, state):
    return mc.accumulate(optax.identity(), 100).update(row, state)


@pytest.mark.parametrize("value", [1 / 3, 3e38, -1e-37, 0.0])
def test_mean_of_equal_values_is_exact_and_does_not_overflow(value):
    gradient = np.full(3, value, np.float32)
    for k in (3, 7):
        np.testing.assert_array_equal(mean_of_rows([gradient] * k), gradient)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_gradients_are_summed_in_float32(dtype):
    large = 6e4  # of which float16 cannot hold the sum of two
    gradients = [jnp.full(2, x, dtype) for x in [large] + [1.0] * 31]
    mean = mean_of(gradients)
    chex.assert_type(mean, dtype)
    exact = np.float64([large, *[1.0] * 31]).mean()
    # One rounding to the gradients' dtype, of the number given and of the mean.
    np.testing.assert_allclose(np.float64(mean), exact, rtol=1.01 * float(jnp.finfo(dtype).eps))


@pytest.mark.parametrize(
    ("dtype", "option", "expected"),
    [
        (jnp.float32, None, jnp.float32),
        (jnp.bfloat16, None, jnp.float32),
        (jnp.float16, None, jnp.float32),
        (jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (jnp.float32, "bfloat16", jnp.bfloat16),
    ],
)
def test_accumulator_dtype(dtype, option, expected):
    tx = mc.accumulate(optax.sgd(1.0), 2, accumulator_dtype=option)
    (zeros, updates), state = run(tx, [jnp.ones(2, dtype), 3 * jnp.ones(2, dtype)])
    chex.assert_type([state.mean, zeros, updates], [expected, dtype, dtype])
    np.testing.assert_array_equal(np.float32(updates), -2)


def test_a_mean_stored_in_bfloat16_is_computed_in_float32():
    rows = np.random.default_rng(0).normal(size=(4, 1000)).astype(np.float32)
    tx = mc.accumulate(optax.identity(), 4, accumulator_dtype=jnp.bfloat16)
    _, state = run(tx, list(rows))
    expected = np.zeros(1000)
    for count, row in enumerate(rows):
        mean = expected + (row.astype(np.float64) - expected) / (count + 1)
        expected = mean.astype(jnp.bfloat16).astype(np.float64)
    # Rounded to bfloat16 once for each micro-batch: nothing else can be seen.
    np.testing.assert_array_equal(np.float64(state.mean), expected)


def test_float64():
    with jax.enable_x64(True):
        gradients = [jnp.array([x]) for x in (1.0, 1e-12, 0.5)]
        mean = mean_of(gradients)
        chex.assert_type(mean, jnp.float64)
        np.testing.assert_allclose(mean, np.mean(gradients, axis=0), rtol=1e-15)


def test_updates_keep_the_dtype_that_the_optimizer_gives_them():
    tx = mc.accumulate(optax.add_decayed_weights(0.1), 2)  # float32, of the parameters
    gradient = {"w": jnp.ones(3, jnp.bfloat16)}
    updates, _ = run(tx, [gradient] * 2, {"w": jnp.ones(3)})
    chex.assert_type([u["w"] for u in updates], jnp.float32)


def test_the_optimizers_state_keeps_the_dtype_of_init():
    tx = mc.accumulate(optax.scale_by_adam(), 2)
    params = {"w": jnp.ones(3, jnp.bfloat16)}
    state = tx.init(params)
    _, after = run(tx, [{"w": jnp.ones(3)}] * 2, params)
    chex.assert_trees_all_equal_dtypes(after, state)
    assert float(after.inner_state.mu["w"][0]) > 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_forgotten_after_its_real_step(bad):
    tx = mc.accumulate(optax.identity(), 2)
    gradients = [jnp.array([x, 1.0]) for x in (bad, 1.0, 2.0, 3.0)]
    (_, first, _, second), _ = run(tx, gradients)
    assert not np.isfinite(first[0]) and float(first[1]) == 1
    np.testing.assert_array_equal(second, [2.5, 1])


# ---- The maximum


def clipping():
    return optax.chain(optax.sgd(0.1), mc.qk_clip(mc.layouts.mha()))


@quick_jit
def clip_after_three(state, maxima):
    tx = mc.accumulate(clipping(), 3)
    return tx.update(kernels(), state, kernels(), max_logits=sown(maxima))


@pytest.mark.slow
@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("where", range(3))
def test_a_fault_in_any_micro_batch_is_counted_once_and_clips_nothing(bad, where):
    state, counts = mc.accumulate(clipping(), 3).init(kernels()), []
    for micro_step in range(6):
        maxima = np.array([150.0, -3.0, -np.inf, 1.0], np.float32)
        maxima[1] = bad if micro_step == where else -3.0
        _, state = clip_after_three(state, maxima)
        clip = mc.qk_clip_state(state)
        counts.append((int(clip.nonfinite_heads), int(clip.heads_clipped)))
    assert counts == [(0, 0), (0, 0), (1, 1), (1, 1), (1, 1), (1, 1)]
    np.testing.assert_array_equal(clip.max_logits["attn"], [150, -3, -np.inf, 1])


def test_nans_are_kept_however_many_heads_there_are():
    """XLA's maximum drops NaNs from some vectorized reductions; this one it must not."""
    heads = 100
    kernel = {"kernel": jnp.ones((2, heads, 1))}
    params = {"attn": {"query": kernel, "key": kernel}}
    tx = mc.accumulate(mc.qk_clip(mc.layouts.mha(value=None, out=None)), 3)
    maxima = np.arange(3 * heads, dtype=np.float32).reshape(3, heads)
    maxima[0, ::3] = maxima[1, 1::3] = np.nan
    state = tx.init(params)
    update = jax.jit(lambda s, maxima: tx.update(params, s, params, max_logits=sown(maxima)))
    for row in maxima:
        _, state = update(state, row)
    np.testing.assert_array_equal(mc.qk_clip_state(state).max_logits["attn"], maxima.max(0))


@pytest.mark.parametrize(
    "form",
    [
        lambda maxima: {"intermediates": {"attn": {"max_logits": (maxima,)}}},
        lambda maxima: {("attn",): maxima},
        lambda maxima: {"attn": {"op": {"max_logits": maxima}}},  # a sub-module of the block
        lambda maxima: {"attn": {"max_logits": jnp.stack([maxima, maxima - 1])}},  # a batch
    ],
    ids=["Linen", "read_max_logits", "sub-module", "batch"],
)
def test_every_form_of_max_logits(form):
    tx = mc.accumulate(clipping(), 2)
    state = tx.init(kernels())
    update = quick_jit(lambda s, m: tx.update(kernels(), s, kernels(), max_logits=form(m)))
    for maxima in (MAXIMA, MAXIMA[::-1]):
        _, state = update(state, maxima)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(kernels()))
    np.testing.assert_array_equal(
        mc.qk_clip_state(state).max_logits["attn"], np.maximum(MAXIMA, MAXIMA[::-1])
    )


def test_blocks_of_several_clips_and_one_that_is_left_out():
    params = {name: kernels()["attn"] for name in ("a", "b", "c")}
    tx = mc.accumulate(
        optax.chain(*(mc.qk_clip(mc.layouts.mha(block=name), 10.0) for name in ("a", "b"))), 2
    )
    state = tx.init(params)
    assert set(state.maxima["max_logits"]) == {"a", "b"}
    update = quick_jit(lambda s, sown: tx.update(params, s, params, max_logits=sown))
    for scale in (1.0, 0.1):
        sown = {
            ("a",): scale * MAXIMA,
            ("b",): scale * MAXIMA[::-1],
            ("c",): jnp.ones(7),  # of which nobody knows how many heads it has
        }
        updates, state = update(state, sown)
    moved = optax.apply_updates(params, updates)
    for name, maxima in (("a", MAXIMA), ("b", MAXIMA[::-1])):
        gamma = np.minimum(1, 10 / maxima)[:, None]
        np.testing.assert_allclose(
            moved[name]["key"]["kernel"], 2 * params[name]["key"]["kernel"] * gamma**0.5, rtol=1e-6
        )
    chex.assert_trees_all_close(moved["c"], jax.tree.map(lambda x: 2 * x, params["c"]))


def test_a_block_inside_a_block_has_its_own_maxima():
    params = {"outer": {**kernels()["attn"], "inner": kernels(1)["attn"]}}
    tx = mc.accumulate(mc.qk_clip(mc.layouts.mha()), 2)
    state = tx.init(params)
    update = quick_jit(lambda s, sown: tx.update(params, s, params, max_logits=sown))
    for scale in (1.0, 0.1):
        _, state = update(
            state, {("outer", "inner"): scale * MAXIMA, ("outer",): scale * MAXIMA[::-1]}
        )
    maxima = mc.qk_clip_state(state).max_logits
    np.testing.assert_array_equal(maxima["outer"], MAXIMA[::-1])
    np.testing.assert_array_equal(maxima["outer/inner"], MAXIMA)


def test_maxima_of_attention_that_the_layout_leaves_out_are_not_the_block_s():
    """Only the inner attention sows. qk_clip raises, and so it does when accumulated."""
    params = {"outer": {**kernels()["attn"], "inner": kernels(1)["attn"]}}
    layout = [mc.layouts.mha(block="outer"), mc.layouts.ignore("outer/inner")]
    for tx in (mc.qk_clip(layout), mc.accumulate(mc.qk_clip(layout), 2)):
        with pytest.raises(ValueError, match="outer has query and key kernels but sowed no"):
            tx.update(params, tx.init(params), params, max_logits={("outer", "inner"): MAXIMA})


def test_without_a_clip_max_logits_are_ignored():
    tx = mc.accumulate(optax.sgd(1.0), 2)
    (_, updates), state = run(tx, [jnp.ones(2)] * 2, max_logits=jnp.ones(()))
    np.testing.assert_array_equal(updates, -1)
    assert state.maxima == {}


# ---- How many


def test_one_micro_batch_is_the_optimizer_itself():
    params = kernels()
    plain, accumulated = muonclip(), mc.accumulate(muonclip(), 1)
    state = accumulated.init(params)
    for _ in range(2):
        expected, _ = quick_jit(plain.update)(params, state.inner_state, params, max_logits=sown())
        updates, state = quick_jit(accumulated.update)(params, state, params, max_logits=sown())
        # The same operations, fused otherwise.
        chex.assert_trees_all_close(updates, expected, rtol=1e-6, atol=1e-7)
        assert bool(state.has_updated)


@pytest.mark.parametrize("every", [np.int64(3), lambda step: 3])
def test_has_updated(every):
    tx = mc.accumulate(optax.sgd(1.0), every)
    state, seen = tx.init(jnp.zeros(2)), []
    assert not bool(state.has_updated)
    update = quick_jit(tx.update)
    for _ in range(7):
        _, state = update(jnp.ones(2), state)
        seen.append((bool(state.has_updated), int(state.step), int(state.micro_step)))
    assert seen == [
        (False, 0, 1), (False, 0, 2), (True, 1, 0),
        (False, 1, 1), (False, 1, 2), (True, 2, 0), (False, 2, 1),
    ]  # fmt: skip


def test_growing_batches():
    """1, 2, 3, ... micro-batches for the real steps, and never fewer than one."""
    tx = mc.accumulate(optax.identity(), lambda step: step)
    updates, _ = run(tx, [jnp.float32(x) for x in (7, 1, 2, 4, 1, 2, 9)])
    np.testing.assert_array_equal(updates, [7, 1, 0, 3, 0, 0, 4])


# ---- Inside and outside of others


def test_schedules_count_real_steps_under_inject_hyperparams():
    make = optax.inject_hyperparams(optax.sgd)
    tx = mc.accumulate(make(lambda count: 10.0 ** -count.astype(jnp.float32)), 2)
    updates, state = run(tx, [jnp.float32(1)] * 6)
    np.testing.assert_allclose(updates, [0, -1, 0, -0.1, 0, -0.01], rtol=1e-6)
    np.testing.assert_allclose(state.inner_state.hyperparams["learning_rate"], 0.01, rtol=1e-6)


def test_apply_if_finite_outside_drops_a_micro_batch_inside_a_real_step():
    gradients = [jnp.float32(x) for x in (1, np.nan, 3, 5)]
    finite = functools.partial(optax.apply_if_finite, max_consecutive_errors=9)
    outside, _ = run(finite(mc.accumulate(optax.identity(), 2)), gradients)
    np.testing.assert_array_equal(outside, [0, 0, 2, 0])
    inside, _ = run(mc.accumulate(finite(optax.identity()), 2), gradients)
    np.testing.assert_array_equal(inside, [0, 0, 0, 4])


def test_inside_a_partition():
    """Masked leaves on both sides, and other parameters that step each time."""
    params = {"a": jnp.zeros(2), "b": {"c": jnp.zeros(3)}}
    tx = optax.partition(
        {"few": mc.accumulate(optax.sgd(1.0), 2), "all": optax.sgd(1.0)}, {"a": "few", "b": "all"}
    )
    updates, state = run(tx, [jax.tree.map(jnp.ones_like, params)] * 2, params)
    np.testing.assert_array_equal([u["a"] for u in updates], [[0, 0], [-1, -1]])
    np.testing.assert_array_equal([u["b"]["c"] for u in updates], -np.ones((2, 3)))
    assert bool(mc.accumulate_state(state).has_updated)


def test_other_extra_arguments_are_the_last_micro_batch_s():
    def update(updates, state, params=None, *, value, name, **extra_args):
        assert name == "not an array"
        return jax.tree.map(lambda u: u * value, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx = mc.accumulate(inner, 2)
    state, seen = tx.init(jnp.zeros(2)), []
    for value in (3.0, 5.0):
        updates, state = tx.update(jnp.ones(2), state, value=value, name="not an array")
        seen.append(float(updates[0]))
    assert seen == [0, 5]


def test_a_state_of_random_keys_and_boxed_parameters():
    params = {"w": nn.Partitioned(jnp.ones(3), names=("x",))}
    tx = mc.accumulate(optax.chain(optax.add_noise(0.1, 0.5, jax.random.key(0)), optax.sgd(1.0)), 2)
    updates, state = run(tx, [params] * 2, params)
    chex.assert_trees_all_equal_structs(updates[-1], state.mean, params)
    assert np.ptp(updates[-1]["w"].value) > 0


def test_replicas_under_shard_map_wait_and_step_together():
    """Each device has its own examples; gradients and maxima are reduced, then accumulated."""
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = mc.accumulate(mc.qk_clip(mc.layouts.mha(), 100.0), 2)
    params, state = kernels(), tx.init(kernels())

    @quick_jit
    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=(P(), P()))
    def update(state, maxima):
        everywhere = {("attn",): jax.lax.pmax(maxima[0], "data")}
        return tx.update(params, state, params, max_logits=everywhere)

    for scale in (1.0, 0.5):
        maxima = scale * MAXIMA * jnp.arange(8.0)[:, None] / 7
        updates, state = update(state, maxima)
    gamma = np.minimum(1, 100 / MAXIMA)[:, None]
    np.testing.assert_allclose(
        optax.apply_updates(params, updates)["attn"]["query"]["kernel"],
        2 * params["attn"]["query"]["kernel"] * gamma**0.5,
        rtol=1e-6,
    )


@pytest.mark.parametrize("scope", ["head", "layer"])
def test_heads_spread_by_hand(scope):
    """A layer's factor is the same on all devices, the state's may differ: one type for both."""
    mesh = jax.make_mesh((4,), ("tp",), axis_types=(AxisType.Auto,))
    clip = functools.partial(mc.qk_clip, mc.layouts.mha(value=None, out=None), 1.0, scope=scope)
    params = {"attn": {name: {"kernel": jnp.ones((4, 8, 2))} for name in ("query", "key")}}
    maxima = jnp.linspace(1, 3, 8)
    split = {1: P("tp"), 3: P(None, "tp")}
    specs = lambda tree: jax.tree.map(lambda x: split.get(x.ndim, P()), tree)  # noqa: E731
    tx = mc.accumulate(clip(heads_axis_name="tp"), 2)
    state = tx.init(params)

    @quick_jit
    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(specs(params), specs(state), P("tp")),
        out_specs=(specs(params), specs(state)),
    )
    def update(params, state, maxima):
        return tx.update(params, state, params, max_logits={("attn",): maxima})

    alone = clip()
    expected, _ = alone.update(params, alone.init(params), params, max_logits={("attn",): maxima})
    for scale in (1.0, 0.5):
        updates, state = update(params, state, scale * maxima)
    chex.assert_trees_all_close(updates, expected, rtol=1e-6)


# ---- Sharded

SPECS = {
    "attn": {
        **{name: {"kernel": P("fsdp", "tp")} for name in ("query", "key", "value")},
        "out": {"kernel": P("tp", None, "fsdp")},
    },
    "mlp": {"kernel": P("fsdp", "tp")},
}


class Sharded(NamedTuple):
    params: chex.ArrayTree
    states: list[mc.AccumulateState]  # after each micro-batch
    program: jax.stages.Compiled


@functools.cache
def sharded_steps(mesh=None):
    """Two real steps."""
    chex.clear_trace_counter()
    place = lambda x, spec: x if mesh is None else jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    params = jax.tree.map(place, kernels(), SPECS)
    tx = mc.accumulate(muonclip(shardings=jax.tree.map(lambda p: p.sharding, params)), 2)
    state, states = tx.init(params), []

    @functools.partial(quick_jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state, maxima):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = tx.update(grads, state, params, max_logits=sown(maxima))
        return optax.apply_updates(params, updates), state

    for scale in (1.0, 0.1, 0.2, 3.0):
        maxima = place(scale * MAXIMA, P("tp"))
        params, state = step(params, state, maxima)
        states.append(jax.tree.map(jnp.copy, state))
    return Sharded(params, states, step.lower(params, state, maxima).compile())


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
def test_sharded(kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind, kind))
    with jax.set_mesh(mesh):
        run = sharded_steps(mesh)
    expected = sharded_steps()
    chex.assert_trees_all_close(run[:2], expected[:2], atol=TOLERANCE, rtol=0)
    assert [int(mc.qk_clip_state(state).heads_clipped) for state in run.states] == [0, 2, 2, 3]
    for state in run.states:
        same = jax.tree.map(
            lambda x, spec: x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim),
            state.mean,
            SPECS,
        )
        assert all(jax.tree.leaves(same)), same
        replicated = state.maxima["max_logits"]["attn"].sharding.is_fully_replicated
        assert replicated or kind is AxisType.Auto  # where the compiler chooses
    # Nothing but the heads' maxima travels before the real step.
    travels = collectives(run.program)
    assert any(each.conditional for each in travels)
    assert sum(each.bytes for each in travels if not each.conditional) <= MAXIMA.nbytes


def test_an_optimizer_that_moves_its_updates_on_an_explicit_mesh():
    """The branches of a condition must agree in their types, and shardings are types there."""
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):

        def update(updates, state, params=None):
            moved = jax.sharding.reshard(updates, P("b"))
            return moved, moved

        inner = optax.GradientTransformation(lambda params: jnp.zeros_like(params), update)
        gradient = jax.sharding.reshard(jnp.ones((8, 4)), P("a", "b"))
        updates, state = run(mc.accumulate(inner, 2), [gradient, 3 * gradient])
    np.testing.assert_array_equal(updates[1], 2)
    for x in (*updates, state.mean, state.inner_state):
        assert x.sharding == gradient.sharding


# ---- Errors: what is wrong raises with the first micro-batch


@pytest.mark.parametrize(
    ("extra_args", "words"),
    [
        ({}, "qk_clip got no max_logits"),
        ({"max_logits": {}}, "No value named 'max_logits'"),
        ({"max_logits": {"mlp": {"max_logits": MAXIMA}}}, "sown in mlp, where the layout finds no"),
        ({"max_logits": sown(jnp.ones(3))}, r"attn sowed max_logits of shape \(3,\)"),
    ],
)
def test_wrong_max_logits(extra_args, words):
    tx = mc.accumulate(muonclip(), 3)
    with pytest.raises(ValueError, match=words):
        jax.jit(tx.update)(kernels(), tx.init(kernels()), kernels(), **extra_args)


def test_missing_params():
    tx = mc.accumulate(muonclip(), 3)
    with pytest.raises(ValueError, match="params"):
        tx.update(kernels(), tx.init(kernels()), max_logits=sown())
