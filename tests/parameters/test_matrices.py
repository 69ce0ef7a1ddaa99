"""A parameter as matrices: their shapes, a function on each of them, Muon on each head."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib import MuonDimensionNumbers

import muonclip_jax as mc
from muonclip_jax._layouts.pieces import Piece
from muonclip_jax._parameters import matrices
from muonclip_jax._parameters.matrices import spec_of, spec_of_parts

WIDTH, HEADS, KV, F, OUT, LAYERS = 16, 4, 2, 6, 10, 3


def split_into_heads(roles):
    """These only; of the others all heads make one matrix."""
    return mc.Granularity({role: 1 if role in roles else "all" for role in ("q", "k", "v", "o")})


def routed(layout, kernel, per_head, **shapes):
    """What the routing makes of one parameter of a block of these shapes."""
    leaves = {
        name: {"kernel": jax.ShapeDtypeStruct(shape, "float32")} for name, shape in shapes.items()
    }
    split = split_into_heads(per_head)
    numbers = mc.muon_dimension_numbers({"attn": leaves}, layout=layout, granularity=split)
    return numbers["attn"][kernel]["kernel"]


def apply(fn, x, spec):
    """`fn` on the matrices, as `[count, in, out]`, of each kind in a parameter."""
    batches = matrices.split(jnp.asarray(x), spec)
    done = [fn(batch.values.reshape(batch.shape)).reshape(batch.values.shape) for batch in batches]
    return matrices.join(jnp.asarray(x), done, spec)


def negative_double(x):
    """A function that shows which entries it was given, and in which order."""
    assert x.ndim >= 2
    return -2 * x


def numbered_matrices(x):
    """Adds to every entry its row and column in its own matrix."""
    return x + 1000 * jnp.arange(x.shape[-2])[:, None] + 1_000_000 * jnp.arange(x.shape[-1])


# Dimension numbers, as Optax has them


@pytest.mark.parametrize(
    ("shape", "spec", "expected"),
    [
        ((5, 7), MuonDimensionNumbers(0, 1), (1, 5, 7)),
        ((5, 7), MuonDimensionNumbers(1, 0), (1, 7, 5)),
        ((5, 7), MuonDimensionNumbers(-2, -1), (1, 5, 7)),
        ((3, 5, 7), MuonDimensionNumbers(-2, -1), (3, 5, 7)),
        ((3, 5, 7), MuonDimensionNumbers(0, 1), (7, 3, 5)),
        ((3, 5, 7), MuonDimensionNumbers((0, 1), 2), (1, 15, 7)),
        ((2, 3, 5, 7), MuonDimensionNumbers(1, (0, 3)), (5, 3, 14)),
        ((2, 3, 5, 7), MuonDimensionNumbers((3, 1), (2,)), (2, 21, 5)),
    ],
)
def test_dimension_numbers(shape, spec, expected):
    numbers, spec = spec, spec_of(("a",), shape, spec)
    assert spec.shapes == (expected,)
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    seen = []
    result = apply(lambda m: seen.append(m) or negative_double(m), x, spec)
    np.testing.assert_array_equal(result, -2 * x)
    (given,) = seen
    assert (math.prod(given.shape[:-2]), *given.shape[-2:]) == expected

    # By hand: one matrix for each index of the other axes.
    ins, outs = (np.atleast_1d(axis) % x.ndim for axis in numbers)
    others = [axis for axis in range(x.ndim) if axis not in (*ins, *outs)]
    by_hand = x.transpose(*others, *ins, *outs).reshape(expected)
    np.testing.assert_array_equal(given.reshape(expected), by_hand)


@pytest.mark.parametrize(
    "spec",
    [
        MuonDimensionNumbers(0, 2),
        MuonDimensionNumbers(-3, 1),
        MuonDimensionNumbers(0, 0),
        MuonDimensionNumbers(0, -2),  # the same axis
        MuonDimensionNumbers((0, 0), 1),
        MuonDimensionNumbers((), 1),
    ],
)
def test_axes_that_the_parameter_does_not_have(spec):
    with pytest.raises(ValueError, match=r"a/b of shape \(5, 7\) cannot be read .*different axes"):
        spec_of(("a", "b"), (5, 7), spec)


def test_a_spec_of_the_same_parameter_is_taken_as_it_is():
    assert spec_of(("a",), (5, 7), None) is None
    spec = routed(SEPARATE, "query", ("q",), **HEADED)
    assert spec_of(("attn", "query", "kernel"), HEADED["query"], spec) is spec


# Patterns, as einops has them


@pytest.mark.parametrize(
    ("shape", "pattern", "expected", "by_hand"),
    [
        ((5, 7), "in out", (1, 5, 7), lambda x: x),
        ((5, 7), "out in -> in out", (1, 7, 5), lambda x: x.T),
        ((3, 5, 7), "experts in out", (3, 5, 7), lambda x: x),
        ((2, 3, 5, 7), "... in out", (6, 5, 7), lambda x: x),
        ((5, 7), "... in out", (1, 5, 7), lambda x: x),
        (
            (2, 3, 4, 7),
            "height width channels out -> (height width channels) out",
            (1, 24, 7),
            lambda x: x.reshape(24, 7),
        ),
        (
            (2, 5, 3, 7),
            "... in heads features -> ... heads in features",
            (6, 5, 7),
            lambda x: x.swapaxes(1, 2),
        ),
        (
            (5, 14),
            mc.MatrixPattern("in (part out) -> part in out", {"part": 2}),
            (2, 5, 7),
            lambda x: np.stack([x[:, :7], x[:, 7:]]),
        ),
        (
            (4, 5, 6),
            mc.MatrixPattern("in layers (out part) -> layers part in out", {"part": 3}),
            (15, 4, 2),
            lambda x: np.stack([x[:, i, j::3] for i in range(5) for j in range(3)]),
        ),
    ],
)
def test_patterns(shape, pattern, expected, by_hand):
    spec = spec_of(("a",), shape, pattern)
    assert spec.shapes == (expected,)
    x = np.arange(math.prod(shape), dtype=np.float32).reshape(shape)
    seen = []
    result = apply(lambda m: seen.append(m) or negative_double(m), x, spec)
    np.testing.assert_array_equal(result, -2 * x)
    np.testing.assert_array_equal(seen[0].reshape(expected), by_hand(x).reshape(expected))


def test_several_patterns_share_a_parameter():
    """Gate and up of different widths in one kernel, `[in, 4 + 6]`."""
    halves = [mc.MatrixPattern("in out", select={"out": cut}) for cut in ((0, 4), (4, None))]
    spec = spec_of(("mlp", "kernel"), (5, 10), halves)
    assert spec.shapes == ((1, 5, 4), (1, 5, 6))
    x = np.arange(50, dtype=np.float32).reshape(5, 10)
    seen = []
    result = apply(lambda m: seen.append(m) or negative_double(m), x, spec)
    np.testing.assert_array_equal(result, -2 * x)
    for given, expected in zip(seen, (x[:, :4], x[:, 4:]), strict=True):
        np.testing.assert_array_equal(given[0] if given.ndim == 3 else given, expected)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("in (part out) -> part in out", r"a of shape \(5, 14\) does not tell part and out apart"),
        ("experts in out", r"a of shape \(5, 14\) does not have the axes of .*experts in out"),
        ("in out -> out", "must have the same names on both sides"),
        ("in -> in", "must end in the two axes of a matrix"),
        ("in (out", "unmatched or nested parentheses"),
        ("in 2", "'2', which is no name for an axis"),
        ("in in", "has a name twice"),
        ("in ... out", "can have ... in front only"),
        ("stack0 in out", "'stack0', the name of a stack axis"),
        (mc.MatrixPattern("in (part out) -> part in out", {"part": 3}), "3 part do not divide"),
        (mc.MatrixPattern("in out", {"out": 7}), r"has 14 on axis out, not 7 out"),
        (mc.MatrixPattern("in out", select={"out": (0, 4)}), "10 of its .* belong to none of"),
        (mc.MatrixPattern("in out", select={"out": (0, 99)}), "has 14 out, of which .* is no part"),
        (["in out", "in out"], "its patterns overlap"),
    ],
)
def test_patterns_that_do_not_fit(pattern, message):
    with pytest.raises(ValueError, match=message):
        spec_of(("a",), (5, 14), pattern)


@pytest.mark.parametrize(
    ("sizes", "select", "message"),
    [
        ({"part": 0}, {}, r"sizes\['part'\] must be a whole number"),
        ({"parts": 2}, {}, "does not have parts, which sizes or select name"),
        ({"part": 2}, {"out": "all"}, "neither an index nor"),
    ],
)
def test_patterns_that_are_refused_when_built(sizes, select, message):
    with pytest.raises(ValueError, match=message):
        mc.MatrixPattern("in (part out) -> part in out", sizes, select)


def test_what_is_no_pattern():
    with pytest.raises(TypeError, match=r"mlp/kernel of shape \(5, 7\) cannot be read with 3"):
        spec_of(("mlp", "kernel"), (5, 7), 3)
    with pytest.raises(TypeError, match="must be text"):
        mc.MatrixPattern(3)


# Heads

SEPARATE = mc.layouts.gqa()
HEADED = {
    "query": (WIDTH, HEADS, F),
    "key": (WIDTH, KV, F),
    "value": (WIDTH, KV, F),
    "out": (HEADS, F, OUT),
}
FUSED = mc.layouts.fused_qkv(HEADS, KV, axes="in (heads part features)")
FUSED_SHAPES = {"qkv": (LAYERS, WIDTH, (HEADS + 2 * KV) * F), "out": (LAYERS, HEADS * F, OUT)}


@pytest.mark.parametrize(
    ("per_head", "expected"),
    [
        (("q", "k", "v", "o"), [(4, 16, 6), (2, 16, 6), (2, 16, 6), (4, 6, 10)]),
        (("q", "k"), [(4, 16, 6), (2, 16, 6), (1, 16, 12), (1, 24, 10)]),
        ((), [(1, 16, 24), (1, 16, 12), (1, 16, 12), (1, 24, 10)]),
    ],
)
def test_shapes_per_piece(per_head, expected):
    names = {"query": "q", "key": "k", "value": "v", "out": "o"}
    separate = [routed(SEPARATE, name, per_head, **HEADED).shapes for name in names]
    assert separate == [(one,) for one in expected]
    fused = [
        one for name in FUSED_SHAPES for one in routed(FUSED, name, per_head, **FUSED_SHAPES).shapes
    ]
    assert fused == [(LAYERS * count, ins, outs) for count, ins, outs in expected]


def test_a_spec_for_another_parameter():
    spec = routed(SEPARATE, "query", ("q",), **HEADED)
    message = r"attn/key/kernel of shape \(16, 2, 6\) cannot be read with .*attn/query/kernel"
    with pytest.raises(ValueError, match=message):
        spec_of(("attn", "key", "kernel"), HEADED["key"], spec)
    with pytest.raises(ValueError, match=r"of shape \(3, 16, 4, 6\) cannot be read with"):
        spec_of(("attn", "query", "kernel"), (3, *HEADED["query"]), spec)


def test_pieces_that_are_not_all_of_the_parameter():
    part = Piece("q", "query", select={"features": (0, 4)}).fit(("query",), HEADED["query"])
    with pytest.raises(ValueError, match=r"query of shape \(16, 4, 6\): 2 of its 6 .*pieces \(q\)"):
        spec_of_parts([part], mc.Granularity())


def fused_heads(x):
    """By hand, for each layer: `[heads, in, features]` of queries, keys and values."""
    slots = x.reshape(LAYERS, WIDTH, KV, HEADS // KV + 2, F)
    queries, keys, values = slots[..., :-2, :], slots[..., -2, :], slots[..., -1, :]
    queries = queries.reshape(LAYERS, WIDTH, HEADS, F)
    return [each.swapaxes(1, 2) for each in (queries, keys, values)]


def side_by_side(heads):
    """`[layers, heads, in, features]` as `[layers, in, heads*features]`."""
    return heads.swapaxes(1, 2).reshape(LAYERS, WIDTH, -1)


def test_split_gives_each_matrix_in_its_order():
    """Rows are inputs and columns features of one head, or of all, head after head."""
    x = np.arange(math.prod(FUSED_SHAPES["qkv"]), dtype=np.float32).reshape(FUSED_SHAPES["qkv"])
    seen = []
    spec = routed(FUSED, "qkv", ("q",), **FUSED_SHAPES)
    result = apply(lambda m: seen.append(m) or negative_double(m), x, spec)
    np.testing.assert_array_equal(result, -2 * x)
    q, k, v = fused_heads(x)
    for given, expected in zip(seen, (q, side_by_side(k), side_by_side(v)), strict=True):
        np.testing.assert_array_equal(given.reshape(expected.shape), expected)


def test_apply_puts_each_matrix_back_in_its_order():
    """A function that knows rows from columns, on the projection back from the heads."""
    shape = (LAYERS, HEADS * F, OUT)
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    whole = apply(numbered_matrices, x, routed(FUSED, "out", (), **FUSED_SHAPES))
    np.testing.assert_array_equal(whole, numbered_matrices(x))
    split = apply(numbered_matrices, x, routed(FUSED, "out", ("o",), **FUSED_SHAPES))
    heads = numbered_matrices(x.reshape(LAYERS, HEADS, F, OUT))
    np.testing.assert_array_equal(split, heads.reshape(shape))


# Muon

SCHEDULE = mc.schedules.deepseek_v4()  # error 5e-4 for singular values from 1e-2 of the norm
# Gaussian matrices of 6 x 16 have none below; that error, and rounding at 6e-8 in float32, which
# ten steps of slopes up to 3.4 enlarge where singular values are small.
TOLERANCE = 1e-3


def polar(matrix):
    """U Vᵀ in float64."""
    u, _, vt = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return u @ vt


def muon_direction(layout, per_head, params, grads):
    """The first update of Muon without momentum: the orthogonalized gradient."""
    numbers = mc.muon_dimension_numbers(
        params, layout=layout, granularity=split_into_heads(per_head)
    )
    how = mc.NewtonSchulz(SCHEDULE, "float32")
    tx = mc.scale_by_muon(0.0, newton_schulz=how, dimension_numbers=numbers)
    return jax.jit(tx.update)(grads, tx.init(params))[0]


def gaussian(**shapes):
    rng = np.random.default_rng(0)
    return {
        "attn": {
            name: {"kernel": rng.normal(size=shape).astype(np.float32)}
            for name, shape in shapes.items()
        }
    }


def kernels(tree):
    return {name: np.asarray(leaf["kernel"]) for name, leaf in tree["attn"].items()}


def test_muon_orthogonalizes_every_head():
    grads = gaussian(**HEADED)
    update = kernels(muon_direction(SEPARATE, ("q", "k", "v", "o"), grads, grads))
    for name, grad in kernels(grads).items():
        for head in range(grad.shape[0 if name == "out" else 1]):
            at = (head,) if name == "out" else (slice(None), head)
            np.testing.assert_allclose(update[name][at], polar(grad[at]), atol=TOLERANCE)


def test_muon_per_piece():
    """Heads of queries and keys; values and outputs whole, as flat kernels without heads give."""
    grads = gaussian(**HEADED)
    update = kernels(muon_direction(SEPARATE, ("q", "k"), grads, grads))
    wide = {"value": (WIDTH, KV * F), "out": (HEADS * F, OUT)}
    for name, grad in kernels(grads).items():
        if name in wide:
            expected = polar(grad.reshape(wide[name]))
            np.testing.assert_allclose(update[name].reshape(wide[name]), expected, atol=TOLERANCE)
        else:
            for head in range(grad.shape[1]):
                expected = polar(grad[:, head])
                np.testing.assert_allclose(update[name][:, head], expected, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("per_head", [("q", "k", "v", "o"), ("k",)])
def test_muon_does_the_same_to_fused_and_separate_kernels(per_head):
    grads = gaussian(**FUSED_SHAPES)
    fused = kernels(muon_direction(FUSED, per_head, grads, grads))
    q, k, v = fused_heads(kernels(grads)["qkv"])
    separate = {
        "query": q.swapaxes(1, 2),
        "key": k.swapaxes(1, 2),
        "value": v.swapaxes(1, 2),
        "out": kernels(grads)["out"].reshape(LAYERS, HEADS, F, OUT),
    }
    separate = {"attn": {name: {"kernel": x} for name, x in separate.items()}}
    update = kernels(muon_direction(SEPARATE, per_head, separate, separate))
    heads = fused_heads(fused["qkv"])
    # The same float32 products in another order: rounding of entries up to 1.
    for name, one in zip(("query", "key", "value"), heads, strict=True):
        np.testing.assert_allclose(update[name].swapaxes(1, 2), one, atol=1e-5)
    np.testing.assert_allclose(update["out"].reshape(fused["out"].shape), fused["out"], atol=1e-5)


@pytest.mark.slow
def test_per_head_is_not_the_whole():
    """The tests above would notice the wrong one: their updates differ by far more."""
    grads = gaussian(**FUSED_SHAPES)
    whole = kernels(muon_direction(FUSED, (), grads, grads))["qkv"]
    heads = kernels(muon_direction(FUSED, ("q", "k", "v"), grads, grads))["qkv"]
    for a, b in zip(fused_heads(whole), fused_heads(heads), strict=True):
        assert np.abs(a - b).max() > 100 * TOLERANCE


def test_update_rms_is_by_the_shape_of_each_matrix():
    """0.2 sqrt(max(in, out)): per head 0.2 sqrt(16); values together 0.2 sqrt(16) as well, the
    whole output projection 0.2 sqrt(24)."""
    ones = jax.tree.map(np.ones_like, gaussian(**HEADED))
    split = split_into_heads(("q", "k"))
    numbers = mc.muon_dimension_numbers(ones, layout=SEPARATE, granularity=split)
    tx = mc.scale_by_update_rms(dimension_numbers=numbers)
    update = kernels(tx.update(ones, tx.init(ones))[0])
    sizes = {"query": 16, "key": 16, "value": 16, "out": 24}
    for name, size in sizes.items():
        np.testing.assert_allclose(update[name], 0.2 * math.sqrt(size), rtol=1e-6)


def test_queries_and_keys_of_latent_attention_are_families():
    """`q` and `k` name MLA's parts of them; what all heads share is one matrix in any case."""
    shape = lambda *lengths: {"kernel": jax.ShapeDtypeStruct(lengths, jnp.float32)}  # noqa: E731
    block = {
        "wq_a": shape(8, 5),
        "wq_b": shape(5, 2 * 6),
        "wkv_a": shape(8, 7 + 2),
        "wkv_b": shape(7, 2 * 7),
        "wo": shape(2 * 3, 8),
    }
    split = split_into_heads(("q", "k"))
    rows = mc.describe({"attn": block}, mc.layouts.mla(4, 2, 3), granularity=split)
    assert {row.path.split("/")[1]: [str(m) for m in row.matrices] for row in rows} == {
        "wq_a": ["q_down 1 × [8, 5]"],
        "wq_b": ["q_nope 2 × [5, 4]", "q_rope 2 × [5, 2]"],
        "wkv_a": ["kv_down 1 × [8, 7]", "k_rope 1 × [8, 2]"],
        "wkv_b": ["k_nope 2 × [7, 4]", "v 1 × [7, 6] of 2 heads"],
        "wo": ["o 1 × [6, 8] of 2 heads"],
    }
