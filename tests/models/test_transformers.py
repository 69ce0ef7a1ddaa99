"""Hugging Face's Flax models (Linen; transformers 4 is the last to have them)."""

import jax.numpy as jnp

from tests.models.checks import (
    Model,
    by_path,
    check_step_and_clip,
    cross_entropy,
    moved,
    require,
    softmax_inputs,
)

require("transformers.models.gpt2.modeling_flax_gpt2")

from transformers import BertConfig, GPT2Config, LlamaConfig  # noqa: E402
from transformers.models.bert.modeling_flax_bert import FlaxBertForMaskedLM  # noqa: E402
from transformers.models.gpt2.modeling_flax_gpt2 import FlaxGPT2LMHeadModel  # noqa: E402
from transformers.models.llama.modeling_flax_llama import FlaxLlamaForCausalLM  # noqa: E402

HEADS = 4  # its kernels are flat
TOKENS = jnp.arange(16).reshape(2, 8) % 11


def make(model, block: str) -> Model:
    def loss(params):
        with softmax_inputs() as logits:
            output = model(TOKENS, params=params).logits
        return cross_entropy(output, TOKENS), by_path(logits, "b h t s -> h", block)

    return Model(moved(model.params), loss, HEADS)


def make_gpt2() -> Model:
    config = GPT2Config(
        vocab_size=11,
        n_positions=8,
        n_embd=16,
        n_layer=2,
        n_head=HEADS,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = FlaxGPT2LMHeadModel(config, input_shape=(1, 8))
    return make(model, "transformer/h/{}/attn")


SIZES = dict(
    vocab_size=11,
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=2,
    num_attention_heads=HEADS,
    max_position_embeddings=8,
)


def make_llama() -> Model:
    model = FlaxLlamaForCausalLM(LlamaConfig(num_key_value_heads=2, **SIZES), input_shape=(1, 8))
    return make(model, "model/layers/{}/self_attn")


def make_bert() -> Model:
    model = FlaxBertForMaskedLM(BertConfig(**SIZES), input_shape=(1, 8))
    return make(model, "bert/encoder/layer/{}/attention")


def test_gpt2():
    model = make_gpt2()
    model.check_matrices(
        {
            "transformer/h/0/attn/c_attn/kernel": "q 4 × [16, 4], k 4 × [16, 4], v 4 × [16, 4]",
            "transformer/h/0/attn/c_proj/kernel": "o 4 × [4, 16]",
            "transformer/h/0/mlp/c_fc/kernel": "1 × [16, 64]",
        }
    )
    check_step_and_clip(model)


def test_llama():
    model = make_llama()
    model.check_matrices(
        {
            "model/layers/1/self_attn/q_proj/kernel": "q 4 × [16, 4]",
            "model/layers/1/self_attn/v_proj/kernel": "v 2 × [16, 4]",
        }
    )
    check_step_and_clip(model)


def test_bert():
    model = make_bert()
    model.check_matrices(
        {
            "bert/encoder/layer/0/attention/self/key/kernel": "k 4 × [16, 4]",
            "bert/encoder/layer/0/attention/output/dense/kernel": "o 4 × [4, 16]",
        }
    )
    check_step_and_clip(model)
