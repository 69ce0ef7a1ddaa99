"""The MLA decoder: its training and its absorbed decode form are one function."""

import dataclasses
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import muonclip_jax as mc
from examples.mla.model import Decoder, ModelConfig, attention_layout, generate

TINY = ModelConfig(
    vocab_size=31, d_model=24, layers=2, heads=4, kv_heads=2, nope=6, rope=4, v=5,
    q_rank=12, kv_rank=8, d_ff=32, max_length=12,
)  # fmt: skip
VARIANTS = {
    "mla": TINY,
    "mla without query compression": dataclasses.replace(TINY, q_rank=0),
    "mla with QK-norm": dataclasses.replace(TINY, qk_norm="full"),
    "mla with partial QK-norm": dataclasses.replace(TINY, qk_norm="partial"),
    "mla with soft cap": dataclasses.replace(TINY, soft_cap=0.5),
    "mha": dataclasses.replace(TINY, attention="mha"),
    "gqa with QK-norm": dataclasses.replace(TINY, attention="gqa", qk_norm="full"),
}


def make(config, gain=4.0):
    """A model whose weights are large enough for logits that matter, and no norm's gain is 1."""
    model = Decoder(config, nnx.Rngs(0))

    def scaled(p):
        return p * (gain if p.ndim == 2 else 1 + 0.5 * jnp.sin(1 + jnp.arange(p.size)))

    nnx.update(model, jax.tree.map(scaled, nnx.state(model, nnx.Param)))
    return model


@nnx.jit
def forward(model, tokens):
    return nnx.capture(lambda model: model(tokens), nnx.Intermediate)(model)


@nnx.jit
def decode_all(model, tokens):
    """Logits of every position, one token after the other through the cache."""
    caches, steps = model.init_cache(len(tokens)), []
    for position in range(tokens.shape[1]):
        logits, caches = model.decode(tokens[:, position], caches, jnp.asarray(position))
        steps.append(logits)
    return jnp.stack(steps, axis=1)


TOKENS = jax.random.randint(jax.random.key(2), (2, 7), 0, TINY.vocab_size)


QUICK = ["mla", "mla with QK-norm"]  # the model that `make train` trains; the longest decode


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(config, id=name, marks=[] if name in QUICK else pytest.mark.slow)
        for name, config in VARIANTS.items()
    ],
)
def test_decode_equals_training_before_and_after_a_clip(config):
    model = make(config)
    trained, sown = forward(model, TOKENS)
    scale = float(jnp.abs(trained).max())
    # float32 throughout; absorption reorders the sums, so 1e-5 of the largest logit.
    np.testing.assert_allclose(decode_all(model, TOKENS), trained, atol=1e-5 * scale)
    if config.qk_norm != "none":
        layout = attention_layout(config)
        for transformation in (mc.qk_clip(layout), mc.scale_by_quack(layout)):
            with pytest.raises(ValueError, match="normalises queries or keys"):
                transformation.init(nnx.state(model, nnx.Param))
        return

    maxima = mc.read_max_logits(sown)
    threshold = 0.5 * float(min(x.min() for x in maxima.values()))
    params = mc.apply_qk_clip(
        nnx.state(model, nnx.Param), sown, attention_layout(config), threshold
    )
    nnx.update(model, params)
    clipped, sown = forward(model, TOKENS)
    assert float(jnp.abs(clipped - trained).max()) > 1e-3 * scale, "the clip changed nothing"
    np.testing.assert_allclose(decode_all(model, TOKENS), clipped, atol=1e-5 * scale)
    # The first layer sees the same input, so its heads land on the threshold.
    first = mc.read_max_logits(sown)[("layers", "0", "attn")]
    np.testing.assert_allclose(first, threshold, rtol=1e-5)


@pytest.mark.parametrize("name", ["mla", "mla with QK-norm", "gqa with QK-norm"])
def test_keys_are_those_of_the_logits(name):
    """The maxima recomputed from queries and keys of the first layer."""
    model = make(VARIANTS[name])
    config = model.config
    (_, sown), keys = forward(model, TOKENS), model.keys(TOKENS)
    heads = config.heads if config.attention == "mla" else config.kv_heads
    chex.assert_shape(keys, (2, 7, heads, config.nope + config.rope))
    layer = model.layers[0]
    queries = layer.attn.queries(layer.attn_norm(model.embed(TOKENS)), jnp.arange(7))
    q = np.concatenate(queries, axis=-1) if isinstance(queries, tuple) else np.asarray(queries)
    k = np.repeat(keys[0], config.heads // heads, axis=2)
    logits = config.scale * np.einsum("bthf,bshf->hbts", q, k)
    maxima = np.where(np.tri(7, dtype=bool), logits, -np.inf).max(axis=(1, 2, 3))
    np.testing.assert_allclose(mc.read_max_logits(sown)[("layers", "0", "attn")], maxima, rtol=1e-5)


def normalized(x, norm):
    """gain * x / √(mean(x²) + ε), in float64."""
    return np.float64(norm.scale[...]) * x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6)


def rotated(x):
    """RoPE in float64: `b t h r`, turned by the position t."""
    half = x.shape[-1] // 2
    angles = np.arange(x.shape[1])[:, None, None] * TINY.rope_base ** (-np.arange(half) / half)
    turned = np.exp(1j * angles) * (x[..., :half] + 1j * x[..., half:])
    return np.concatenate([turned.real, turned.imag], axis=-1)


def test_qk_norm_of_mla_is_of_whole_heads_before_rope():
    """By the formula, from the weights; and what decoding caches for it."""
    config = VARIANTS["mla with QK-norm"]
    model = make(config)
    attn, n, heads = model.layers[0].attn, config.nope, config.heads
    x = model.layers[0].attn_norm(model.embed(TOKENS))
    project = lambda x, module: x @ np.float64(module.kernel[...])  # noqa: E731
    split = lambda x: x.reshape(*x.shape[:2], heads, -1)  # noqa: E731
    q = split(project(normalized(project(np.float64(x), attn.wq_a), attn.q_norm), attn.wq_b))
    down = project(np.float64(x), attn.wkv_a)
    latent = normalized(down[..., : config.kv_rank], attn.kv_norm)
    k_nope = split(project(latent, attn.wkv_b))[..., :n]
    k_rope = np.repeat(down[..., None, config.kv_rank :], heads, axis=2)
    k = np.concatenate([k_nope, k_rope], axis=-1)
    for got, raw, norm in (
        (jnp.concatenate(attn.queries(x, jnp.arange(7)), axis=-1), q, attn.q_head_norm),
        (attn.keys_and_values(x)[0], k, attn.k_head_norm),
    ):
        whole = normalized(raw, norm)
        wanted = np.concatenate([whole[..., :n], rotated(whole[..., n:])], axis=-1)
        # float32 against numbers of order 1.
        np.testing.assert_allclose(got, wanted, atol=3e-6)

    cache = attn.init_cache(2)
    assert {name: each.shape[2:] for name, each in cache.items()} == {
        "latent": (config.kv_rank,), "k_rope": (config.rope,), "inverse_rms": (heads,)
    }  # fmt: skip
    _, cache = attn.decode(x[:, :1], cache, jnp.asarray(0))
    inverse = 1 / np.sqrt(np.square(k[:, 0]).mean(axis=-1) + 1e-6)
    np.testing.assert_allclose(cache["inverse_rms"][:, 0], inverse, rtol=1e-5)


def test_a_plain_call_stores_nothing_in_the_model():
    model = make(TINY)
    before = nnx.to_flat_state(nnx.state(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(TOKENS)
    assert [path for path, _ in nnx.to_flat_state(nnx.state(model))] == [p for p, _ in before]


def test_causal():
    model = make(TINY)
    changed = TOKENS.at[:, -1].set((TOKENS[:, -1] + 1) % TINY.vocab_size)
    (a, _), (b, _) = forward(model, TOKENS), forward(model, changed)
    np.testing.assert_array_equal(a[:, :-1], b[:, :-1])
    assert float(jnp.abs(a[:, -1] - b[:, -1]).max()) > 0


@pytest.mark.parametrize("config", [VARIANTS["mla"], VARIANTS["mha"]], ids=["mla", "mha"])
def test_greedy_generation_follows_the_training_form(config):
    model = make(config)
    prompt = TOKENS[0, :3]
    text = generate(model, prompt, 5, 0.0, jax.random.key(0))
    chex.assert_shape(text, (8,))
    np.testing.assert_array_equal(text[:3], prompt)
    logits, _ = forward(model, text[None])
    np.testing.assert_array_equal(logits[0, 2:-1].argmax(-1), text[3:])


def test_generation_is_bounded_by_the_model():
    with pytest.raises(ValueError, match=r"max_length of 12"):
        generate(make(TINY), TOKENS[0], 6, 1.0, jax.random.key(0))


def test_bfloat16_activations_float32_parameters():
    model = make(dataclasses.replace(TINY, dtype="bfloat16"), gain=1.0)
    logits, _ = forward(model, TOKENS)
    assert logits.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {
        jnp.dtype(jnp.float32)
    }


def test_parameters_route_and_describe():
    for config in VARIANTS.values():
        if config.qk_norm == "none":
            params = nnx.state(make(config), nnx.Param)
            rows = {row.path: row for row in mc.describe(params, attention_layout(config))}
            assert rows["lm_head/kernel"].optimizer == rows["embed/embedding"].optimizer == "other"
            assert [str(m) for m in rows["layers/0/mlp/gate/kernel"].matrices] == ["1 × [24, 32]"]
            query = "wq_b" if config.attention == "mla" and config.q_rank else "wq"
            roles = [piece.role for piece in rows[f"layers/0/attn/{query}/kernel"].attention]
            assert roles in (["q"], ["q_nope", "q_rope"])
