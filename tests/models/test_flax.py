"""Flax's own attention modules, Linen and NNX: found, not written down."""

import jax
import jax.numpy as jnp
import pytest
from flax import linen, nnx

import muonclip_jax as mc
from tests.models.checks import Model, check_step_and_clip, moved

WIDTH, HEADS, KV_HEADS = 12, 4, 2
X = jax.random.normal(jax.random.key(0), (2, 6, WIDTH))
MEMORY = jax.random.normal(jax.random.key(1), (2, 5, WIDTH))
TARGETS = jax.random.normal(jax.random.key(2), X.shape)
CAUSAL = linen.make_causal_mask(X[..., 0])


class LinenDecoder(linen.Module):
    """Two layers of attention to itself, then to `memory`."""

    @linen.compact
    def __call__(self, x, memory):
        for i in range(2):
            x = self.attend(f"layer_{i}_attention", x, x, CAUSAL)
            x = self.attend(f"layer_{i}_cross_attention", x, memory, None)
            x = x + linen.Dense(WIDTH)(linen.gelu(linen.Dense(2 * WIDTH)(linen.LayerNorm()(x))))
        return x

    def attend(self, name, x, memory, mask):
        attention = linen.MultiHeadDotProductAttention(
            HEADS, attention_fn=mc.attention_fn, name=name
        )
        return x + attention(linen.LayerNorm()(x), memory, mask=mask, sow_weights=True)


class NnxLayer(nnx.Module):
    """Attention to itself, then to `memory`, with `KV_HEADS` key heads."""

    def __init__(self, rngs: nnx.Rngs):
        options = dict(
            num_heads=HEADS,
            in_features=WIDTH,
            num_kv_heads=KV_HEADS,
            attention_fn=mc.attention_fn,
            decode=False,
            rngs=rngs,
        )
        self.attention = nnx.MultiHeadAttention(**options)
        self.cross_attention = nnx.MultiHeadAttention(**options)
        self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

    def __call__(self, x, memory):
        x = x + self.attention(self.norm(x), mask=CAUSAL, sow_weights=True)
        return x + self.cross_attention(x, memory, sow_weights=True)


class NnxDecoder(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([NnxLayer(rngs) for _ in range(2)])

    def __call__(self, x, memory):
        for layer in self.layers:
            x = layer(x, memory)
        return x


def make_linen() -> Model:
    model = LinenDecoder()
    variables = model.init(jax.random.key(3), X, MEMORY)
    params = moved({"params": variables["params"]})

    def loss(params):
        output, sown = model.apply(params, X, MEMORY, mutable=["intermediates"])
        return jnp.square(output - TARGETS).mean(), sown

    return Model(params, loss)


def make_nnx() -> Model:
    graphdef, params, rest = nnx.split(NnxDecoder(nnx.Rngs(3)), nnx.Param, ...)

    def loss(params):
        model = nnx.merge(graphdef, params, rest)
        output, sown = nnx.capture(model, nnx.Intermediate)(X, MEMORY)
        return jnp.square(output - TARGETS).mean(), sown

    return Model(moved(params), loss)


@pytest.mark.slow
def test_linen():
    model = make_linen()
    model.check_matrices(
        {
            "params/layer_1_attention/query/kernel": "q 4 × [12, 3]",
            "params/layer_1_cross_attention/out/kernel": "o 4 × [3, 12]",
            "params/layer_1_cross_attention/key/bias": "",
            "params/Dense_0/kernel": "1 × [24, 12]",
        }
    )
    check_step_and_clip(model)


@pytest.mark.slow
def test_nnx_with_grouped_queries():
    model = make_nnx()
    model.check_matrices(
        {
            "layers/0/attention/query/kernel": "q 4 × [12, 3]",
            "layers/0/cross_attention/key/kernel": "k 2 × [12, 3]",
        }
    )
    check_step_and_clip(model)
