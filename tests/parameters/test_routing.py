"""Which parameters Muon takes."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx, traverse_util
from optax.contrib import MuonDimensionNumbers

import muonclip_jax as mc
from muonclip_jax._parameters import routing


def shapes(tree):
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=is_shape
    )


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.LayerNorm(name="norm")(x)
        x = x + nn.MultiHeadDotProductAttention(4, name="attn")(y)
        return x + nn.Dense(16, name="mlp")(x)


class Model(nn.Module):
    scanned: bool

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(11, 16, name="embed")(tokens)
        if self.scanned:
            step = nn.scan(
                lambda layer, x, _: (layer(x), None),
                variable_axes={"params": 0},
                split_rngs={"params": True},
                length=3,
            )
            x, _ = step(Layer(name="layers"), x, None)
        else:
            x = Layer(name="layers")(x)
        return nn.Dense(11, name="lm_head")(nn.RMSNorm(name="norm")(x))


def linen_params(scanned):
    init = lambda: Model(scanned).init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))  # noqa: E731
    return jax.eval_shape(init)["params"]


@pytest.mark.parametrize("scanned", [False, True])
def test_default_routing_of_a_linen_model(scanned):
    rows = {row.path: row for row in mc.describe(linen_params(scanned), mc.layouts.mha())}
    shown = {path: "; ".join(map(str, row.matrices)) for path, row in rows.items()}
    layers = 3 if scanned else 1
    assert rows["embed/embedding"].optimizer == "other"
    assert rows["lm_head/kernel"].optimizer == "other"
    for path, row in rows.items():
        if path.endswith(("bias", "scale")):
            assert (row.optimizer, row.matrices) == ("other", ())
    assert shown["layers/attn/query/kernel"] == f"q {4 * layers} × [16, 4]"
    assert shown["layers/attn/out/kernel"] == f"o {4 * layers} × [4, 16]"
    assert shown["layers/mlp/kernel"] == f"{layers} × [16, 16]"
    (key,) = rows["layers/attn/key/bias"].attention
    assert (key.role, key.heads) == ("k", 4)
    assert rows["layers/mlp/kernel"].attention == ()
    # Without the layout, Flax's own modules are known all the same.
    alone = {row.path: row.matrices for row in mc.describe(linen_params(scanned))}
    assert [str(m) for m in alone["layers/attn/query/kernel"]] == [f"{4 * layers} × [16, 4]"]


def test_default_routing_of_an_nnx_model():
    class Small(nnx.Module):
        def __init__(self, rngs):
            self.embed = nnx.Embed(11, 16, rngs=rngs)
            self.attn = nnx.MultiHeadAttention(4, 16, use_bias=False, decode=False, rngs=rngs)
            self.mlp = nnx.List([nnx.Linear(16, 32, use_bias=False, rngs=rngs)])
            self.lm_head = nnx.Linear(32, 11, rngs=rngs)

    params = nnx.state(nnx.eval_shape(lambda: Small(nnx.Rngs(0))), nnx.Param)
    rows = {row.path: (row.optimizer, *map(str, row.matrices)) for row in mc.describe(params)}
    assert rows == {
        "attn/key/kernel": ("muon", "4 × [16, 4]"),
        "attn/out/kernel": ("muon", "4 × [4, 16]"),
        "attn/query/kernel": ("muon", "4 × [16, 4]"),
        "attn/value/kernel": ("muon", "4 × [16, 4]"),
        "embed/embedding": ("other",),
        "lm_head/bias": ("other",),
        "lm_head/kernel": ("other",),
        "mlp/0/kernel": ("muon", "1 × [16, 32]"),
    }


@pytest.mark.parametrize(
    ("tree", "path", "expected"),
    [
        # No bias and no norm anywhere: a module called as a stack is, with all that layers need.
        (
            {"layers": {"up": {"kernel": (5, 16, 32)}, "down": {"kernel": (5, 32, 16)}}},
            ("layers", "up", "kernel"),
            (5, 16, 32),
        ),
        ({"mlp": {"kernel": (5, 16, 32), "bias": (5, 32)}}, ("mlp", "kernel"), (5, 16, 32)),
        # Stacked norms tell.
        (
            {"layers": {"norm": {"scale": (5, 16)}, "mlp": {"kernel": (5, 16, 32)}}},
            ("layers", "mlp", "kernel"),
            (5, 16, 32),
        ),
        # A matrix beside stacked layers is still one matrix.
        (
            {"layers": {"norm": {"scale": (5, 16)}}, "proj": {"kernel": (16, 32)}},
            ("proj", "kernel"),
            (1, 16, 32),
        ),
    ],
)
def test_stacks_are_told_from_biases_and_norms(tree, path, expected):
    params = shapes(tree)
    spec = routing.resolve(mc.muon_dimension_numbers, params)[path]
    assert spec.shapes == (expected,)


AMBIGUOUS = {
    "nothing around it": {"mlp": {"kernel": (5, 16, 32)}},
    "a stack only by its name": {"layers": {n: {"kernel": (64, 4, 16)} for n in "qkv"}},
    "a list by its name": {"layers": {n: {"kernel": (5, 8, 8)} for n in "01"}},
    "a stack with something else in it": {"layers": {"up": {"kernel": (5, 8, 8)}, "b": (8,)}},
    "convolutions that follow each other": {
        "c1": {"kernel": (3, 3, 64)},
        "c2": {"kernel": (3, 64, 128)},
    },
    "a bias of stacked layers or of heads": {"q": {"kernel": (8, 8, 4), "bias": (8, 4)}},
    "projection to heads": {"attn": {"q": {"kernel": (16, 4, 8)}, "o": {"kernel": (4, 8, 16)}}},
    "projection to heads, with bias": {
        "attn": {"q_proj": {"kernel": (16, 4, 8), "bias": (4, 8)}},
        "norm": {"scale": (16,)},
    },
    "as many heads as inputs": {
        "attn": {"q_proj": {"kernel": (8, 8, 4), "bias": (8, 4)}},
        "norm": {"scale": (8,)},
    },
    "fused projection to heads": {"attn": {"qkv": {"kernel": (32, 3, 4, 8), "bias": (3, 4, 8)}}},
    "matrices beside it": {"a": {"wq": {"kernel": (32, 4, 12)}, "wkv_a": {"kernel": (32, 16)}}},
    "norms of another name": {
        "params": {"layer": {"q": {"kernel": (32, 4, 8)}, "norm": {"gamma": (32,)}}}
    },
    "1-D convolution of another name": {"stem": {"kernel": (3, 4, 8)}},
    "2-D convolution of another name": {"stem": {"kernel": (3, 3, 4, 8)}},
    "convolution in layers that nothing tells": {"layers": {"conv": {"kernel": (3, 3, 4, 8)}}},
    "convolution with bias": {"c": {"kernel": (3, 4, 8), "bias": (8,)}},
    "experts": {"layers": {"norm": {"scale": (5, 16)}, "experts": {"kernel": (5, 2, 16, 32)}}},
    "experts of another number than the router's outputs": {
        "norm": {"scale": (16,)},
        "moe": {"router": {"kernel": (16, 4)}, "up": {"kernel": (8, 16, 32)}},
    },
    "scanned flat attention": {
        "layers": {
            **{name: {"kernel": (3, 32, 32), "bias": (3, 32)} for name in ("query", "key")},
            "out": {"kernel": (3, 16, 2, 32), "bias": (3, 32)},
            "norm": {"scale": (3, 32)},
        }
    },
}


@pytest.mark.parametrize("tree", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_kernels_that_could_be_several_things_raise(tree):
    with pytest.raises(ValueError, match=r"(?s)kernel of shape .* does not look like .*rules="):
        mc.describe(shapes(tree))


def test_scanned_flat_attention_is_a_stack_of_matrices():
    names = ("query", "key", "value", "out")
    kernels = {name: {"kernel": (3, 32, 32), "bias": (3, 32)} for name in names}
    params = shapes({"layers": {"attn": kernels, "norm": {"scale": (3, 32)}}})
    assert {tuple(map(str, row.matrices)) for row in mc.describe(params)} == {("3 × [32, 32]",), ()}
    with pytest.raises(ValueError, match="find_layout"):
        mc.find_layout(params)


def test_parameters_that_are_none_are_left_alone():
    """As Equinox filters leave them."""
    params = {"mlp": {"kernel": jnp.ones((2, 3)), "bias": None}}
    assert set(routing.resolve(mc.muon_dimension_numbers, params)) == {("mlp", "kernel")}


def optimizers(tree, **options):
    """By path, of a tree given as shapes by path."""
    params = traverse_util.unflatten_dict(shapes(tree), sep="/")
    return {row.path: row.optimizer for row in mc.describe(params, **options)}


@pytest.mark.parametrize(
    "path",
    [
        "lm_head/kernel", "head/kernel", "unembed/w", "logits_dense/kernel", "classifier/kernel",
        "decoder_output_layer/kernel", "LMHead/kernel", "lmHead/w", "heads/0/kernel", "lm_head",
        "lm_head/dense/kernel", "decoder/toLogits/kernel", "UnembedLayer_0/kernel", "policy_head/w",
        "lm_head/weight", "heads/3/Dense_0/kernel", "decoder/logitdense/kernel",
    ],
)  # fmt: skip
def test_unembeddings_go_to_the_other_optimizer(path):
    assert optimizers({path: (16, 99)})[path] == "other"


@pytest.mark.parametrize(
    "path",
    [
        "headings_proj/kernel", "multi_heads/kernel", "mlp/kernel", "attn/head_proj/kernel",
        "multihead/kernel", "num_heads/kernel", "attention_head/kernel", "attention/heads/0/kernel",
        "SelfAttention_0/head/kernel", "pre_logits/kernel", "router_logits/w",
    ],
)  # fmt: skip
def test_ordinary_modules_are_not_taken_for_unembeddings(path):
    assert optimizers({path: (16, 99)})[path] == "muon"


@pytest.mark.parametrize(
    "path",
    [
        "embed/embedding", "tok_emb", "wte/weight", "token_embedder/w", "word_embeddings/kernel",
        "E/w", "embedder/input_embedding", "y_embedder/embedding_table", "patch/pos_embedding",
        "positionEmbeddings/weight", "embeddings/0/weight", "patch_embedding/embedding",
    ],
)  # fmt: skip
def test_embeddings_go_to_the_other_optimizer(path):
    assert optimizers({path: (99, 16)})[path] == "other"


@pytest.mark.parametrize(
    "path",
    ["patch_embedding/kernel", "template_embedding/w", "time_embed/dense/kernel", "embed/proj/w"],
)
def test_projections_of_embeddings_are_matrices(path):
    assert optimizers({path: (99, 16)})[path] == "muon"
    # With as many inputs as an embedding has rows it is one too.
    tree = {path: (99, 16), "tokens/embedding": (99, 16)}
    in_holder = path.split("/")[-2].endswith(("embedding", "embed"))
    assert optimizers(tree)[path] == ("other" if in_holder else "muon")


def test_rules_come_first():
    params = shapes(
        {"experts": {"wi": (8, 16, 32)}, "conv": {"kernel": (3, 3, 4, 8), "bias": (8,)}}
    )
    rules = {
        "experts/*": MuonDimensionNumbers(-2, -1),
        "conv/kernel": MuonDimensionNumbers((0, 1, 2), 3),
    }
    rows = mc.describe(params, rules=rules)
    assert {row.path: "; ".join(map(str, row.matrices)) for row in rows} == {
        "conv/bias": "",
        "conv/kernel": "1 × [36, 8]",
        "experts/wi": "8 × [16, 32]",
    }


def test_optax_trees_and_prefixes_of_them():
    params = shapes({"a": {"w": (4, 5), "u": (4, 5)}, "b": (3, 4, 5), "c": (7,)})
    tree = {"a": MuonDimensionNumbers(), "b": MuonDimensionNumbers(1, 2), "c": None}
    rows = {
        row.path: "; ".join(map(str, row.matrices))
        for row in mc.describe(params, dimension_numbers=tree)
    }
    assert rows == {"a/u": "1 × [4, 5]", "a/w": "1 × [4, 5]", "b": "3 × [4, 5]", "c": ""}


def test_resolve_skips_masked_parameters():
    params = {"a": jnp.ones((2, 3)), "b": optax.MaskedNode()}
    assert set(routing.resolve({"a": MuonDimensionNumbers(), "b": None}, params)) == {("a",)}
