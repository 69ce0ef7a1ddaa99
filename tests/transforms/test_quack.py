"""QuacK: norms, what is done to the updates, state, wiring and errors."""

import dataclasses
import functools
import operator

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from muonclip_jax import layouts
from muonclip_jax._transforms.quack import quack_state, scale_by_quack
from tests.transforms import quack_reference
from tests.transforms.quack_models import (
    ATTENTION,
    GQA,
    HEADS,
    LATENT,
    MHA,
    MLA,
    MLA_WITH_GAINS,
    NOPE,
    ROPE,
    TAU,
    WIDTH,
    V,
    as_jax,
    attention,
    compiled,
    latent,
    matrices,
    scaled_by_hand,
)


def models(make, count, **options):
    """Different weights, or updates, of one model."""
    rng = np.random.default_rng(0)
    return [as_jax(make(rng, **options)) for _ in range(count)]


# Norms


def query_factors(keys, **options):
    """The queries' factors over τ, `[steps, heads]`, while one block's key kernel, `[in, heads,
    features]`, is each of `keys` in turn, the first being the initial one."""
    init, update = compiled(MHA, **options)
    _, heads, features = keys[0].shape
    (params,) = models(attention, 1, heads=heads, kv_heads=heads, features=features)

    def with_key(key):
        return params | {"attn": params["attn"] | {"key": {"kernel": jnp.asarray(key)}}}

    state, factors = init(with_key(keys[0])), []
    for key in keys:
        _, state = update(with_key(key), state, with_key(key))
        factors.append(np.asarray(state.factors["attn"]["q"]) / TAU)
    return np.stack(factors)


KERNELS_OF_NOTE = {
    "huge": np.full((6, 1, 3), 1e15),
    "tiny": np.full((6, 1, 3), 1e-15),
    "of one entry": np.eye(6, 3)[:, None] * np.eye(1, 3),
    "of rank one": np.multiply.outer(np.arange(6.0), np.ones((1, 3))),
    "with equal singular values": np.eye(6, 3)[:, None],
    "of all sizes": 10.0 ** np.random.default_rng(0).uniform(-30, 15, size=(6, 1, 3)),
}


def test_norms_of_kernels_of_every_kind():
    kernels = np.float32(np.concatenate(list(KERNELS_OF_NOTE.values()), axis=1))
    factors = query_factors([kernels, 5 * kernels, kernels / 100])
    expected = np.array([1, 1 / 5, 100])[:, None] * np.ones(len(KERNELS_OF_NOTE))
    # Size alone changes: float32 rounding of two norms and their ratio.
    np.testing.assert_allclose(factors, expected, rtol=1e-6)


def test_initial_norms_of_stacked_layers_with_biases_and_gains():
    params = latent(np.random.default_rng(0), stack=(2, 3))
    params["attn"]["wkv_a"]["bias"] *= 100  # as large as Qwen2's key biases
    init, _ = compiled(MLA_WITH_GAINS, rule="latent_norm")
    norms = init(as_jax(params)).initial_norms["attn"]
    for layer in np.ndindex(2, 3):
        for role, heads in matrices(LATENT, params, layer).items():
            chex.assert_shape(norms[role], (2, 3, len(heads)))
            # float32: sums of 40 squares, rounded at random.
            np.testing.assert_allclose(
                norms[role][layer], [quack_reference.frobenius(m) for m in heads], rtol=1e-6
            )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_norms_of_half_precision_weights_are_taken_in_float32(dtype):
    (params,) = models(attention, 1, features=64)
    half = as_jax(params, dtype)
    init, _ = compiled(MHA)
    chex.assert_trees_all_equal_dtypes(init(half), init(params))
    # The same numbers, read from half the bytes: the compiler may sum in another order.
    chex.assert_trees_all_close(init(half), init(as_jax(half)), rtol=1e-6)


def test_a_head_that_collapses_or_breaks_gives_its_partner_a_bounded_or_no_factor():
    key = np.float32(np.random.default_rng(0).normal(size=(16, 3, 8)))
    keys = np.stack([key] * 6)
    keys[1, :, 1] = 0
    keys[2, :, 1] *= 1e-5
    keys[4, 0, 1, 0] = np.nan
    expected = np.ones((6, 3))
    expected[[1, 2], 1] = 1000  # a norm counts as at least 1/1000 of the first
    expected[4, 1] = np.nan
    # float32 rounding.
    np.testing.assert_allclose(query_factors(keys), expected, rtol=1e-5)


def spoilt(value):
    """Two stacked layers, in the second of which the keys of head 2 are all `value`."""
    params = attention(np.random.default_rng(0), stack=(2,))
    params["attn"]["key"]["kernel"][1, :, 2] = value
    params["attn"]["key"]["bias"][1, 2] = value
    return as_jax(params)


@pytest.mark.parametrize("value, shown", [(0.0, "of 0.0"), (np.nan, "of nan"), (np.inf, "of ")])
def test_an_initial_norm_that_is_zero_or_not_finite_raises(value, shown):
    with pytest.raises(ValueError) as raised:
        scale_by_quack(MHA).init(spoilt(value))
    for part in ("attn/key/kernel", "(2, 6, 4, 3)", "1 of 8 heads", "(1, 2)", shown, "floor="):
        assert part in str(raised.value)


def test_under_jit_a_zero_initial_norm_is_nan_and_so_are_its_partners_updates():
    init, update = compiled(MHA)
    params = spoilt(0.0)
    state = init(params)
    broken = np.zeros((2, HEADS), bool)
    broken[1, 2] = True
    np.testing.assert_array_equal(np.isnan(state.initial_norms["attn"]["k"]), broken)
    scaled, _ = update(jax.tree.map(jnp.ones_like, params), state, params)
    np.testing.assert_array_equal(np.isnan(scaled["attn"]["query"]["bias"][..., 0]), broken)
    chex.assert_tree_all_finite(scaled["attn"]["key"])


def test_the_floor_counts_small_matrices_as_noise_of_that_size():
    """Keys `[6, 4]` a head that start at zero and grow past a floor of 0.1."""
    ones = np.ones((6, 1, 4), np.float32)  # of norm sqrt(24), as noise of RMS 1
    factors = query_factors([0 * ones, 0.01 * ones, ones], floor=0.1)[:, 0]
    # float32 rounding of two norms and their ratio.
    np.testing.assert_allclose(factors, [1, 1, 0.1], rtol=1e-6)


def test_the_floor_counts_biases_and_gains():
    zeros = jax.tree.map(np.zeros_like, latent(np.random.default_rng(0)))
    init, _ = compiled(MLA_WITH_GAINS, rule="latent_norm", floor=0.1)
    norms = init(as_jax(zeros)).initial_norms["attn"]
    for role, heads in matrices(LATENT, zeros).items():
        rows, columns = heads[0].shape
        noise = (rows * (1 if role.endswith("gain") else columns)) ** 0.5
        np.testing.assert_allclose(norms[role], 0.1 * noise, rtol=1e-6)  # float32 rounding


# Updates


def test_everything_but_queries_and_keys_keeps_its_bits():
    init, update = compiled(MLA)
    first, now, raw = models(latent, 3)
    scaled, _ = update(raw, init(first), now)
    for name in ("wo", "q_norm", "kv_norm"):
        chex.assert_trees_all_equal(scaled["attn"][name], raw["attn"][name])
    before, after = (np.asarray(tree["attn"]["wkv_b"]["kernel"]) for tree in (raw, scaled))
    np.testing.assert_array_equal(before[..., NOPE:], after[..., NOPE:])
    assert (before[..., :NOPE] != after[..., :NOPE]).all()


@pytest.mark.parametrize("compile", [jax.jit, lambda fn: fn], ids=["jit", "eager"])
def test_a_factor_of_exactly_one_leaves_the_bits(compile):
    (params,) = models(attention, 1)
    raw = jax.tree.map(lambda x: np.full(x.shape, 1e-40, np.float32), params)  # subnormal
    tx = scale_by_quack(MHA, 1.0, rule="fixed")
    scaled, _ = compile(tx.update)(as_jax(raw), tx.init(params), params)
    for before, after in zip(*map(jax.tree.leaves, (raw, scaled)), strict=True):
        np.testing.assert_array_equal(before.view(np.uint32), np.asarray(after).view(np.uint32))


def test_fixed_is_a_lower_rate_of_queries_and_keys_and_measures_nothing():
    """Also of what is in front of them, but for the latent that values come from as well."""
    init, update = compiled(MLA_WITH_GAINS, rule="fixed")
    first, now, raw = models(latent, 3)
    state = init(first)
    assert state.initial_norms == {}
    scaled, state = update(raw, state, now)
    by_hand = {role: [TAU] * len(m) for role, m in matrices(LATENT, now).items()}
    del by_hand["q_gain"], by_hand["kv_gain"]
    by_hand["kv_down"] = [1.0] * len(by_hand["kv_down"])
    # One float32 rounding.
    chex.assert_trees_all_close(scaled, scaled_by_hand(LATENT, raw, by_hand), rtol=1e-7)
    for factors in (init(first).factors["attn"], state.factors["attn"]):
        chex.assert_trees_all_close({role: list(x) for role, x in factors.items()}, by_hand)


@pytest.mark.parametrize(
    ("layout", "make", "options"),
    [(MHA, attention, {}), (MLA_WITH_GAINS, latent, {"rule": "latent_norm"})],
    ids=["paper", "latent_norm"],
)
def test_while_the_weights_stay_the_factors_are_tau(layout, make, options):
    """The latent of the values too, which only a fixed rate leaves alone; and before any step."""
    init, update = compiled(layout, **options)
    (params,) = models(make, 1)
    state = init(params)
    expected = jax.tree.map(lambda norm: jnp.full(norm.shape, TAU), state.initial_norms)
    assert {"q", "k"} == expected["attn"].keys() or "kv_down" in expected["attn"]
    chex.assert_trees_all_equal(state.factors, expected)
    for _ in range(2):
        _, state = update(params, state, params)
        # float32 rounding of two norms and their ratio.
        chex.assert_trees_all_close(state.factors, expected, rtol=1e-6)


LAYERS = [functools.partial(jax.tree.map, operator.itemgetter(at)) for at in range(2)]


@pytest.mark.parametrize(
    "layout, make, options",
    [(MLA_WITH_GAINS, latent, {"rule": "latent_norm"}), (MHA, attention, {})],
    ids=["latent_norm", "paper"],
)
def test_stacked_layers_are_layers(layout, make, options):
    init, update = compiled(layout, **options)
    first, now, raw = models(make, 3, stack=(2,))
    stacked = update(raw, init(first), now)
    unrolled = [update(layer(raw), init(layer(first)), layer(now)) for layer in LAYERS]
    # The compiler may sum in another order: float32 rounding of six norms.
    chex.assert_trees_all_close(
        stacked, jax.tree.map(lambda *x: jnp.stack(x), *unrolled), rtol=3e-6, atol=1e-6
    )


def test_fused_kernels_are_their_pieces():
    first, now, raw = models(attention, 3, kv_heads=2)

    def fused(params):
        names = ("query", "key", "value")
        flat = {
            leaf: jnp.concatenate([params["attn"][name][leaf].reshape(shape) for name in names], -1)
            for leaf, shape in (("kernel", (WIDTH, -1)), ("bias", (-1,)))
        }
        return {"attn": {"qkv": flat}}

    init, update = compiled(GQA)
    scaled, _ = update(raw, init(first), now)
    init, update = compiled(layouts.fused_qkv(HEADS, 2, out=None))
    scaled_whole, _ = update(fused(raw), init(fused(first)), fused(now))
    # The compiler may sum in another order: float32 rounding of two norms.
    chex.assert_trees_all_close(scaled_whole, fused(scaled), rtol=1e-6)


def test_several_kinds_of_attention_in_one_model():
    (a,), (b,) = models(attention, 1), models(latent, 1)
    params = {"a": a, "b": b}
    several = (layouts.mha(block="a/*"), dataclasses.replace(MLA, block="b/*"))
    init, update = compiled(several)
    scaled, state = update(params, init(params), params)
    assert set(state.factors) == {"a/attn", "b/attn"}
    for places, name in ((ATTENTION, "a"), (LATENT, "b")):
        by_hand = scaled_by_hand(places, params[name], state.factors[f"{name}/attn"])
        # One float32 rounding.
        chex.assert_trees_all_close(scaled[name], by_hand, rtol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_updates_keep_their_dtype(dtype):
    init, update = compiled(MHA)
    first, now, raw = (as_jax(tree, "bfloat16") for tree in models(attention, 3))
    raw = as_jax(raw, dtype)
    scaled, state = update(raw, init(first), now)
    chex.assert_trees_all_equal_dtypes(scaled, raw)
    by_hand = scaled_by_hand(ATTENTION, as_jax(raw), state.factors["attn"])
    # One rounding of the product, to the updates' dtype.
    chex.assert_trees_all_close(as_jax(scaled), by_hand, rtol=float(jnp.finfo(dtype).eps))


# The chain


def test_weight_decay_is_scaled_only_when_it_comes_before():
    (params,) = models(attention, 1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    quack, decay = scale_by_quack(MHA, 0.5), optax.add_decayed_weights(0.1)
    for links, factor in (((quack, decay), 1.0), ((decay, quack), 0.5)):
        tx = optax.chain(*links)
        decayed, _ = tx.update(zeros, tx.init(params), params)
        for name, expected in (("query", factor), ("value", 1.0)):
            # float32 rounding of a norm's ratio to itself and of two products.
            np.testing.assert_allclose(
                decayed["attn"][name]["kernel"],
                0.1 * expected * params["attn"][name]["kernel"],
                rtol=1e-6,
            )


def test_behind_adam_it_scales_the_step_where_a_scaled_gradient_would_not():
    (params,) = models(attention, 1)
    for links, expected in (
        ((optax.scale_by_adam(), scale_by_quack(MHA, 0.25)), 0.25),
        ((scale_by_quack(MHA, 0.25), optax.scale_by_adam()), 1.0),
    ):
        tx = optax.chain(*links)
        step, _ = tx.update(params, tx.init(params), params)
        # Adam's first step has entries ±1, up to its epsilon of 1e-8 over the gradient.
        np.testing.assert_allclose(jnp.abs(step["attn"]["query"]["bias"]), expected, rtol=1e-5)
        np.testing.assert_allclose(jnp.abs(step["attn"]["value"]["bias"]), 1, rtol=1e-5)


def train(tx, make, steps):
    """Some steps with donated buffers; checks that one compilation without host traffic does."""
    (params,) = models(make, 1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.sin, params), state, params)
        return optax.apply_updates(params, updates), state

    chex.clear_trace_counter()
    state = tx.init(params)
    initial_norms = jax.tree.map(np.array, quack_state(state).initial_norms)
    text = step.lower(params, state).as_text()
    assert "callback" not in text and "outfeed" not in text
    for _ in range(steps):
        params, state = step(params, state)
    chex.assert_trees_all_equal(quack_state(state).initial_norms, initial_norms)
    return params, state


@pytest.mark.parametrize(
    "layout, make, options",
    [
        (MLA_WITH_GAINS, latent, {"rule": "latent_norm"}),
        (MHA, attention, {}),
        (MHA, attention, {"rule": "fixed"}),
    ],
    ids=["latent_norm", "paper", "fixed"],
)
def test_one_trace_no_callback_and_states_that_can_be_donated(layout, make, options):
    tx = optax.chain(scale_by_quack(layout, 0.5, **options), optax.scale(-0.01))
    chex.assert_tree_all_finite(train(tx, make, steps=2))


def test_a_schedule_through_inject_hyperparams():
    schedule = optax.linear_schedule(1.0, 0.5, 2)
    tx = optax.inject_hyperparams(scale_by_quack)(MHA, relative_learning_rate=schedule, floor=0.01)
    _, state = train(optax.chain(tx, optax.scale(-1e-7)), attention, steps=3)
    for factor in jax.tree.leaves(quack_state(state).factors):
        # The weights moved by 1e-7 of their size.
        np.testing.assert_allclose(factor, 0.5, rtol=1e-5)


def test_a_restored_state_keeps_the_norms_of_the_first_weights():
    init, update = compiled(MHA)
    first, now, raw = models(attention, 3)
    _, state = update(raw, init(first), now)
    restored = flax.serialization.from_bytes(init(now), flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored.initial_norms, init(first).initial_norms)
    chex.assert_trees_all_equal(update(raw, restored, now), update(raw, state, now))


def test_nnx_optimizer_and_linen_trees():
    model = nnx.Dict(attn=nnx.MultiHeadAttention(4, 8, decode=False, rngs=nnx.Rngs(0)))
    tx = optax.chain(scale_by_quack(MHA, 0.5), optax.sgd(1.0))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    params = nnx.state(model, nnx.Param)
    before = jax.tree.map(np.array, nnx.to_pure_dict(params))
    grads = jax.tree.map(jnp.ones_like, before)

    linen = {"params": before}
    updates, linen_state = jax.jit(tx.update)({"params": grads}, jax.jit(tx.init)(linen), linen)
    for name, step in (("query", 0.5), ("key", 0.5), ("value", 1.0), ("out", 1.0)):
        # float32 rounding of two norms and their ratio.
        np.testing.assert_allclose(updates["params"]["attn"][name]["kernel"], -step, rtol=1e-6)

    as_state = jax.tree.map(jnp.ones_like, params)
    nnx.jit(lambda model, optimizer, grads: optimizer.update(model, grads))(
        model, optimizer, as_state
    )
    after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    moved = optax.apply_updates(before, updates["params"])
    # One float32 rounding of weights and steps of order 1.
    chex.assert_trees_all_close(after, moved, atol=1e-6)
    chex.assert_trees_all_close(
        quack_state(optimizer.opt_state), quack_state(linen_state), rtol=1e-6
    )


def test_quack_state_is_found_once_or_raises():
    (params,) = models(attention, 1)
    quack = scale_by_quack(MHA)
    found = quack_state(optax.chain(optax.scale_by_adam(), quack).init(params))
    chex.assert_trees_all_equal(found, quack.init(params))
    for links, count in ((optax.identity(),), 0), ((quack, quack), 2):
        with pytest.raises(ValueError, match=f"found {count}"):
            quack_state(optax.chain(*links).init(params))


# Errors


@pytest.mark.parametrize(
    "error, options, parts",
    [
        (ValueError, {"rule": "algorithm_2"}, ["rule", "algorithm_2", "latent_norm"]),
        (ValueError, {"relative_learning_rate": 0}, ["relative_learning_rate", "above 0"]),
        (ValueError, {"relative_learning_rate": -1.0}, ["relative_learning_rate", "-1.0"]),
        (ValueError, {"relative_learning_rate": np.nan}, ["relative_learning_rate", "nan"]),
        (ValueError, {"relative_learning_rate": np.inf}, ["relative_learning_rate", "inf"]),
        (TypeError, {"relative_learning_rate": [1.0, 2.0]}, ["relative_learning_rate", "2.0"]),
        (TypeError, {"relative_learning_rate": lambda step: 1.0}, ["inject_hyperparams"]),
        (ValueError, {"floor": -0.1}, ["floor", "-0.1"]),
        (TypeError, {"floor": "small"}, ["floor", "small"]),
        (TypeError, {"layout": "mha"}, ["layout", "layouts.mha()"]),
    ],
)
def test_wrong_options_raise_when_built(error, options, parts):
    with pytest.raises(error) as raised:
        scale_by_quack(**{"layout": MHA} | options)
    for part in parts:
        assert part in str(raised.value)


def with_qk_norm(rng):
    params = attention(rng)
    params["attn"]["q_norm"] = {"scale": np.ones(3)}
    return params


WITHOUT_K_ROPE = dataclasses.replace(
    MLA, pieces=[piece for piece in MLA.pieces if piece.role != "k_rope"]
)
ONE_GAIN = layouts.mla(NOPE, ROPE, V, key_value_norm="kv_norm")


@pytest.mark.parametrize(
    "layout, rule, make, parts",
    [
        (MHA, "paper", with_qk_norm, ["attn/q_norm/scale"]),
        (MHA, "latent_norm", attention, ["attn", "latent_norm", 'rule="paper"']),
        (MLA, "latent_norm", latent, ["attn", "kv_gain", "q_gain", 'query_norm="q_norm"']),
        (ONE_GAIN, "latent_norm", latent, ["attn", "no q_gain", 'query_norm="q_norm"']),
        (WITHOUT_K_ROPE, "paper", latent, ["attn", "k_rope", "block="]),
    ],
)
def test_models_that_do_not_fit_raise(layout, rule, make, parts):
    (params,) = models(make, 1)
    with pytest.raises(ValueError) as raised:
        scale_by_quack(layout, rule=rule).init(params)
    for part in parts:
        assert part in str(raised.value)


def test_fixed_takes_a_qk_norm():
    """Behind a norm, too, a smaller step is a smaller step."""
    init, update = compiled(MHA, rule="fixed")
    params, raw = models(with_qk_norm, 2)
    scaled, _ = update(raw, init(params), params)
    # One float32 rounding.
    chex.assert_trees_all_close(
        scaled["attn"]["query"], jax.tree.map(lambda u: TAU * u, raw["attn"]["query"]), rtol=1e-7
    )


def test_an_update_without_params_raises():
    (params,) = models(attention, 1)
    tx = scale_by_quack(MHA)
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        tx.update(params, tx.init(params))


def test_inside_a_partition_it_raises():
    """Where the partner's weights are out of sight."""
    (params,) = models(attention, 1)
    labels = {"attn": {"query": "a", "key": "b", "value": "b", "out": "b"}, "mlp": "b"}
    tx = optax.partition({"a": scale_by_quack(MHA), "b": optax.identity()}, labels)
    with pytest.raises(ValueError, match="key"):
        tx.init(params)


def test_a_hybrid_takes_each_kind_by_its_own_rule():
    """With norms on its latents, MLA by `latent_norm`; plain attention beside it by the paper."""
    rng = np.random.default_rng(0)
    local, other = (as_jax(make(rng)["attn"]) for make in (attention, latent))
    params = {"local": {"attn": local}, "global": {"attn": other}}
    layout = [
        dataclasses.replace(MHA, block="local/*"),
        dataclasses.replace(MLA_WITH_GAINS, block="global/*"),
    ]
    grown = jax.tree.map(lambda x: 3 * x, params)
    raw = jax.tree.map(jnp.ones_like, params)

    def factors(layout, rule, names):
        tx = scale_by_quack(layout, TAU, rule=rule)
        first, now, given = ({k: tree[k] for k in names} for tree in (params, grown, raw))
        return tx.update(given, tx.init(first), now)[1].factors

    both = factors(layout, "latent_norm", params)
    alone = factors(layout[0], "paper", ["local"]) | factors(layout[1], "latent_norm", ["global"])
    chex.assert_trees_all_equal(both, alone)
    assert set(both) == {"local/attn", "global/attn"}


def test_hyperparameters_of_half_precision():
    """`inject_hyperparams` casts them to the parameters' dtype."""
    params = as_jax(attention(np.random.default_rng(0)), jnp.bfloat16)
    make = optax.inject_hyperparams(scale_by_quack, static_args=("layout", "rule"))
    tx = make(MHA, relative_learning_rate=0.5)
    scaled, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(scaled["mlp"], params["mlp"])
    # τ = 0.5 and norms as they were: halves, exact in any dtype.
    expected = jax.tree.map(lambda x: x / 2, params["attn"]["key"])
    chex.assert_trees_all_equal(scaled["attn"]["key"], expected)


def test_latent_attention_without_positions():
    """No rotary queries and keys: one path, q_down · q_nope · k_nope · kv_down."""
    rng = np.random.default_rng(0)
    shapes = {
        "wq_a": (WIDTH, 6),
        "wq_b": (6, HEADS, NOPE),
        "wkv_a": (WIDTH, 5),
        "wkv_b": (5, HEADS, NOPE + V),
        "wo": (HEADS, V, WIDTH),
    }
    kernels = {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()}
    tx = scale_by_quack(layouts.mla(NOPE, 0, V), rule="paper")
    params = as_jax({"attn": kernels})
    state = tx.init(params)
    grown = jax.tree.map(lambda x: x, params)
    grown["attn"]["wkv_b"]["kernel"] = params["attn"]["wkv_b"]["kernel"].at[..., :NOPE].mul(4.0)
    _, state = tx.update(params, state, grown)
    factors = quack_state(state).factors["attn"]
    np.testing.assert_allclose(factors["q_nope"], 0.25, rtol=1e-6)
    np.testing.assert_allclose(factors["k_nope"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(factors["kv_down"], 0.25, rtol=1e-6)
