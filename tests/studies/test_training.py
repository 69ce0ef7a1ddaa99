"""Training runs and their optimizers, against plain loops and the package's recipes."""

from dataclasses import replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from studies.common import training
from studies.common.model import ModelConfig, attention_layout, init_params
from studies.common.optimizers import Optimizer
from studies.common.training import Plan, Setting, loss_and_sown, probed

MODEL = ModelConfig(
    vocab_size=257, d_model=16, layers=2, heads=2, kv_heads=2, rope=8, v=8, d_ff=16, init_std=0.3
)
PLAN = Plan("package", steps=6, batch=2, context=16, measure_every=3, valid_batches=2)
SETTING = Setting(MODEL, Optimizer(learning_rate=0.03, threshold=0.5, warmup=2))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CACHE", tmp_path_factory.mktemp("cache"))
        return training.load_text(PLAN, MODEL.vocab_size)


@pytest.fixture(scope="module")
def run(text):
    return training.train(SETTING, PLAN, text, seed=3)


@pytest.fixture(scope="module")
def start():
    """Parameters, gradients of a batch, and what was sown."""

    @jax.jit
    def make():
        params = init_params(MODEL, 3)
        tokens = jnp.arange(18, dtype=jnp.int32).reshape(2, 9)
        return params, *jax.grad(loss_and_sown, has_aux=True)(params, MODEL, tokens)

    return make()


@pytest.mark.slow
def test_a_run_is_the_plain_loop(run, text, start):
    tx = SETTING.optimizer.chain(MODEL)
    valid = training.data.validation_batches(text, context=16, batch=2, count=2)

    @jax.jit
    def step(params, opt_state, batch):
        (loss, sown), grads = jax.value_and_grad(loss_and_sown, has_aux=True)(params, MODEL, batch)
        updates, opt_state = tx.update(grads, opt_state, params, max_logits=sown)
        before = probed(params, MODEL, valid[0][:1])
        params = optax.apply_updates(params, updates)
        change = abs(probed(params, MODEL, valid[0][:1]) - before).max(axis=(1, 2, 3, 4))
        maxima = mc.read_max_logits(sown)["layers", "attn"]
        return params, opt_state, {"loss": loss, "max_logits": maxima, "logit_change": change}

    params, _, _ = start
    opt_state = tx.init(params)
    for i, batch in enumerate(training.training_batches(text, PLAN, seed=3)):
        params, opt_state, numbers = step(params, opt_state, batch)
        # Newton–Schulz is in bfloat16, which a program compiled otherwise rounds otherwise: the
        # directions differ by up to 1%, of steps that change these numbers by up to half.
        for name, value in numbers.items():
            np.testing.assert_allclose(run["curves"][name][i], value, rtol=0.03, err_msg=name)
    assert [each["step"] for each in run["measurements"]] == [0, 3, 6]
    losses = [each["valid_loss"] for each in run["measurements"]]
    # Nothing is known at first, and logits of variance 16 * 0.3² add half of that.
    assert losses[0] == pytest.approx(np.log(257) + 8 * 0.3**2, rel=0.1) and losses[2] < losses[0]
    assert (run["curves"]["max_logits"] > 0.5).any()  # it did clip


@pytest.mark.slow
def test_key_ratios_are_those_of_each_batch(run, text, start):
    ratios, losses = [], []
    for batch in training.data.validation_batches(text, context=16, batch=2, count=2):
        logits, _, keys = jax.jit(training.queries_and_keys, static_argnums=1)(
            start[0], MODEL, batch[:, :-1]
        )
        rows = np.asarray(keys, np.float64).transpose(0, 3, 1, 2, 4).reshape(2, 2, 32, 8)
        values = np.linalg.svd(rows, compute_uv=False)
        ratios.append(values.sum(-1) ** 2 / (values**2).sum(-1))
        logits = np.asarray(logits, np.float64)
        right = np.take_along_axis(logits, batch[:, 1:, None], axis=-1)[..., 0]
        losses.append(np.mean(np.log(np.exp(logits).sum(-1)) - right))
    # float32 logits and keys.
    first = run["measurements"][0]
    np.testing.assert_allclose(first["key_ratio"], np.mean(ratios, axis=0), rtol=1e-4)
    np.testing.assert_allclose(first["valid_loss"], np.mean(losses), rtol=1e-4)


def test_settings_see_the_same_batches_and_seeds_others(text):
    first, again, other = (training.training_batches(text, PLAN, seed) for seed in (0, 0, 1))
    assert first.shape == (6, 2, 17)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_epochs_see_every_window_once(text):
    count = len(training.data.windows(text.train, PLAN.context))
    plan = replace(PLAN, steps=2 * count // 2, measure_every=count)  # two epochs of `count` windows
    batches = training.training_batches(text, plan, 0).reshape(2, count, -1)
    for epoch in batches:
        np.testing.assert_array_equal(
            np.sort(epoch[:, :-1].ravel()), np.sort(text.train[: count * PLAN.context])
        )


def test_a_plan_measures_at_its_end():
    with pytest.raises(ValueError, match="6 steps do not divide by 4"):
        replace(PLAN, measure_every=4)


def test_a_sweep_over_numbers_compiles_once(start):
    @jax.jit
    @chex.assert_max_traces(n=1)
    def update(optimizer, params, grads, sown):
        tx = optimizer.chain(MODEL)
        return tx.update(grads, tx.init(params), params, max_logits=sown)[0]

    optimizer = Optimizer(direction="adam", threshold=1e9, warmup=0)
    slow = update(optimizer, *start)
    fast = update(replace(optimizer, learning_rate=0.1), *start)
    # All but the rounding of products with another number.
    chex.assert_trees_all_close(jax.tree.map(lambda u: 10 * u, slow), fast, rtol=1e-5)


LAYOUT = attention_layout(MODEL)
WHOLE = {"dimension_numbers": mc.muon_dimension_numbers}


def all_but_scales(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "scale" not in str(path[-1]), params)


RECIPES = {
    "per-head Muon": (
        Optimizer(direction="per_head_muon", update_rms="jordan"),
        mc.muon(1e-2, layout=LAYOUT, update_rms="jordan"),
    ),
    "Muon, all heads clipped": (
        Optimizer(threshold=0.1, scope="layer"),
        mc.muonclip(1e-2, layout=LAYOUT, threshold=0.1, scope="layer", **WHOLE),
    ),
    "lower Q and K rate": (
        Optimizer(quack="fixed", relative_learning_rate=0.1, other_rate=0.5),
        mc.quack(
            1e-2,
            layout=LAYOUT,
            rule="fixed",
            relative_learning_rate=0.1,
            direction=mc.muon_direction(
                other=optax.chain(optax.scale_by_adam(b2=0.95), optax.scale(0.5)), **WHOLE
            ),
        ),
    ),
    "AdamClip": (
        Optimizer(direction="adam", threshold=0.1),
        optax.chain(
            optax.adamw(1e-2, b2=0.95, weight_decay=0.1, mask=all_but_scales),
            mc.qk_clip(LAYOUT, 0.1),
        ),
    ),
}


@pytest.mark.parametrize(("optimizer", "recipe"), RECIPES.values(), ids=RECIPES)
def test_optimizers_are_the_recipes(optimizer, recipe, start):
    def update(tx):
        def first(params, grads, sown):
            return tx.update(grads, tx.init(params), params, max_logits=sown)[0]

        return jax.jit(first)(*start)

    ours = update(replace(optimizer, warmup=0).chain(MODEL))
    # The same programs but for a learning rate that is a schedule.
    chex.assert_trees_all_close(ours, update(recipe), rtol=1e-5, atol=1e-8)


def test_decay_of_queries_and_keys_leaves_the_rest_alone(start):
    params, grads, sown = start
    for direction in ("muon", "adam"):
        optimizer = Optimizer(direction=direction, decay_of="queries_and_keys", warmup=0)

        @jax.jit
        def decay(optimizer):
            free = replace(optimizer, weight_decay=0.0)
            with_decay, without = (
                tx.update(grads, tx.init(params), params, max_logits=sown)[0]
                for tx in (optimizer.chain(MODEL), free.chain(MODEL))
            )
            return jax.tree.map(jnp.subtract, with_decay, without)

        found = decay(optimizer)
        decayed = {"wq", "wk"}
        attention = dict(found["layers"]["attn"])
        for name in decayed:
            # λη W, less the rounding of the update that it was added to, of at most 0.1.
            expected = -1e-2 * 0.1 * params["layers"]["attn"][name]["kernel"]
            chex.assert_trees_all_close(attention.pop(name)["kernel"], expected, atol=1e-7)
        rest = {**found, "layers": {**found["layers"], "attn": attention}}
        chex.assert_trees_all_equal(rest, jax.tree.map(jnp.zeros_like, rest))


def test_decay_of_queries_and_keys_needs_kernels_of_their_own():
    optimizer = Optimizer(decay_of="queries_and_keys")
    for attention in ("latent", "fused"):
        with pytest.raises(ValueError, match=f"{attention} attention has kernels that values"):
            optimizer.chain(replace(MODEL, attention=attention, nope=8))


def test_the_rate_falls_to_nothing_at_its_end():
    optimizer = Optimizer(learning_rate=2.0, warmup=2, decay_steps=6)
    expected = [2 / 3, 4 / 3, 2, 1.5, 1, 0.5, 0, 0]
    np.testing.assert_allclose(optimizer.rate(jnp.arange(8)), expected, rtol=1e-6)


def test_warm_up_is_linear_and_ends():
    optimizer = Optimizer(learning_rate=1.0, warmup=3)
    np.testing.assert_allclose(optimizer.rate(jnp.arange(6)), [0.25, 0.5, 0.75, 1, 1, 1])
