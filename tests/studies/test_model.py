"""The studies' decoder, against plain NumPy and against itself written otherwise."""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from studies.common.model import (
    BLOCK,
    Decoder,
    ModelConfig,
    attention_layout,
    attention_logits,
    init_params,
    queries_and_keys,
)

GROUPED = ModelConfig(
    vocab_size=17, d_model=16, layers=2, heads=4, kv_heads=2, rope=4, v=4, d_ff=8, init_std=0.3
)
LATENT = replace(GROUPED, attention="latent", kv_heads=4, nope=4, rope=2, q_rank=6, kv_rank=5)
KINDS = {
    "grouped": GROUPED,
    "fused": replace(GROUPED, attention="fused"),
    "latent": LATENT,
    "latent, latent norms": replace(LATENT, latent_norm=True),
    "grouped, QK-norm": replace(GROUPED, qk_norm=True, mlp="swiglu"),
    "latent, QK-norm": replace(LATENT, qk_norm=True),
    "latent, partial QK-norm": replace(LATENT, partial_qk_norm=True),
}
TOKENS = jax.random.randint(jax.random.key(1), (2, 6), 0, 17)


@functools.partial(jax.jit, static_argnums=0)
def apply(config, params):
    return Decoder(config).apply({"params": params}, TOKENS, mutable=["intermediates"])


@functools.lru_cache
def first(config):
    """Parameters, and the logits, queries and keys that they make of `TOKENS`."""

    @jax.jit
    def make():
        params = init_params(config, 0)
        return params, *queries_and_keys(params, config, TOKENS)

    return make()


def naive_logits(q, k):
    """`layers b t h f`, `layers b t k f` → float64 `layers b h t s`, NaN where masked."""
    q, k = np.asarray(q, np.float64), np.asarray(k, np.float64)
    k = np.repeat(k, q.shape[3] // k.shape[3], axis=3)
    logits = np.einsum("lbthf,lbshf->lbhts", q, k) / np.sqrt(q.shape[-1])
    return np.where(np.tril(np.ones(logits.shape[-2:], bool)), logits, np.nan)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.slow] * ("norm" in kind)) for kind in KINDS],
)
def test_sown_maxima_are_those_of_the_sown_queries_and_keys(kind):
    config = KINDS[kind]
    params, logits, q, k = first(config)
    again, sown = apply(config, params)
    np.testing.assert_allclose(logits, again, rtol=1e-5, atol=1e-5)  # two programs, float32
    expected = naive_logits(q, k)
    maxima = mc.read_max_logits(sown)[BLOCK]
    assert maxima.shape == (config.layers, config.heads)
    # float32 sums of at most 8 products.
    np.testing.assert_allclose(maxima, np.nanmax(expected, axis=(1, 3, 4)), rtol=1e-5)
    np.testing.assert_allclose(
        attention_logits(q, k, last=3), np.nan_to_num(expected[..., -3:, :]), atol=1e-5
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["grouped", "latent"])
def test_qk_norm_gives_every_head_unit_rms(kind):
    _, _, q, k = first(KINDS[kind])
    _, _, normed_q, normed_k = first(KINDS[f"{kind}, QK-norm"])
    for before, after in ((q, normed_q), (k, normed_k)):
        # RMSNorm adds 1e-6 to a mean square above 1e-2; RoPE turns without scaling.
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(after), axis=-1)), 1, rtol=1e-3)
        assert np.ptp(np.mean(np.square(before), axis=-1)) > 0.1  # it was not so by itself


@pytest.mark.slow
def test_partial_qk_norm_is_on_what_absorbed_decoding_can_form():
    _, _, q, k = first(LATENT)
    _, _, normed_q, normed_k = first(KINDS["latent, partial QK-norm"])

    def parts(x):
        return np.split(np.asarray(x), [LATENT.nope], axis=-1)

    for part in (*parts(normed_q), parts(normed_k)[1]):
        # RMSNorm adds 1e-6 to a mean square above 1e-3; RoPE turns without scaling.
        np.testing.assert_allclose(np.sqrt(np.mean(np.square(part), axis=-1)), 1, rtol=1e-3)
    for part in (*parts(q), parts(k)[1]):
        assert np.ptp(np.mean(np.square(part), axis=-1)) > 0.1  # it was not so by itself
    # The first layer reads the same: its keys without position are left alone, and all heads have
    # the same rotary key.
    np.testing.assert_allclose(parts(normed_k)[0][0], parts(k)[0][0], rtol=1e-6)
    np.testing.assert_array_equal(parts(normed_k)[1][..., :1, :], parts(normed_k)[1][..., 1:2, :])


def test_partial_qk_norm_is_for_latent_attention():
    for attention in ("grouped", "fused"):
        with pytest.raises(ValueError, match="partial_qk_norm is for attention='latent'"):
            init_params(replace(GROUPED, attention=attention, partial_qk_norm=True), 0)


def test_fused_is_separate_with_the_kernels_side_by_side():
    separate, expected, _, _ = first(GROUPED)
    attn = dict(separate["layers"]["attn"])
    kernels = [attn.pop(name)["kernel"] for name in ("wq", "wk", "wv", "wo")]
    fused = {"qkvo": {"kernel": jnp.concatenate(kernels, axis=-1)}}
    layers = {**separate["layers"], "attn": fused}
    found, _ = apply(KINDS["fused"], {**separate, "layers": layers})
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)  # float32, other order


def test_a_soft_cap_bounds_the_weights_and_not_the_maxima():
    params, *_ = first(GROUPED)
    free, sown = apply(GROUPED, params)
    capped, sown_capped = apply(replace(GROUPED, soft_cap=0.1), params)
    maxima = [mc.read_max_logits(each)[BLOCK][0] for each in (sown, sown_capped)]
    np.testing.assert_array_equal(*maxima)
    assert np.abs(capped - free).max() > 1e-2


def test_fused_refuses_heads_that_do_not_fill_the_width():
    with pytest.raises(ValueError, match="4 heads of 3 values must make d_model=16"):
        init_params(replace(KINDS["fused"], v=3), 0)


@pytest.mark.parametrize(
    "kind",
    ["grouped", "latent", pytest.param("latent, latent norms", marks=pytest.mark.slow)],
)
def test_the_layout_finds_the_heads(kind):
    config = KINDS[kind]
    params, *_ = first(config)
    _, sown = apply(config, params)
    half = float(mc.read_max_logits(sown)[BLOCK][0].max()) / 2
    clipped = mc.apply_qk_clip(params, sown, attention_layout(config), threshold=half)
    _, sown_after = apply(config, clipped)
    before, after = (mc.read_max_logits(each)[BLOCK][0] for each in (sown, sown_after))
    np.testing.assert_allclose(after, np.minimum(before, half), rtol=1e-4)
