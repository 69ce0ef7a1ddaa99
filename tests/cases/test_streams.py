"""What one attention may hold: streams, queries alone, further keys and biases, adapters.

The logits are those of a float64 reference, before and after a clip: each head's scale by its γ.
"""

import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import muonclip_jax as mc
from muonclip_jax.layouts import Layout, Piece, find_blocks

H, F = 4, 3
MAXIMA = jnp.array([40.0, 1.0, 20.0, 80.0])
GAMMA = np.array([0.25, 1, 0.5, 0.125])
SOWN = {("attn",): MAXIMA}
RNG = np.random.default_rng(0)
SIDES_ONLY = {"value": None, "out": None}


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def kernel(*shape, bias=()):
    return {"kernel": array(*shape)} | ({"bias": array(*bias)} if bias else {})


def heads_of(block, params, role):
    """Of each piece with a role the inputs' rows, its bias one more, `[stack..., heads, in, F]`."""
    found = []
    for part in block.parts:
        if part.role == role:
            leaves = [
                params["attn"][part.kernel[1]][name]
                for name in ("kernel", "bias")[: 1 + bool(part.bias)]
            ]
            found.append(np.concatenate([np.float64(part.take(x)) for x in leaves], axis=-2))
    return found


def products(layout, params):
    """Of every query piece with every key piece W_q W_kᵀ, `[stack..., heads, in, in]`."""
    (block,) = find_blocks(layout, params)
    pairs = itertools.product(heads_of(block, params, "q"), heads_of(block, params, "k"))
    repeated = ((q, np.repeat(k, block.heads // block.kv_heads, axis=-3)) for q, k in pairs)
    return [q @ k.swapaxes(-1, -2) for q, k in repeated]


def sown_by(layout, params):
    (block,) = find_blocks(layout, params)
    return {("attn",): MAXIMA.reshape(block.shape)}


def assert_scaled(layout, params, gamma=GAMMA, **options):
    after = mc.apply_qk_clip(params, sown_by(layout, params), layout, 10.0, **options)
    for now, then in zip(products(layout, after), products(layout, params), strict=True):
        # Rounded roots of γ, and sums of a few float32 products.
        np.testing.assert_allclose(now, then * gamma[..., None, None], rtol=1e-5, atol=1e-5)
    return after


def moved(before, after):
    return {
        name
        for name in before["attn"]
        if not jax.tree.all(
            jax.tree.map(
                lambda x, y: bool((x == y).all()), before["attn"][name], after["attn"][name]
            )
        )
    }


# --- streams
def joint(stack=(), kv_heads=H):
    """Streams of 8 and of 12 features, as images and text."""
    widths = {"": 8, "_txt": 12}
    own = {
        f"{name}{stream}": kernel(*stack, width, H if name == "query" else kv_heads, F)
        for stream, width in widths.items()
        for name in ("query", "key", "value")
    }
    own |= {f"out{stream}": kernel(*stack, H, F, width) for stream, width in widths.items()}
    return {"attn": own}


STREAMS = {name: (name, f"{name}_txt") for name in ("query", "key", "value", "out")}
JOINT = mc.layouts.mha(**STREAMS)


def flux():
    """Flat projections with biases, Flux and SD 3 in Hugging Face's spelling."""
    names = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")
    flat = {name: kernel(8, H * F, bias=(H * F,)) for name in names}
    return {"attn": flat | {name: kernel(H * F, 8) for name in ("to_out", "to_add_out")}}


FLUX = mc.layouts.mha(
    heads=H,
    query=("to_q", "add_q_proj"),
    key=("to_k", "add_k_proj"),
    value=("to_v", "add_v_proj"),
    out=("to_out", "to_add_out"),
)


@pytest.mark.parametrize(
    ("layout", "params", "clipped"),
    [
        (JOINT, joint(), {"query", "key", "query_txt", "key_txt"}),
        (JOINT, joint((1,)), {"query", "key", "query_txt", "key_txt"}),
        (FLUX, flux(), {"to_q", "to_k", "add_q_proj", "add_k_proj"}),
        # openpi: one key head for all, of two experts of different widths.
        (mc.layouts.gqa(**STREAMS), joint(kv_heads=1), {"query", "query_txt"}),
    ],
    ids=["MM-DiT", "stacked", "Flux", "openpi"],
)
def test_all_streams_of_a_joint_attention_are_clipped(layout, params, clipped):
    assert moved(params, assert_scaled(layout, params)) == clipped


def test_a_stream_that_no_piece_describes_is_refused_by_name():
    """As is what `find_layout` makes of it: the streams' names tell no order of theirs."""
    for layout in (mc.find_layout(joint()), mc.layouts.mha()):
        with pytest.raises(ValueError, match=r"query_txt/kernel.*enters the logits of attn"):
            mc.qk_clip(layout).init(joint())


def test_one_stream_frozen():
    """Its side as a whole is held, since the other stream alone would not do."""
    params = joint()
    after = assert_scaled(JOINT, params, frozen="attn/query_txt/*")
    assert moved(params, after) == {"key", "key_txt"}


def test_quack_compares_with_the_largest_of_the_streams():
    params = joint()
    tx = mc.scale_by_quack(JOINT, 0.5)
    state = tx.init(params)
    grown = jax.tree.map(lambda x: x, params)
    grown["attn"]["key_txt"] = {"kernel": 4 * params["attn"]["key_txt"]["kernel"]}
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, grown)
    norm = lambda name, p: np.linalg.norm(np.float64(p["attn"][name]["kernel"]), axis=(0, 2))  # noqa: E731
    largest = lambda p: np.maximum(norm("key", p), norm("key_txt", p))  # noqa: E731
    expected = 0.5 * largest(params) / largest(grown)
    np.testing.assert_allclose(state.factors["attn"]["q"], expected, rtol=1e-5)
    np.testing.assert_allclose(state.factors["attn"]["k"], 0.5, rtol=1e-5)
    for name in STREAMS["query"]:
        found = updates["attn"][name]["kernel"]
        np.testing.assert_allclose(found, np.broadcast_to(expected[:, None], found.shape), 1e-5)


def test_muon_and_the_report_see_every_stream():
    params = joint()
    rows = {row.path: str(row.matrices[0]) for row in mc.describe(params, JOINT)}
    assert rows["attn/query/kernel"] == "q 4 × [8, 3]"
    assert rows["attn/key_txt/kernel"] == "k 4 × [12, 3]"
    assert rows["attn/out_txt/kernel"] == "o 4 × [3, 12]"
    heads = mc.head_matrices(params, JOINT)["attn"]
    assert heads["q"].shape == (4, 8, 3) and heads["q of query_txt/kernel"].shape == (4, 12, 3)
    report = mc.attention_report(params, None, SOWN, JOINT).blocks["attn"]
    (block,) = find_blocks(JOINT, params)
    for role, norms in (("q", report.query_norms), ("k", report.key_norms)):
        both = np.concatenate(heads_of(block, params, role), axis=-2)
        np.testing.assert_allclose(norms, np.linalg.norm(both, 2, axis=(-2, -1)), rtol=1e-5)


def test_check_layout_proves_streams():
    """A joint attention of 5 and 3 tokens; then one whose text is cut the other way."""
    params = joint()
    tokens = {"": array(1, 5, 8), "_txt": array(1, 3, 12)}

    def model(params, tokens):
        attn = params["attn"]

        def both(name):
            of = lambda s: jnp.einsum("bti,ihf->bthf", tokens[s], attn[name + s]["kernel"])  # noqa: E731
            return jnp.concatenate([of(""), of("_txt")], axis=1)

        out, maxima = mc.dot_product_attention(both("query"), both("key"), both("value"))
        cut = {"": out[:, :5], "_txt": out[:, 5:]}
        back = [jnp.einsum("bthf,hfo->bto", cut[s], attn["out" + s]["kernel"]) for s in cut]
        return back, {("attn",): maxima}

    proof = mc.check_layout(model, params, JOINT, tokens)
    assert proof.roles == {"attn": ("q", "k", "v", "o")}
    turned = [
        Piece("q", "query_txt", "in features heads") if piece.parameter == "query_txt" else piece
        for piece in JOINT.pieces
    ]
    square = jax.tree.map(
        lambda x: jnp.concatenate([x, x[..., :1]], -1) if x.ndim == 3 else x, params
    )
    square["attn"] |= {
        name: {"kernel": array(H, H, width)} for name, width in (("out", 8), ("out_txt", 12))
    }
    with pytest.raises(ValueError, match=r"q \(attn/query/kernel .* and attn/query_txt/kernel"):
        mc.check_layout(model, square, Layout("turned", tuple(turned)), tokens)


# --- queries whose keys are another layer's, or no parameters here
ALONE = {
    "a piece": (Layout("q", (Piece("q", "query"),)), {"query": kernel(8, H, F)}),
    "shared layers": (
        mc.layouts.gqa(heads=H, query="q_proj", key=None, value=None, out="o_proj"),
        {"q_proj": kernel(8, H * F, bias=(H * F,)), "o_proj": kernel(H * F, 8)},
    ),
    "scanned": (mc.layouts.mha(key=None, **SIDES_ONLY), {"query": kernel(1, 8, H, F)}),
}


@pytest.mark.parametrize("which", ALONE)
@pytest.mark.parametrize("scope", ["head", "layer"])
def test_queries_alone_take_all_of_gamma(which, scope):
    layout, own = ALONE[which]
    gamma = GAMMA if scope == "head" else np.full(H, 0.125)
    sown = sown_by(layout, {"attn": own})
    after = mc.apply_qk_clip({"attn": own}, sown, layout, 10.0, scope=scope)["attn"]
    (block,) = find_blocks(layout, {"attn": own})
    (query, then), *_ = own.items()
    for name, x in then.items():
        now, before = (block.part("q").take(leaf) for leaf in (after[query][name], x))
        np.testing.assert_array_equal(now, before * gamma[:, None, None])
    assert moved({"attn": own}, {"attn": after}) == {query}


def shared_layers():
    """As in Gemma 3n: the second layer attends to the first one's keys."""
    first = {"q_proj": kernel(8, H, F), "k_proj": kernel(8, 1, F), "v_proj": kernel(8, 1, F)}
    params = {"layers_0": {"attn": first}, "layers_1": {"attn": {"q_proj": kernel(8, H, F)}}}
    names = {"query": "q_proj", "out": None}
    layouts = [
        mc.layouts.gqa(key="k_proj", value="v_proj", block="layers_0/*", **names),
        mc.layouts.gqa(key=None, value=None, block="layers_1/*", **names),
    ]
    return params, layouts, {(layer, "attn"): MAXIMA for layer in params}


def test_layers_that_share_keys(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    params, layouts, sown = shared_layers()
    tx = mc.accumulate(mc.qk_clip(layouts, 10.0), every=1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, max_logits=sown)
    for layer, own in params.items():
        moved = updates[layer]["attn"]["q_proj"]["kernel"]
        np.testing.assert_allclose(
            moved, own["attn"]["q_proj"]["kernel"] * (GAMMA[:, None] - 1), rtol=1e-6
        )
    report = mc.attention_report(params, state, sown, layouts, threshold=10.0)
    full, alone = (report.blocks[f"layers_{i}/attn"] for i in range(2))
    assert alone.key_norms is alone.ranks is alone.key_rms is None and full.ranks is not None
    assert not alone.dead.any() and not alone.collapsed.any() and alone.above.sum() == 3
    expected = np.linalg.norm(np.float64(params["layers_1"]["attn"]["q_proj"]["kernel"]), 2, (0, 2))
    np.testing.assert_allclose(alone.query_norms, expected, rtol=1e-5)
    assert "query_norm/layers_1/attn" in report.scalars() and "layers_1/attn" in str(report)


@pytest.mark.bad_input
@pytest.mark.parametrize("rule", ["paper", "fixed"])
def test_quack_refuses_queries_alone_by_name(rule):
    params, layouts, _ = shared_layers()
    with pytest.raises(ValueError, match=r"layers_1/attn: .* queries alone.*\['q'\].*ignore"):
        mc.scale_by_quack(layouts, rule=rule).init(params)


@pytest.mark.bad_input
def test_queries_alone_that_are_frozen_in_part():
    layout, own = ALONE["shared layers"]
    with pytest.raises(ValueError, match=r"attn/q_proj/bias \(12,\).*has no keys that they meet"):
        mc.qk_clip(layout, frozen="*/bias").init({"attn": own})


# --- further keys, and biases that stand by themselves
def transformer_xl():
    own = {name: kernel(8, H, F) for name in ("query", "key", "pos_embed_mat")}
    return {"attn": own | {"r_w_bias": array(H, F), "r_r_bias": array(H * F)}}


XL = Layout(
    "transformer_xl",
    (
        Piece("q", "query"),
        Piece("k", "key"),
        Piece("k", "pos_embed_mat"),
        Piece("q", "r_w_bias", "heads features"),
        Piece("q", "r_r_bias", "(heads features)", {"heads": H}),
    ),
)


def xl_logits(params):
    """`(x W_q + u) · (x W_k) + (x W_q + v) · (p W_r)`, float64."""
    a = jax.tree.map(np.float64, params["attn"])
    x, p = (np.random.default_rng(1).normal(size=(5, 8)) for _ in range(2))
    of = lambda t, name: np.einsum("ti,ihf->htf", t, a[name]["kernel"])  # noqa: E731
    q, k, r = of(x, "query"), of(x, "key"), of(p, "pos_embed_mat")
    u, v = a["r_w_bias"][:, None], a["r_r_bias"].reshape(H, 1, F)
    return (q + u) @ k.swapaxes(1, 2) + (q + v) @ r.swapaxes(1, 2)


@pytest.mark.parametrize("options", [{}, {"alpha": 1.0}, {"frozen": "*/key/*"}], ids=str)
def test_second_keys_and_biases_of_transformer_xl(options):
    params = transformer_xl()
    after = mc.apply_qk_clip(params, SOWN, XL, 10.0, **options)
    expected = xl_logits(params) * GAMMA[:, None, None]
    np.testing.assert_allclose(xl_logits(after), expected, rtol=1e-5, atol=1e-5)
    with_keys = not options
    assert ("pos_embed_mat" in moved(params, after)) == with_keys
    rows = {row.path: (row.optimizer, row.decays) for row in mc.describe(params, XL)}
    assert rows["attn/r_w_bias"] == rows["attn/r_r_bias"] == ("other", False)
    assert rows["attn/pos_embed_mat/kernel"] == ("muon", True)


def test_quack_counts_biases_that_stand_by_themselves():
    params = transformer_xl()
    tx = mc.scale_by_quack(XL)
    grown = jax.tree.map(lambda x: x, params)
    grown["attn"]["r_w_bias"] = 3 * params["attn"]["r_w_bias"]
    _, state = tx.update(params, tx.init(params), grown)

    def size(params):
        a = jax.tree.map(lambda x: np.square(np.float64(x)), params["attn"])
        biases = a["r_w_bias"] + a["r_r_bias"].reshape(H, F)
        return np.sqrt(a["query"]["kernel"].sum((0, 2)) + biases.sum(1))

    np.testing.assert_allclose(state.factors["attn"]["k"], size(params) / size(grown), rtol=1e-5)
    np.testing.assert_allclose(state.factors["attn"]["q"], 1, rtol=1e-6)


@pytest.mark.parametrize("slots", [1, 5])
def test_learned_keys_of_each_head_are_keys(slots):
    """Memory and null keys: as the keys of so many tokens that are always there."""
    params = {"attn": {"query": kernel(8, H, F), "key": kernel(8, H, F), "mem": array(slots, H, F)}}
    pieces = (Piece("q", "query"), Piece("k", "key"), Piece("k", "mem"))
    after = mc.apply_qk_clip(params, SOWN, Layout("mem", pieces), 10.0)
    root = np.sqrt(GAMMA)[:, None]
    np.testing.assert_allclose(after["attn"]["mem"], params["attn"]["mem"] * root, rtol=1e-6)


# --- adapters around a projection
class Wrapped(nnx.Module):
    """`nnx.LoRA(base_module=)`, as for a base that is already there."""

    def __init__(self, rngs):
        base = lambda: nnx.Linear(8, H * F, rngs=rngs)  # noqa: E731
        adapt = lambda: nnx.LoRA(  # noqa: E731
            8, 2, H * F, base_module=base(), rngs=rngs, b_initializer=nnx.initializers.normal(1.0)
        )
        self.q_proj, self.k_proj = adapt(), adapt()


class Own(nnx.Module):
    """`nnx.LoRALinear`, which is its own base."""

    def __init__(self, rngs):
        adapt = lambda: nnx.LoRALinear(  # noqa: E731
            8, H * F, lora_rank=2, rngs=rngs, b_initializer=nnx.initializers.normal(1.0)
        )
        self.q_proj, self.k_proj = adapt(), adapt()


@pytest.mark.versions
@pytest.mark.parametrize(("kind", "inside"), [(Wrapped, "/base_module"), (Own, "")])
def test_lora_of_nnx_scales_with_its_kernel(kind, inside):
    model = kind(nnx.Rngs(0))
    params = {"attn": nnx.state(model, nnx.Param)}
    layout = mc.layouts.mha(heads=H, query=f"q_proj{inside}", key=f"k_proj{inside}", **SIDES_ONLY)
    x = np.float32(np.random.default_rng(0).normal(size=(5, 8)))
    before = model.q_proj(x), model.k_proj(x)
    nnx.update(model, mc.apply_qk_clip(params, SOWN, layout, 10.0)["attn"])
    root = np.repeat(np.sqrt(GAMMA), F)
    for now, then in zip((model.q_proj(x), model.k_proj(x)), before, strict=True):
        np.testing.assert_allclose(now, then * root, rtol=1e-5, atol=1e-5)


class Adapted(nn.Module):
    """A wrapper of Linen, with an adapter of two layers."""

    @nn.compact
    def __call__(self, x):
        low = nn.Dense(2, use_bias=False, name="lora_a")(x)
        base = nn.DenseGeneral((H, F), name="base")(x)
        return base + nn.DenseGeneral((H, F), use_bias=False, name="lora_b")(low)


def test_a_linen_wrapper_scales_as_one():
    x = np.float32(RNG.normal(size=(5, 8)))
    sides = {name: Adapted().init(jax.random.key(i), x)["params"] for i, name in enumerate("qk")}
    layout = mc.layouts.mha(query="q/base", key="k/base", **SIDES_ONLY)
    after = mc.apply_qk_clip({"attn": sides}, SOWN, layout, 10.0)["attn"]
    root = np.sqrt(GAMMA)[:, None]
    for name, then in sides.items():
        now, before = (Adapted().apply({"params": p}, x) for p in (after[name], then))
        np.testing.assert_allclose(now, before * root, rtol=1e-5, atol=1e-6)


def effective(p, out):
    """The kernel with its adapter, `[in, heads, F]` float64; `out` says how these lie."""
    a = jax.tree.map(np.float64, p)
    both = out(a["w"]) + a["w_lora_a"] @ a["w_lora_b"].reshape(2, H * F)
    return both.reshape(8, H, F)


@pytest.mark.parametrize(
    ("axes", "shape", "out"),
    [
        ("in heads features", (8, H, F), lambda w: w.reshape(8, H * F)),
        ("heads in features", (H, 8, F), lambda w: w.swapaxes(0, 1).reshape(8, H * F)),
        ("in (heads features)", (8, H * F), lambda w: w),
    ],
)
@pytest.mark.parametrize("flat", [True, False])
def test_adapters_beside_an_einsum_kernel(axes, shape, out, flat):
    """As Tunix adds them: the rank in front, whatever way the kernel lies."""
    outputs = (H * F,) if flat else (H, F)
    sizes = {"heads": H} if "(" in axes else {}
    if sizes and not flat:
        outputs = (H * F,)
    make = lambda: {"w": array(*shape), "w_lora_a": array(8, 2), "w_lora_b": array(2, *outputs)}  # noqa: E731
    params = {"attn": {"q_einsum": make(), "k_einsum": make()}}
    pieces = tuple(Piece(role, f"{role}_einsum/w", axes, sizes) for role in ("q", "k"))
    after = mc.apply_qk_clip(params, SOWN, Layout("gemma", pieces), 10.0)
    root = np.sqrt(GAMMA)[:, None]
    for name, then in params["attn"].items():
        now = effective(after["attn"][name], out)
        np.testing.assert_allclose(now, effective(then, out) * root, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(after["attn"][name]["w_lora_a"], then["w_lora_a"])


def adapted(magnitude=False, stack=()):
    def side():
        base = {"kernel": array(*stack, 8, H * F), "bias": array(*stack, H * F)}
        pair = {"lora_a": array(*stack, 8, 2), "lora_b": array(*stack, 2, H * F)}
        more = {"magnitude": jnp.abs(array(*stack, H * F))} if magnitude else {}
        return {"base_layer": base, **pair, **more}

    return {"attn": {"q_proj": side(), "k_proj": side()}}


ADAPTED = mc.layouts.mha(heads=H, query="q_proj/base_layer", key="k_proj/base_layer", **SIDES_ONLY)


def dora(p, x):
    a = jax.tree.map(np.float64, p)
    both = a["base_layer"]["kernel"] + a["lora_a"] @ a["lora_b"]
    scale = a.get("magnitude", 1) / (np.linalg.norm(both, axis=0) if "magnitude" in a else 1)
    return x @ (both * scale) + a["base_layer"]["bias"]


@pytest.mark.parametrize("magnitude", [False, True], ids=["LoRA", "DoRA"])
def test_dora_scales_by_its_magnitude(magnitude):
    params, x = adapted(magnitude), RNG.normal(size=(5, 8))
    after = mc.apply_qk_clip(params, SOWN, ADAPTED, 10.0)
    root = np.repeat(np.sqrt(GAMMA), F)
    for name, then in params["attn"].items():
        np.testing.assert_allclose(
            dora(after["attn"][name], x), dora(then, x) * root, rtol=1e-5, atol=1e-5
        )


def test_adapters_of_scanned_layers():
    params = adapted(stack=(2,))
    sown = {("attn",): jnp.stack([MAXIMA, MAXIMA[::-1]])}
    after = mc.apply_qk_clip(params, sown, ADAPTED, 10.0)
    root = np.repeat(np.sqrt(np.stack([GAMMA, GAMMA[::-1]])), F, axis=1)[:, None]
    for now, then in ((tree["attn"]["q_proj"]["lora_b"] for tree in (after, params)),):
        np.testing.assert_allclose(now, then * root, rtol=1e-6)


@pytest.mark.bad_input
def test_a_frozen_base_is_no_base_for_a_clip():
    """`lora_b` alone scales a part of the logits; frozen whole, the block is left out."""
    with pytest.raises(
        ValueError, match=r"attn/q_proj/base_layer/kernel \(8, 12\).*nothing is left"
    ):
        mc.qk_clip(ADAPTED, frozen="*/base_layer/*").init(adapted())
    params = adapted()
    after = mc.apply_qk_clip(params, SOWN, ADAPTED, 10.0, frozen="attn/*")
    assert not moved(params, after)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "change",
    [
        {"lora_b": (3, H * F)},  # another rank than lora_a's
        {"lora_b": (2, 7)},
        {"lora_a": None},
        {"mora": (4, 4)},
    ],
)
def test_adapters_that_are_no_pair_are_refused_by_name(change):
    params = adapted()
    own = params["attn"]["q_proj"]
    own |= {name: array(*(shape or (1,))) for name, shape in change.items()}
    if change.get("lora_a", ()) is None:
        del own["lora_a"]
    with pytest.raises(ValueError, match=r"attn/q_proj/\w+ .*also takes part in .*Merge"):
        find_blocks(ADAPTED, params)


@pytest.mark.bad_input
def test_quack_refuses_adapters_by_name():
    with pytest.raises(ValueError, match=r"attn/q_proj/lora_b \(2, 12\) is an adapter.*Merge"):
        mc.scale_by_quack(ADAPTED).init(adapted())


# --- block= as several globs, or a function
def shapes(*names):
    return {name: jax.ShapeDtypeStruct(shape, "float32") for name, shape in names}


KINDS = {
    "mha": (mc.layouts.mha, SIDES_ONLY, shapes(("query", (8, 2, 4)), ("key", (8, 2, 4)))),
    "gqa": (mc.layouts.gqa, SIDES_ONLY, shapes(("query", (8, 2, 4)), ("key", (8, 1, 4)))),
    "fused_qkv": (mc.layouts.fused_qkv, {"heads": 2, "out": None}, shapes(("qkv", (8, 24)))),
    "mla": (
        mc.layouts.mla,
        {"nope": 4, "rope": 2, "v": 3, "query": "wq", "out": None},
        shapes(("wq", (8, 12)), ("wkv_a", (8, 9)), ("wkv_b", (7, 14))),
    ),
}
PATTERNS = {
    "globs": ("encoder/*", "decoder/*/attn"),
    "list": ["encoder/*", "decoder/*/attn"],
    "function": lambda path: not path.startswith("vision"),
}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", KINDS)
def test_block_takes_globs_and_functions(kind, pattern):
    make, options, own = KINDS[kind]
    params = {"encoder": {"attn": own}, "decoder": {"0": {"attn": own}}, "vision": {"attn": own}}
    layout = make(block=PATTERNS[pattern], **options)
    assert isinstance(hash(layout), int)
    assert {b.name for b in find_blocks(layout, params)} == {"encoder/attn", "decoder/0/attn"}
    others = mc.layouts.ignore(PATTERNS[pattern])
    kept = make(block="vision/*", **options)
    assert [b.name for b in find_blocks([kept, others], params)] == ["vision/attn"]
