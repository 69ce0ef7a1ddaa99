"""Every way of wiring it wrong raises early, naming path, finding and fix.

One row a mistake: what the user did, and the words that must stand in the message.
"""

import dataclasses
import pathlib
import tempfile
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax.contrib import MuonDimensionNumbers

import muonclip_jax as mc
from examples.mla.cli import InputError
from examples.mla.data import load_text, training_batches
from examples.mla.model import ModelConfig, attention_layout
from examples.mla.train import read_settings


def kernel(*shape):
    return {"kernel": jnp.ones(shape)}


def block(heads=4, kv_heads=None, features=6, stack=()):
    return {
        "query": kernel(*stack, 8, heads, features),
        "key": kernel(*stack, 8, kv_heads or heads, features),
        "value": kernel(*stack, 8, kv_heads or heads, features),
        "out": kernel(*stack, heads, features, 8),
    }


PARAMS = {"layers": {"attn": block()}}
MAXIMA = {"layers": {"attn": {"max_logits": jnp.ones(4)}}}
KEY_PIECE = mc.layouts.Piece("k", "key")
MLA = {  # 2 heads: nope 4, rope 2, v 3
    "attn": {
        "wq_a": kernel(8, 5),
        "wq_b": kernel(5, 12),
        "wkv_a": kernel(8, 7),
        "wkv_b": kernel(5, 14),
        "wo": kernel(6, 8),
    }
}


def clip(params=PARAMS, maxima=MAXIMA, layout=None, **options):
    return mc.apply_qk_clip(params, maxima, layout or mc.layouts.mha(), **options)


def update(tx, params=PARAMS, **extra):
    return tx.update(params, tx.init(params), params, **extra)


def linen_intermediates(sow_weights=True, mutable=("intermediates",), axes=("params",)):
    """What a scanned Linen model hands on when it is wired as told."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = nn.MultiHeadDotProductAttention(
                2, attention_fn=mc.attention_fn, name="attn"
            )
            scanned = nn.scan(
                lambda module, x, _: (module(x, sow_weights=sow_weights), None),
                variable_axes=dict.fromkeys(axes, 0),
                split_rngs={"params": True},
                length=2,
            )
            return scanned(attention, x, None)[0]

    x = jnp.ones((1, 3, 4))
    params = Model().init(jax.random.key(0), x)["params"]
    _, sown = Model().apply({"params": params}, x, mutable=list(mutable))
    return params, sown


def clip_linen(**wiring):
    params, sown = linen_intermediates(**wiring)
    return clip(params, sown)


def nnx_intermediates_without_capture_type():
    attention = nnx.MultiHeadAttention(
        2, 4, decode=False, attention_fn=mc.attention_fn, rngs=nnx.Rngs(0)
    )
    _, sown = nnx.capture(
        lambda module: module(jnp.ones((1, 3, 4)), sow_weights=True), nnx.BatchStat
    )(attention)
    return mc.read_max_logits(sown)


def attention(query=(1, 3, 4, 2), key=(1, 3, 4, 2), value=(1, 3, 4, 2), **options):
    return mc.dot_product_attention(jnp.ones(query), jnp.ones(key), jnp.ones(value), **options)


def inject_function():
    """`inject_hyperparams` calls every function with the step count."""
    make = optax.inject_hyperparams(mc.muon)
    return make(0.1, dimension_numbers=mc.muon_dimension_numbers).init(PARAMS)


def text_of(name, content=b"", size=257):
    """`--data` pointing at a file with this content (None: an empty folder)."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, name)
        if content is None:
            path.mkdir()
        elif content:
            path.write_bytes(content)
        return load_text(
            [path], installed_packages=False, vocab_size=size, cache=pathlib.Path(folder, "cache")
        )


def flags(*arguments):
    return read_settings([*arguments, "--run-dir", "never-made"])


# (what is wrong, what the user did, words in the message)
MISTAKES = [
    # --- options
    ("threshold zero", lambda: mc.qk_clip(mc.layouts.mha(), 0.0), ["threshold", "above 0", "0.0"]),
    (
        "threshold NaN",
        lambda: mc.qk_clip(mc.layouts.mha(), np.nan),
        ["threshold", "above 0", "nan"],
    ),
    ("threshold as text", lambda: clip(threshold="100"), ["threshold", "one number", "'100'"]),
    ("alpha above one", lambda: clip(alpha=1.5), ["alpha", "[0, 1]", "1.5"]),
    ("unknown scope", lambda: clip(scope="model"), ["scope", '"head", "layer"', "'model'"]),
    (
        "alpha for what heads share",
        lambda: mc.muonclip(0.1, layout=mc.layouts.gqa(), shared_keys=0.5),
        ["shared_keys", '"untouched", "split"', "0.5"],
    ),
    (
        "layout not called",
        lambda: mc.qk_clip(mc.layouts.mha),
        ["layout must be", "layouts.mha()", "function mha"],
    ),
    ("momentum of one", lambda: mc.scale_by_muon(1.0), ["momentum", "[0, 1)", "1.0"]),
    (
        "momentum schedule",
        lambda: mc.scale_by_muon(lambda count: 0.9),
        ["momentum", "[0, 1)", "inject_hyperparams"],
    ),
    (
        "an optimizer with its own learning rate",
        lambda: mc.muon(0.1, other=optax.adamw(1e-3)),
        ["other", "-0.001", "scale_by_adam()"],
    ),
    ("unknown rule", lambda: mc.scale_by_update_rms("adam"), ["'adam'", "match_adam", "jordan"]),
    ("MLA size zero", lambda: mc.layouts.mla(0, 2, 3), ["layouts.mla", "nope", "0"]),
    (
        "uneven groups",
        lambda: mc.layouts.gqa(3, heads=4),
        ["layouts.gqa", "4 query heads", "3 key heads", "multiple of kv_heads"],
    ),
    (
        "a step that turns singular values around",
        lambda: dataclasses.replace(
            mc.schedules.jordan(), coefficients=((3.4445, -4.7750, 2.0315), (2.0, -3.5, 0.5))
        ),
        ["jordan", "step 2 of 2", "outside (0, 2]", "Fix the coefficients"],
    ),
    # --- the optimizer's wiring
    (
        "no max_logits",
        lambda: update(mc.qk_clip(mc.layouts.mha())),
        ["got no max_logits", "max_logits=", "capture"],
    ),
    (
        "no params",
        lambda: mc.qk_clip(mc.layouts.mha()).update(
            PARAMS, mc.qk_clip(mc.layouts.mha()).init(PARAMS), max_logits=MAXIMA
        ),
        ["qk_clip rescales weights", "tx.update(grads, state, params"],
    ),
    (
        "qk_clip inside a partition",
        lambda: optax.partition(
            {"a": mc.qk_clip(mc.layouts.mha()), "b": optax.identity()},
            jax.tree.map(lambda _: "b", PARAMS),
        ).init(PARAMS),
        ["masked", "optax.partition", "end of the chain"],
    ),
    (
        "no clip in the chain",
        lambda: mc.qk_clip_state(optax.adam(1).init(PARAMS)),
        ["QKClipState", "found 0", "in the chain"],
    ),
    # --- accumulation
    ("no micro-batches", lambda: mc.accumulate(optax.sgd(1), 0), ["every", "at least 1", "0"]),
    ("half a micro-batch", lambda: mc.accumulate(optax.sgd(1), 2.5), ["every", "whole", "2.5"]),
    (
        "every in front",
        lambda: mc.accumulate(4, optax.sgd(1)),
        ["tx must be", "Optax transformation", "got 4"],
    ),
    (
        "accumulating integers",
        lambda: mc.accumulate(optax.sgd(1), 2, accumulator_dtype="int8"),
        ["accumulator_dtype", "floating point", "int8"],
    ),
    (
        "no max_logits, accumulated",
        lambda: update(mc.accumulate(mc.qk_clip(mc.layouts.mha()), 2)),
        ["got no max_logits", "max_logits=intermediates"],
    ),
    (
        "the state of another optimizer, accumulated",
        lambda: mc.accumulate(mc.qk_clip(mc.layouts.mha()), 2).update(
            PARAMS,
            mc.accumulate(optax.sgd(1), 2).init(PARAMS),
            PARAMS,
            max_logits={("layers", "attn"): jnp.ones(4)},
        ),
        ["no signal", "'layers/attn'", "another optimizer"],
    ),
    (
        "factors of a role that is not there",
        lambda: mc.clip_by_signal(
            mc.layouts.mha(), 1.0, signal="max_output", factors=lambda b, gamma: {"k_nope": gamma}
        ).init(PARAMS),
        ["clip_by_signal", "'k_nope'", "layers/attn", "q, k"],
    ),
    (
        "all micro-batches at once",
        lambda: mc.accumulate(optax.sgd(1), 2).update(
            {"a": jnp.ones((2, 3))}, mc.accumulate(optax.sgd(1), 2).init({"a": jnp.ones(3)})
        ),
        ["(2, 3)", "a (3,)", "once for each micro-batch"],
    ),
    (
        "nothing accumulated",
        lambda: mc.accumulate_state(optax.adam(1).init(PARAMS)),
        ["AccumulateState", "found 0", "in the chain"],
    ),
    # --- parameter trees
    (
        "no attention at all",
        lambda: clip({"mlp": kernel(4, 4)}),
        ["no attention block", "holding query and key", "mlp/kernel", "query="],
    ),
    (
        "one kernel missing",
        lambda: clip({"layers": {"attn": {"query": kernel(8, 4, 6)}}}),
        ["layers/attn", "expects key, or key/kernel", "query/kernel (8, 4, 6)", "key="],
    ),
    (
        "grouped model, layout mha",
        lambda: clip({"attn": block(kv_heads=2)}, {"attn": {"max_logits": jnp.ones(4)}}),
        ["attn/query/kernel", "(8, 4, 6)", "2 key heads", "layouts.gqa()"],
    ),
    (
        "flat grouped kernels, one head count missing",
        lambda: mc.layouts.gqa(heads=4),
        ["layouts.gqa", "heads=4", "give kv_heads="],
    ),
    (
        "flat grouped model, layout mha",
        lambda: clip(
            {"attn": {"query": kernel(8, 24), "key": kernel(8, 12)}},
            layout=mc.layouts.mha(heads=4, value=None, out=None),
        ),
        ["attn/query/kernel (8, 24)", "6 features", "attn/key/kernel (8, 12)", "layouts.gqa("],
    ),
    (
        "flat kernel, no head count",
        lambda: clip({"attn": {"query": kernel(8, 24), "key": kernel(8, 24)}}),
        ["attn/query/kernel", "(8, 24)", "heads="],
    ),
    (
        "flat kernel that does not split",
        lambda: clip(
            {"attn": {"query": kernel(8, 25), "key": kernel(8, 25)}}, layout=mc.layouts.mha(heads=4)
        ),
        ["attn/query/kernel", "(8, 25)", "has 25", "4 heads do not divide"],
    ),
    (
        "wrong number of key heads",
        lambda: clip({"attn": block(kv_heads=2)}, layout=mc.layouts.gqa(4)),
        ["attn/key/kernel", "has 2 on axis heads", "not 4"],
    ),
    (
        "wrong MLA sizes",
        lambda: clip(MLA, layout=mc.layouts.mla(4, 4, 3)),
        ["attn/wq_b/kernel", "(5, 12)", "nope, rope, v"],
    ),
    (
        "wrong MLA value size",
        lambda: clip(MLA, layout=mc.layouts.mla(4, 2, 4)),
        ["attn/wkv_b/kernel", "(5, 14)", "8 features do not divide", "nope, rope, v"],
    ),
    (
        "MLA without query compression",
        lambda: clip(
            {"attn": {"wq": kernel(5, 12), "wkv_b": kernel(5, 14)}}, layout=mc.layouts.mla(4, 2, 3)
        ),
        ["attn", "expects wq_b", "wq/kernel (5, 12)"],
    ),
    (
        "kernels stacked differently",
        lambda: clip({"attn": {**block(), "key": kernel(3, 8, 4, 6)}}),
        ["attn/key/kernel", "(3,)", "stacked alike"],
    ),
    (
        "QK-norm behind the kernels",
        lambda: clip({"attn": {**block(), "query_ln": {"scale": jnp.ones(6)}}}),
        ["attn/query_ln", "change nothing", "QK-norm"],
    ),
    (
        "an adapter beside the kernel",
        lambda: clip(
            {"attn": {**block(), "query": {**kernel(8, 4, 6), "lora_a": jnp.ones((8, 2))}}}
        ),
        ["attn/query/lora_a", "(8, 2)", "Merge"],
    ),
    (
        "two kinds of attention",
        lambda: mc.find_layout({"a": block(), "b": {"wq": kernel(8, 8), "wk": kernel(8, 8)}}),
        ["b looks like attention", "wq/kernel (8, 8)", "block= patterns", "ignore(block)"],
    ),
    (
        "attention that the layout does not name",
        lambda: clip({"a": block(), "b": {"q_proj": kernel(8, 8), "k_proj": kernel(8, 8)}}),
        ["b holds q_proj and k_proj", "layouts.mha()", "covers a", "block= patterns"],
    ),
    (
        "a piece beyond its head",
        lambda: clip(
            layout=dataclasses.replace(
                mc.layouts.mha(),
                pieces=(mc.layouts.Piece("q", "query", select={"features": (4, 8)}), KEY_PIECE),
            )
        ),
        ["attn/query/kernel", "(8, 4, 6)", "has 6 features", "(4, 8)"],
    ),
    (
        "a layout without queries",
        lambda: dataclasses.replace(mc.layouts.mha(), pieces=(mc.layouts.Piece("k", "key"),)),
        ["roles ['k']", "'q_nope'", "layouts.ignore"],
    ),
    ("a fraction of a head", lambda: mc.layouts.mha(heads=4.0), ["heads", "whole number", "4.0"]),
    (
        "find_layout finds nothing",
        lambda: mc.find_layout({"a": kernel(2, 3)}),
        ["a/kernel", "no attention of a known model", "layouts.mla"],
    ),
    # --- routing
    (
        "unnamed matrix",
        lambda: mc.muon(0.1).init({"moe": {"mixer": jnp.ones((8, 9))}}),
        ["moe/mixer", "(8, 9)", "rules=", "None"],
    ),
    (
        "convolution",
        lambda: mc.muon(0.1).init(
            {"stem": {"kernel": jnp.ones((3, 5, 4, 8)), "bias": jnp.ones(8)}}
        ),
        ["stem/kernel", "(3, 5, 4, 8)", "convolution", "MuonDimensionNumbers"],
    ),
    (
        "vector under scale_by_muon",
        lambda: mc.scale_by_muon().init({"mlp": {"bias": jnp.ones(3)}}),
        ["mlp/bias", "(3,)", "mc.muon"],
    ),
    (
        "rule that matches nothing",
        lambda: mc.muon_dimension_numbers({"a": kernel(2, 3)}, rules={"b/*": None}),
        ["'b/*'", "matches no parameter", "a/kernel"],
    ),
    (
        "a rule that is none",
        lambda: mc.muon_dimension_numbers({"a": kernel(2, 3)}, rules={"a/*": 3}),
        ["rules has {'a/*': 3}", "MatrixPattern", "None"],
    ),
    (
        "a rule for other axes",
        lambda: mc.muon_dimension_numbers({"a": kernel(2, 3)}, rules={"a/*": "experts in out"}),
        ["a/kernel", "(2, 3)", "does not have the axes", "experts in out"],
    ),
    (
        "a rule behind one that takes all",
        lambda: mc.muon_dimension_numbers(
            {"a": kernel(2, 3)}, rules={"a/*": None, "*kernel": MuonDimensionNumbers()}
        ),
        ["'*kernel'", "decides nothing", "'a/*'", "narrower rule first"],
    ),
    (
        "dimension numbers with a hole",
        lambda: mc.muon(0.1, dimension_numbers={"a": None}).init(
            {"a": jnp.ones(2), "b": jnp.ones(3)}
        ),
        ["b", "(3,)", "says nothing"],
    ),
    (
        "dimension numbers for no parameter",
        lambda: mc.muon(0.1, dimension_numbers={"a": None, "c": None}).init({"a": jnp.ones(2)}),
        ["for c", "no parameter", "remove it or correct it"],
    ),
    (
        "dimension numbers out of range",
        lambda: mc.muon(0.1, dimension_numbers=MuonDimensionNumbers(0, 2)).init(
            {"a": jnp.ones((2, 3))}
        ),
        ["a of shape (2, 3)", "output_axis=2", "[-2, 1]"],
    ),
    # --- sown values
    ("nothing sown", lambda: clip(maxima={}), ["intermediates", "capture", "sow_weights=True"]),
    (
        "Linen: collection not mutable",
        lambda: clip_linen(mutable=(), axes=("params", "intermediates")),
        ["'max_logits'", "found nothing", "mutable=['intermediates']"],
    ),
    (
        "Linen: scan drops the collection",
        lambda: clip_linen(),
        ["found nothing", "variable_axes", "intermediates"],
    ),
    (
        "Linen: Flax attention without sow_weights",
        lambda: clip_linen(sow_weights=False, axes=("params", "intermediates")),
        ["'max_logits'", "found nothing", "sow_weights=True"],
    ),
    (
        "NNX: another variable type captured",
        nnx_intermediates_without_capture_type,
        ["'max_logits'", "nnx.Intermediate"],
    ),
    (
        "a block that sowed nothing",
        lambda: clip({"a": block(), "b": block()}, {"a": {"max_logits": jnp.ones(4)}}),
        ["b has query and key kernels", "sowed no max_logits", "block="],
    ),
    (
        "sown where no kernels are",
        lambda: clip(maxima={**MAXIMA, "mlp": {"max_logits": jnp.ones(4)}}),
        ["sown in mlp", "layers/attn", "Sow in the attention module"],
    ),
    (
        "sown with the wrong number of heads",
        lambda: clip(maxima={"layers": {"attn": {"max_logits": jnp.ones(3)}}}),
        ["layers/attn", "(3,)", "4 query heads", "(4,)"],
    ),
    (
        "layers reduced away",
        lambda: clip({"attn": block(stack=(3,))}, {"attn": {"max_logits": jnp.ones(4)}}),
        ["attn", "(4,)", "(3, 4)"],
    ),
    (
        "ambiguous stack axis",
        lambda: clip({"attn": block(stack=(3,))}, {"attn": {"max_logits": jnp.ones((3, 3, 4))}}),
        ["(3, 3, 4)", "ambiguous", "s.max(axis=...)"],
    ),
    (
        "a scalar sown",
        lambda: clip(maxima={"layers": {"attn": {"max_logits": jnp.ones(())}}}),
        ["layers/attn", "found a scalar", "not over heads"],
    ),
    # --- kernel and attention
    (
        "a vector to orthogonalize",
        lambda: mc.orthogonalize(jnp.ones(3)),
        ["(3,)", "[..., n, m]", "reshape it"],
    ),
    (
        "integers to orthogonalize",
        lambda: mc.orthogonalize(jnp.ones((3, 3), int)),
        ["x must be", "bfloat16", "int32"],
    ),
    (
        "schedule by name",
        lambda: mc.orthogonalize(jnp.ones((3, 3)), "jordan"),
        ["schedule='jordan'", "not a Schedule", "schedules.polar_express"],
    ),
    (
        "heads do not divide",
        lambda: attention(key=(1, 3, 3, 2), value=(1, 3, 3, 2)),
        ["4 query heads", "not a multiple of 3", "(1, 3, 3, 2)", "[..., length, heads, size]"],
    ),
    (
        "key and value lengths",
        lambda: attention(value=(1, 5, 4, 2)),
        ["key and value", "same length", "(1, 5, 4, 2)"],
    ),
    (
        "mask of floats",
        lambda: attention(mask=jnp.ones((1, 1, 3, 3))),
        ["mask", "boolean", "float32", "mask.astype(bool)"],
    ),
    (
        "segments of another length",
        lambda: attention(segment_ids=jnp.zeros((1, 4), int)),
        ["segment_ids of the queries (1, 4)", "[..., T] = (1, 3)", "(the queries', the keys')"],
    ),
    (
        "segments as a mask",
        lambda: attention(segment_ids=jnp.ones((1, 3), bool)),
        ["segment_ids", "whole numbers", "bool", "`mask`"],
    ),
    (
        "lengths of positions",
        lambda: attention(key_value_seq_lengths=jnp.ones((1, 3), int)),
        ["key_value_seq_lengths (1, 3)", "batch axes (1,)", "one length for each entry"],
    ),
    (
        "sinks of key heads",
        lambda: attention(key=(1, 3, 2, 2), value=(1, 3, 2, 2), sinks=jnp.zeros(2)),
        ["sinks", "[N] = (4,)", "query head", "(2,)"],
    ),
    (
        "sinks in a kernel without them",
        lambda: attention(sinks=jnp.zeros(4), implementation="logsumexp"),
        ["logsumexp attention does not support sinks", '"chunked"', '"auto"'],
    ),
    (
        "soft cap zero",
        lambda: attention(soft_cap=0.0),
        ["soft_cap must be", "above 0", "found 0.0"],
    ),
    (
        "a schedule without margin in bfloat16",
        lambda: mc.orthogonalize(jnp.ones((3, 3)), mc.schedules.cans(safety=1)),
        ["cans(safety=1)", "bfloat16", "safety"],
    ),
    (
        "functions under inject_hyperparams",
        inject_function,
        ["got one number", "static_args", "dimension_numbers"],
    ),
    # --- the example's data and flags
    ("data that is not there", lambda: text_of("nowhere"), ["nowhere", "no such file", "--data"]),
    ("binary data", lambda: text_of("binary", b"a\0b"), ["binary", "UTF-8", "--data"]),
    ("empty data", lambda: text_of("empty", b" \n"), ["empty: an empty file", "--data"]),
    ("an empty folder", lambda: text_of("folder", None), ["folder", "0 files", "--data"]),
    (
        "too little data",
        lambda: training_batches(text_of("little", b"x\n" * 50), context=64, batch=8, seed=0),
        ["little", "too little training text", "513", "--batch-size"],
    ),
    ("vocabulary too small", lambda: text_of("x", b"x\ny", size=9), ["--vocab-size 9", "257"]),
    ("zero steps", lambda: flags("--steps", "0"), ["--steps must be at least 1", "0"]),
    ("zero threshold", lambda: flags("--threshold", "0"), ["--threshold must be above 0", "0"]),
    ("misspelt flag", lambda: flags("--stepz", "3"), ["--stepz", "--help"]),
    ("odd RoPE", lambda: ModelConfig(64, rope=7), ["turns pairs", "7 rotary features is odd"]),
    (
        "partial QK-norm without MLA",
        lambda: ModelConfig(64, attention="mha", qk_norm="partial"),
        ["mla", "full"],
    ),
    ("no layers", lambda: ModelConfig(64, layers=0), ["layers", "at least 1", "0"]),
    (
        "kv_heads",
        lambda: ModelConfig(64, attention="gqa", heads=6, kv_heads=4),
        ["6 heads", "4 key heads"],
    ),
]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("do", "words"), [row[1:] for row in MISTAKES], ids=[row[0] for row in MISTAKES]
)
def test_mistake(do, words):
    with warnings.catch_warnings(), pytest.raises((ValueError, TypeError, InputError)) as caught:
        warnings.simplefilter("error", DeprecationWarning)
        do()
    message = str(caught.value)
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"


def test_there_are_enough_mistakes():
    assert len({row[0] for row in MISTAKES}) == len(MISTAKES) >= 25


def test_the_right_wiring_raises_nothing():
    """The functions that build the mistakes work when told to be right."""
    clip_linen(axes=("params", "intermediates"))
    clip(MLA, {"attn": {"max_logits": jnp.ones(2)}}, layout=mc.layouts.mla(4, 2, 3))
    clip({"attn": block(kv_heads=2)}, {"attn": {"max_logits": jnp.ones(4)}}, mc.layouts.gqa())
    attention()
    assert attention_layout(ModelConfig(64)).name == "mla"
