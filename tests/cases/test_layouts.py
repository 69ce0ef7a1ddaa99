"""Layouts: what is beside the projections, frozen, absent, quantized or stored the other way.

Situations that went wrong for users, and two more of each kind.
"""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.nnx import bridge
from flax.traverse_util import unflatten_dict

import muonclip_jax as mc
from muonclip_jax.layouts import Layout, Piece, find_blocks

IN, HEADS, F = 8, 2, 4

by_path = partial(unflatten_dict, sep="/")


def array(*shape, dtype="float32"):
    return jax.ShapeDtypeStruct(shape, dtype)


def kernel(*shape):
    return {"kernel": array(*shape)}


def attention(**extra):
    names = ("query", "key", "value")
    own = {**{name: kernel(IN, HEADS, F) for name in names}, "out": kernel(HEADS, F, IN)}
    return {"attn": {**own, **extra}}


def maker(layout, link=mc.qk_clip):
    return link(layout).init


# Of the logits and without a role: path inside the block, shape.
ENTER_LOGITS = {
    "second streams": [
        {"query_txt/kernel": (IN, HEADS, F), "key_txt/kernel": (IN, HEADS, F)},
        {"add_q_proj/kernel": (IN, HEADS * F), "add_k_proj/kernel": (IN, HEADS * F)},
        {"q_proj_context/kernel": (24, HEADS * F)},
        {"q_einsum_1/w": (HEADS, IN, F)},
        {"txtQkv/kernel": (IN, 3 * HEADS * F)},
        {"q_point_local/w": (IN, 12)},
    ],
    "relative positions": [
        {"pos_embed_mat/kernel": (IN, HEADS, F)},
        {"r_w_bias": (HEADS, F)},
        {"r_r_bias": (HEADS * F,)},
        {"pos_bias_u": (HEADS, F)},
        {"rel_embedding": (9, F)},
        {"rel_pos_h": (15, F)},
        {"linear_pos/kernel": (IN, HEADS * F)},
        {"r/kernel": (IN, HEADS, F)},
        {"seg_embed": (2, HEADS, F)},
    ],
    "further keys": [
        {"null_k": (F,)},
        {"null_kv": (2, F)},
        {"mem_key": (5, HEADS, F)},
        {"persistent_keys": (16, HEADS * F)},
        {"prefix_key/embedding": (4, HEADS * F)},
        {"relative_keys": (9, F)},
    ],
    "adapters beside": [
        {"query_lora/lora_a": (IN, 2), "query_lora/lora_b": (2, HEADS * F)},
        {"lora_k/a": (IN, 2)},
        {"lora/q/a": (IN, 2)},
        {"lora_a": (IN, 2)},
    ],
}


@pytest.mark.parametrize("stack", [(), (3,)], ids=["one layer", "stacked"])
@pytest.mark.parametrize("link", [mc.qk_clip, mc.scale_by_quack], ids=["qk_clip", "quack"])
@pytest.mark.parametrize("kind", ENTER_LOGITS)
def test_parameters_that_enter_the_logits_need_a_role(kind, link, stack):
    for extra in ENTER_LOGITS[kind]:
        own = {path: array(*stack, *shape) for path, shape in extra.items()}
        params = jax.tree.map(lambda x: array(*stack, *x.shape), attention())
        params["attn"] |= by_path(own)
        all_of_them = [f"attn/{path} {(*stack, *shape)}" for path, shape in extra.items()]
        layout = mc.layouts.mha()
        with pytest.raises(ValueError, match=r"enters the logits of attn") as caught:
            jax.eval_shape(maker(layout, link), params)
        for told in (*all_of_them, "Merge", "Piece", "block=", "harmless=("):
            assert told in str(caught.value)
        names = dict.fromkeys(path.split("/")[0] for path in extra)
        jax.eval_shape(maker(dataclasses.replace(layout, harmless=tuple(names)), link), params)
        mc.muon_dimension_numbers(params, layout=layout, rules={f"attn/{n}*": None for n in names})


@pytest.mark.parametrize(
    "extra",
    [
        {"rel_pos_bias/rel_embedding": (HEADS, 32)},  # added to the logits, behind q · k
        {"relative_position_bias_table": (225, HEADS)},
        {"relative_attention_bias/embedding": (32, HEADS)},
        {"sinks": (HEADS,)},
        {"alibi_slopes": (HEADS,)},
        {"value_txt/kernel": (IN, HEADS, F)},
        {"lora_v/a": (IN, 2)},
        {"out/lora_a": (HEADS, F, 2)},
        {"rel_values": (9, F)},
        {"gate/kernel": (IN, HEADS, F)},
        {"g_proj/kernel": (IN, HEADS * F)},
        {"gate_bias": (HEADS, F)},
        {"query_embed": (5, IN)},
        {"per_dim_scale": (F,)},  # a factor of the logits
        {"q_conv/kernel": (4, HEADS * F)},
        {"cached_key": (1, 5, HEADS, F)},
        {"cache_index": ()},
        {"dropout/rng": (2,)},
        {"lambda_q1": (F,), "lambda_k1": (F,)},  # of the differential transformer
        {"indexer/wq_b/kernel": (IN, 6), "indexer/wk/kernel": (IN, 6)},  # its own attention
        {"mlp/pos_ffn/kernel": (32, HEADS * F)},
        {"mlp/up/lora_a": (IN, 2)},
    ],
    ids=lambda extra: next(iter(extra)),
)
def test_what_does_not_enter_the_logits_is_left_alone(extra):
    params = attention(**{"out": {**kernel(HEADS, F, IN)}})
    for path, leaf in by_path({path: array(*shape) for path, shape in extra.items()}).items():
        params["attn"][path] = (
            {**params["attn"].get(path, {}), **leaf} if type(leaf) is dict else leaf
        )
    jax.eval_shape(maker(mc.layouts.mha()), params)


@pytest.mark.parametrize(
    ("query", "adapter"),
    [
        ("q_proj/base_module/kernel", "q_proj/lora_b"),
        ("q_proj/base_layer/inner/kernel", "q_proj/lora/a"),
        ("q_proj/linear/kernel", "q_proj/magnitude"),  # DoRA
        ("q_proj/base/kernel", "q_proj/m"),
        ("LoRA_0/q_proj/kernel", "LoRA_0/lora_a"),
        ("q_proj/kernel", "q_proj/lora_a"),
        ("q_proj/kernel", "q_proj/dora/magnitude"),
    ],
)
def test_adapters_around_and_inside_a_projection(query, adapter):
    block = {query: array(8, 8), adapter: array(8), "k_proj/kernel": array(8, 8)}
    layout = mc.layouts.mha(heads=2, query=query, key="k_proj", value=None, out=None)
    with pytest.raises(
        ValueError, match=f"attn/{adapter} .*also takes part in attn/{query}.*Merge"
    ):
        find_blocks(layout, {"attn": by_path(block)})


@pytest.mark.parametrize("extra", ["norm/scale", "mlp/kernel", "value/kernel"])
def test_a_module_around_several_projections_is_no_wrapper(extra):
    """BERT's `self`, and a module that prepares the keys' input."""
    block = {f"self/{name}/kernel": array(8, 8) for name in ("query", "key")}
    block[f"self/{extra}"] = array(8, 8)
    layout = mc.layouts.mha(heads=2, query="self/query", key="self/key", value=None, out=None)
    (found,) = find_blocks(layout, {"attn": by_path(block)})
    assert found.name == "attn"


# --- absent, masked, frozen
@pytest.mark.parametrize(
    ("pieces", "roles"),
    [
        ([Piece("k", "key"), Piece("v", "value")], "'k', 'v'"),
        ([Piece("k_nope", "key"), Piece("kv_down", "key", "in features")], "'k_nope', 'kv_down'"),
        ([Piece("v", "value")], "'v'"),
    ],
)
def test_keys_alone_are_no_layout(pieces, roles):
    """Nothing tells how many query heads read them. (Queries alone are one: test_streams.py.)"""
    with pytest.raises(ValueError, match=rf"\[{roles}\].*must be a Piece of .*'q'.*ignore"):
        Layout("alone", tuple(pieces))


@pytest.mark.parametrize(("heads", "flat"), [(None, False), (None, True), (2, True)])
def test_latent_attention_without_rotary_features(heads, flat):
    of = lambda features: (2 * features,) if flat else (2, features)  # noqa: E731
    shapes = {"wq": (16, *of(4)), "wkv_a": (16, 6), "wkv_b": (6, *of(7)), "wo": (6, 16)}
    params = {"attn": {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}}
    layout = mc.layouts.mla(nope=4, rope=0, v=3, heads=heads, query="wq")
    assert [piece.role for piece in layout.pieces] == ["q_nope", "k_nope", "v", "kv_down", "o"]
    (block,) = mc.layouts.find_blocks(layout, params)
    assert {part.role: part.matrix for part in block.parts} == {
        "q_nope": (16, 4), "k_nope": (6, 4), "v": (6, 3), "kv_down": (16, 6), "o": (3, 16)
    }  # fmt: skip

    clipped = mc.apply_qk_clip(params, {("attn",): jnp.array([40.0, 1.0])}, layout, 10.0)
    for role, (first, second) in {"q_nope": (0.5, 1), "k_nope": (0.5, 1), "v": (1, 1)}.items():
        part = block.part(role)
        taken = part.take(clipped["attn"][part.kernel[1]]["kernel"])
        np.testing.assert_allclose(taken[0], jnp.full(part.matrix, first), rtol=1e-6)
        np.testing.assert_allclose(taken[1], jnp.full(part.matrix, second), rtol=1e-6)
    np.testing.assert_array_equal(clipped["attn"]["wkv_a"]["kernel"], 1)

    quack = mc.scale_by_quack(layout)
    updates, _ = quack.update(params, quack.init(params), params)
    np.testing.assert_allclose(updates["attn"]["wkv_b"]["kernel"], 1, rtol=1e-6)


def test_rotary_features_are_not_negative():
    with pytest.raises(
        ValueError, match=r"layouts\.mla: rope must be a whole .* at least 0, got -1"
    ):
        mc.layouts.mla(nope=8, rope=-1, v=8)


SOWN = {("attn",): jnp.array([40.0, 40.0]), ("other",): jnp.array([40.0, 1.0])}


def two_blocks(dtype=jnp.float32):
    bias = {"bias": jnp.ones((HEADS, F), dtype)}
    full = lambda tree: jax.tree.map(lambda x: jnp.ones(x.shape, dtype), tree)  # noqa: E731
    block = full(attention()["attn"])
    block["query"] |= bias
    return {"attn": block, "other": full(attention()["attn"])}


def masked(hide):
    """Parameters, and a clip that does not see those whose path holds one of these words."""
    params = two_blocks()
    seen = lambda path, _: not any(word in jax.tree_util.keystr(path) for word in hide)  # noqa: E731
    mask = jax.tree_util.tree_map_with_path(seen, params)
    layout = mc.layouts.mha(value=None, out=None)
    return params, optax.masked(mc.qk_clip(layout, 10.0), mask)


@pytest.mark.parametrize(
    ("hide", "path"),
    [
        (["bias"], "attn/query/bias"),
        (["'attn']['key'"], "attn/key/kernel"),
        (["'attn']['query']['kernel'"], "attn/query/kernel"),
        (["'other']['query'"], "other/query/kernel"),
    ],
)
def test_a_mask_that_hides_a_part_of_a_block_is_refused(hide, path):
    params, tx = masked(hide)
    with pytest.raises(ValueError, match=path) as caught:
        tx.init(params)
    assert "masked" in str(caught.value) and "outside" in str(caught.value)


@pytest.mark.parametrize("hide", ["'value'", "'out'", "'other'"])
def test_a_mask_that_hides_values_or_a_whole_block_is_not(hide):
    params, tx = masked([hide])
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, max_logits=SOWN)
    np.testing.assert_allclose(updates["attn"]["query"]["kernel"], -0.5, rtol=1e-6)


@pytest.mark.parametrize("how", ["mask", "ignore", "block"])
def test_frozen_layers_are_left_out_of_the_clip(how):
    """By a mask that hides them whole, or by the layout. What is frozen in front is not seen."""
    params = two_blocks()
    labels = {"attn": "freeze", "other": "train"}
    rest = optax.partition({"train": optax.sgd(0.0), "freeze": optax.set_to_zero()}, labels)
    left_out = [mc.layouts.mha(block="other"), mc.layouts.ignore("attn")]
    clip = {
        "mask": lambda: masked(["'attn'"])[1],
        "ignore": lambda: mc.qk_clip(left_out, 10.0),
        "block": lambda: mc.qk_clip(left_out[0], 10.0),
    }[how]()
    tx = optax.chain(rest, clip)
    updates, state = jax.jit(tx.update)(params, tx.init(params), params, max_logits=SOWN)
    assert not any(x.any() for x in jax.tree.leaves(updates["attn"]))
    np.testing.assert_allclose(updates["other"]["query"]["kernel"][:, 0], -0.5, rtol=1e-6)
    assert list(mc.qk_clip_state(state).gamma) == ["other"]


# --- dtypes
@pytest.mark.parametrize("dtype", [jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.int32])
def test_quantized_kernels_are_refused_by_all_clips(dtype):
    params = {"attn": jax.tree.map(lambda x: jnp.ones(x.shape, dtype), attention()["attn"])}
    layout, sown = mc.layouts.mha(), {("attn",): jnp.array([40.0, 40.0])}
    mine = mc.clip_by_signal(layout, 1.0, signal="loud", factors=lambda block, gamma: {"o": gamma})
    updates = jax.tree.map(lambda x: jnp.zeros(x.shape), params)
    told = rf"attn/\w+/kernel \(\w+, \w+, \w+\) is {jnp.dtype(dtype)}"
    for act in (
        lambda: mc.qk_clip(layout).init(params),
        lambda: mc.qk_clip(layout).update(updates, None, params, max_logits=sown),
        lambda: mc.apply_qk_clip(params, sown, layout),
        lambda: mine.init(params),
    ):
        with pytest.raises(TypeError, match=told):
            act()


# --- QK-norms
FLAT = dict(heads=4, query="q_proj", key="k_proj", value="v_proj", out="o_proj")


@pytest.mark.parametrize(
    ("features", "extra"),
    [
        (16, {"q_norm/kernel": (16,), "k_norm/kernel": (16,)}),  # EasyDeL
        (16, {"norm/kernel": (16,)}),
        (16, {"q_norm/kernel": (4, 16)}),
        (16, {"q_norm/weight": (16,)}),
        (16, {"norm/g": (16,)}),
        (16, {"logit_scale": (4,)}),  # cosine attention
        (16, {"logit_scale": (4, 1, 1)}),
        (16, {"attn_logit_scale": ()}),
        (16, {"q_scale": (16,), "k_scale": (16,)}),
        (16, {"qk_norm_q_scale": (16,)}),
        (64, {"norm/scale": (64,)}),  # one for both, as long as a head and as the input
        (64, {"RMSNorm_0/scale": (64,)}),
        (64, {"head_norm/gamma": (64,)}),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else str(x),
)
@pytest.mark.parametrize("stack", [(), (16,)], ids=["one layer", "stacked"])
def test_qk_norms_are_seen(features, extra, stack):
    sides = {f"{n}_proj": kernel(*stack, 64, 4 * features) for n in "qkv"}
    block = {**sides, "o_proj": kernel(*stack, 4 * features, 64)}
    block |= by_path({path: array(*stack, *shape) for path, shape in extra.items()})
    layout = mc.layouts.mha(**FLAT)
    with pytest.raises(ValueError, match="normalises queries or keys") as caught:
        jax.eval_shape(maker(layout), {"attn": block})
    assert "harmless=(" in str(caught.value) and "attn/" in str(caught.value)
    names = tuple(path.split("/")[0] for path in extra)
    jax.eval_shape(maker(dataclasses.replace(layout, harmless=names)), {"attn": block})


@pytest.mark.parametrize(
    ("features", "extra"),
    [
        (16, {"norm/scale": (64,)}),  # in front: as long as the input
        (16, {"norm/kernel": (64,)}),
        (64, {"pre_norm/scale": (64,)}),
        (64, {"norm_in/scale": (64,)}),
        (16, {"v_norm/scale": (16,)}),  # of values and outputs
        (16, {"o_norm/g": (4, 16)}),
        (16, {"q_scale": (16,)}),  # a temperature of each feature
        (16, {"k_scale": ()}),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else str(x),
)
def test_other_gains_are_no_qk_norms(features, extra):
    sides = {f"{n}_proj": kernel(64, 4 * features) for n in "qkv"}
    block = {**sides, "o_proj": kernel(4 * features, 64)}
    block |= by_path({path: array(*shape) for path, shape in extra.items()})
    jax.eval_shape(maker(mc.layouts.mha(**FLAT)), {"attn": block})


# --- which way a weight lies
WEIGHTS = {
    name: f"{name[0] if name != 'out' else 'o'}/weight" for name in ("query", "key", "value", "out")
}


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("q/weight", lambda: mc.layouts.mha(heads=4, **WEIGHTS)),
        ("k/weight", lambda: mc.layouts.gqa(2, heads=4, query="q", key="k/weight")),
        ("wq_b/weight", lambda: mc.layouts.mla(4, 2, 3, query=("wq_a", "wq_b/weight"))),
        ("qkv/weight", lambda: mc.layouts.fused_qkv(4, kernel="qkv/weight")),
    ],
)
def test_a_flat_weight_may_be_in_out_or_out_in(name, make):
    with pytest.raises(ValueError, match=rf"{name} may be \[in, out\], or \[out, in\].*say"):
        make()


def test_weights_of_out_in_are_read_as_told():
    """Square, as in Equinox: each head's rows, by hand."""
    rng = np.random.default_rng(0)
    block = {
        n: {"weight": jnp.asarray(rng.normal(size=(32, 32))), "bias": jnp.ones(32)} for n in "qkvo"
    }
    (found,) = find_blocks(mc.layouts.mha(heads=4, transposed=True, **WEIGHTS), {"attn": block})
    for role, part in zip("qkvo", found.parts, strict=True):
        weight = np.asarray(block[role]["weight"])
        heads = part.take(weight)
        rows = lambda h: slice(8 * h, 8 * (h + 1))  # noqa: E731
        for h in range(4):
            by_hand = weight[:, rows(h)].T if role == "o" else weight[rows(h)].T
            np.testing.assert_array_equal(heads[h], by_hand)
    (found,) = find_blocks(mc.layouts.mha(heads=4, transposed=False, **WEIGHTS), {"attn": block})
    np.testing.assert_array_equal(found.part("q").take(weight)[1], weight[:, 8:16])


@pytest.mark.parametrize("transposed", [False, True])
def test_grouped_and_latent_weights(transposed):
    turn = lambda shape: shape[::-1] if transposed else shape  # noqa: E731
    grouped = {"q": (64, 32), "k": (64, 16), "v": (64, 16), "o": (32, 64)}
    latent = {"wq_a": (8, 5), "wq_b": (5, 12), "wkv_a": (8, 9), "wkv_b": (7, 14), "wo": (6, 8)}
    trees = [
        {"attn": {name: {"weight": array(*turn(shape))} for name, shape in shapes.items()}}
        for shapes in (grouped, latent)
    ]
    gqa = mc.layouts.gqa(2, heads=4, transposed=transposed, **WEIGHTS)
    mla = mc.layouts.mla(
        4,
        2,
        3,
        query=("wq_a/weight", "wq_b/weight"),
        key_value=("wkv_a/weight", "wkv_b/weight"),
        out="wo/weight",
        transposed=transposed,
    )
    told = [
        {part.role: (part.heads, *part.matrix) for part in find_blocks(layout, tree)[0].parts}
        for layout, tree in zip((gqa, mla), trees, strict=True)
    ]
    assert told[0] == {"q": (4, 64, 8), "k": (2, 64, 8), "v": (2, 64, 8), "o": (4, 8, 64)}
    assert told[1]["q_nope"] == (2, 5, 4) and told[1]["k_rope"] == (1, 8, 2)
    assert told[1]["q_down"] == (1, 8, 5) and told[1]["o"] == (2, 3, 8)


def test_transposed_is_of_flat_kernels():
    with pytest.raises(ValueError, match=r"transposed=True is for flat kernels.*heads="):
        mc.layouts.mha(transposed=True)


# --- sown values
@pytest.mark.parametrize(
    ("stack", "shape"),
    [
        ((1,), (1, 1, 2)),
        ((1,), (1, 1, 1, 2)),
        ((1, 1), (1, 1, 1, 2)),
        ((2,), (2, 1, 2)),
        ((2,), (1, 2, 2)),
    ],
)
def test_readings_that_agree_are_no_ambiguity(stack, shape):
    """One scanned layer with a batch of one."""
    params = jax.tree.map(lambda x: jnp.ones((*stack, *x.shape)), attention())
    clipped = mc.apply_qk_clip(params, {("attn",): jnp.full(shape, 40.0)}, mc.layouts.mha(), 10.0)
    np.testing.assert_allclose(clipped["attn"]["query"]["kernel"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("shape", [(2, 2, 2), (2, 1, 2, 2)])
def test_readings_that_differ_are(shape):
    params = jax.tree.map(lambda x: jnp.ones((2, *x.shape)), attention())
    with pytest.raises(ValueError, match=r"which axis is the stack \(2,\) is ambiguous"):
        mc.apply_qk_clip(params, {("attn",): jnp.full(shape, 40.0)}, mc.layouts.mha(), 10.0)


@pytest.mark.parametrize(
    ("layout", "inner"),
    [
        ([mc.layouts.mha(block="attn"), mc.layouts.ignore("attn/inner")], "inner"),
        ([mc.layouts.mha(block="attn"), mc.layouts.ignore("attn/inner")], "inner/core"),
        (mc.layouts.mha(block="attn"), "inner"),
    ],
    ids=["ignored", "sown deeper inside", "outside the pattern"],
)
def test_an_ignored_attention_inside_another(layout, inner):
    full = jax.tree.map(lambda x: jnp.ones(x.shape), attention())["attn"]
    params = {"attn": {**full, "inner": full}}
    sown = {("attn",): jnp.full(2, 1.0), ("attn", *inner.split("/")): jnp.full(2, 500.0)}
    tx = mc.qk_clip(layout, 100.0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(zeros, tx.init(params), params, max_logits=sown)
    report = mc.attention_report(params, state, sown, layout, threshold=100.0)
    np.testing.assert_array_equal(state.max_logits["attn"], [1, 1])
    np.testing.assert_array_equal(report.blocks["attn"].max_logits, [1, 1])


# --- NNX attention in a Linen model
X = np.random.default_rng(0).normal(size=(1, 3, 8)).astype(np.float32)


class Bridged(nn.Module):
    @nn.compact
    def __call__(self, x, calls):
        attend = bridge.to_linen(
            nnx.MultiHeadAttention,
            num_heads=2,
            in_features=8,
            decode=False,
            attention_fn=mc.attention_fn,
            name="attn",
        )
        for call in range(calls):
            out = attend((call + 1) * x, sow_weights=True)
        return out


@pytest.mark.versions
def test_nnx_attention_inside_linen_sows():
    model = Bridged()
    params = model.init(jax.random.key(0), X, 1)["params"]
    apply = lambda params, calls=1: model.apply(  # noqa: E731
        {"params": params}, X, calls, mutable=["intermediates"]
    )[1]
    sown = apply(params)
    before = mc.read_max_logits(sown)["attn",]
    clipped = mc.apply_qk_clip(params, sown, mc.find_layout(params), float(before.min()) / 4)
    after = mc.read_max_logits(apply(clipped))["attn",]
    np.testing.assert_allclose(after, before.min() / 4, rtol=1e-5)  # float32 products of ten terms
    assert "intermediates" not in model.init(jax.random.key(0), X, 1)
    plain = model.apply({"params": params}, X, 1)  # nothing collects
    assert plain.shape == X.shape


class OwnAttention(nnx.Module):
    """That sows by itself."""

    def __init__(self, rngs):
        self.query, self.key = (nnx.LinearGeneral(8, (2, 4), rngs=rngs) for _ in range(2))

    def __call__(self, x):
        key = self.key(x)
        out, maxima = mc.dot_product_attention(self.query(x), key, key)
        mc.sow_max_logits(self, maxima)
        return out


class BridgedDeeper(nn.Module):
    """In a Linen module of its own, in layers."""

    @nn.compact
    def __call__(self, x):
        for i in range(2):
            x = x + bridge.to_linen(OwnAttention, name=f"attn_{i}")(x).sum((-1, -2))[..., None]
        return x


@pytest.mark.versions
def test_own_nnx_attention_inside_linen_sows_layer_by_layer():
    model = BridgedDeeper()
    params = model.init(jax.random.key(0), X)["params"]
    apply = lambda params: model.apply({"params": params}, X, mutable=["intermediates"])[1]  # noqa: E731
    sown = mc.read_max_logits(apply(params))
    assert list(sown) == [("attn_0",), ("attn_1",)]
    kernels = (np.float64(params["attn_0"][side]["kernel"]) for side in ("query", "key"))
    q, k = (np.einsum("bti,ihf->bthf", np.float64(X), kernel) for kernel in kernels)
    logits = np.einsum("bthf,bshf->bhts", q, k) / 2  # 1/sqrt(4)
    np.testing.assert_allclose(sown["attn_0",], logits.max((0, 2, 3)), rtol=1e-5)
    half = float(sown["attn_0",].min()) / 2
    clipped = mc.apply_qk_clip(params, sown, mc.layouts.mha(value=None, out=None), half)
    np.testing.assert_allclose(mc.read_max_logits(apply(clipped))["attn_0",], half, rtol=1e-5)


@pytest.mark.versions
@pytest.mark.filterwarnings("ignore:Found unknown module paths")  # Flax, of what was just sown
def test_nnx_attention_inside_linen_keeps_the_largest_of_several_calls():
    model = Bridged()
    params = model.init(jax.random.key(0), X, 1)["params"]
    apply = lambda x, calls: model.apply({"params": params}, x, calls, mutable=["intermediates"])[1]  # noqa: E731
    once, twice, larger = (
        mc.read_max_logits(apply(x, calls))["attn",] for x, calls in ((X, 1), (X, 2), (2 * X, 1))
    )
    np.testing.assert_allclose(twice, np.maximum(once, larger), rtol=1e-6)
