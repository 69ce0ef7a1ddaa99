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
    "mla with partial QK-norm": dataclasses.replace(TINY, qk_norm="partial"),
    "mla with soft cap": dataclasses.replace(TINY, soft_cap=0.5),
    "mha": dataclasses.replace(TINY, attention="mha"),
    "gqa with QK-norm": dataclasses.replace(TINY, attention="gqa", qk_norm="full"),
}


def make(config, gain=4.0):
    """A model whose weights are large enough for logits that matter."""
    model = Decoder(config, nnx.Rngs(0))
    params = jax.tree.map(lambda p: gain * p if p.ndim == 2 else p, nnx.state(model, nnx.Param))
    nnx.update(model, params)
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


QUICK = ["mla"]  # the model that `make train` trains


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
        with pytest.raises(ValueError, match="normalises queries or keys"):
            mc.qk_clip(attention_layout(config)).init(nnx.state(model, nnx.Param))
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


@pytest.mark.parametrize("name", ["mla", "gqa with QK-norm"])
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
