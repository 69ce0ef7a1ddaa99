"""What each parameter of known models is, by hand: what `benchmarks.coverage` compares with.

Written from the models' sources, not from what this library prints: MaxText 0.2.5 `layers/` and
`models/`, Transformers 4.57.1 `modeling_flax_*.py`, Tunix 0.1.7 `models/*/model.py` and gemma 4.0.1
`gm/nn/`, both by their einsums. An entry is a glob, the axes of one layer's
parameter as its forward pass contracts them, and what it is. A matrix has the rows `in` (of
projections back from heads `features`), with them `window` axes, and the columns `features` or
`out`. All other axes count matrices: each head that has an axis of its own is one.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

Sides = tuple[frozenset[int], frozenset[int]]
"""The axes of a matrix's rows and of its columns."""

Entry = tuple[str, str | None, str]
"""A glob, the axes (several, by their number, with `|`; None: no matrix), and what it is:
"attention", "embedding", "unembedding" or nothing of these."""


@dataclass(frozen=True)
class Table:
    """One library's storage.

    Attributes:
      entries: The first whose glob matches and that has as many axes decides.
      stacked: Globs of modules whose layers are stacked → how many axes these have.
      stack_axis: Where these are.
    """

    entries: Sequence[Entry]
    stacked: Mapping[str, int]
    stack_axis: int = 0


HEADS = "in heads features"
MLA = "in heads features | in out"
BACK = "heads features out | in out"

VECTORS: tuple[Entry, ...] = (("*bias", None, ""), ("*scale*", None, ""), ("*_scalar", None, ""))

MAXTEXT = Table(
    (
        *VECTORS,
        ("*embedder/embedding", None, "embedding"),
        ("*/embed_tokens_per_layer", None, "embedding"),
        ("*/logits_dense/kernel", None, "unembedding"),
        # attentions.py: Attention, fused or not; of Qwen3-Next `out` is flat.
        ("*/query/kernel", HEADS, "attention"),
        ("*/key/kernel", HEADS, "attention"),
        ("*/value/kernel", HEADS, "attention"),
        ("*/qkv_proj/kernel", "in part heads features | in heads features", "attention"),
        ("*attention*/out/kernel", BACK, "attention"),
        ("*Attention*/out/kernel", BACK, "attention"),
        ("*/sinks", None, ""),
        # attention_mla.py: MLA and Indexer; attention_compressed.py.
        ("*/wq_[ab]/kernel", MLA, "attention"),
        ("*/wkv_[ab]/kernel", MLA, "attention"),
        ("*/wkv/kernel", HEADS, "attention"),
        ("*/o_a_proj/kernel", "groups in out", "attention"),
        ("*/o_b_proj/kernel", "in out", "attention"),
        # moe.py: RoutedMoE. `gate` and dense layers are linears.py: DenseGeneral.
        ("*/wi", "experts in out", ""),
        ("*/wi_[01]", "experts in out", ""),
        ("*/wo", "experts in out", ""),
        # qwen3.py: a causal convolution of each feature by itself.
        ("*/conv1d/kernel", None, ""),
        # mhc.py: ManifoldConstrainedHyperConnections and the head behind them.
        ("*/*_alpha", "in out", ""),
        ("*/hc_fn", "in out", ""),
        ("*/*_beta", None, ""),
        ("*/kernel", "in out", ""),
    ),
    {
        "decoder/scanned_blocks/local_layers/*": 2,
        "decoder/scanned_blocks/*": 1,
        "decoder/layers/local_layers/*": 2,
        "decoder/layers/*": 1,
        "decoder/dense_layers/*": 1,
        "decoder/moe_layers/*": 1,
    },
    stack_axis=1,
)

TRANSFORMERS = Table(
    (
        *VECTORS,
        ("*/embedding", None, "embedding"),
        # Heads of classification and of language models that are not tied.
        ("*lm_head*/kernel", None, "unembedding"),
        ("*classifier/kernel", None, "unembedding"),
        ("cls/seq_relationship/kernel", None, "unembedding"),
        ("discriminator_predictions/dense_prediction/kernel", None, "unembedding"),
        ("final_logits_bias", None, ""),
        # modeling_flax_gpt2.py: FlaxConv1D, whose kernel is transposed in the forward pass.
        ("*/c_attn/kernel", "out in", "attention"),
        ("*/attn/c_proj/kernel", "out in", "attention"),
        ("*/c_fc/kernel", "out in", ""),
        ("*/mlp/c_proj/kernel", "out in", ""),
        ("*attention*/kernel", "in out", "attention"),
        ("*[aA]tt*/kernel", "in out", "attention"),
        ("*_layer_norm/kernel", None, ""),
        # nn.Conv is [window..., in, out].
        ("*/kernel", "in out | window in out | window window in out", ""),
    ),
    {},
)

# modeling_flax_gpt_neo.py and gptj keep the names of GPT-2's MLP, with nn.Dense.
DENSE_MLP = Table(
    (
        ("*/c_fc/kernel", "in out", ""),
        ("*/mlp/c_proj/kernel", "in out", ""),
        *TRANSFORMERS.entries,
    ),
    {},
)

# The einsums of Gemma's attention, in gemma and in Tunix.
GEMMA_ATTENTION: tuple[Entry, ...] = (
    ("*/q_einsum/w", "heads in features", "attention"),  # BTD,NDH->BTNH
    ("*/k_einsum/w", "heads in features", "attention"),  # BSD,KDH->BSKH, keys are values
    ("*/kv_einsum/w", "part heads in features", "attention"),  # BSD,CKDH->CBSKH
    ("*/qkv_einsum/w", "part heads in features", "attention"),  # BTD,SNDH->SBTNH
    ("*/attn_vec_einsum/w", "heads features out", "attention"),  # BTNH,NHD->BTD
)

TUNIX = Table(
    (
        *VECTORS,
        ("*/input_embedding", None, "embedding"),
        ("*/per_layer_input_embedding", None, "embedding"),
        ("*/pos_embedding", None, "embedding"),
        ("lm_head/w", None, "unembedding"),
        # llama3, qwen2, qwen3: Attention.
        ("*/[qkv]_proj/w", HEADS, "attention"),
        ("*/o_proj/w", "heads features out", "attention"),
        *GEMMA_ATTENTION,
        # gemma3/vision.py: VisionAttention and ViTModel's patches.
        ("*/attn/*_proj/kernel", "in out", "attention"),
        ("*/siglip_encoder/embedding/kernel", "window window in out", ""),
        # qwen3: MoELayer; gemma4/moe.py: MoERagged, whose gate is [experts, 2, hidden, features].
        ("*/mlp/*_proj", "experts in out", ""),
        ("*/moe/gating_einsum", "experts part out in", ""),
        ("*/moe/linear", "experts in out", ""),
        ("*/moe/router_logits", "in out", ""),
        # gemma4: a matrix for each layer, BTD,DNP->BTNP; then each layer's own.
        ("*/per_layer_model_projection/w", "in layers out", ""),
        ("*/per_layer_input_gate/w", "in out", ""),
        ("*/per_layer_projection/w", "in out", ""),
        ("*/mm_input_projection/w", "in out", ""),
        ("*/kernel", "in out", ""),
    ),
    {},
)

GEMMA = Table(
    (
        *VECTORS,
        ("*/input_embedding", None, "embedding"),
        ("*/per_layer_input_embedding", None, "embedding"),
        ("*/per_layer_embeddings", None, "embedding"),
        ("*/pos_embedding", None, "embedding"),
        *GEMMA_ATTENTION,
        # _modules.py: FeedForward with transpose_gating_einsum, ...F,NHF->...NH.
        ("*/gating_einsum", "part out in", ""),
        ("*/linear", "in out", ""),
        # gemma4/_moe.py: MoERagged.
        ("*/mlp/gating_einsum/w", "experts part out in", ""),
        ("*/mlp/linear/w", "experts in out", ""),
        ("*/router_logits/w", "in out", ""),
        # gemma3n and gemma4: a matrix for each layer, ...td,dnp->...tnp; then each layer's own.
        ("*/per_layer_input_projection/w", "in layers out", ""),
        ("*/per_layer_model_projection/w", "in layers out", ""),
        ("*/per_layer_input_gate/w", "in out", ""),
        ("*/per_layer_projection/w", "in out", ""),
        ("*/mm_input_projection/w", "in out", ""),
        # gemma3n: AltUp, whose predictions are mixed by a matrix for each token: ...p,pij->...ij.
        ("altup_projection_*", "in out", ""),
        ("altup_unembed_projection_*", "in out", ""),
        ("*/altup/modality_router/w", "in out", ""),
        ("*/altup/correction_coefs", "in out", ""),
        ("*/altup/prediction_coefs", "in out out", ""),
        ("*/laurel/linear_*/w", "in out", ""),
        # vision/_vision_utils.py: ViTModel, of Flax's modules.
        ("*/query/kernel", HEADS, "attention"),
        ("*/key/kernel", HEADS, "attention"),
        ("*/value/kernel", HEADS, "attention"),
        ("*/out/kernel", "heads features out", "attention"),
        ("*/siglip_encoder/embedding/kernel", "window window in out", ""),
        ("*/kernel", "in out", ""),
    ),
    {},
)

# The only one without transpose_gating_einsum: ...F,NFH->...NH.
GEMMA_2_2B = Table((("*/gating_einsum", "part in out", ""), *GEMMA.entries), {})

TABLES = {
    "maxtext": MAXTEXT,
    "transformers": TRANSFORMERS,
    "transformers/gpt_neo": DENSE_MLP,
    "tunix": TUNIX,
    "gemma": GEMMA,
    "gemma/Gemma2_2B": GEMMA_2_2B,
}


def table(library: str, *names: str) -> Table:
    """The table of a model or an architecture that has one of its own, or its library's."""
    own = (TABLES[key] for name in names if (key := f"{library}/{name}") in TABLES)
    return next(own, TABLES[library])


def expected(path: str, shape: tuple[int, ...], known: Table) -> tuple[Sides | None, str]:
    """The axes of a parameter's matrices (None: it is for the other optimizer), and what it is.

    Raises:
      ValueError: The table has no entry for it.
    """
    depths = (depth for glob, depth in known.stacked.items() if fnmatchcase(path, glob))
    depth = next(depths, 0)
    if len(shape) - depth < 2:
        return None, ""
    for glob, text, kind in known.entries:
        if not fnmatchcase(path, glob):
            continue
        if text is None:
            return None, kind
        for axes in (one.split() for one in text.split("|")):
            if len(axes) == len(shape) - depth:
                at = known.stack_axis if depth else 0
                whole = [*axes[:at], *[""] * depth, *axes[at:]]
                outs = "out" if "out" in whole else "features"
                ins = "in" if "in" in whole else "features"
                rows = {i for i, axis in enumerate(whole) if axis in (ins, "window")}
                columns = {i for i, axis in enumerate(whole) if axis == outs}
                return (frozenset(rows), frozenset(columns)), kind
    raise ValueError(f"benchmarks.known_models has no entry for {path} of shape {shape}.")
