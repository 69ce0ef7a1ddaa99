"""What each parameter of known models is, by hand: what `benchmarks.coverage` compares with.

Written from the models' sources, not from what this library prints: MaxText 0.2.5 `layers/` and
`models/`, Transformers 4.57.1 `modeling_flax_*.py`. An entry is a glob, the axes of one layer's
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

TABLES = {
    "maxtext": MAXTEXT,
    "transformers": TRANSFORMERS,
    "transformers/gpt_neo": DENSE_MLP,
}


def table(library: str, architecture: str) -> Table:
    """The table of an architecture, or its library's."""
    return TABLES.get(f"{library}/{architecture}", TABLES[library])


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
                return (frozenset(rows), frozenset({whole.index(outs)})), kind
    raise ValueError(f"benchmarks.known_models has no entry for {path} of shape {shape}.")
