"""Google DeepMind's Gemma (Flax Linen)."""

from unittest import mock

import jax
import jax.numpy as jnp
from flax import linen

import muonclip_jax as mc
from tests.models.checks import (
    Model,
    by_path,
    check_qk_norm,
    check_step_and_clip,
    cross_entropy,
    moved,
    require,
    softmax_inputs,
    stand_ins,
)

require("gemma")
with (
    stand_ins("tensorflow"),  # of which a module below Gemma names a type
    mock.patch.object(linen.Module, "param", linen.Module.param),  # Gemma replaces everybody's
):
    from gemma import gm

    Transformer, LoRA = gm.nn.Transformer, gm.nn.LoRA  # imported when first asked for

SOFT_CAP = 50.0
SIZES = dict(
    num_embed=11,
    embed_dim=16,
    hidden_dim=32,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    final_logit_softcap=30.0,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(gm.nn.AttentionType.LOCAL_SLIDING, gm.nn.AttentionType.GLOBAL),
    sliding_window_size=3,
)
TOKENS = jnp.arange(10).reshape(2, 5) % 9 + 2  # 0 is padding


def transformer(**options):
    config = gm.nn.config.TransformerConfig(**SIZES, **options)
    return Transformer(config=config, dtype=jnp.float32)


def make(**options) -> Model:
    model = transformer(**options)
    params = model.init(jax.random.key(0), TOKENS)["params"]

    def loss(params):
        # Its own jit would keep from us what softmax is given.
        with softmax_inputs() as logits, jax.disable_jit():
            output = model.apply({"params": params}, TOKENS).logits
        soft_cap = options.get("attn_logits_soft_cap")
        max_logits = by_path(logits, "b t h s -> h", "layer_{}/attn", soft_cap)
        return cross_entropy(output, TOKENS), max_logits

    return Model(moved(params), loss)


def test_step_and_clip_before_a_soft_cap():
    model = make(attn_logits_soft_cap=SOFT_CAP)
    model.check_matrices(
        {
            "layer_0/attn/q_einsum/w": "q 4 × [16, 8]",
            "layer_0/attn/kv_einsum/w": "k 2 × [16, 8], v 2 × [16, 8]",
            "layer_0/mlp/gating_einsum": "2 × [16, 32]",
            "layer_0/mlp/linear": "1 × [32, 16]",
            "embedder/input_embedding": "",
        }
    )
    check_step_and_clip(model)


def test_qk_norm():
    check_qk_norm(make(use_qk_norm=True), "layer_0/attn/_key_norm/scale")


def test_low_rank_adapters_scale_with_their_kernels():
    model = LoRA(rank=2, model=transformer())
    shapes = jax.eval_shape(model.init, jax.random.key(0), TOKENS)["params"]
    params = jax.tree.map(lambda leaf: jnp.ones(leaf.shape, leaf.dtype), shapes)
    layout = mc.find_layout(params)
    maxima = {
        block.path: jnp.full(block.shape, 1.0).at[0].set(400.0)
        for block in mc.layouts.find_blocks(layout, params)
    }
    after = mc.apply_qk_clip(params, maxima, layout, 100.0)["layer_0"]["attn"]["q_einsum"]
    kernel = after["w"][:, 0, 0]  # [heads, in, features]
    (adapter,) = (after[name]["lora"] for name in after if name != "w")
    assert kernel[0] < 1 and (kernel[1:] == 1).all()
    assert (adapter["a"] == 1).all()
    heads = adapter["b"].ndim - 2  # [rank, heads, features]
    scaled = jnp.moveaxis(adapter["b"], heads, 0).reshape(len(kernel), -1)
    assert jnp.allclose(scaled, kernel[:, None])
