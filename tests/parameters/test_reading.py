"""What is read by names and shapes alone, without a rule and without a layout."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import muonclip_jax as mc
from muonclip_jax._parameters import matrices
from tests.families.test_families import by_hand, every_tree, random_params
from tests.families.trees import Tree


def tree_of(shapes):
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return unflatten_dict(leaves, sep="/")


def rows(shapes):
    return {row.path: row for row in mc.describe(tree_of(shapes))}


def read(shapes, path):
    """`8 × [16, 32]`, or `other`."""
    row = rows(shapes)[path]
    return ", ".join(map(str, row.matrices)) or row.optimizer


# --- known models -----------------------------------------------------------------------------
def sides(matrix: np.ndarray) -> set[bytes]:
    """Its columns."""
    return {column.tobytes() for column in np.ascontiguousarray(matrix.T)}


@every_tree
def test_attention_of_known_models_needs_no_layout(tree: Tree):
    """The matrices of every kernel hold each head where the source has it, whole: inputs along the
    rows, and where heads have an axis of their own nothing else."""
    params = random_params(tree)
    specs, flat = flatten_dict(mc.muon_dimension_numbers(params)), flatten_dict(params)
    for block, roles in tree.blocks.items():
        for role, (name, _) in roles.items():
            (path,) = [p for p in flat if "/".join(p).removeprefix("params/") == f"{block}/{name}"]
            if role.endswith("gain"):
                assert specs[path] is None
                continue
            spec, x = specs[path], flat[path]
            (array,) = matrices.split(jnp.asarray(x), spec)
            every = np.asarray(array.values).reshape(-1, *spec.shapes[0][1:])
            heads = by_hand(tree, params, block, role)
            heads = heads.reshape(-1, *heads.shape[-2:])
            own_axis = x.ndim > 2 + tree.depth
            turn = np.transpose if role == "o" else np.asarray
            columns = [sides(turn(each)) for each in every]
            for head in heads:
                (there,) = [found for found in columns if sides(turn(head)) <= found]
            if own_axis and role == "o":
                assert every.shape == heads.shape and len(there) == heads.shape[1]
            layers = math.prod(x.shape[tree.axis : tree.axis + tree.depth])
            assert len(every) % len(heads) == 0 if own_axis else len(every) == layers


LLAMA = {
    "self_attn/q_proj/kernel": (64, 4, 16),
    "self_attn/k_proj/kernel": (64, 2, 16),
    "self_attn/v_proj/kernel": (64, 2, 16),
    "self_attn/o_proj/kernel": (4, 16, 64),
}


def stacked(module, shapes, layers=6, axis=0):
    return {
        f"{module}/{name}": (*shape[:axis], layers, *shape[axis:]) for name, shape in shapes.items()
    }


@pytest.mark.parametrize("axis", [0, 1])
def test_attention_tells_where_everything_around_it_is_stacked(axis):
    layer = {
        **LLAMA,
        "self_attn/sinks": (4,),
        "mlp/up/kernel": (64, 64),
        "mlp/up/bias": (64,),
        "moe/gate/kernel": (64, 8),
        "moe/wi": (8, 64, 64),
        "q_norm/weight": (16,),
        "res_scalar": (1,),
    }
    shapes = stacked("layers", layer, axis=axis) | {"norm/weight": (64,), "wte": (99, 64)}
    found = {path: ", ".join(map(str, row.matrices)) for path, row in rows(shapes).items()}
    assert {path: text for path, text in found.items() if text} == {
        "layers/self_attn/q_proj/kernel": "24 × [64, 16]",
        "layers/self_attn/k_proj/kernel": "12 × [64, 16]",
        "layers/self_attn/v_proj/kernel": "12 × [64, 16]",
        "layers/self_attn/o_proj/kernel": "24 × [16, 64]",
        "layers/mlp/up/kernel": "6 × [64, 64]",
        "layers/moe/gate/kernel": "6 × [64, 8]",
        "layers/moe/wi": "48 × [64, 64]",
    }


@pytest.mark.parametrize(
    ("gain", "expected"),
    [
        ((), ("4 × [16, 4]", "4 × [4, 16]")),
        ((16,), ("4 × [16, 4]", "4 × [4, 16]")),
        ((16, 4), ("4 × [16, 4]", "4 × [4, 16]")),  # four flat layers on axis 1, by chance alike
        ((4, 16), None),
    ],
)
def test_as_many_heads_as_features(gain, expected):
    """`[in, heads, features]` could be `[in, layers, features]`: the norms tell."""
    shapes = {f"attn/{name}/kernel": (16, 4, 4) for name in ("query", "key", "value")}
    shapes |= {"attn/out/kernel": (4, 4, 16), "mlp/kernel": (16, 3)}
    shapes |= {"norm/scale": gain} if gain else {}
    if expected is None:
        with pytest.raises(ValueError, match="attn/query/kernel"):
            rows(shapes)
    else:
        query, out = expected
        assert read(shapes, "attn/query/kernel") == query
        assert read(shapes, "attn/out/kernel") == out


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        # Llama in Levanter: heads in front, [out, in]; norms are called weight.
        (
            stacked(
                "transformer/layers/stacked",
                {
                    "self_attn/q_proj/weight": (2, 2, 16, 64),
                    "self_attn/k_proj/weight": (2, 16, 64),
                    "self_attn/v_proj/weight": (2, 16, 64),
                    "self_attn/o_proj/weight": (64, 4, 16),
                    "input_layernorm/weight": (64,),
                    "mlp/gate_proj/weight": (256, 64),
                    "mlp/down_proj/weight": (64, 256),
                },
            ),
            {"mlp/gate_proj": "6 × [64, 256]", "mlp/down_proj": "6 × [256, 64]"},
        ),
        # GPT-2 in Transformers: kernels [out, in], as the biases show.
        (
            {
                "h/0/mlp/c_fc/kernel": (256, 64),
                "h/0/mlp/c_fc/bias": (256,),
                "h/0/mlp/c_proj/kernel": (64, 256),
                "h/0/mlp/c_proj/bias": (64,),
            },
            {"mlp/c_fc": "1 × [64, 256]", "mlp/c_proj": "1 × [256, 64]"},
        ),
        # Gemma's MLP: gate and up together, either way round.
        (
            {"norm/scale": (64,), "mlp/gating_einsum": (2, 64, 256), "mlp/linear": (256, 64)},
            {"gating_einsum": "2 × [64, 256]", "linear": "1 × [256, 64]"},
        ),
        (
            {"norm/scale": (64,), "mlp/gating_einsum": (2, 256, 64), "mlp/linear": (256, 64)},
            {"gating_einsum": "2 × [64, 256]"},
        ),
        # Layers on axis 1 without attention of a known model.
        (
            {"layers/norm/scale": (64, 6), **stacked("layers", MLP := {
                "wi/kernel": (64, 256), "wo/kernel": (256, 64)}, axis=1)},
            {"wi/kernel": "6 × [64, 256]", "wo/kernel": "6 × [256, 64]"},
        ),
    ],
)  # fmt: skip
def test_mlps_of_known_models(shapes, expected):
    found = {path: ", ".join(map(str, row.matrices)) for path, row in rows(shapes).items()}
    for part, text in expected.items():
        (one,) = [own for path, own in found.items() if part in path and "bias" not in path]
        assert one == text


# --- inputs of each layer ---------------------------------------------------------------------
EMBEDDER = {"norm/scale": (8,), "embedder/per_layer_input_projection/w": (64, 12, 8)}


@pytest.mark.parametrize("table", ["per_layer_embeddings", "per_layer_input_embedding"])
def test_projections_to_every_layer_beside_their_table(table):
    shapes = EMBEDDER | {f"embedder/{table}": (99, 12, 8)}
    assert read(shapes, "embedder/per_layer_input_projection/w") == "12 × [64, 8]"


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "table",
    [{}, {"embedder/per_layer_embeddings": (99, 8, 12)}, {"per_layer_embeddings": (99, 12, 8)}],
)
def test_projections_to_layers_without_their_table_raise(table):
    with pytest.raises(ValueError, match=r"per_layer_input_projection/w of shape .*rules="):
        rows(EMBEDDER | table)


# --- experts ----------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("router", "experts", "expected"),
    [
        ({"router/kernel": (64, 8)}, {"up": (8, 64, 256)}, "8 × [64, 256]"),
        ({"gate/kernel": (64, 8)}, {"wo": (8, 256, 64)}, "8 × [256, 64]"),
        ({"router/kernel": (64, 8)}, {"experts/kernel": (8, 64, 256)}, "8 × [64, 256]"),
        ({"router/w": (64, 8)}, {"experts/down/w": (8, 256, 64)}, "8 × [256, 64]"),
        # Gate and up together.
        ({"router/kernel": (64, 8)}, {"gate_up": (8, 64, 2, 256)}, "16 × [64, 256]"),
        ({"router_logits": (64, 8)}, {"gating_einsum": (8, 2, 256, 64)}, "16 × [64, 256]"),
        # Gemma 4's: an einsum's order is its own.
        ({"router_logits/w": (64, 8)}, {"gating_einsum/w": (8, 2, 256, 64)}, "16 × [64, 256]"),
        # [out, in]
        ({"gate/weight": (8, 64)}, {"experts/up_proj/weight": (8, 256, 64)}, "8 × [64, 256]"),
        # Layers in front, or behind the experts as in MaxText.
        ({"gate/kernel": (6, 64, 8)}, {"wi_0": (6, 8, 64, 256)}, "48 × [64, 256]"),
        ({"gate/kernel": (64, 6, 8)}, {"wi_0": (8, 6, 64, 256)}, "48 × [64, 256]"),
        # As wide as the model: only a convention tells.
        ({"gate/kernel": (64, 8)}, {"wi_0": (8, 64, 64)}, "8 × [64, 64]"),
    ],
)
def test_experts_beside_their_router(router, experts, expected):
    shapes = {f"layers/0/moe/{path}": shape for path, shape in {**router, **experts}.items()}
    (path,) = (f"layers/0/moe/{name}" for name in experts)
    assert read(shapes, path) == expected


@pytest.mark.bad_input
@pytest.mark.parametrize(
    "shapes",
    [
        {"moe/up": (8, 64, 256)},  # no router
        {"moe/router/kernel": (64, 4), "moe/up": (8, 64, 256)},  # of other experts
        {"a/router/kernel": (64, 8), "b/c/moe/experts/up": (8, 64, 256)},  # of another layer
        {"moe/router/kernel": (64, 8), "moe/up": (8, 32, 256)},  # of another width
        {"moe/router/kernel": (64, 8), "moe/mix": (8, 64, 256)},  # in or out?
        {"moe/router/kernel": (64, 8), "moe/up": (8, 64, 64)},  # either way
        {"moe/router/kernel": (64, 8), "moe/up": (8, 64, 3, 256)},  # three of what?
        {"moe/gate_proj/kernel": (64, 8), "moe/up": (8, 64, 256)},  # an MLP's gate
        {"moe/gate/kernel": (8, 8, 8), "moe/up/kernel": (8, 8, 8, 8)},  # which are the layers?
    ],
)
def test_experts_that_could_be_something_else_raise(shapes):
    with pytest.raises(ValueError, match=r"(?s)moe.* of shape \(8, .*rules="):
        rows(shapes)


# --- convolutions -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"conv1/kernel": (3, 3, 16, 32), "conv1/bias": (32,)}, "1 × [144, 32]"),
        ({"Conv_0/kernel": (3, 3, 16, 32)}, "1 × [144, 32]"),
        ({"stem_conv/kernel": (3, 16, 32)}, "1 × [48, 32]"),
        ({"conv3d/kernel": (2, 3, 3, 16, 32)}, "1 × [288, 32]"),
        ({"patch_embeddings/projection/kernel": (4, 4, 3, 32)}, "1 × [48, 32]"),
        ({"layers/0/kernel": (3, 3, 16, 32), "layers/0/bias": (32,)}, "1 × [144, 32]"),
        ({"layers/1/kernel": (1, 1, 16, 32), "layers/0/scale": (16,)}, "1 × [16, 32]"),
        (
            stacked("layers", {"conv/kernel": (3, 16, 32), "norm/scale": (16,)}),
            "6 × [48, 32]",
        ),
        # Of each feature by itself: no matrix.
        ({"dwconv/kernel": (7, 7, 1, 32), "dwconv/bias": (32,)}, "other"),
        ({"mixer/conv1d/kernel": (4, 1, 48), "mixer/A_log": (4,)}, "other"),
        ({"attn/q_conv1d/kernel": (4, 1, 32), "attn/q_proj/kernel": (64, 32)}, "other"),
        (stacked("layers", LLAMA | {"short_conv/kernel": (4, 1, 64)}, axis=1), "other"),
    ],
)
def test_convolutions(shapes, expected):
    named = [path for path in shapes if "conv" in path or "patch" in path]
    path = named[0] if named else next(path for path in shapes if len(shapes[path]) == 4)
    assert read(shapes, path) == expected


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        # A grey image, or a filter for each feature?
        (
            {"conv/kernel": (3, 3, 1, 32), "conv/bias": (32,)},
            ["one input", "each feature by itself (None)", "(window0 window1 in) out"],
        ),
        ({"conv/kernel": (3, 3, 4, 8), "conv/bias": (4,)}, ["beside conv/bias (4,)"]),
        # Square, but nothing tells that it is not stacked.
        ({"stem/kernel": (3, 3, 4, 8)}, ["may be a convolution"]),
        ({"attn/qkv/kernel": (3, 3, 4, 8), "attn/qkv/bias": (8,)}, ["may be a convolution"]),
    ],
)
def test_what_may_be_no_convolution_raises(shapes, words):
    with pytest.raises(ValueError, match="rules=") as caught:
        rows(shapes)
    assert all(word in str(caught.value) for word in words), caught.value


def test_the_rule_that_an_error_names_for_a_convolution_fits():
    params = tree_of({"conv/kernel": (3, 3, 1, 32)})
    rules = {"conv/kernel": "window0 window1 in out -> (window0 window1 in) out"}
    (row,) = mc.describe(params, rules=rules)
    assert str(row.matrices[0]) == "1 × [9, 32]"
