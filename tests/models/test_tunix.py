"""Tunix's models (Flax NNX): Llama 3, Qwen 2 and 3, Gemma."""

import sys
import types

import jax.numpy as jnp
import pytest
from flax import nnx

from muonclip_jax._parameters.description import AttentionPiece
from tests.models.checks import (
    Model,
    by_path,
    check_qk_norm,
    check_step_and_clip,
    cross_entropy,
    moved,
    require,
    softmax_inputs,
)

# A bare package in place of tunix/__init__.py, which imports far more than the models.
tunix = types.ModuleType("tunix")
tunix.__spec__ = require("tunix")
tunix.__path__ = list(tunix.__spec__.submodule_search_locations)
sys.modules.setdefault("tunix", tunix)

from tunix.models.gemma import model as gemma  # noqa: E402
from tunix.models.llama3 import model as llama3  # noqa: E402
from tunix.models.qwen2 import model as qwen2  # noqa: E402
from tunix.models.qwen3 import model as qwen3  # noqa: E402

SIZES = dict(num_layers=2, embed_dim=16, hidden_dim=32, num_heads=4, num_kv_heads=2, head_dim=8)
LLAMA_SIZES = dict(SIZES, vocab_size=11, rope_theta=10_000, norm_eps=1e-6)
SOFT_CAP = 50.0
GEMMA_SIZES = dict(
    SIZES,
    num_embed=11,
    final_logit_softcap=30.0,
    use_post_attn_norm=True,
    use_post_ffw_norm=True,
    attention_types=(gemma.AttentionType.LOCAL_SLIDING, gemma.AttentionType.GLOBAL),
    attn_logits_soft_cap=SOFT_CAP,
    sliding_window_size=3,
)
TOKENS = jnp.arange(10).reshape(2, 5)
POSITIONS = jnp.tile(jnp.arange(5), (2, 1))
MASK = jnp.tile(jnp.tril(jnp.ones((5, 5), bool)), (2, 1, 1))


def make(model: nnx.Module, axes: str, soft_cap=None) -> Model:
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        with softmax_inputs() as logits:
            output, _ = nnx.merge(graphdef, params, rest)(TOKENS, POSITIONS, None, MASK)
        max_logits = by_path(logits, axes, "layers/{}/attn", soft_cap)
        return cross_entropy(output, TOKENS), max_logits

    return Model(moved(params), loss)


def make_llama() -> Model:
    model = llama3.Llama3(llama3.ModelConfig(**LLAMA_SIZES), rngs=nnx.Rngs(0))
    return make(model, "b h t s -> h")


def make_qwen2() -> Model:
    model = qwen2.Qwen2(qwen2.ModelConfig(**LLAMA_SIZES), rngs=nnx.Rngs(0))
    return make(model, "b k g t s -> (k g)")


def make_qwen3() -> Model:
    model = qwen3.Qwen3(qwen3.ModelConfig(**LLAMA_SIZES), rngs=nnx.Rngs(0))
    return make(model, "b k g t s -> (k g)")


def make_gemma(kv_heads: int = 2) -> Model:
    config = gemma.ModelConfig(**dict(GEMMA_SIZES, num_kv_heads=kv_heads))
    return make(gemma.Gemma(config, rngs=nnx.Rngs(0)), "b t h s -> h", SOFT_CAP)


@pytest.mark.parametrize(
    ("kv_heads", "matrices"),
    [
        (1, {"kv_einsum/w": "k 1 × [16, 8], v 1 × [16, 8]"}),
        (2, {"kv_einsum/w": "k 2 × [16, 8], v 2 × [16, 8]", "q_einsum/w": "q 4 × [16, 8]"}),
        (4, {"qkv_einsum/w": "q 4 × [16, 8], k 4 × [16, 8], v 4 × [16, 8]"}),
    ],
    ids=["one key head", "grouped", "fused"],
)
def test_gemma(kv_heads, matrices):
    model = make_gemma(kv_heads)
    model.check_matrices({f"layers/0/attn/{name}": text for name, text in matrices.items()})
    check_step_and_clip(model)


def test_llama():
    model = make_llama()
    model.check_matrices(
        {
            "layers/1/attn/k_proj/w": "k 2 × [16, 8]",
            "layers/1/attn/o_proj/w": "o 4 × [8, 16]",
            "layers/1/mlp/down_proj/kernel": "1 × [32, 16]",
            "lm_head/w": "",
        }
    )
    check_step_and_clip(model)


def test_qwen2_with_biases_beside_the_projections():
    model = make_qwen2()
    (bias,) = [row for row in model.describe() if row.path == "layers/0/attn/k_bias"]
    assert (bias.optimizer, *bias.attention) == ("other", AttentionPiece("k", 2))
    check_step_and_clip(model)


def test_qwen3_with_qk_norm():
    check_qk_norm(make_qwen3(), "layers/0/attn/k_norm/w")
