"""MaxText's models (Flax NNX): DeepSeek's latent attention, Llama 2 fused, Qwen 3 Next."""

import contextlib
import pathlib
import types
from unittest import mock

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx, traverse_util
from flax.training import train_state

import muonclip_jax as mc
from tests.models.checks import (
    Model,
    check_qk_norm,
    check_step_and_clip,
    cross_entropy,
    moved,
    require,
)

CONFIG = pathlib.Path(require("maxtext").origin).parent / "configs" / "base.yml"

from maxtext.configs import pyconfig  # noqa: E402
from maxtext.layers.attention_op import AttentionOp  # noqa: E402
from maxtext.models import models  # noqa: E402
from maxtext.utils import maxtext_utils, qk_clip_utils  # noqa: E402

NOPE, ROPE, V = 8, 4, 8
BATCH, LENGTH = 3, 8
TOKENS = jnp.arange(BATCH * LENGTH).reshape(BATCH, LENGTH) * 7 % 16
POSITIONS = jnp.tile(jnp.arange(LENGTH), (BATCH, 1))
SEGMENTS = jnp.ones_like(TOKENS)

SIZES = dict(
    per_device_batch_size=BATCH,
    max_target_length=LENGTH,
    base_emb_dim=16,
    base_num_query_heads=4,
    base_num_kv_heads=4,
    base_mlp_dim=32,
    base_num_decoder_layers=2,
    head_dim=8,
    vocab_size=16,
    mlp_activations=["silu", "linear"],
)
EXPERT_SIZES = dict(
    num_experts=2,
    num_experts_per_tok=1,
    base_moe_mlp_dim=8,
    sparse_matmul=False,
    capacity_factor=-1.0,
)
DEEPSEEK = dict(
    EXPERT_SIZES,
    decoder_block="deepseek",
    attention_type="mla",
    use_qk_clip=True,  # makes it report its max logits
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=NOPE,
    qk_rope_head_dim=ROPE,
    v_head_dim=V,
    first_num_dense_layers=1,
    shared_experts=1,
    rope_type="default",
)
QWEN3_NEXT_SIZES = dict(
    EXPERT_SIZES,
    decoder_block="qwen3_next",
    base_num_kv_heads=2,
    base_num_decoder_layers=4,
    inhomogeneous_layer_cycle_interval=4,
    use_qk_norm=True,
    partial_rotary_factor=0.5,
    gdn_conv_kernel_dim=4,
    gdn_key_head_dim=4,
    gdn_value_head_dim=4,
    gdn_num_key_heads=2,
    gdn_num_value_heads=4,
    gdn_chunk_size=4,
)


def make(**options) -> Model:
    config = pyconfig.initialize_pydantic(
        ["", str(CONFIG)],
        run_name="test",
        hardware="cpu",
        attention="dot_product",
        dtype="float32",
        weight_dtype="float32",
        enable_checkpointing=False,
        skip_jax_distributed_system=True,
        log_config=False,
        override_model_config=True,
        **(SIZES | options),
    )
    device = maxtext_utils.create_device_mesh(config, devices=jax.devices()[:1])
    mesh = jax.sharding.Mesh(device, config.mesh_axes)

    @contextlib.contextmanager
    def on_mesh():
        with mesh, linen.logical_axis_rules(config.logical_axis_rules):
            yield

    with on_mesh():
        model = models.Transformer(config, mesh, quant=None, rngs=nnx.Rngs(params=0, dropout=1))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        with on_mesh():
            model = nnx.merge(graphdef, params, rest, copy=True)
            output = model(TOKENS, POSITIONS, decoder_segment_ids=SEGMENTS, enable_dropout=False)
        return cross_entropy(output, TOKENS), nnx.state(model, nnx.Intermediate)

    return Model(moved(params), loss)


@contextlib.contextmanager
def recorded():
    """Max logits of attention other than MLA, for which MaxText has no option."""
    attend = AttentionOp.apply_attention_dot

    def attend_and_record(*args, **kwargs):
        return attend(*args, **(kwargs | {"record_max_logits": True}))

    with mock.patch.object(AttentionOp, "apply_attention_dot", attend_and_record):
        yield


def test_latent_attention_scanned():
    options = dict(DEEPSEEK, base_num_decoder_layers=3, scan_layers=True)
    model = make(**options)
    block, experts = "decoder/moe_layers/self_attention", "decoder/moe_layers/DeepSeekMoeBlock_0"
    model.check_matrices(
        {
            f"{block}/wq_b/kernel": "q_nope 8 × [8, 8], q_rope 8 × [8, 4]",
            f"{block}/wkv_a/kernel": "kv_down 2 × [16, 8], k_rope 2 × [16, 4]",
            f"{block}/out/kernel": "o 8 × [8, 16]",
            f"{experts}/MoeBlock_0/wo": "4 × [8, 16]",
            f"{experts}/MoeBlock_0/gate/kernel": "2 × [16, 2]",
            f"{experts}/shared_experts/wo/kernel": "2 × [8, 16]",
            "decoder/dense_layers/mlp/wo/kernel": "1 × [32, 16]",
        }
    )
    check_step_and_clip(model)


def test_latent_attention_without_query_compression():
    options = dict(DEEPSEEK, q_lora_rank=0, scan_layers=False)
    model = make(**options)
    query = "decoder/dense_layers_0/self_attention/query/kernel"
    model.check_matrices(
        {
            query: "q_nope 4 × [16, 8], q_rope 4 × [16, 4]",
            "decoder/moe_layers_0/DeepSeekMoeBlock_0/MoeBlock_0/wi_0": "2 × [16, 8]",
        }
    )
    check_step_and_clip(model)


def test_fused_and_scanned():
    options = dict(decoder_block="llama2", base_num_kv_heads=2, fused_qkv=True, scan_layers=True)
    model = make(**options)
    fused = "decoder/layers/self_attention/qkv_proj/kernel"
    model.check_matrices(
        {
            fused: "q 8 × [16, 8], k 4 × [16, 8], v 4 × [16, 8]",
            "decoder/layers/mlp/wi_0/kernel": "2 × [16, 32]",
        }
    )
    with recorded():
        check_step_and_clip(model)


def test_gated_attention_among_recurrent_layers():
    model = make(scan_layers=False, **QWEN3_NEXT_SIZES)
    block = "decoder/layers_3/attention/attention"
    model.check_matrices(
        {
            f"{block}/query/kernel": "q 4 × [16, 8], gate 4 × [16, 8]",
            f"{block}/out/kernel": "o 4 × [8, 16]",
            "decoder/layers_0/attention/in_proj_qkvz/kernel": (
                "q 2 × [16, 4], k 2 × [16, 4], v 4 × [16, 4], gate 4 × [16, 4]"
            ),
            "decoder/layers_0/attention/conv1d/kernel": "",
            "decoder/layers_0/mlp/routed_experts/wo": "2 × [8, 16]",
        }
    )
    with recorded():
        check_qk_norm(model, f"{block}/key_norm/scale")


def test_same_as_maxtexts_own_qk_clip():
    rng = np.random.default_rng(0)
    shapes = {
        "wq_a/kernel": (16, 8),
        "q_norm/scale": (8,),
        "wq_b/kernel": (8, 4, NOPE + ROPE),
        "wkv_a/kernel": (16, 8 + ROPE),
        "kv_norm/scale": (8,),
        "wkv_b/kernel": (8, 4, NOPE + V),
        "out/kernel": (4, V, 16),
    }
    block = {name: rng.normal(size=shape).astype("float32") for name, shape in shapes.items()}
    params = {"layers_0": {"self_attention": traverse_util.unflatten_dict(block, sep="/")}}
    max_logits = jnp.array([[30.0, 90.0, 200.0, 5.0], [110.0, 80.0, 150.0, 6.0]])  # [batch, heads]
    sown = {"layers_0": {"self_attention": {"attention_op": {"max_logits": max_logits}}}}

    state = train_state.TrainState.create(apply_fn=None, params=params, tx=optax.identity())
    config = types.SimpleNamespace(
        attention_type="mla", qk_clip_threshold=100.0, qk_nope_head_dim=NOPE
    )
    theirs = qk_clip_utils.apply_qk_clip(state, sown, config).params
    # It adds 1e-6 to the maxima; float32 rounding.
    chex.assert_trees_all_close(
        mc.apply_qk_clip(params, sown, mc.find_layout(params), 100.0), theirs, rtol=1e-6
    )
