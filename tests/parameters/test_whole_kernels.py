"""Whole kernels: every kernel of attention is one matrix, as it is stored."""

import dataclasses
from functools import partial

import einops
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc
from muonclip_jax.layouts import Layout, Piece

CONVERGED = mc.NewtonSchulz(mc.schedules.polar_express(12), dtype="float32", method="standard")
MLA = mc.layouts.mla(4, 2, 3, heads=5)
MLA_SHAPES = {
    "wq_a": (12, 7),
    "wq_b": (7, 5 * 6),
    "wkv_a": (12, 8 + 2),
    "wkv_b": (8, 5 * 7),
    "wo": (5 * 3, 12),
}
HEADED = {
    **dict.fromkeys(("query", "key", "value"), (12, 5, 4)),
    "out": (5, 4, 12),
}
PROJECTIONS = {name: f"{name}_proj" for name in ("query", "key", "value")}

whole_kernels = partial(mc.muon_dimension_numbers, granularity=mc.Granularity.kimi_k2())


# layout, shapes of all its kernels, which one, its axes, and how many matrices [in, out]
STORAGES = {
    "head axes": (mc.layouts.mha(), HEADED, "query", "i h f -> 1 i (h f)", (1, 12, 20)),
    "out": (mc.layouts.mha(), HEADED, "out", "h f o -> 1 (h f) o", (1, 20, 12)),
    "grouped": (
        mc.layouts.gqa(),
        HEADED | dict.fromkeys(("key", "value"), (12, 1, 4)),
        "key",
        "i h f -> 1 i (h f)",
        (1, 12, 4),
    ),
    "flat": (
        mc.layouts.mha(heads=5),
        {name: (12, 20) for name in ("query", "key", "value")} | {"out": (20, 12)},
        "value",
        "i o -> 1 i o",
        (1, 12, 20),
    ),
    "[out, in]": (
        mc.layouts.mha(heads=5, transposed=True, **PROJECTIONS, out=None),
        dict.fromkeys(PROJECTIONS.values(), (20, 12)),
        "query_proj",
        "o i -> 1 i o",
        (1, 12, 20),
    ),
    "fused, flat": (
        mc.layouts.fused_qkv(5, out=None),
        {"qkv": (12, 60)},
        "qkv",
        "i o -> 1 i o",
        (1, 12, 60),
    ),
    "fused, with axes": (
        mc.layouts.fused_qkv(5, axes="part heads in features", out=None),
        {"qkv": (3, 5, 12, 4)},
        "qkv",
        "p h i f -> 1 i (p h f)",
        (1, 12, 60),
    ),
    "queries of MLA": (MLA, MLA_SHAPES, "wq_b", "i o -> 1 i o", (1, 7, 30)),
    "compression of MLA": (MLA, MLA_SHAPES, "wkv_a", "i o -> 1 i o", (1, 12, 10)),
    "keys and values of MLA": (MLA, MLA_SHAPES, "wkv_b", "i o -> 1 i o", (1, 8, 35)),
    "layers in front": (
        mc.layouts.mha(),
        {name: (3, *shape) for name, shape in HEADED.items()},
        "out",
        "l h f o -> l (h f) o",
        (3, 20, 12),
    ),
    "layers behind the inputs": (
        dataclasses.replace(mc.layouts.mha(), stack_axis=1),
        {name: (shape[0], 3, *shape[1:]) for name, shape in HEADED.items()},
        "key",
        "i l h f -> l i (h f)",
        (3, 12, 20),
    ),
    "fused, layers behind the parts": (
        dataclasses.replace(
            mc.layouts.fused_qkv(5, axes="part heads in features", out=None), stack_axis=1
        ),
        {"qkv": (3, 2, 5, 12, 4)},
        "qkv",
        "p l h i f -> l i (p h f)",
        (2, 12, 60),
    ),
}


def tree(shapes, make):
    return {"attn": {name: {"kernel": make(shape)} for name, shape in shapes.items()}}


@pytest.mark.parametrize(
    ("layout", "shapes", "name", "axes", "matrices"), STORAGES.values(), ids=STORAGES
)
def test_a_kernel_is_one_matrix_however_it_is_stored(layout, shapes, name, axes, matrices):
    rng = np.random.default_rng(0)
    params = tree(shapes, lambda shape: jnp.asarray(rng.normal(size=shape), jnp.float32))
    numbers = partial(whole_kernels, layout=layout)
    rows = {row.path: row for row in mc.describe(params, layout, dimension_numbers=numbers)}
    (found,) = rows[f"attn/{name}/kernel"].matrices
    assert (found.count, found.ins, found.outs) == matrices

    def update(tx):
        return tx.update(params, tx.init(params))[0]["attn"][name]["kernel"]

    kernel = np.asarray(params["attn"][name]["kernel"], np.float64)
    u, _, vt = np.linalg.svd(einops.rearrange(kernel, axes), full_matrices=False)
    done = update(mc.scale_by_orthogonalization(CONVERGED, dimension_numbers=numbers))
    # float32 rounding, which the smallest singular values take up a tenfold or two.
    np.testing.assert_allclose(einops.rearrange(done, axes), u @ vt, atol=2e-5)
    _, ins, outs = matrices
    scaled = update(mc.scale_by_update_rms("unit_rms_norm", dimension_numbers=numbers))
    np.testing.assert_allclose(scaled, kernel * (outs / ins) ** 0.5, rtol=1e-6)


def test_the_rest_is_read_as_without_a_layout_and_rules_come_first():
    params = tree(HEADED, jnp.ones) | {
        "norm": {"scale": jnp.ones(12)},
        "embed": {"embedding": jnp.ones((30, 12))},
        "mlp": {"kernel": jnp.ones((12, 48))},
    }
    rest = {name: params[name] for name in ("norm", "embed", "mlp")}
    specs = whole_kernels(params, layout=mc.layouts.mha())
    assert {name: specs[name] for name in rest} == mc.muon_dimension_numbers(rest)
    rules = {"*/key/*": "in heads features -> heads in features", "mlp/*": None}
    ruled = whole_kernels(params, layout=mc.layouts.mha(), rules=rules)
    assert ruled["attn"]["key"]["kernel"].shapes == ((5, 12, 4),)
    assert ruled["attn"]["query"] == specs["attn"]["query"]
    assert ruled["mlp"]["kernel"] is None


def test_biases_and_gains_are_not_muons():
    layout = mc.layouts.mla(4, 2, 3, heads=5, query_norm="q_norm", key_value_norm="kv_norm")
    gains = {"q_norm": {"scale": jnp.ones(7)}, "kv_norm": {"scale": jnp.ones(8)}}
    params = tree(MLA_SHAPES, jnp.ones)
    params["attn"] |= gains
    params["attn"]["wq_b"]["bias"] = jnp.ones(30)
    specs = whole_kernels(params, layout=layout)["attn"]
    assert specs["q_norm"]["scale"] is specs["kv_norm"]["scale"] is specs["wq_b"]["bias"] is None
    assert specs["wq_b"]["kernel"].shapes == ((1, 7, 30),)


def test_several_kinds_of_attention():
    params = {"a": tree(HEADED, jnp.ones), "b": tree(MLA_SHAPES, jnp.ones)}
    layouts = [mc.layouts.mha(block="a/*"), dataclasses.replace(MLA, block="b/*")]
    specs = whole_kernels(params, layout=layouts)
    assert specs["a"]["attn"]["out"]["kernel"].shapes == ((1, 20, 12),)
    assert specs["b"]["attn"]["wkv_b"]["kernel"].shapes == ((1, 8, 35),)


def test_pieces_whose_inputs_lie_along_different_axes_are_no_matrix():
    """Queries, keys, values `[in, out]` and the way back `[out, in]` in one array `[4, 20, 20]`."""
    sizes = {"heads": 5}
    pieces = [
        Piece(role, "qkvo", "part in (heads features)", sizes=sizes, select={"part": i})
        for i, role in enumerate(("q", "k", "v"))
    ]
    pieces += [Piece("o", "qkvo", "part (heads features) out", sizes=sizes, select={"part": 3})]
    layout = Layout("mine", tuple(pieces))
    params = tree({"qkvo": (4, 20, 20)}, jnp.ones)
    with pytest.raises(ValueError, match=r"attn/qkvo/kernel .*\(4, 20, 20\).*q, k, v, o.*rule"):
        whole_kernels(params, layout=layout)
    rules = {"*/qkvo/*": "part in out"}
    spec = whole_kernels(params, layout=layout, rules=rules)["attn"]["qkvo"]["kernel"]
    assert spec.shapes == ((4, 20, 20),)
