"""A layout is proved on its model: right ones pass, and each wrong one is named."""

import dataclasses
import functools
from collections.abc import Callable

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from flax import nnx

import muonclip_jax as mc
from examples.mla.model import Decoder, ModelConfig, attention_layout
from muonclip_jax.layouts import Piece
from tests.models.test_flax import MEMORY, LinenDecoder, NnxDecoder, X

WIDTH, HEADS, KV_HEADS, FEATURES = 16, 4, 2, 4
BATCH = jax.random.normal(jax.random.key(0), (2, 6, WIDTH))


class Attention(nn.Module):
    """Attention of flat kernels, in many ways that models store them.

    Attributes:
      projections: Each kernel's heads, from `[..., heads*features]`.
      fused: If given, the axes of one kernel for all, of which `order` says which part is what.
      shifts: Roles that get a bias which is called as no bias is.
      key_of: How a query head finds its key head: "blocks", or "turns", by h % kv_heads.
    """

    heads: int = HEADS
    kv_heads: int = KV_HEADS
    q: str = "(h f) -> h f"
    k: str = "(h f) -> h f"
    v: str = "(h f) -> h f"
    o: str = "h f -> (h f)"
    fused: str | None = None
    order: str = "qkv"
    shifts: str = ""
    key_of: str = "blocks"
    gated: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x):
        x = x.astype(self.dtype)
        q, k, v = (
            self.fused_heads(x) if self.fused else map(functools.partial(self.project, x), "qkv")
        )
        if self.key_of == "turns":
            k, v = (jnp.tile(y, (1, 1, self.heads // self.kv_heads, 1)) for y in (k, v))
        out, maxima = mc.dot_product_attention(q, k, v, is_causal=True)
        mc.sow_max_logits(self, maxima)
        if self.gated:
            out *= jax.nn.sigmoid(self.project(x, "gate"))
        before, after = self.o.split(" -> ")
        return self.dense("o", WIDTH)(rearrange(out, f"b t {before} -> b t {after}"))

    def dense(self, name, features):
        return nn.Dense(features, use_bias=False, dtype=self.dtype, name=f"{name}_proj")

    def project(self, x, name):
        heads = self.kv_heads if name in "kv" else self.heads
        y = self.dense(name, heads * FEATURES)(x)
        if name in self.shifts:
            y += self.param(f"shift_{name}", nn.initializers.zeros, y.shape[-1:])
        before, after = getattr(self, name, self.q).split(" -> ")
        return rearrange(y, f"b t {before} -> b t {after}", h=heads)

    def fused_heads(self, x):
        y = self.dense("qkv", 3 * self.heads * FEATURES)(x)
        parts = rearrange(y, f"b t {self.fused} -> p b t h f", p=3, h=self.heads)
        return (parts[self.order.index(name)] for name in "qkv")


class Model(nn.Module):
    """Attention, by default twice, between which a stream of tokens goes on."""

    blocks: dict[str, nn.Module]

    @nn.compact
    def __call__(self, x):
        for name, block in self.blocks.items():
            x = x + block.copy(name=name)(nn.RMSNorm()(x))
        return nn.Dense(8)(x)


def check(layout, attention=None, batch=BATCH, **blocks):
    """`check_layout` on a model of these blocks."""
    model = Model(blocks or {"local": attention, "global": attention})
    params = model.init(jax.random.key(1), batch)["params"]

    def model_fn(params, batch):
        return model.apply({"params": params}, batch, mutable=["intermediates"])

    return mc.check_layout(model_fn, params, layout, batch)


NAMES = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
GQA = mc.layouts.gqa(KV_HEADS, heads=HEADS, **NAMES)
MHA = mc.layouts.mha(heads=HEADS, **NAMES)
FUSED = functools.partial(mc.layouts.fused_qkv, HEADS, kernel="qkv_proj", out="o_proj")


def changed(layout, **pieces):
    """The layout with fields of the pieces of some roles replaced."""
    return dataclasses.replace(
        layout,
        pieces=tuple(
            dataclasses.replace(piece, **pieces.get(piece.role, {})) for piece in layout.pieces
        ),
    )


INTERLEAVED = {"axes": "in (features heads)"}
GATED = dataclasses.replace(
    MHA, pieces=(*MHA.pieces, Piece("gate", "gate_proj", "in (heads features)", {"heads": HEADS}))
)

RIGHT = {
    "grouped": (GQA, Attention()),
    "multi-query": (mc.layouts.gqa(1, heads=HEADS, **NAMES), Attention(kv_heads=1)),
    "one head": (mc.layouts.mha(heads=1, **NAMES), Attention(1, 1)),
    "half precision": (GQA, Attention(dtype="bfloat16")),
    "interleaved": (changed(GQA, q=INTERLEAVED), Attention(q="(f h) -> h f")),
    "fused": (FUSED(), Attention(fused="(p h f)")),
    "fused by head": (FUSED(axes="in (heads part features)"), Attention(fused="(h p f)")),
    "gated": (GATED, Attention(kv_heads=HEADS, gated=True)),
    "a bias of its own": (changed(GQA, q={"bias": "shift_q"}), Attention(shifts="q")),
    "queries and keys only": (
        mc.layouts.gqa(KV_HEADS, heads=HEADS, query="q_proj", key="k_proj", value=None, out=None),
        Attention(),
    ),
    "no outputs": (
        mc.layouts.gqa(2, heads=4, query="q_proj", key="k_proj", value="v_proj", out=None),
        Attention(),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "attention"), RIGHT.values(), ids=RIGHT)
def test_right_layouts_pass(layout, attention):
    proof = check(layout, attention)
    assert proof.heads == 2 * attention.heads and not proof.left_out
    wanted = tuple(piece.role for piece in layout.pieces)
    assert proof.roles == {"local": wanted, "global": wanted}


# Layout, what the model really is, and what the error names: heads, pieces, a likely reason.
WRONG = {
    "fused in another order": (
        FUSED(), Attention(fused="(p h f)", order="vkq"),
        r"heads 0, 1, 2, 3, q \(global/qkv_proj/kernel \(16, 48\)\): scaled .* order in a fused",
    ),
    "fused with keys last": (
        FUSED(), Attention(fused="(p h f)", order="qvk"), "3, k .*: scaled .* another piece",
    ),
    "fused by head, taken for blocks": (
        FUSED(), Attention(fused="(h p f)"), "q .*: scaled .*interleaved for blocked",
    ),
    "queries interleaved": (
        GQA, Attention(q="(f h) -> h f"), r", q \(.*: scaled .*interleaved for blocked",
    ),
    "keys interleaved": (
        GQA, Attention(k="(f h) -> h f"), r", k \(.*: scaled .*interleaved for blocked",
    ),
    "values interleaved": (
        GQA, Attention(v="(f h) -> h f"), r"key heads 0, 1, v \(.*: v times a power",
    ),
    "outputs interleaved": (
        GQA, Attention(o="h f -> (f h)"), r", o \(.*: v times a power",
    ),
    "values and outputs interleaved alike": (
        MHA, Attention(kv_heads=4, v="(f h) -> h f", o="h f -> (f h)"),
        r"heads 0, 1, 2, 3, v and o \(.*: with o of some heads zero",
    ),
    "outputs alone interleaved": (
        mc.layouts.gqa(2, heads=4, query="q_proj", key="k_proj", value=None, out="o_proj"),
        Attention(o="h f -> (f h)"), r", o \(.*: with o of some heads zero",
    ),
    "values alone interleaved": (
        mc.layouts.gqa(2, heads=4, query="q_proj", key="k_proj", value="v_proj", out=None),
        Attention(v="(f h) -> h f"), r", v \(.*: with v of some heads zero",
    ),
    "keys and values exchanged": (
        mc.layouts.gqa(2, heads=4, query="q_proj", key="v_proj", value="k_proj", out="o_proj"),
        Attention(), r", k \(global/v_proj/kernel .*another piece",
    ),
    "key heads by turns": (GQA, Attention(key_of="turns"), r", k \("),
    "half of the heads": (
        mc.layouts.gqa(1, heads=2, **NAMES), Attention(), "have 2 query heads: expected",
    ),
    "twice the heads": (
        mc.layouts.gqa(4, heads=8, **NAMES), Attention(), "have 8 query heads: expected",
    ),
    "a bias of the queries without a piece": (GQA, Attention(shifts="q"), r", q .* a bias has no"),
    "a bias of the keys without a piece": (GQA, Attention(shifts="k"), r", k .* a bias has no"),
    "a bias of the values without a piece": (GQA, Attention(shifts="v"), r", v .* a bias has no"),
    "a gate taken for the queries": (
        changed(GATED, q={"parameter": "gate_proj"}, gate={"parameter": "q_proj"}),
        Attention(kv_heads=4, gated=True), r", q \(global/gate_proj.* a gate, a value",
    ),
    "a gate interleaved": (
        GATED, Attention(kv_heads=4, gated=True, q="(f h) -> h f"), r", q \(",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "attention", "words"), WRONG.values(), ids=WRONG)
def test_wrong_layouts_are_named(layout, attention, words):
    with pytest.raises(ValueError, match=words):
        check(layout, attention)


def test_only_the_gate_wrong():
    """Queries in blocks, gates interleaved: which is seen behind the softmax only."""
    layout = changed(GATED, gate=INTERLEAVED)
    with pytest.raises(ValueError, match=r"gate \(.*: with o of some heads zero, their gates"):
        check(layout, Attention(kv_heads=HEADS, gated=True))


def test_heads_that_are_wrong_are_named():
    """Of four heads the last two exchanged: in q alone, in what is sown, in o alone."""

    class Swapped(Attention):
        @nn.compact
        def __call__(self, x):
            return super().__call__(x)

        def project(self, x, name):
            y = super().project(x, name)
            return y[:, :, jnp.array([0, 1, 3, 2])] if name == "q" else y

    with pytest.raises(ValueError, match=r"heads 2, 3, q \(.*: scaled .* in another order"):
        check(MHA, Swapped(kv_heads=HEADS))


def test_patterns_of_two_kinds_exchanged():
    kinds = {"local": Attention(), "global": Attention(q="(f h) -> h f")}
    of = {"local": GQA, "global": changed(GQA, q=INTERLEAVED)}
    right = [dataclasses.replace(of[name], block=name) for name in kinds]
    assert check(right, **kinds).heads == 2 * HEADS
    wrong = [
        dataclasses.replace(of["local"], block="global"),
        dataclasses.replace(of["global"], block="local"),
    ]
    with pytest.raises(ValueError) as raised:
        check(wrong, **kinds)
    # Each layout's own layers are tried: both are named.
    assert "- local, heads" in str(raised.value) and "- global, heads" in str(raised.value)


def test_what_a_pattern_leaves_out_is_listed():
    proof = check(dataclasses.replace(GQA, block="local"), Attention())
    assert list(proof.roles) == ["local"] and proof.left_out == ("global",)
    assert "left out by the layout: global" in str(proof)


# Flax's own modules


@pytest.mark.parametrize("exchanged", [False, True])
def test_flax_linen(exchanged):
    """Exchanging queries and keys is what no scale can see, and what no clip minds."""
    model = LinenDecoder()
    params = model.init(jax.random.key(3), X, MEMORY)["params"]
    layout = mc.layouts.mha(query="key", key="query") if exchanged else mc.find_layout(params)

    def model_fn(params, batch):
        return model.apply({"params": params}, *batch, mutable=["intermediates"])

    assert mc.check_layout(model_fn, params, layout, (X, MEMORY)).heads == 16
    wrong = mc.layouts.mha(key="value", value="key")
    with pytest.raises(ValueError, match=r"layer_0_attention, heads 0, 1, 2, 3, k \("):
        mc.check_layout(model_fn, params, wrong, (X, MEMORY))


def test_flax_nnx():
    graph, params, rest = nnx.split(NnxDecoder(nnx.Rngs(3)), nnx.Param, ...)

    def model_fn(params, batch):
        return nnx.capture(nnx.merge(graph, params, rest), nnx.Intermediate)(*batch)

    assert mc.check_layout(model_fn, params, mc.find_layout(params), (X, MEMORY)).heads == 16
    wrong = mc.layouts.gqa(key="value", value="key")
    with pytest.raises(ValueError, match=r"layers/0/attention, heads 0, 1, 2, 3, k \("):
        mc.check_layout(model_fn, params, wrong, (X, MEMORY))


class Own(eqx.Module):
    """Attention in Equinox, whose trees hold functions."""

    projections: dict[str, jax.Array]
    activation: Callable = jnp.tanh

    def __call__(self, x):
        q, k, v = (jnp.einsum("bti,ihf->bthf", x, self.projections[name]) for name in "qkv")
        out, maxima = mc.dot_product_attention(q, k, v, is_causal=True)
        out = jnp.einsum("bthf,hfo->bto", out, self.projections["o"])
        return self.activation(out), {"projections": {"max_logits": maxima}}


@pytest.mark.parametrize("exchanged", [False, True])
def test_equinox(exchanged):
    rng = np.random.default_rng(0)
    shapes = {"q": (16, 4, 4), "k": (16, 4, 4), "v": (16, 4, 4), "o": (4, 4, 16)}
    model = Own({name: jnp.asarray(rng.normal(size=s), "float32") for name, s in shapes.items()})
    key, value = ("v", "k") if exchanged else ("k", "v")
    names = {"query": "q", "key": key, "value": value, "out": "o"}
    params, static = eqx.partition(model, eqx.is_inexact_array)
    model_fn = lambda params, x: eqx.combine(params, static)(x)  # noqa: E731
    run = functools.partial(mc.check_layout, model_fn, params, mc.layouts.mha(**names), BATCH)
    if exchanged:
        with pytest.raises(ValueError, match=r"projections, heads 0, 1, 2, 3, k \("):
            run()
    else:
        assert run().heads == 4


class Scanned(nn.Module):
    """As many layers as the width, so that shapes do not tell which axis is which."""

    axis: int

    @nn.compact
    def __call__(self, x):
        def layer(attention, x, _):
            return x + attention(x, sow_weights=True), None

        layers = nn.scan(
            layer,
            variable_axes={"params": self.axis, "intermediates": 0},
            split_rngs={"params": True},
            length=x.shape[-1],
        )
        attention = nn.MultiHeadDotProductAttention(
            2, use_bias=False, attention_fn=mc.attention_fn, name="attn"
        )
        return layers(attention, x, None)[0]


def test_the_stacks_axis():
    model, x = Scanned(axis=1), BATCH[..., :4]
    params = model.init(jax.random.key(0), x)["params"]
    model_fn = lambda params, x: model.apply({"params": params}, x, mutable=["intermediates"])  # noqa: E731
    layout = dataclasses.replace(mc.layouts.mha(out=None), stack_axis=1)
    proof = mc.check_layout(model_fn, params, layout, x)
    assert proof.heads == 8 and proof.roles == {"attn": ("q", "k", "v")}
    with pytest.raises(ValueError, match=r"attn, layer 0, heads 0, 1, q \(attn/query/kernel"):
        mc.check_layout(model_fn, params, dataclasses.replace(layout, stack_axis=0), x)


# The example's latent attention

SQUARE = ModelConfig(
    vocab_size=31, d_model=24, layers=2, heads=4, nope=4, rope=4, v=4, q_rank=12, kv_rank=8, d_ff=32
)
TOKENS = jax.random.randint(jax.random.key(2), (2, 7), 0, SQUARE.vocab_size)


def check_example(config, layout=None):
    graph, params, rest = nnx.split(Decoder(config, nnx.Rngs(0)), nnx.Param, ...)

    def model_fn(params, tokens):
        return nnx.capture(nnx.merge(graph, params, rest), nnx.Intermediate)(tokens)

    return mc.check_layout(model_fn, params, layout or attention_layout(config), TOKENS)


@pytest.mark.parametrize(
    "options",
    [
        {},
        pytest.param({"q_rank": 0, "dtype": "bfloat16"}, marks=pytest.mark.slow),
        {"qk_norm": "partial"},
        {"qk_norm": "full"},  # as long as the latent
        pytest.param({"attention": "gqa", "qk_norm": "full"}, marks=pytest.mark.slow),
        pytest.param({"soft_cap": 0.5}, marks=pytest.mark.slow),
        pytest.param({"attention": "mha"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_the_example(options):
    config = dataclasses.replace(SQUARE, **options)
    proof = check_example(config)
    wanted = tuple(piece.role for piece in attention_layout(config).pieces)
    assert proof.roles == {f"layers/{i}/attn": wanted for i in range(2)}
    assert proof.behind_norm == (tuple(proof.roles) if "qk_norm" in options else ())


def slices(**cuts):
    return changed(
        attention_layout(SQUARE),
        **{role: {"select": {"features": cut}} for role, cut in cuts.items()},
    )


WRONG_LATENT = {
    "nope keys interleaved": (
        changed(attention_layout(SQUARE), k_nope=INTERLEAVED, v=INTERLEAVED),
        r", k_nope \(.*interleaved for blocked(?s:.*), v or o \(",
    ),
    "nope and rope queries exchanged": (
        slices(q_nope=(4, None), q_rope=(0, 4)),
        "q_nope and q_rope and k_nope .* cuts nope and rope",
    ),
    "nope keys and values exchanged": (
        slices(k_nope=(4, None), v=(0, 4)), r", k_nope \(.*\): scaled",
    ),
    "the latent behind the shared key": (
        slices(kv_down=(4, None), k_rope=(0, 4)), r"kv_down \(.* cuts the latent(?s:.*)k_rope \(",
    ),
    "norms exchanged": (
        changed(
            attention_layout(dataclasses.replace(SQUARE, q_rank=8)),
            q_gain={"parameter": "kv_norm/scale"},
            kv_gain={"parameter": "q_norm/scale"},
        ),
        r"q_gain \((?s:.*)kv_gain \(",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("layout", "words"), WRONG_LATENT.values(), ids=WRONG_LATENT)
def test_wrong_latent_layouts_are_named(layout, words):
    config = dataclasses.replace(SQUARE, q_rank=8)
    with pytest.raises(ValueError, match=words):
        check_example(config, layout)


@pytest.mark.parametrize("role", ["q", "k", "v", "o"])
def test_behind_a_qk_norm_heads_are_told_apart_too(role):
    config = dataclasses.replace(SQUARE, attention="mha", qk_norm="full")
    axes = "(features heads) out" if role == "o" else "in (features heads)"
    with pytest.raises(ValueError, match=rf"layers/0/attn, heads .*, {role} \("):
        check_example(config, changed(attention_layout(config), **{role: {"axes": axes}}))


# What cannot be tried


def wrong_calls():
    model = Model({"attn": Attention()})
    params = model.init(jax.random.key(1), BATCH)["params"]
    right = lambda params, x: model.apply({"params": params}, x, mutable=["intermediates"])  # noqa: E731
    counter = iter(range(100))
    return {
        "one thing returned": (TypeError, lambda p, x: right(p, x)[0], "must return .output, what"),
        "no float output": (
            TypeError,
            lambda p, x: (right(p, x)[0].argmax(-1), right(p, x)[1]),
            "no floating point array",
        ),
        "nothing sown": (ValueError, lambda p, x: (right(p, x)[0], {}), "No value named 'max_log"),
        "noise": (
            ValueError,
            lambda p, x: (
                right(p, x)[0]
                + jax.pure_callback(lambda: np.float32(next(counter)), jnp.float32(0)),
                right(p, x)[1],
            ),
            "two equal forward passes differ",
        ),
        "an output of nothing": (
            ValueError,
            lambda p, x: (x, right(p, x)[1]),
            "the output tells nothing of values and outputs",
        ),
        "one token": (
            ValueError,
            lambda p, x: right(p, x[:, :1]),
            "every query of the batch sees one key",
        ),
        "no logits": (
            ValueError,
            lambda p, x: (right(p, x)[0], jax.tree.map(jnp.zeros_like, right(p, x)[1])),
            "the max logit is 0.0",
        ),
    }, params


@pytest.mark.parametrize("name", wrong_calls()[0])
def test_wrong_calls(name):
    calls, params = wrong_calls()
    error, model_fn, words = calls[name]
    with pytest.raises(error, match=words):
        mc.check_layout(model_fn, params, GQA, BATCH)
