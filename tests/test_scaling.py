"""Scaling rules against their formulas, against what they speak of, and against each other."""

import dataclasses
import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings

import muonclip_jax as mc
from muonclip_jax.scaling import Size, Tuned, transfer

RULES = ("none", "jordan", "unit_rms_norm", "match_adam", "spectral")


@pytest.mark.parametrize(("ins", "outs"), [(64, 256), (256, 64), (96, 96)])
def test_shape_scales_are_those_of_the_article_and_of_the_link(ins, outs):
    """Su Jianlin writes W as [out, in]; these are for [in, out]."""
    published = {
        "none": 1.0,
        "jordan": math.sqrt(max(1, outs / ins)),
        "unit_rms_norm": math.sqrt(outs / ins),
        "match_adam": 0.2 * math.sqrt(max(outs, ins)),
    }
    update = {"kernel": jnp.ones((ins, outs))}
    for rule, scale in published.items():
        tx = mc.scale_by_update_rms(rule)
        scaled, _ = tx.update(update, tx.init(update))
        assert mc.scaling.shape_scale(rule, ins, outs) == pytest.approx(scale, rel=1e-12)
        np.testing.assert_allclose(scaled["kernel"], scale, rtol=1e-6)
    assert mc.scaling.shape_scale(lambda i, o: i / o, ins, outs) == ins / outs


@pytest.mark.parametrize("rule", RULES)
def test_rms_of_muons_updates_is_that_of_orthogonal_matrices(rule):
    noise = jax.random.normal(jax.random.key(0), (48, 160))
    exact = mc.orthogonalize(noise, mc.schedules.polar_express(12), dtype="float32")
    rms = float(jnp.sqrt(jnp.mean(exact**2))) * mc.scaling.shape_scale(rule, 48, 160)
    assert mc.scaling.muon_update_rms(rule, 48, 160) == pytest.approx(rms, rel=1e-4)
    rate = mc.scaling.match_rate(1e-3, rule, 48, 160, rms=0.25)
    assert rate * rms == pytest.approx(1e-3 * 0.25, rel=1e-4)


@pytest.mark.parametrize(("b1", "signal"), [(0.0, 0.0), (0.5, 0.0), (0.9, 0.0), (0.9, 0.25)])
def test_adams_rms_is_that_of_a_simulation(b1, signal):
    """20,000 entries of independent noise with a mean; b2 so near 1 that v is its mean square. Of
    the mean over entries 1% is five standard errors."""
    entries, steps = 20_000, 200
    tx = optax.scale_by_adam(b1=b1, b2=0.9999, eps=0.0)
    mean = math.sqrt(signal)

    def step(state, key):
        update, state = tx.update(mean + jax.random.normal(key, (entries,)), state)
        return state, jnp.mean(update**2)

    keys = jax.random.split(jax.random.key(1), steps)
    _, squares = jax.jit(lambda: jax.lax.scan(step, tx.init(jnp.zeros(entries)), keys))()
    found = float(jnp.sqrt(jnp.mean(squares[steps // 2 :])))
    assert mc.scaling.adam_update_rms(b1, signal) == pytest.approx(found, rel=0.01)


def test_an_average_of_noise_has_the_same_square_root():
    """By the sum of its weights' squares, (1 - b)² Σ b^2k, in float64."""
    for b in (0.5, 0.9, 0.95):
        weights = (1 - b) * b ** np.arange(10_000)
        of_sum = math.sqrt((weights**2).sum())
        assert mc.scaling.adam_update_rms(b) == pytest.approx(of_sum, rel=1e-12)
    assert mc.scaling.adam_update_rms(0.9) == pytest.approx(0.2294, abs=1e-4)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(64, 64), (64, 256), (256, 64), (16, 64)])
def test_mup_keeps_the_norm_that_activations_see(rule, shape):
    """η · ‖update‖₂ / sqrt(out/in) is the same for both shapes, whatever grows."""
    ins, outs = shape
    for large in ((4 * ins, 4 * outs), (ins, 4 * outs), (4 * ins, outs)):
        ratio = mc.scaling.muon_by_width(rule, shape, large)
        seen = [
            rate * mc.scaling.shape_scale(rule, i, o) / math.sqrt(o / i)
            for rate, (i, o) in ((1.0, shape), (ratio, large))
        ]
        assert seen[0] == pytest.approx(seen[1], rel=1e-12)
    square = mc.scaling.muon_by_width(rule, (64, 64), (256, 256))
    assert square == pytest.approx(0.5 if rule in ("match_adam", "spectral") else 1.0)


def test_powers_are_the_published_ones():
    by_kind = {"hidden": (-1, -0.5), "embedding": (0, 0), "unembedding": (-1, -1), "vector": (0, 0)}
    for kind, (rate, std) in by_kind.items():
        assert mc.scaling.adam_by_width(kind, 8.0) == pytest.approx(8.0**rate)
        assert mc.scaling.init_by_width(kind, 8.0) == pytest.approx(8.0**std)
    assert mc.scaling.residual_by_depth(16, 0.5) == mc.scaling.rate_by_depth(16, 0.5) == 0.25
    assert mc.scaling.residual_by_depth(16) == 1 / 16 and mc.scaling.rate_by_depth(16) == 1
    assert mc.scaling.rate_by_length(2.0) == pytest.approx(2**-0.32)
    assert mc.scaling.decay_product(width=4, batch=2, length=8) == pytest.approx(2 / 32)
    assert mc.scaling.rate_by_batch(8, 32) == 2 and mc.scaling.rate_by_batch(8, 32, power=1) == 4


def test_a_critical_batch_lies_between_the_power_and_none():
    far, near, below = (
        mc.scaling.rate_by_batch(8, 32, power=1, critical=b) for b in (1e9, 16.0, 1e-9)
    )
    assert far == pytest.approx(4) and below == pytest.approx(1)
    assert near == pytest.approx((1 + 16 / 8) / (1 + 16 / 32))


def test_betas_keep_their_memory_in_tokens():
    """1/(1 - β) steps of a batch: four times the batch, a quarter of the steps."""
    assert 1 / (1 - mc.scaling.beta_by_batch(0.99, 4)) == pytest.approx(25)
    with pytest.raises(ValueError, match=r"beta 0\.9 has no counterpart at 16 times the batch"):
        mc.scaling.beta_by_batch(0.9, 16)


def test_arrays_and_traced_numbers_go_through():
    ratios = jnp.array([1.0, 4.0])
    np.testing.assert_allclose(mc.scaling.adam_by_width("hidden", ratios), [1, 0.25])
    np.testing.assert_allclose(jax.jit(mc.scaling.rate_by_batch)(ratios, 4.0), [2, 1])
    np.testing.assert_allclose(mc.scaling.decay_product(width=np.array([1.0, 2.0])), [1, 0.5])
    assert jax.jit(mc.scaling.beta_by_batch)(0.9, 2.0) == pytest.approx(0.8)


TUNED = Tuned(0.02, 0.1, 3e-3, init_std=0.06, b1=0.9, b2=0.95)
SMALL, LARGE = Size(64, 2, 512, 300), Size(256, 8, 1024, 1200)


def test_transfer_by_hand():
    """Widths × 4, depths × 4, batches × 2, tokens × 8."""
    t = transfer(TUNED, SMALL, LARGE, depth_power=0.5, length_power=0.32)
    both = math.sqrt(2) * 8**-0.32
    muon = both * 0.5 * 0.5  # match_adam over widths, sqrt over depths
    expected = Tuned(
        learning_rate=0.02 * muon,
        weight_decay=0.1 * (2 / 4) / muon,
        other_learning_rate=3e-3 * both,
        init_std=0.03,
        logit_multiplier=0.25,
        residual_multiplier=0.5,
        b1=0.8,
        b2=0.9,
    )
    assert dataclasses.astuple(t) == pytest.approx(dataclasses.astuple(expected), rel=1e-12)
    length = transfer(TUNED, SMALL, LARGE, update_rms="unit_rms_norm", decay="length")
    assert length.learning_rate == pytest.approx(0.02 * math.sqrt(2))
    # What the decay takes off in the whole run is the same.
    taken = [
        t.learning_rate * t.weight_decay * s.steps for t, s in ((TUNED, SMALL), (length, LARGE))
    ]
    assert taken[0] == pytest.approx(taken[1], rel=1e-12)
    fixed = transfer(TUNED, SMALL, LARGE, decay="fixed")
    assert fixed.weight_decay == TUNED.weight_decay
    one = transfer(Tuned(0.02, 0.1), SMALL, Size(256, 2, 512, 300))
    assert one == Tuned(0.01, 0.05, other_learning_rate=0.02, logit_multiplier=0.25)


SIZES = st.builds(
    Size,
    width=st.integers(16, 2**14),
    depth=st.integers(1, 128),
    batch=st.integers(2**8, 2**22),
    steps=st.integers(10, 10**6),
)
OPTIONS = st.fixed_dictionaries(
    {
        "update_rms": st.sampled_from(RULES),
        "decay": st.sampled_from(("width", "length", "fixed")),
        "depth_power": st.floats(0.5, 1),
        "critical_batch": st.none() | st.floats(1, 1e9),
        "length_power": st.floats(0, 1),
    }
)


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, SIZES, OPTIONS)
def test_transfers_compose_and_equal_sizes_change_nothing(a, b, c, options):
    tuned = dataclasses.replace(TUNED, b1=None, b2=None)
    direct = transfer(tuned, a, c, **options)
    by_way_of_b = transfer(transfer(tuned, a, b, **options), b, c, **options)
    back = transfer(direct, c, a, **options)
    same = transfer(tuned, a, a, **options)
    for one, other in ((direct, by_way_of_b), (tuned, back), (tuned, same)):
        values = [[x for x in dataclasses.astuple(t) if x is not None] for t in (one, other)]
        assert values[0] == pytest.approx(values[1], rel=1e-9)


def test_betas_compose_too():
    a, b, c = (Size(64, 2, batch, 300) for batch in (512, 1024, 2048))
    direct, step = transfer(TUNED, a, c), transfer(transfer(TUNED, a, b), b, c)
    for found in (direct, step):
        assert (found.b1, found.b2) == pytest.approx((0.6, 0.8))
    with pytest.raises(ValueError, match=r"beta 0\.9 has no counterpart at 16\.0 times the batch"):
        transfer(TUNED, a, Size(64, 2, 512 * 16, 300))


def test_what_is_transferred_goes_straight_to_muon():
    t = transfer(TUNED, SMALL, LARGE)
    tx = mc.muon(
        t.learning_rate,
        other_learning_rate=t.other_learning_rate,
        weight_decay=t.weight_decay,
        other=optax.scale_by_adam(t.b1, t.b2),
    )
    params = {"up": {"kernel": jnp.ones((8, 16))}, "norm": {"scale": jnp.ones(8)}}
    updates, _ = tx.update(params, tx.init(params), params)
    assert jax.tree.all(jax.tree.map(lambda u: jnp.isfinite(u).all(), updates))


def test_outputs_of_heads_taken_one_by_one_change_more_with_the_width():
    """muP's rates hold for an output projection taken whole: its heads, each a matrix of its own,
    add up. Float64, steps along the gradient of four tokens."""
    rng = np.random.default_rng(0)
    head, tokens = 16, 4

    def msign(x):
        left, _, right = np.linalg.svd(x, full_matrices=False)
        rank = min(tokens, *x.shape)
        return left[:, :rank] @ right[:rank]

    def change(width, whole):
        inputs, errors = rng.normal(size=(2, tokens, width))
        gradient = inputs.T @ errors
        parts = [gradient] if whole else np.split(gradient, width // head)
        scales = [mc.scaling.shape_scale("unit_rms_norm", *part.shape) for part in parts]
        step = np.concatenate([s * msign(part) for s, part in zip(scales, parts, strict=True)])
        return np.sqrt(np.mean((inputs @ step) ** 2))

    whole, by_head = ([change(width, w) for width in (64, 1024)] for w in (True, False))
    assert whole[1] == pytest.approx(whole[0], rel=0.1)
    assert by_head[1] > 3 * by_head[0]
