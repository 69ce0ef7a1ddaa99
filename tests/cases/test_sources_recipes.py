"""Where recipes were not what their sources say: each shown case, and two more of its kind."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.recipes import published

NOPE, ROPE, V, HEADS, LATENT, COMPRESSED, WIDTH = 6, 4, 5, 3, 8, 10, 24
LAYOUT = mc.layouts.mla(NOPE, ROPE, V)
SHAPES = {
    "wq_a": (WIDTH, COMPRESSED),
    "wq_b": (COMPRESSED, HEADS * (NOPE + ROPE)),
    "wkv_a": (WIDTH, LATENT + ROPE),
    "wkv_b": (LATENT, HEADS * (NOPE + V)),
    "wo": (HEADS * V, WIDTH),
}
SETTINGS = published.Settings(learning_rate=0.02, weight_decay=0.1, momentum=0.95, threshold=10.0)
# Twelve steps bring all singular values to 1: what is left is float32 rounding.
CONVERGED = mc.NewtonSchulz(mc.schedules.polar_express(12), dtype="float32", method="standard")


def tree(arrays):
    return {"attn": {name: {"kernel": jnp.asarray(x)} for name, x in arrays.items()}}


def arrays(params):
    return {name: np.asarray(leaf["kernel"], np.float64) for name, leaf in params["attn"].items()}


def normal(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


# MuonClip


def one_step(recipe, layout, start, grads, maxima, **options):
    tx = recipe(
        SETTINGS.learning_rate,
        layout=layout,
        threshold=SETTINGS.threshold,
        weight_decay=SETTINGS.weight_decay,
        momentum=SETTINGS.momentum,
        **options,
    )
    params = tree(start)
    sown = {"attn": {"max_logits": jnp.asarray(maxima)}}
    updates, _ = jax.jit(tx.update)(tree(grads), tx.init(params), params, max_logits=sown)
    return arrays(optax.apply_updates(params, updates))


def apart(got, expected, start):
    """The worst distance, as a share of the step."""
    return max(
        np.linalg.norm(got[n] - expected[n]) / np.linalg.norm(expected[n] - start[n]) for n in got
    )


clip_latent = functools.partial(
    published.clip_latent, query="wq_b", key_value="wkv_b", nope=NOPE, rope=ROPE, v=V
)


def test_kimi_muonclip_is_the_box_of_its_source():
    start, grads, maxima = normal(0), normal(1), np.array([40.0, 10.0, 3.0])
    expected = published.train(start, [grads], [maxima], SETTINGS, clip_latent)
    step = functools.partial(
        one_step, layout=LAYOUT, start=start, grads=grads, maxima=maxima, newton_schulz=CONVERGED
    )
    assert apart(step(mc.kimi_muonclip), expected, start) < 1e-5
    assert apart(step(mc.muonclip), expected, start) > 0.1  # per head, and with Nesterov


def test_kimi_muonclip_on_kernels_stored_as_out_in():
    """Equinox's [heads*features, in]: n and m change places, and nothing else does."""
    features, names = 5, ("query_proj", "key_proj", "value_proj")
    shapes = {name: (HEADS * features, WIDTH) for name in names}
    projections = dict(zip(("query", "key", "value"), names, strict=True))
    layout = mc.layouts.mha(heads=HEADS, transposed=True, out=None, **projections)
    start, grads, maxima = normal(0, shapes), normal(1, shapes), np.array([15.0, 2.0, 80.0])

    def turned(kernels):
        return {name: x.T for name, x in kernels.items()}

    clip = functools.partial(
        published.clip_plain, query="query_proj", key="key_proj", features=features
    )
    expected = turned(published.train(turned(start), [turned(grads)], [maxima], SETTINGS, clip))
    got = one_step(mc.kimi_muonclip, layout, start, grads, maxima, newton_schulz=CONVERGED)
    assert apart(got, expected, start) < 1e-5


def test_kimi_muonclip_on_scanned_layers():
    """Each layer's kernel is one matrix, and each has its own maxima."""
    layers = [(normal(2 * i), normal(2 * i + 1)) for i in range(3)]
    maxima = np.array([[40.0, 10.0, 3.0], [3.0, 11.0, 3.0], [1.0, 2.0, 3.0]])
    expected = [
        published.train(start, [grads], [s], SETTINGS, clip_latent)
        for (start, grads), s in zip(layers, maxima, strict=True)
    ]
    starts, grads = (
        {name: np.stack([x[name] for x in each]) for name in SHAPES}
        for each in zip(*layers, strict=True)
    )
    got = one_step(mc.kimi_muonclip, LAYOUT, starts, grads, maxima, newton_schulz=CONVERGED)
    for i, one in enumerate(expected):
        assert apart({n: x[i] for n, x in got.items()}, one, layers[i][0]) < 1e-5


# A lower rate of queries and keys


def factors_of_a_fixed_rate(layout, params):
    """What each entry of an update of ones becomes at a tenth of the rate, by piece."""
    tx = mc.scale_by_quack(layout, 0.1, rule="fixed")
    ones = jax.tree.map(jnp.ones_like, params)
    updates, state = jax.jit(tx.update)(ones, tx.init(params), params)
    pieces = mc.head_matrices(updates, layout)["attn"]
    found = {role: tuple(np.unique(x).tolist()) for role, x in pieces.items()}
    told = mc.quack_state(state).factors["attn"]
    for role, x in told.items():  # the state says what was done
        assert tuple(np.unique(x).tolist()) == found[role]
    return found


TENTH, WHOLE = (float(np.float32(0.1)),), (1.0,)


def test_a_fixed_rate_leaves_the_latent_of_the_values():
    found = factors_of_a_fixed_rate(LAYOUT, tree(normal(0)))
    slow = ("q_down", "q_nope", "q_rope", "k_nope", "k_rope")
    assert found == dict.fromkeys(slow, TENTH) | dict.fromkeys(("kv_down", "v", "o"), WHOLE)


def test_a_fixed_rate_leaves_it_without_query_compression():
    shapes = {
        "wq": (WIDTH, HEADS * (NOPE + ROPE)),
        **{name: SHAPES[name] for name in ("wkv_a", "wkv_b", "wo")},
    }
    layout = mc.layouts.mla(NOPE, ROPE, V, query="wq")
    found = factors_of_a_fixed_rate(layout, tree(normal(0, shapes)))
    slow = ("q_nope", "q_rope", "k_nope", "k_rope")
    assert found == dict.fromkeys(slow, TENTH) | dict.fromkeys(("kv_down", "v", "o"), WHOLE)


def test_a_fixed_rate_leaves_the_values_of_a_fused_kernel_and_the_latents_bias():
    layout = mc.layouts.fused_qkv(HEADS, out=None)
    found = factors_of_a_fixed_rate(layout, tree({"qkv": np.ones((WIDTH, 3 * HEADS * 4))}))
    assert found == {"q": TENTH, "k": TENTH, "v": WHOLE}
    params = tree(normal(0))
    params["attn"]["wkv_a"]["bias"] = jnp.ones(LATENT + ROPE)
    tx = mc.scale_by_quack(LAYOUT, 0.1, rule="fixed")
    updates, _ = tx.update(params, tx.init(params), params)
    expected = [1.0] * LATENT + [np.float32(0.1)] * ROPE
    np.testing.assert_array_equal(updates["attn"]["wkv_a"]["bias"], expected)


def decay_of(tx, params, layout):
    """By piece, the share of the weight that a step without a gradient takes away."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(tx.update)(zeros, tx.init(params), params)
    shares = jax.tree.map(lambda u, p: -u / p, updates, params)
    pieces = mc.head_matrices(shares, layout)["attn"]
    return {role: tuple({round(float(x), 6) for x in np.ravel(x)}) for role, x in pieces.items()}


@pytest.mark.parametrize(
    ("options", "slow"),
    [
        ({"rule": "fixed"}, 0.01),
        ({"rule": "fixed", "scale_weight_decay": True}, 0.01),
        ({"rule": "fixed", "scale_weight_decay": False}, 0.1),
        ({"rule": "paper"}, 0.1),
        ({"rule": "paper", "scale_weight_decay": True}, 0.01),
    ],
    ids=str,
)
def test_a_lower_rate_lowers_the_decay_too(options, slow):
    """As in `W ← W − η (O + λ W)`; QuacK itself leaves it alone."""
    params = tree(normal(0))
    tx = mc.quack(
        1.0, layout=LAYOUT, relative_learning_rate=0.1, direction=optax.identity(), **options
    )
    found = decay_of(tx, params, LAYOUT)
    of_values = {"v": (0.1,), "o": (0.1,)}
    if options["rule"] == "fixed":
        of_values["kv_down"] = (0.1,)
    assert found == dict.fromkeys(found, (slow,)) | of_values


def test_a_lower_rate_lowers_the_decay_of_grouped_queries_too():
    layout, shapes = mc.layouts.gqa(2, heads=4), {"query": (12, 20), "key": (12, 10)}
    shapes |= {"value": (12, 10), "out": (20, 12)}
    tx = mc.quack(
        0.5,
        layout=layout,
        relative_learning_rate=0.5,
        rule="fixed",
        direction=optax.scale_by_adam(),
        weight_decay=0.2,
    )
    found = decay_of(tx, tree(normal(0, shapes)), layout)
    assert found == {"q": (0.05,), "k": (0.05,), "v": (0.1,), "o": (0.1,)}


def test_a_fixed_rate_is_the_optimizer_with_a_lower_rate():
    """Step and decay: as if queries and keys had been given to `muon` with a tenth of the rate."""
    layout, names = mc.layouts.mha(heads=HEADS), ("query", "key", "value", "out")
    shapes = dict.fromkeys(names, (15, 15))
    params = tree(normal(0, shapes))
    fixed = mc.quack(
        0.1,
        layout=layout,
        relative_learning_rate=0.1,
        rule="fixed",
        direction=mc.muon_direction(layout=layout, newton_schulz=CONVERGED),
    )
    plain = {rate: mc.muon(rate, layout=layout, newton_schulz=CONVERGED) for rate in (0.1, 0.01)}
    state, states = fixed.init(params), {rate: tx.init(params) for rate, tx in plain.items()}
    for step in range(2):
        grads = tree(normal(1 + step, shapes))
        updates, state = jax.jit(fixed.update)(grads, state, params)
        by_rate = {}
        for rate, tx in plain.items():
            by_rate[rate], states[rate] = jax.jit(tx.update)(grads, states[rate], params)
        for name in names:
            rate = 0.01 if name in ("query", "key") else 0.1
            # One float32 multiplication more.
            np.testing.assert_allclose(
                updates["attn"][name]["kernel"], by_rate[rate]["attn"][name]["kernel"], rtol=1e-6
            )
        params = optax.apply_updates(params, updates)


# The size of an update


def update_rms(spectrum, newton_schulz=mc.NewtonSchulz()):  # noqa: B008 (frozen)
    """The RMS of an update of match_adam whose momentum has these singular values."""
    rng, n = np.random.default_rng(0), len(spectrum)
    u, v = (np.linalg.qr(rng.normal(size=(n, n)))[0] for _ in range(2))
    momentum = {"kernel": jnp.asarray((u * spectrum) @ v.T, jnp.float32)}
    tx = optax.chain(mc.scale_by_orthogonalization(newton_schulz), mc.scale_by_update_rms())
    update, _ = tx.update(momentum, tx.init(momentum))
    return float(jnp.sqrt(jnp.mean(jnp.square(update["kernel"]))))


K = np.arange(1, 513)
LONGER = mc.NewtonSchulz(mc.schedules.polar_express(12), dtype="float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spectrum", "default", "longer"),
    [
        (np.ones(512), 0.200, 0.200),
        (1 / K, 0.193, 0.200),
        (1 / K**2, 0.047, 0.139),
        (np.where(K <= 8, 1.0, 0.0), 0.028, 0.2 * (8 / 512) ** 0.5),
    ],
    ids=["flat", "1/k", "1/k²", "rank 8"],
)
def test_the_rms_of_an_update_goes_by_its_spectrum(spectrum, default, longer):
    """The table of `scale_by_update_rms`, to the digits it has."""
    assert abs(update_rms(spectrum) - default) < 7e-4
    assert abs(update_rms(spectrum, LONGER) - longer) < 7e-4


def test_more_steps_in_bfloat16_raise_rounding_errors():
    """Of rank 8 only 0.025 can come from the momentum."""
    how = mc.NewtonSchulz(mc.schedules.polar_express(12))
    assert update_rms(np.where(K <= 8, 1.0, 0.0), how) > 0.1
