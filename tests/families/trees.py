"""Transcriptions: the parameter trees of known models, written from their sources, in small.

Nothing here is the output of those models' code: shapes and paths were read off it, and so was
which slice of a kernel the forward pass makes a head's query, key or value. `tests/models` runs the
models themselves, where they can be installed. Each entry names its source; commits are:

    MaxText e591f30cb, Tunix c7d8950f, google-deepmind/gemma 7691fd4, bonsai 3628425,
    EasyDeL 090a03b2, Levanter 9263f81e, Transformers v4.57.1
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

# Lengths that cannot be taken for one another.
WIDTH, HEADS, KV, F, LAYERS = 10, 4, 2, 3, 5
NOPE, ROPE, V, Q_RANK, KV_RANK = 3, 2, 4, 11, 9

Shape = tuple[int, ...]
Heads = Callable[[np.ndarray], list[np.ndarray]]  # one layer's parameter → a matrix for each head
Block = Mapping[str, tuple[str, Heads]]  # role → (the parameter inside the block, its heads)


@dataclass(frozen=True)
class Tree:
    """A model's parameters and, by hand, its attention.

    Attributes:
      source: The class whose forward pass says which slices are the heads.
      shapes: By path.
      blocks: By the path that `sow` uses.
      linear: Likewise its linear attention, which has no logits.
      axis: Where the axes of stacked layers are.
      depth: How many axes of stacked layers there are.
      told: What `find_layout` must be told.
      qk_norm: Whether a norm stands behind a projection, for which clips refuse the model.
    """

    source: str
    shapes: Mapping[str, Shape]
    blocks: Mapping[str, Block]
    linear: Mapping[str, Block] = field(default_factory=dict)
    axis: int = 0
    depth: int = 0
    told: Mapping[str, int] = field(default_factory=dict)
    qk_norm: bool = False


# Heads by hand


def headed(count: int, start: int | None = None, stop: int | None = None) -> Heads:
    """`[in, heads, features]`."""
    return lambda x: [x[:, h, start:stop] for h in range(count)]


def in_front(count: int) -> Heads:
    """`[heads, in, features]`, and outputs `[heads, features, out]`."""
    return lambda x: [x[h] for h in range(count)]


def flat(count: int, start: int = 0, step: int = F, size: int = F) -> Heads:
    """`[in, heads*features]`: `size` columns of each `step`."""
    return lambda x: [x[:, start + step * h : start + step * h + size] for h in range(count)]


def _several(groups: int, each: int, start: int, step: int) -> Heads:
    """`[in, features]`: `each` heads beside each other in each `step` columns."""
    starts = [start + step * group + F * i for group in range(groups) for i in range(each)]
    return lambda x: [x[:, at : at + F] for at in starts]


def flat_out(count: int, size: int = F) -> Heads:
    """`[heads*features, out]`."""
    return lambda x: [x[size * h : size * (h + 1)] for h in range(count)]


def turned(heads: Heads) -> Heads:
    """The same of a parameter stored `[out, in]`."""
    return lambda x: heads(x.T)


def turned_out(count: int) -> Heads:
    """`[out, heads*features]`."""
    return lambda x: [x[:, F * h : F * (h + 1)].T for h in range(count)]


# Whole blocks


def at(block: str, *shapes: Mapping[str, Shape], axis: int = 0, stack: Shape = ()):
    """The parameters of a block at this path, stacked."""
    together = {name: shape for each in shapes for name, shape in each.items()}
    return {
        f"{block}/{name}": (*shape[:axis], *stack, *shape[axis:])
        for name, shape in together.items()
    }


def plain(names: str, leaf: str, lies: str, kv: int = KV, f: int = F, heads: int = HEADS):
    """Shapes of four projections, and where their heads are."""
    q, k, v, o = (f"{name}{leaf}" for name in names.split())
    if lies == "flat":
        shapes = [(WIDTH, heads * f), (WIDTH, kv * f), (WIDTH, kv * f), (heads * f, WIDTH)]
        cut = lambda n: flat(n, step=f, size=f)  # noqa: E731
        out = flat_out(heads, f)
    elif lies == "headed":
        shapes = [(WIDTH, heads, f), (WIDTH, kv, f), (WIDTH, kv, f), (heads, f, WIDTH)]
        cut, out = headed, in_front(heads)
    else:
        shapes = [(heads * f, WIDTH), (kv * f, WIDTH), (kv * f, WIDTH), (WIDTH, heads * f)]
        cut = lambda n: turned(flat(n))  # noqa: E731
        out = turned_out(heads)
    return dict(zip((q, k, v, o), shapes, strict=True)), {
        "q": (q, cut(heads)),
        "k": (k, cut(kv)),
        "v": (v, cut(kv)),
        "o": (o, out),
    }


def latent(names: str, norms: str, lies: str, rope: int = ROPE):
    """Shapes of multi-head latent attention, and where its heads are. Names: of the query one or
    two, of keys and values two, of the output."""
    *query, kv_down, kv_up, out = (f"{name}/kernel" for name in names.split())
    of = lambda n: (HEADS * n,) if lies == "flat" else (HEADS, n)  # noqa: E731
    cut = (
        (lambda start, stop, step: flat(HEADS, start, step, stop - start))
        if lies == "flat"
        else (lambda start, stop, step: headed(HEADS, start, stop))
    )
    rank = Q_RANK if len(query) == 2 else WIDTH
    shapes = {
        query[-1]: (rank, *of(NOPE + rope)),
        kv_down: (WIDTH, KV_RANK + rope),
        kv_up: (KV_RANK, *of(NOPE + V)),
        out: (*of(V), WIDTH),
    }
    heads = {
        "q_nope": (query[-1], cut(0, NOPE, NOPE + rope)),
        "k_nope": (kv_up, cut(0, NOPE, NOPE + V)),
        "v": (kv_up, cut(NOPE, NOPE + V, NOPE + V)),
        "kv_down": (kv_down, lambda x: [x[:, :KV_RANK]]),
        "o": (out, flat_out(HEADS, V) if lies == "flat" else in_front(HEADS)),
    }
    q_norm, kv_norm = norms.split()
    shapes[kv_norm] = (KV_RANK,)
    heads["kv_gain"] = (kv_norm, lambda x: [x[None]])
    if rope:
        heads["q_rope"] = (query[-1], cut(NOPE, NOPE + rope, NOPE + rope))
        heads["k_rope"] = (kv_down, lambda x: [x[:, KV_RANK:]])
    if len(query) == 2:
        shapes |= {query[0]: (WIDTH, Q_RANK), q_norm: (Q_RANK,)}
        heads |= {"q_down": (query[0], lambda x: [x]), "q_gain": (q_norm, lambda x: [x[None]])}
    return shapes, heads


def one(source, block, shapes, heads, stack=(), axis=0, **options) -> Tree:
    """A model of one kind of attention, in two layers or stacked."""
    blocks = [block] if stack else [block.replace("*", str(i)) for i in range(2)]
    parameters = {}
    for path in blocks:
        parameters |= at(path, shapes, stack=stack, axis=axis)
    return Tree(
        source,
        parameters,
        {path.removeprefix("params/"): heads for path in blocks},
        axis=axis,
        depth=len(stack),
        **options,
    )


def norms(*names: str, size: int = F) -> dict[str, Shape]:
    return dict.fromkeys(names, (size,))


LLAMA = "q_proj k_proj v_proj o_proj"
FLAX = "query key value out"
GEMMA = {
    "q_einsum/w": (HEADS, WIDTH, F),
    "kv_einsum/w": (2, KV, WIDTH, F),
    "attn_vec_einsum/w": (HEADS, F, WIDTH),
}
GEMMA_HEADS = {
    "q": ("q_einsum/w", in_front(HEADS)),
    "k": ("kv_einsum/w", lambda x: [x[0, h] for h in range(KV)]),
    "v": ("kv_einsum/w", lambda x: [x[1, h] for h in range(KV)]),
    "o": ("attn_vec_einsum/w", in_front(HEADS)),
}
PUBLISHED = "wq_a wq_b wkv_a wkv_b out"
HF_LATENT = "q_a_proj q_b_proj kv_a_proj_with_mqa kv_b_proj o_proj"


def fused(kernel: str, out: str, shape: Shape, q: Heads, k: Heads, v: Heads, out_shape, o: Heads):
    """Shapes and heads of one kernel for queries, keys and values."""
    return {kernel: shape, out: out_shape}, {
        "q": (kernel, q),
        "k": (kernel, k),
        "v": (kernel, v),
        "o": (out, o),
    }


def maxtext() -> dict[str, Tree]:
    """`maxtext/layers/attentions.py`, `attention_mla.py`, `models/qwen3.py`, `gpt3.py`."""
    headed_llama = plain(FLAX, "/kernel", "headed")
    scanned = dict(stack=(LAYERS,), axis=1)
    sinks = {**headed_llama[0], "sinks": (HEADS,)}
    normed = {**headed_llama[0], **norms("query_norm/scale", "key_norm/scale")}
    blocked = fused(
        "qkv_proj/kernel",
        "out/kernel",
        (WIDTH, HEADS + 2 * KV, F),
        headed(HEADS),
        lambda x: [x[:, HEADS + h] for h in range(KV)],
        lambda x: [x[:, HEADS + KV + h] for h in range(KV)],
        (HEADS, F, WIDTH),
        in_front(HEADS),
    )
    gpt3 = fused(
        "qkv_proj/kernel",
        "out/kernel",
        (WIDTH, 3, HEADS, F),
        *(lambda x, part=part: [x[:, part, h] for h in range(HEADS)] for part in range(3)),
        (HEADS, F, WIDTH),
        in_front(HEADS),
    )
    mla = latent(PUBLISHED, "q_norm/scale kv_norm/scale", "headed")
    plain_query = latent("query wkv_a wkv_b out", "q_norm/scale kv_norm/scale", "headed")
    indexer = {
        "indexer/wq_b/kernel": (Q_RANK, 6, 7),
        "indexer/wk/kernel": (WIDTH, 7),
        "indexer/k_norm/scale": (7,),
        "indexer/k_norm/bias": (7,),
        "indexer/weights_proj/kernel": (WIDTH, 6),
    }
    shared = {name: x for name, x in normed.items() if not name.startswith("value")}
    gated = {
        "query/kernel": (WIDTH, HEADS, 2 * F),
        "key/kernel": (WIDTH, KV, F),
        "value/kernel": (WIDTH, KV, F),
        "out/kernel": (HEADS * F, WIDTH),
        **norms("query_norm/scale", "key_norm/scale"),
    }
    gated_heads = {
        "q": ("query/kernel", headed(HEADS, 0, F)),
        "gate": ("query/kernel", headed(HEADS, F, 2 * F)),
        "k": ("key/kernel", headed(KV)),
        "v": ("value/kernel", headed(KV)),
        "o": ("out/kernel", flat_out(HEADS)),
    }
    delta_net = {
        "in_proj_qkvz/kernel": (WIDTH, 2 * (KV + HEADS) * F),
        "in_proj_ba/kernel": (WIDTH, 2 * HEADS),
        "conv1d/kernel": (4, 1, (2 * KV + HEADS) * F),
        "A_log": (HEADS,),
        "dt_bias": (HEADS,),
        "norm/rms_norm/scale": (F,),
        "out_proj/kernel": (HEADS * F, WIDTH),
    }
    # Of each key head [query | key | its values | their gates].
    group = 2 * F + 2 * HEADS // KV * F
    each = HEADS // KV
    delta_heads = {
        "q": ("in_proj_qkvz/kernel", flat(KV, 0, group)),
        "k": ("in_proj_qkvz/kernel", flat(KV, F, group)),
        "v": ("in_proj_qkvz/kernel", _several(KV, each, 2 * F, group)),
        "gate": ("in_proj_qkvz/kernel", _several(KV, each, (2 + each) * F, group)),
        "o": ("out_proj/kernel", flat_out(HEADS)),
    }
    attention = "attentions.py: Attention"
    latents = "attention_mla.py: MLA"
    hybrid = {
        **at("decoder/layers_3/attention/attention", gated),
        **at("decoder/layers_0/attention", delta_net),
    }
    dense, sparse = "decoder/dense_layers/self_attention", "decoder/moe_layers/self_attention"
    return {
        "Llama": one(attention, "decoder/layers_*/self_attention", *headed_llama),
        "Llama, scanned": one(
            attention, "params/decoder/layers/self_attention", *headed_llama, **scanned
        ),
        "Llama, fused and scanned": one(
            attention, "decoder/layers/self_attention", *blocked, **scanned
        ),
        "Qwen 3": one(
            attention,
            "decoder/layers/self_attention",
            normed,
            headed_llama[1],
            **scanned,
            qk_norm=True,
        ),
        "gpt-oss": one(attention, "decoder/layers_*/GptOssAttention", sinks, headed_llama[1]),
        "Gemma 4, global": one(
            attention,
            "decoder/layers_*/self_attention",
            shared,
            {role: at_ for role, at_ in headed_llama[1].items() if role != "v"},
            qk_norm=True,
        ),
        "GPT-3, scanned": one(
            "gpt3.py: Gpt3MultiHeadAttention", "decoder/layers/self_attention", *gpt3, **scanned
        ),
        "DeepSeek V3, scanned": Tree(
            latents,
            {
                **at(dense, mla[0], stack=(2,), axis=1),
                **at(sparse, mla[0], stack=(LAYERS,), axis=1),
            },
            {dense: mla[1], sparse: mla[1]},
            axis=1,
            depth=1,
        ),
        "DeepSeek V2 Lite": one(latents, "decoder/layers_*/self_attention", *plain_query),
        "DeepSeek V3.2": one(
            latents, "decoder/layers_*/self_attention", {**mla[0], **indexer}, mla[1]
        ),
        "Qwen3-Next": Tree(
            "qwen3.py: Qwen3NextFullAttention, Qwen3NextGatedDeltaNet",
            hybrid,
            {"decoder/layers_3/attention/attention": gated_heads},
            linear={"decoder/layers_0/attention": delta_heads},
            qk_norm=True,
        ),
    }


def tunix() -> dict[str, Tree]:
    """`tunix/models/*/model.py`, `gemma3/vision.py`, `gemma4/attention.py`."""
    shapes, heads = plain(LLAMA, "/w", "headed")
    biases = {"q_bias": (HEADS * F,), "k_bias": (KV * F,), "v_bias": (KV * F,)}
    gemma_mha = fused(
        "qkv_einsum/w",
        "attn_vec_einsum/w",
        (3, HEADS, WIDTH, F),
        *(lambda x, part=part: [x[part, h] for h in range(HEADS)] for part in range(3)),
        (HEADS, F, WIDTH),
        in_front(HEADS),
    )
    normed = {**GEMMA, **norms("_query_norm/scale", "_key_norm/scale")}
    f = 7  # of global layers
    shared = {
        "q_einsum/w": (HEADS, WIDTH, f),
        "k_einsum/w": (1, WIDTH, f),
        "attn_vec_einsum/w": (HEADS, f, WIDTH),
        **norms("_query_norm/scale", "_key_norm/scale", size=f),
    }
    shared_heads = {
        "q": ("q_einsum/w", in_front(HEADS)),
        "k": ("k_einsum/w", in_front(1)),
        "o": ("attn_vec_einsum/w", in_front(HEADS)),
    }
    vision = plain("query_proj key_proj value_proj out_proj", "/kernel", "flat", kv=5, heads=5)
    return {
        "Llama 3": one("llama3: Attention", "layers/*/attn", shapes, heads),
        "Qwen 2": one("qwen2: Attention", "layers/*/attn", {**shapes, **biases}, heads),
        "Qwen 3": one(
            "qwen3: Attention",
            "layers/*/attn",
            {**shapes, **norms("q_norm/w", "k_norm/w")},
            heads,
            qk_norm=True,
        ),
        "Gemma": one("gemma: Attention", "layers/*/attn", GEMMA, GEMMA_HEADS),
        "Gemma 7B": one("gemma: Attention", "layers/*/attn", *gemma_mha),
        "Gemma 3 with SigLIP": Tree(
            "gemma3: Attention; vision.py: VisionAttention",
            {
                **at("layers/0/attn", normed),
                **at("vision_encoder/siglip_encoder/blocks/0/attn", vision[0]),
            },
            {
                "layers/0/attn": GEMMA_HEADS,
                "vision_encoder/siglip_encoder/blocks/0/attn": vision[1],
            },
            told={"heads": 5},
            qk_norm=True,
        ),
        "Gemma 4": Tree(
            "gemma4: Attention",
            {**at("layers/0/attn", normed), **at("layers/1/attn", shared)},
            {"layers/0/attn": GEMMA_HEADS, "layers/1/attn": shared_heads},
            qk_norm=True,
        ),
        # Norms of other names: gemma's `gm/nn/gemma4/_modules.py`.
        "Gemma 4 of DeepMind": Tree(
            "gm.nn.gemma4: Attention",
            {
                path.replace("layers/", "layer_").replace("/_", "/"): shape
                for path, shape in {
                    **at("layers/0/attn", normed),
                    **at("layers/1/attn", shared),
                }.items()
            },
            {"layer_0/attn": GEMMA_HEADS, "layer_1/attn": shared_heads},
            qk_norm=True,
        ),
    }


def transformers() -> dict[str, Tree]:
    """`transformers/models/*/modeling_flax_*.py`."""
    both = {"heads": HEADS, "kv_heads": KV}
    mha = {"heads": HEADS}
    square = dict(kv=HEADS)
    gpt2 = fused(
        "c_attn/kernel",
        "c_proj/kernel",
        (3 * HEADS * F, WIDTH),
        *(turned(flat(HEADS, part * HEADS * F)) for part in range(3)),
        (WIDTH, HEADS * F),
        turned_out(HEADS),
    )
    bloom = fused(
        "query_key_value/kernel",
        "dense/kernel",
        (WIDTH, HEADS * 3 * F),
        *(flat(HEADS, part * F, 3 * F) for part in range(3)),
        (HEADS * F, WIDTH),
        flat_out(HEADS),
    )
    t5 = plain("q k v o", "/kernel", "flat", **square)
    bias = {"relative_attention_bias/embedding": (32, HEADS)}
    encoder, decoder = "encoder/block/*/layer/0/SelfAttention", "decoder/block/0/layer/*/"
    t5_blocks = {
        encoder.replace("*", "0"): {**t5[0], **bias},
        encoder.replace("*", "1"): t5[0],
        decoder.replace("*", "0") + "SelfAttention": {**t5[0], **bias},
        decoder.replace("*", "1") + "EncDecAttention": t5[0],
    }
    bart = plain("q_proj k_proj v_proj out_proj", "/kernel", "flat", **square)
    bart_blocks = (
        "model/encoder/layers/0/self_attn",
        "model/decoder/layers/0/self_attn",
        "model/decoder/layers/0/encoder_attn",
    )
    bert = plain("self/query self/key self/value output/dense", "/kernel", "flat", **square)
    vit = "attention/query attention/key attention/value output/dense"
    distil = plain("q_lin k_lin v_lin out_lin", "/kernel", "flat", **square)
    albert = plain("query key value dense", "/kernel", "flat", **square)
    return {
        "Llama": one(
            "llama: FlaxLlamaAttention",
            "model/layers/*/self_attn",
            *plain(LLAMA, "/kernel", "flat"),
            told=both,
        ),
        "GPT-2": one("gpt2: FlaxGPT2Attention", "transformer/h/*/attn", *gpt2, told=mha),
        "BLOOM": one(
            "bloom: FlaxBloomAttention", "transformer/h/*/self_attention", *bloom, told=mha
        ),
        "BERT": one("bert: FlaxBertAttention", "bert/encoder/layer/*/attention", *bert, told=mha),
        "ViT": one(
            "vit: FlaxViTAttention",
            "vit/encoder/layer/*/attention",
            *plain(vit, "/kernel", "flat", **square),
            told=mha,
        ),
        "DistilBERT": one(
            "distilbert: FlaxMultiHeadSelfAttention",
            "distilbert/transformer/layer/*/attention",
            *distil,
            told=mha,
        ),
        "ALBERT": one(
            "albert: FlaxAlbertSelfAttention",
            "albert/encoder/albert_layer_groups/0/albert_layers/*/attention",
            *albert,
            told=mha,
        ),
        "T5": Tree(
            "t5: FlaxT5Attention",
            {k: x for path, own in t5_blocks.items() for k, x in at(path, own).items()},
            dict.fromkeys(t5_blocks, t5[1]),
        ),
        "BART": Tree(
            "bart: FlaxBartAttention",
            {k: x for path in bart_blocks for k, x in at(path, bart[0]).items()},
            dict.fromkeys(bart_blocks, bart[1]),
            told=mha,
        ),
    }


def bonsai() -> dict[str, Tree]:
    """`bonsai/models/*/modeling.py`."""
    qwen = plain(LLAMA, "/kernel", "headed")
    llama = plain(LLAMA, "/kernel", "flat")
    pair = ("q_norm/scale", "k_norm/scale")
    llada = plain("q_proj k_proj v_proj attn_out", "/kernel", "flat")
    vjepa = plain("query key value proj", "/kernel", "flat", kv=HEADS)
    umt5 = plain("q k v o", "/kernel", "flat", kv=HEADS)
    vision = fused(
        "qkv/kernel",
        "proj/kernel",
        (WIDTH, 3 * HEADS * F),
        *(flat(HEADS, part * HEADS * F) for part in range(3)),
        (HEADS * F, WIDTH),
        flat_out(HEADS),
    )
    bias = {"relative_attention_bias/embedding": (32, HEADS)}
    text = {**llama[0], **norms("q_norm/weight", "k_norm/weight")}
    return {
        "Qwen 3": one(
            "qwen3: Attention",
            "layers/*/attn",
            {**qwen[0], **norms(*pair)},
            qwen[1],
            qk_norm=True,
        ),
        "Gemma 3": one(
            "gemma3: Gemma3Attention",
            "language_model/layers/*/self_attn",
            {**llama[0], **norms(*pair)},
            llama[1],
            qk_norm=True,
        ),
        "LLaDA": one(
            "llada: LLaDALlamaBlock",
            "blocks/*",
            {**llada[0], **norms("attn_norm/weight", "ff_norm/weight", size=WIDTH)},
            llada[1],
            told={"kv_heads": KV},
        ),
        "V-JEPA 2": one(
            "vjepa2: VJEPA2RopeAttention",
            "encoder/layer/*/attention",
            *vjepa,
            told={"heads": HEADS},
        ),
        "umT5": one(
            "umt5: UMT5Attention", "encoder/block/*/layer/0/attn", {**umt5[0], **bias}, umt5[1]
        ),
        "Qwen 3 VL": Tree(
            "qwen3_vl: Qwen3VLAttention, Qwen3VLVisionAttention",
            {
                **at("language_model/layers/0/self_attn", text),
                **at("visual/blocks/0/attn", vision[0]),
            },
            {"language_model/layers/0/self_attn": llama[1], "visual/blocks/0/attn": vision[1]},
            told={"heads": HEADS},
            qk_norm=True,
        ),
    }


def easydel() -> dict[str, Tree]:
    """`easydel/modules/*/modeling_*.py`, `layers/attention/_unified.py`."""
    llama = plain(LLAMA, "/kernel", "flat")
    both = {"heads": HEADS, "kv_heads": KV}
    mla = latent(HF_LATENT, "q_a_layernorm/kernel kv_a_layernorm/kernel", "flat")
    plain_query = latent(
        "q_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        "q_a_layernorm/kernel kv_a_layernorm/kernel",
        "flat",
    )
    no_rope = latent(
        "q_proj kv_a_proj_with_mqa kv_b_proj o_proj",
        "q_a_layernorm/kernel kv_a_layernorm/kernel",
        "flat",
        rope=0,
    )
    indexer = {
        "indexer/wq_b/kernel": (Q_RANK, 6 * 7),
        "indexer/wk/kernel": (WIDTH, 7),
        "indexer/k_norm/scale": (7,),
        "indexer/kernels_proj/kernel": (WIDTH, 6),
    }
    gated = {
        "q_proj/kernel": (WIDTH, 2 * HEADS * F),
        "k_proj/kernel": (WIDTH, KV * F),
        "v_proj/kernel": (WIDTH, KV * F),
        "o_proj/kernel": (HEADS * F, WIDTH),
        **norms("q_norm/kernel", "k_norm/kernel"),
    }
    gated_heads = {
        **llama[1],
        "q": ("q_proj/kernel", flat(HEADS, 0, 2 * F)),
        "gate": ("q_proj/kernel", flat(HEADS, F, 2 * F)),
    }
    delta = {
        **plain(LLAMA, "/kernel", "flat", kv=HEADS)[0],
        "q_conv1d/kernel": (4, 1, HEADS * F),
        "k_conv1d/kernel": (4, 1, HEADS * F),
        "v_conv1d/kernel": (4, 1, HEADS * F),
        "f_a_proj/kernel": (WIDTH, F),
        "f_b_proj/kernel": (F, HEADS),
        "b_proj/kernel": (WIDTH, HEADS),
        "g_a_proj/kernel": (WIDTH, F),
        "g_b_proj/kernel": (F, HEADS * F),
        "o_norm/kernel": (F,),
        "A_log": (HEADS,),
        "dt_bias": (HEADS,),
    }
    delta_heads = {
        **plain(LLAMA, "/kernel", "flat", kv=HEADS)[1],
        "gate": ("g_b_proj/kernel", flat(HEADS)),
    }
    slots = (HEADS // KV + 2) * F
    grouped = dict(
        q=lambda x: [x[:, i : i + F] for i in (0, F, slots, slots + F)],
        k=flat(KV, 2 * F, slots),
        v=flat(KV, 3 * F, slots),
        out_shape=(HEADS * F, WIDTH),
        o=flat_out(HEADS),
    )
    blocked = dict(
        q=flat(HEADS),
        k=flat(KV, HEADS * F),
        v=flat(KV, (HEADS + KV) * F),
        out_shape=(HEADS * F, WIDTH),
        o=flat_out(HEADS),
    )
    in_one = (WIDTH, (HEADS + 2 * KV) * F)
    return {
        "Llama, Mixtral": one(
            "llama: LlamaAttention", "model/layers/*/self_attn", *llama, told=both
        ),
        "Qwen 3, Qwen 3 MoE": one(
            "qwen3: Qwen3Attention",
            "model/layers/*/self_attn",
            {**llama[0], **norms("q_norm/kernel", "k_norm/kernel")},
            llama[1],
            qk_norm=True,
        ),
        "gpt-oss": one(
            "gpt_oss: GptOssAttention",
            "model/layers/*/self_attn",
            {**llama[0], "sinks": (HEADS,)},
            llama[1],
        ),
        "DeepSeek V3": one("deepseek_v3: DeepseekV3Attention", "model/layers/*/self_attn", *mla),
        "DeepSeek V2 Lite": one(
            "deepseek_v2: DeepseekV2Attention", "model/layers/*/self_attn", *plain_query
        ),
        "MLA without rotary features": one(
            "kimi_linear: KimiMLAAttention, with qk_rope_head_dim=0",
            "model/layers/*/self_attn",
            *no_rope,
            told={"heads": HEADS},
        ),
        "Kimi Linear": Tree(
            "kimi_linear: KimiMLAAttention, KimiDeltaAttention",
            {
                **at("model/layers/0/self_attn", delta),
                **at("model/layers/1/self_attn", plain_query[0]),
            },
            {"model/layers/1/self_attn": plain_query[1]},
            linear={"model/layers/0/self_attn": delta_heads},
        ),
        "GLM 5": one(
            "glm_moe_dsa: GlmMoeDsaAttention, GlmMoeDsaIndexer",
            "model/layers/*/self_attn",
            {**mla[0], **indexer},
            mla[1],
        ),
        "Qwen3-Next": one(
            "qwen3_next: Qwen3NextFullAttention",
            "model/layers/*/self_attn",
            gated,
            gated_heads,
            qk_norm=True,
        ),
        "Falcon": one(
            "falcon: FalconAttention",
            "transformer/h/*/self_attention",
            *fused("query_key_value/kernel", "dense/kernel", in_one, **grouped),
            told=both,
        ),
        "InternLM 2": one(
            "internlm2: InternLM2Attention",
            "model/layers/*/attention",
            *fused("wqkv/kernel", "wo/kernel", in_one, **grouped),
            told=both,
        ),
        "Phi 3": one(
            "phi3: Phi3Attention",
            "model/layers/*/self_attn",
            *fused("qkv_proj/kernel", "o_proj/kernel", in_one, **blocked),
            told=both,
        ),
        "DBRX": one(
            "dbrx: DbrxAttention",
            "transformer/blocks/*/norm_attn_norm/attn",
            *fused("Wqkv/kernel", "out_proj/kernel", in_one, **blocked),
            told=both,
        ),
    }


def equinox() -> dict[str, Tree]:
    """Levanter: `layers/attention.py`, `models/gpt2.py`, `whisper.py`; Equinox's own module."""
    group = HEADS // KV
    llama = {
        "q_proj/weight": (KV, group, F, WIDTH),
        "k_proj/weight": (KV, F, WIDTH),
        "v_proj/weight": (KV, F, WIDTH),
        "o_proj/weight": (WIDTH, HEADS, F),
    }
    llama_heads = {
        "q": ("q_proj/weight", lambda x: [x[h // group, h % group].T for h in range(HEADS)]),
        "k": ("k_proj/weight", lambda x: [x[h].T for h in range(KV)]),
        "v": ("v_proj/weight", lambda x: [x[h].T for h in range(KV)]),
        "o": ("o_proj/weight", lambda x: [x[:, h].T for h in range(HEADS)]),
    }
    gpt2 = fused(
        "c_attn/weight",
        "c_proj/weight",
        (WIDTH, 3, HEADS, F),
        *(lambda x, part=part: [x[:, part, h] for h in range(HEADS)] for part in range(3)),
        (HEADS, F, WIDTH),
        in_front(HEADS),
    )
    whisper = plain("q_proj k_proj v_proj out_proj", "/weight", "headed", kv=HEADS)
    own = plain("query_proj key_proj value_proj output_proj", "/weight", "turned", kv=HEADS)
    stacked = dict(stack=(LAYERS,))
    return {
        "Llama in Levanter": one(
            "attention.py: Attention",
            "transformer/layers/stacked/self_attn",
            llama,
            llama_heads,
            **stacked,
        ),
        "Qwen 3 in Levanter": one(
            "attention.py: Attention with qk_norm",
            "transformer/layers/stacked/self_attn",
            {**llama, **norms("q_norm/weight", "k_norm/weight")},
            llama_heads,
            **stacked,
            qk_norm=True,
        ),
        "GPT-2 in Levanter": one(
            "gpt2.py: Gpt2Attention", "transformer/blocks/stacked/attn", *gpt2, **stacked
        ),
        "Whisper in Levanter": one(
            "whisper.py: WhisperAttention", "encoder/layers/stacked/self_attn", *whisper, **stacked
        ),
        "Equinox": one(
            "equinox.nn.MultiheadAttention 0.13",
            "layers/*/attention",
            *own,
            told={"heads": HEADS},
        ),
    }


def others() -> dict[str, Tree]:
    """nanodo: `nanodo/model.py`; T5X: `t5x/examples/t5/layers.py`, scanned over axis 1."""
    nanodo = plain("query key value attn_out_proj", "/kernel", "headed", kv=HEADS)
    t5x = plain(FLAX, "/kernel", "flat", kv=HEADS)
    return {
        "nanodo": one("CausalAttn", "blocks_*/CausalAttn_0", *nanodo),
        "T5X, scanned": one(
            "MultiHeadDotProductAttention",
            "target/encoder/encoder/attention",
            *t5x,
            stack=(LAYERS,),
            axis=1,
            told={"heads": HEADS},
        ),
    }


TREES: dict[str, Tree] = {
    f"{library}: {name}": tree
    for library, trees in {
        "MaxText": maxtext(),
        "Tunix and gemma": tunix(),
        "Transformers": transformers(),
        "bonsai": bonsai(),
        "EasyDeL": easydel(),
        "Equinox": equinox(),
        "others": others(),
    }.items()
    for name, tree in trees.items()
}
