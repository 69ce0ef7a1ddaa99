"""A wrong layout raises, naming path, shapes and fix.

One row a mistake: what the user did, and the words that must stand in the message. The last words
of each row are the fix.
"""

import jax
import jax.numpy as jnp
import optax
import pytest

import muonclip_jax as mc
from muonclip_jax._layouts.blocks import Layout, find_blocks
from muonclip_jax._layouts.pieces import Piece


def kernel(*shape):
    return {"kernel": jax.ShapeDtypeStruct(shape, "float32")}


def array(*shape):
    return jax.ShapeDtypeStruct(shape, "float32")


HEADED = {
    "query": kernel(8, 4, 6),
    "key": kernel(8, 4, 6),
    "value": kernel(8, 4, 6),
    "out": kernel(4, 6, 8),
}
FLAT = {"query": kernel(8, 24), "key": kernel(8, 24)}
FUSED = {"qkv": kernel(8, 72), "out": kernel(24, 8)}
MLA = {
    "wq_a": kernel(8, 5),
    "wq_b": kernel(5, 12),
    "wkv_a": kernel(8, 9),
    "wkv_b": kernel(7, 14),
    "wo": kernel(6, 8),
}  # 2 heads: nope 4, rope 2, v 3

QUERIES_AND_KEYS = {"value": None, "out": None}
FLAT_LAYOUT = mc.layouts.mha(heads=4, **QUERIES_AND_KEYS)
KEY = Piece("k", "key")
LLAMA = ("q_proj", "k_proj")


def find(layout, block=None, **changes):
    """Looks for `block`, some of its parameters changed or (None) gone, as `layers/attn`."""
    block = {**(HEADED if block is None else block), **changes}
    block = {name: leaf for name, leaf in block.items() if leaf is not None}
    return find_blocks(layout, {"layers": {"attn": block}})


def query(axes, sizes=(), select=(), shape=(8, 4, 6), **options):
    """A layout whose query is this piece."""
    layout = Layout("mine", (Piece("q", "query", axes, sizes, select, **options), KEY))
    return find(layout, query={"kernel": array(*shape)})


def split(axes, sizes):
    return query(axes, sizes, shape=(8, 24))


def route(layout=None, block=HEADED, **options):
    layout = layout or mc.layouts.mha()
    return mc.muon_dimension_numbers({"attn": block}, layout=layout, **options)


def clip(maxima, params=None, layout=None):
    zeros = lambda tree: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), tree)  # noqa: E731
    params = {"layers": {"attn": HEADED}} if params is None else params
    return mc.apply_qk_clip(zeros(params), maxima, layout or mc.layouts.mha())


def sown(*shape, at="attn"):
    return {"layers": {at: {"max_logits": jnp.ones(shape)}}}


def inside_partition(make):
    params = {"attn": {name: {"kernel": jnp.ones(x["kernel"].shape)} for name, x in HEADED.items()}}
    labels = {"attn": {"query": "a", "key": "b", "value": "b", "out": "b"}}
    return optax.partition({"a": make(mc.layouts.mha()), "b": optax.identity()}, labels).init(
        params
    )


# (what is wrong, what the user did, words in the message)
MISTAKES = [
    # --- no layout
    ("a string", lambda: find("mha"), ["'mha'", "layouts.mha()", "find_layout(params)"]),
    ("None", lambda: find(None), ["layout must be", "None", "layouts.mha()"]),
    ("an empty list", lambda: find([]), ["layout must be", "[]", "layouts.mha()"]),
    (
        "a list with a string",
        lambda: find([mc.layouts.mha(), "x"]),
        ["layout must be", "'x'", "layouts.mha()"],
    ),
    (
        "a layout not called",
        lambda: find(mc.layouts.mha),
        ["layout must be", "function mha", "layouts.mha()"],
    ),
    (
        "no dict of parameters",
        lambda: find_blocks(mc.layouts.mha(), {}),
        ["no attention block", "this tree: none", "query="],
    ),
    # --- parameters that are not there
    (
        "missing kernel",
        lambda: find(mc.layouts.mha(), key=None),
        ["layers/attn", "expects key", "role 'k'", "query/kernel (8, 4, 6)", "key="],
    ),
    (
        "missing value",
        lambda: find(mc.layouts.mha(value="v_proj")),
        ["layers/attn", "expects v_proj", "role 'v'", "value/kernel (8, 4, 6)", "value="],
    ),
    (
        "missing gain",
        lambda: find(mc.layouts.mla(4, 2, 3, query_norm="q_norm"), MLA),
        ["layers/attn", "q_norm/scale", "wq_a/kernel (8, 5)"],
    ),
    (
        "missing bias",
        lambda: query("in heads features", bias="query/b"),
        ["layers/attn", "query/b", "query/kernel (8, 4, 6)"],
    ),
    (
        "a pattern that matches nothing",
        lambda: find(mc.layouts.mha(block="encoder/*")),
        ["'encoder/*'", "no attention block", "layers/attn", "block="],
    ),
    (
        "other names",
        lambda: find(mc.layouts.mha(query="q_proj", key="k_proj")),
        ["q_proj and k_proj", "layers/attn/query/kernel", "query="],
    ),
    # --- heads and sizes
    (
        "wrong number of heads",
        lambda: query("in heads features", {"heads": 3}),
        ["layers/attn/query/kernel", "(8, 4, 6)", "has 4", "heads", "3"],
    ),
    (
        "heads that do not divide",
        lambda: find(mc.layouts.mha(heads=5, **QUERIES_AND_KEYS), FLAT),
        ["layers/attn/query/kernel", "(8, 24)", "has 24", "5 heads"],
    ),
    (
        "wrong number of key heads",
        lambda: find(mc.layouts.gqa(2, heads=4, **QUERIES_AND_KEYS), FLAT, key=kernel(8, 24)),
        ["layers/attn/query/kernel (8, 24)", "6 features", "12", "layouts.gqa("],
    ),
    (
        "grouped heads as one each",
        lambda: find(mc.layouts.mha(), key=kernel(8, 2, 6), value=kernel(8, 2, 6)),
        ["layers/attn/query/kernel (8, 4, 6)", "layers/attn/key/kernel (8, 2, 6)", "layouts.gqa()"],
    ),
    (
        "fused kernel that does not split",
        lambda: find(mc.layouts.fused_qkv(5), FUSED),
        ["layers/attn/qkv/kernel", "(8, 72)", "5 heads", "3 part"],
    ),
    (
        "fused, grouped heads forgotten",
        lambda: find(mc.layouts.fused_qkv(4), FUSED, qkv=kernel(8, 32)),
        ["layers/attn/qkv/kernel", "(8, 32)", "4 heads", "3 part"],
    ),
    (
        "MLA with another rope",
        lambda: find(mc.layouts.mla(4, 3, 3), MLA),
        ["layers/attn/wq_b/kernel", "(5, 12)", "7 features"],
    ),
    (
        "MLA with another value size",
        lambda: find(mc.layouts.mla(4, 2, 4), MLA),
        ["layers/attn/wkv_b/kernel", "(7, 14)", "8 features"],
    ),
    (
        "a size that does not fit",
        lambda: query("in heads features", {"features": 7}),
        ["layers/attn/query/kernel", "(8, 4, 6)", "has 6", "7 features"],
    ),
    (
        "two unknown lengths on one axis",
        lambda: split("in (heads features)", {}),
        ["layers/attn/query/kernel", "(8, 24)", "heads and features", "sizes="],
    ),
    (
        "flat kernel, no head count",
        lambda: find(mc.layouts.mha(**QUERIES_AND_KEYS), FLAT),
        ["layers/attn/query/kernel", "(8, 24)", "[stack..., in, heads, features]", "heads="],
    ),
    (
        "queries and rotary queries of different heads",
        lambda: find(
            Layout("x", (Piece("q", "query"), Piece("q_rope", "rope"), KEY)),
            rope=kernel(8, 2, 6),
        ),
        ["layers/attn", "query/kernel (8, 4, 6)", "rope/kernel (8, 2, 6)"],
    ),
    (
        "an output of other heads",
        lambda: find(
            Layout(
                "x",
                (
                    Piece("q", "query"),
                    KEY,
                    Piece("o", "out", "(heads features) out", {"heads": 2}),
                ),
            ),
            out=kernel(24, 8),
        ),
        ["layers/attn", "query/kernel (8, 4, 6)", "out/kernel (24, 8)", "4", "2"],
    ),
    (
        "values of other heads",
        lambda: find(mc.layouts.mha(), value=kernel(8, 2, 6)),
        ["layers/attn", "key/kernel (8, 4, 6)", "value/kernel (8, 2, 6)", "4", "2"],
    ),
    # --- slices
    (
        "slice out of range",
        lambda: query("in heads features", select={"features": (4, 8)}),
        ["layers/attn/query/kernel", "(8, 4, 6)", "6 features", "(4, 8)"],
    ),
    (
        "index out of range",
        lambda: query("in heads features", select={"heads": 4}),
        ["layers/attn/query/kernel", "(8, 4, 6)", "4 heads", "4"],
    ),
    (
        "negative slice out of range",
        lambda: query("in heads features", select={"features": (-7, None)}),
        ["layers/attn/query/kernel", "(8, 4, 6)", "6 features", "(-7, None)"],
    ),
    (
        "empty slice",
        lambda: query("in heads features", select={"features": (3, 3)}),
        ["layers/attn/query/kernel", "(8, 4, 6)", "(3, 3)"],
    ),
    (
        "slice of the input",
        lambda: query("in heads features", select={"in": (0, 4)}),
        ["'query'", "'in heads features'", "head axes and features"],
    ),
    (
        "overlapping pieces",
        lambda: find(
            Layout(
                "x",
                tuple(
                    Piece(role, "query", select={"features": ends})
                    for role, ends in (("q", (0, 4)), ("k", (2, 6)))
                ),
            )
        ),
        ["layers/attn/query/kernel", "(8, 4, 6)", "q, k overlap", "select="],
    ),
    (
        "a kernel that the pieces do not tile, when Muon splits it",
        lambda: route(
            Layout(
                "x",
                (
                    Piece("q", "query", select={"features": (0, 4)}),
                    Piece("k", "key", select={"features": (0, 4)}),
                    Piece("v", "key", select={"features": (4, 6)}),
                ),
            )
        ),
        ["attn/query/kernel", "(8, 4, 6)", "2 of its 6 features", "pieces (q)", "gate"],
    ),
    # --- pieces
    (
        "unknown role",
        lambda: Piece("queries", "query"),
        ["'queries'", "'query'", "choose from q, k, v"],
    ),
    (
        "a role twice",
        lambda: Layout("x", (Piece("q", "query"), Piece("q", "query"), KEY)),
        ["layouts.x", "role 'q'", "two pieces", "of different parameters"],
    ),
    (
        "a latent twice",
        lambda: Layout("x", tuple(Piece("q_nope", name) for name in ("query", "key"))),
        ["layouts.x", "role 'q_nope', query and key", "two pieces", "q, k, v, o, gate"],
    ),
    (
        "no query",
        lambda: Layout("x", (KEY, Piece("v", "value"))),
        ["layouts.x", "['k', 'v']", "'q_nope'", "layouts.ignore"],
    ),
    (
        "a bias for a projection",
        lambda: Layout("x", (Piece("q", "query", "heads features"), KEY)),
        ["layouts.x", "Piece('q', 'query', 'heads features') has no axis 'in'", "axes"],
    ),
    (
        "streams with other heads",
        lambda: find(
            mc.layouts.mha(query=("query", "other"), value=None, out=None), other=kernel(8, 2, 6)
        ),
        ["layers/attn/query/kernel (8, 4, 6) has 4 heads", "(8, 2, 6) 2 of 6", "axes="],
    ),
    (
        "a key that all heads share beside others",
        lambda: find(
            Layout("x", (Piece("q", "query"), KEY, Piece("k", "value", "heads in features"))),
            value=kernel(1, 9, 6),
        ),
        ["layers/attn/value/kernel (1, 9, 6) 1 of 6", "What all heads share", "harmless="],
    ),
    ("a size of zero", lambda: Piece("q", "w", sizes={"heads": 0}), ["'w'", "heads", "got 0"]),
    (
        "a name twice",
        lambda: Piece("q", "query", "in heads heads features"),
        ["'query'", "'in heads heads features'", "twice"],
    ),
    (
        "no features",
        lambda: Piece("q", "query", "in heads"),
        ["'query'", "'in heads'", "must have", "'features'"],
    ),
    (
        "neither in nor out",
        lambda: Piece("v", "w", "heads features"),
        ["Piece('v', 'w'", "axes='heads features'", "must have 'in'"],
    ),
    (
        "o without out",
        lambda: Piece("o", "w", "in heads features"),
        ["Piece('o', 'w'", "axes='in heads features'", "must have 'out'"],
    ),
    (
        "in inside of parentheses",
        lambda: Piece("q", "query", "(in heads) features"),
        ["'query'", "'(in heads) features'", "outside of parentheses"],
    ),
    (
        "unmatched parentheses",
        lambda: Piece("q", "query", "in (heads features"),
        ["'query'", "'in (heads features'", "unmatched"],
    ),
    (
        "nested parentheses",
        lambda: Piece("q", "query", "in ((heads part) features)"),
        ["'query'", "axes=", "nested"],
    ),
    (
        "a size for no axis",
        lambda: Piece("q", "query", sizes={"groups": 2}),
        ["'query'", "'in heads features'", "groups"],
    ),
    (
        "a slice of no axis",
        lambda: Piece("q", "query", select={"slot": 2}),
        ["'query'", "'in heads features'", "slot"],
    ),
    # --- blocks
    (
        "described twice",
        lambda: find([mc.layouts.mha(), mc.layouts.gqa()]),
        ["layers/attn", "layouts.mha()", "layouts.gqa()", "block="],
    ),
    (
        "attention that nothing covers",
        lambda: find_blocks(
            mc.layouts.mha(),
            {
                "a": {"attn": HEADED},
                "b": {"self_attn": {"q_proj": kernel(8, 8), "k_proj": kernel(8, 8)}},
            },
        ),
        ["b/self_attn", "q_proj and k_proj", "a/attn", "block=", "layouts.ignore("],
    ),
    (
        "nothing ignored",
        lambda: find([mc.layouts.mha(), mc.layouts.ignore("encoder/*")]),
        ["'encoder/*'", "no module", "layers/attn"],
    ),
    (
        "kernels stacked differently",
        lambda: find(mc.layouts.mha(), key=kernel(3, 8, 4, 6)),
        ["layers/attn/query/kernel", "layers/attn/key/kernel", "(3, 8, 4, 6)", "stacked alike"],
    ),
    (
        "too few axes",
        lambda: query("in heads part features"),
        ["layers/attn/query/kernel", "(8, 4, 6)", "[stack..., in, heads, part, features]"],
    ),
    (
        "a bias of another shape",
        lambda: find(mc.layouts.mha(), query={**kernel(8, 4, 6), "bias": array(4)}),
        ["layers/attn/query/bias", "(4,)", "query/kernel (8, 4, 6)", "(4, 6)", "(24,)"],
    ),
    (
        "a bias that is not stacked",
        lambda: find(
            mc.layouts.mha(value=None, out=None),
            query={**kernel(3, 8, 4, 6), "bias": array(4, 6)},
            key=kernel(3, 8, 4, 6),
        ),
        ["layers/attn/query/bias", "(4, 6)", "(3, 8, 4, 6)", "(3, 4, 6)"],
    ),
    (
        "LoRA beside the kernel",
        lambda: find(mc.layouts.mha(), key={**kernel(8, 4, 6), "lora_a": array(8, 2)}),
        ["layers/attn/key/lora_a", "(8, 2)", "Merge", "block="],
    ),
    # --- use
    (
        "QK-norm and QK-Clip",
        lambda: clip(sown(4), {"layers": {"attn": {**HEADED, "q_norm": {"scale": array(6)}}}}),
        ["layers/attn/q_norm/scale", "(6,)", "change nothing", "block=", "harmless"],
    ),
    (
        "QK-norm and QuacK",
        lambda: mc.scale_by_quack(mc.layouts.mha()).init(
            {"attn": {**HEADED, "key_ln": {"scale": array(6)}}}
        ),
        ["attn/key_ln/scale", "change nothing", "block="],
    ),
    (
        "sown with the wrong number of heads",
        lambda: clip(sown(3)),
        ["layers/attn", "(3,)", "4 query heads", "expected (4,)", "heads="],
    ),
    (
        "sown per key head",
        lambda: clip(
            sown(2),
            {"layers": {"attn": {**HEADED, "key": kernel(8, 2, 6), "value": kernel(8, 2, 6)}}},
            mc.layouts.gqa(),
        ),
        ["layers/attn", "(2,)", "4 query heads", "one maximum per query head"],
    ),
    (
        "not sown",
        lambda: clip(sown(4), {"layers": {"attn": HEADED, "cross": HEADED}}),
        ["layers/cross", "layers/attn", "block="],
    ),
    ("sown elsewhere", lambda: clip(sown(4, at="mlp")), ["layers/mlp", "layers/attn", "Sow in"]),
    (
        "roles for a granularity",
        lambda: route(granularity=("q",)),
        ["granularity must be", "Granularity(heads=2)", "('q',)"],
    ),
    (
        "QK-Clip inside a partition",
        lambda: inside_partition(mc.qk_clip),
        ["attn", "optax.partition", "move it outside"],
    ),
    (
        "QuacK inside a partition",
        lambda: inside_partition(mc.scale_by_quack),
        ["attn", "optax.partition", "move it outside"],
    ),
    # --- the kinds
    (
        "fused without part",
        lambda: mc.layouts.fused_qkv(4, axes="in heads features"),
        ["layouts.fused_qkv", "axes='in heads features'", "'part'"],
    ),
    (
        "unequal parts on an axis of their own",
        lambda: mc.layouts.fused_qkv(4, 2, axes="in part heads features"),
        ["layouts.fused_qkv", "4 query and 2 key heads", "'in part heads features'"],
    ),
    ("uneven groups", lambda: mc.layouts.fused_qkv(4, 3), ["4 query", "3 key", "multiple"]),
    ("no number of heads", lambda: mc.layouts.mha(heads="8"), ["layouts.mha", "heads", "'8'"]),
    # --- what only the surroundings tell
    (
        "sibling attention under a common name",
        lambda: find(
            mc.layouts.mha(query="self/query", key="self/key", value="self/value", out="self/out"),
            {"self": HEADED, "cross": HEADED},
        ),
        [
            "layers/attn/cross holds query and key",
            "covers layers/attn/self/query",
            "block= patterns",
        ],
    ),
    (
        "attention beside a block at the root",
        lambda: find_blocks(
            mc.layouts.mha(), {**HEADED, "decoder": {"wq": kernel(8, 8), "wk": kernel(8, 8)}}
        ),
        ["decoder holds wq and wk", "does not cover", "block= patterns"],
    ),
    (
        "one kernel in two blocks",
        lambda: find(
            [
                mc.layouts.mha(**QUERIES_AND_KEYS),
                mc.layouts.mha(query="attn/query", key="attn/key", **QUERIES_AND_KEYS),
            ]
        ),
        ["layers/attn/query/kernel", "described twice", "Narrow"],
    ),
    (
        "stacked flat kernels read as kernels with heads",
        lambda: find_blocks(
            mc.layouts.mha(**QUERIES_AND_KEYS),
            {
                "attn": {"query": kernel(3, 32, 32), "key": kernel(3, 32, 32)},
                "norm": {"scale": array(3, 32)},
            },
        ),
        ["attn/query/kernel", "(3, 32, 32)", "32 heads of", "32 long, not 3", "heads="],
    ),
    (
        "kernels with heads read as stacked flat kernels",
        lambda: find_blocks(
            mc.layouts.mha(heads=4, **QUERIES_AND_KEYS),
            {
                "attn": {"query": kernel(32, 4, 8), "key": kernel(32, 4, 8)},
                "norm": {"scale": array(32)},
            },
        ),
        ["attn/query/kernel", "(32, 4, 8)", "layers (32,)", "32 long, not 4", "only for those"],
    ),
    (
        "heads= for kernels with a head axis",
        lambda: find(mc.layouts.mha(heads=4)),
        ["layers/attn/query/kernel", "(8, 4, 6)", "which only flat kernels need"],
    ),
    (
        "a bias that no piece names",
        lambda: find(mc.layouts.mha(), q_bias=array(4, 6)),
        ["layers/attn/q_bias", "(4, 6)", 'bias="q_bias"'],
    ),
    (
        "a QK-norm of every head's own",
        lambda: mc.qk_clip(mc.layouts.mha()).init(
            {"attn": {**HEADED, "q_norm": {"scale": array(4, 6)}}}
        ),
        ["attn/q_norm/scale (4, 6)", "change nothing", "mc.muon"],
    ),
    (
        "a QK-norm as a parameter of the block",
        lambda: mc.qk_clip(mc.layouts.mha()).init({"attn": {**HEADED, "q_norm": array(6)}}),
        ["attn/q_norm (6,)", "QK-norm", "mc.muon"],
    ),
    # --- the recipes
    (
        "granularity without a layout",
        lambda: mc.muon(0.1, granularity=mc.Granularity(heads=2)).init(
            {"mlp": {"kernel": jnp.ones((2, 3))}}
        ),
        ["Granularity(heads=2", "needs layout=", "where the heads are"],
    ),
    (
        "granularity of a role that no block has",
        lambda: mc.describe(
            {"attn": HEADED}, mc.layouts.mha(), granularity=mc.Granularity(heads={"gate": "all"})
        ),
        ["gate", "no attention block", "k, o, q, v"],
    ),
    (
        "rules beside dimension_numbers",
        lambda: mc.muon(0.1, rules={}, dimension_numbers=mc.muon_dimension_numbers),
        ["rules=", "dimension_numbers= replaces", "the one or the other"],
    ),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("do", "words"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES]
)
def test_mistake(do, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        do()
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_the_right_wiring_raises_nothing():
    """The parameters and functions that the mistakes are made of."""
    find(mc.layouts.mha())
    find(FLAT_LAYOUT, FLAT)
    find(mc.layouts.fused_qkv(4), FUSED)
    find(mc.layouts.mla(4, 2, 3), MLA)
    decoy = {"encoder": {"attn": HEADED}, "decoder": {"attn": HEADED}}
    find_blocks([mc.layouts.mha(), mc.layouts.ignore("encoder/*")], decoy)
    query("in heads features", {"heads": 4, "features": 6}, {"features": (0, 6)})
    split("in (heads features)", {"heads": 4})
    route(granularity=mc.Granularity(heads={"q": 2}))
    clip(sown(4))
