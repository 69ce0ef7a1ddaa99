"""Routing never guesses silently, of whole trees and of masked ones."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import traverse_util

import muonclip_jax as mc


def tree_of(shapes):
    """A tree of parameters given as shapes by path."""
    leaves = {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}
    return traverse_util.unflatten_dict(leaves, sep="/")


def routes(params, **options):
    """`muon 4 × [64, 16]` or `other`, by path."""
    return {
        row.path: " ".join([row.optimizer, *map(str, row.matrices)])
        for row in mc.describe(params, **options)
    }


def message_of(params, **options):
    with pytest.raises(ValueError, match="rules=") as caught:
        mc.describe(params, **options)
    return str(caught.value)


# --- several readings -----------------------------------------------------------------------------
@pytest.mark.parametrize(
    "shapes",
    [
        {"q/kernel": (64, 4, 16), "stem/kernel": (7, 3, 64)},
        # All first axes are equal, as those of stacked layers are.
        {f"attn/{name}/kernel": (64, 4, 16) for name in "qkv"},
        # They follow each other, as stacked layers do.
        {"c1/kernel": (3, 3, 64), "c2/kernel": (3, 64, 64)},
        {"experts/up/w": (8, 16, 32), "experts/down/w": (8, 32, 16)},
    ],
    ids=["heads and a convolution", "heads", "convolutions", "experts"],
)
def test_kernels_without_bias_or_norm_around_them_raise_all_at_once(shapes):
    said = message_of(tree_of(shapes))
    for path, shape in shapes.items():
        assert f"{path} of shape {shape}" in said
    assert "convolution" in said and "'experts in out'" in said and "a projection to heads" in said


@pytest.mark.parametrize(
    "shapes",
    [
        {"layers/up/kernel": (5, 16, 32), "layers/down/kernel": (5, 32, 16)},
        {f"decoder/blocks/attn/{name}/w": (5, 16, 16) for name in "qkvo"},
        {"net/w": (5, 16, 32), "net/b": (5, 32)},
        {"a/kernel": (5, 16, 32), "layer_norm/scale": (5, 16)},
    ],
)
def test_what_a_stack_is_told_by(shapes):
    for path, route in routes(tree_of(shapes)).items():
        expected = "muon 5 × " + str(list(shapes[path][1:])) if len(shapes[path]) == 3 else "other"
        assert route == expected


def test_layers_that_are_alike_share_an_entry_of_the_error():
    shapes = {
        f"layers/{i}/{name}": shape
        for i in range(48)
        for name, shape in {"moe/wi": (8, 16, 32), "proj/weight": (16, 8)}.items()
    }
    said = message_of(tree_of(shapes | {"stem/kernel": (7, 3, 64), "up/kernel": (3, 4)}))
    assert "layers/*/moe/wi, 48 of shape (8, 16, 32)" in said
    assert "layers/*/proj/weight, 48 of shape (16, 8)" in said
    assert "stem/kernel of shape (7, 3, 64)" in said
    assert "up/kernel" not in said and len(said) < 1500


def test_a_weight_may_lie_either_way_and_raises():
    params = tree_of(
        {"mix/weight": (32, 8), "norm/weight": (8,), "token_embeddings/weight": (99, 8)}
    )
    said = message_of(params)
    assert "mix/weight of shape (32, 8)" in said
    assert "'out in -> in out'" in said and "'in out'" in said and "embeddings" not in said
    assert routes(params, rules={"mix/weight": "out in -> in out"}) == {
        "mix/weight": "muon 1 × [8, 32]",
        "norm/weight": "other",
        "token_embeddings/weight": "other",
    }


# --- unembeddings ---------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path",
    [
        "lm_head/dense/kernel",
        "heads/0/kernel",
        "LMHead/kernel",
        "decoder/toLogits/w",
        "unembedding",
    ],
)
def test_unembeddings_in_any_spelling_and_depth(path):
    assert routes(tree_of({path: (16, 99)})) == {path: "other"}


HIDDEN = {"up/kernel": (16, 64), "down/kernel": (64, 16)}
LAYERS = {f"layers_{i}/{path}": shape for i in range(2) for path, shape in HIDDEN.items()}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        # Nothing takes in 99.
        ({"Embed_0/embedding": (99, 16), **HIDDEN, "Dense_2/kernel": (16, 99)}, ["Dense_2/kernel"]),
        ({"wte": (99, 16), **LAYERS, "final/proj/w": (16, 99)}, ["final/proj/w"]),
        # Layers as wide as the vocabulary, or with as many hidden features.
        ({"wte": (16, 16), **LAYERS}, []),
        ({"wte": (64, 16), **LAYERS}, []),
        ({"wte": (64, 16), **HIDDEN, "lm_head/w": (16, 64)}, ["lm_head/w"]),
        ({"wte": (64, 16), "block/up/kernel": (16, 64), "block/down/kernel": (64, 16)}, []),
        # Keys have fewer heads, and nothing takes them in.
        ({"wte": (32, 64), "q_proj/kernel": (64, 64), "k_proj/kernel": (64, 32)}, []),
        # As many positions as features.
        ({"pos_embed/embedding": (16, 16), **HIDDEN}, []),
        ({"wte": (16, 16), **HIDDEN, "output_projection/kernel": (16, 16)}, None),
        ({"wte": (16, 16), "Dense_0/kernel": (16, 16), "Dense_1/kernel": (16, 16)}, None),
        ({"wte": (64, 16), **HIDDEN}, None),
        ({f"net/{path}": shape for path, shape in {"wte": (64, 16), **HIDDEN}.items()}, None),
    ],
)
def test_unembeddings_by_their_length(shapes, expected):
    params = tree_of(shapes)
    if expected is None:
        assert "as long as an embedding has rows" in message_of(params)
    else:
        found = {path for path, route in routes(params).items() if route == "other"}
        assert found - {path for path in shapes if "wte" in path or "mbed" in path} == {*expected}


def test_of_a_head_with_several_matrices_the_last_is_the_unembedding():
    shapes = {"lm_head/dense/kernel": (16, 16), "lm_head/decoder/kernel": (16, 99)}
    assert routes(tree_of(shapes)) == {
        "lm_head/decoder/kernel": "other",
        "lm_head/dense/kernel": "muon 1 × [16, 16]",
    }
    attention = {"query": (16, 2, 8), "key": (16, 2, 8), "value": (16, 2, 8), "out": (2, 8, 16)}
    pooling = {f"MAPHead_0/Attention_0/{name}/kernel": s for name, s in attention.items()}
    mlp = {"MAPHead_0/Dense_0/kernel": (16, 64), "MAPHead_0/Dense_1/kernel": (64, 16)}
    assert "other" not in routes(tree_of(pooling | mlp)).values()
    unclear = {"lm_head/dense/kernel": (16, 16), "lm_head/decoder/kernel": (16, 16)}
    assert "lm_head/dense/kernel" in message_of(tree_of(unclear))


# --- words in names -------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path",
    [
        "template_embedding/block/transition/w",
        "patch_embedding/kernel",
        "time_embed/dense/kernel",
        "attention/heads/0/kernel",
        "multi_head_attention/head_proj/kernel",
        "layers/0/mlp/output_layer/kernel",
    ],
)
def test_a_word_counts_only_where_it_names_the_leaf(path):
    shapes = {path: (16, 64), "tokens/embedding": (99, 16), "up/kernel": (64, 16)}
    assert routes(tree_of(shapes))[path] == "muon 1 × [16, 64]"


@pytest.mark.parametrize("path", ["patch_embedding/kernel", "template_embedding/w"])
def test_but_with_as_many_inputs_as_an_embedding_has_rows_it_is_one(path):
    assert routes(tree_of({path: (99, 16), "tokens/embedding": (99, 16)}))[path] == "other"


def test_a_weight_beside_a_word_that_says_too_little_raises():
    # Of AlphaFold 2: a linear layer.
    said = message_of(tree_of({"template_embedding2d/weights": (88, 64)}))
    assert "template_embedding2d/weights" in said and "embedding (None)" in said


def test_a_kernel_of_a_norm_is_no_matrix():
    assert routes(tree_of({"norm/kernel": (12,)})) == {"norm/kernel": "other"}
    said = message_of(tree_of({"layers/attn_norm/kernel": (12, 64)}))
    assert "gain of a norm in stacked layers (None)" in said
    # Its bias is as long as its outputs: a matrix, of DiT.
    modulation = {"adaLN/kernel": (64, 384), "adaLN/bias": (384,)}
    assert routes(tree_of(modulation))["adaLN/kernel"] == "muon 1 × [64, 384]"


# --- rules ----------------------------------------------------------------------------------------
def test_the_first_rule_decides():
    params = tree_of({"w1/w": (8, 4), "lm_head/w": (8, 99)})
    found = routes(params, rules={"lm_head/w": None, "*/w": "in out"})
    assert found == {"lm_head/w": "other", "w1/w": "muon 1 × [8, 4]"}


MOE = {
    "layers/0/experts/up/weight": (8, 32, 16),
    "layers/0/experts/up/bias": (8, 32),
    "layers/0/router/weight": (8, 16),
    "layers/0/norm/weight": (16,),
}


@pytest.mark.parametrize(
    "rules",
    [
        {
            ("*/experts/*", 3): "experts out in -> experts in out",
            ("*/weight", 2): "out in -> in out",
        },
        {("*", 3): "experts out in -> experts in out", "*/router/weight": "out in -> in out"},
        {"*/bias": None, ("*", 1): None, ("*", 2): "out in -> in out", "*": "e out in -> e in out"},
    ],
)
def test_rules_can_go_by_the_number_of_axes(rules):
    assert routes(tree_of(MOE), rules=rules) == {
        "layers/0/experts/up/bias": "other",
        "layers/0/experts/up/weight": "muon 8 × [16, 32]",
        "layers/0/norm/weight": "other",
        "layers/0/router/weight": "muon 1 × [16, 8]",
    }


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({("*/experts/*", 4): None}, ["('*/experts/*', 4)", "matches no parameter", "(8, 32, 16)"]),
        (
            {"*/experts/*": None, ("*/experts/*", 3): None},
            ["decides nothing", "'*/experts/*' comes"],
        ),
        ({("*", "3"): None}, ["('*', '3')", "a glob", "number of axes"]),
        ({3: None}, ["3", "a glob", "number of axes"]),
    ],
)
def test_rules_by_the_number_of_axes_that_decide_nothing(rules, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        mc.describe(tree_of(MOE), rules=rules)
    assert all(word in str(caught.value) for word in words), caught.value


# --- partial training -----------------------------------------------------------------------------
def flax_attention(bias):
    shapes = {f"{name}/kernel": (64, 4, 16) for name in ("query", "key", "value")}
    shapes |= {f"{name}/bias": (4, 16) for name in ("query", "key", "value") if bias}
    return {**shapes, "out/kernel": (4, 16, 64)}


def under(module, shapes, stack=()):
    return {f"{module}/{path}": (*stack, *shape) for path, shape in shapes.items()}


BLOCK = {
    "norm/scale": (64,),
    **under("attn", flax_attention(bias=True)),
    "mlp/up/kernel": (64, 256),
    "mlp/up/bias": (256,),
    "mlp/down/kernel": (256, 64),
}
WHOLE = {
    "one block": {**under("block", BLOCK), "embed/embedding": (99, 64)},
    "scanned": {**under("layers", BLOCK, (12,)), "embed/embedding": (99, 64)},
    "scanned without biases or norms": {
        **under("layers", {"up/kernel": (64, 256), "down/kernel": (256, 64)}, (12,)),
        **under("layers/attn", flax_attention(bias=False), (12,)),
    },
    "layers, head without a name": {
        **under("layer_0", BLOCK),
        **under("layer_1", BLOCK),
        "Embed_0/embedding": (99, 64),
        "Dense_0/kernel": (64, 99),
    },
    "flat, as wide as the vocabulary": {
        **under("layers/0/attn", {f"{name}_proj/kernel": (64, 64) for name in "qkvo"}),
        **under("layers/1/attn", {f"{name}_proj/kernel": (64, 64) for name in "qkvo"}),
        "wte/embedding": (64, 64),
        "lm_head/dense/kernel": (64, 64),
    },
    "a head of several": {"head/a/kernel": (64, 32), "head/b/kernel": (32, 9), "head/b/bias": (9,)},
    "haiku": {**under("net", {"w": (64, 256), "b": (256,)}, (12,)), "layer_norm/scale": (12, 64)},
}


def masks_of(paths):
    """What people freeze: kinds of parameters, modules, all but one."""
    for path in paths:
        yield {path}
        yield {*paths} - {path}
        yield {other for other in paths if other.split("/")[-1] == path.split("/")[-1]}
        yield {other for other in paths if other.split("/")[-1] != path.split("/")[-1]}
        yield {other for other in paths if other.split("/")[0] == path.split("/")[0]}
        yield {other for other in paths if other.split("/")[0] != path.split("/")[0]}


@pytest.mark.parametrize("shapes", WHOLE.values(), ids=WHOLE)
def test_what_is_masked_changes_no_reading_without_saying_so(shapes):
    expected, told = routes(tree_of(shapes)), 0
    for masked in masks_of(list(shapes)):
        leaves = tree_of({path: s for path, s in shapes.items() if path not in masked})
        leaves = traverse_util.flatten_dict(leaves, sep="/")
        leaves |= {path: optax.MaskedNode() for path in masked}
        params = traverse_util.unflatten_dict(leaves, sep="/")
        try:
            assert routes(params).items() <= expected.items()
        except ValueError as error:
            told += 1
            assert "are masked" in str(error) and "rules=" in str(error)
    assert told < 6 * len(shapes)


@pytest.mark.parametrize(
    "shapes",
    [
        {
            "block/norm/scale": (64,),
            **under("block/attn", {f"{n}/kernel": (64, 4, 16) for n in ("query", "key")}),
            **under("block/attn", {f"{n}/bias": (4, 16) for n in ("query", "key")}),
        },
        under("layers", {"norm/scale": (64,), "up/kernel": (64, 256)}, (12,)),
        under("experts", {"up/kernel": (64, 256), "up/bias": (256,)}, (8,)),
    ],
)
def test_masked_neighbours_by_which_a_shape_is_read(shapes):
    """`optax.masked` around Muon for the kernels: an error whose fixes work."""
    params = jax.tree.map(lambda p: jnp.ones(p.shape), tree_of(shapes))
    mask = jax.tree.map(lambda p: p.ndim == 3, params)
    with pytest.raises(ValueError, match=r"(?s)masked.*rules="):
        optax.masked(mc.muon(1.0), mask).init(params)
    kernels = {path for path in shapes if path.endswith("kernel")}
    rules = dict.fromkeys(kernels, "in heads features -> heads in features")
    optax.masked(mc.muon(1.0, rules=rules), mask).init(params)


@pytest.mark.parametrize(
    "label",
    [lambda path: path[0], lambda path: path[-1] == "kernel" or path[0]],
    ids=["by layer", "kernels apart"],
)
def test_partitions_read_as_the_whole_tree(label):
    """What a link finds inside `optax.partition`, alone or told by `dimension_numbers`."""
    params = tree_of({**under("layer_0", BLOCK), **under("layer_1", BLOCK), "wte": (99, 64)})
    labels = {path: label(path) for path in traverse_util.flatten_dict(params)}
    whole, seen = mc.muon_dimension_numbers(params), {}

    def init(inside):
        assert routes(inside) == routes(inside, dimension_numbers=whole)
        seen.update(routes(inside))
        return optax.EmptyState()

    probe = optax.GradientTransformation(init, lambda updates, state, params=None: (updates, state))
    links = dict.fromkeys(labels.values(), probe)
    optax.partition(links, traverse_util.unflatten_dict(labels)).init(params)
    assert seen == routes(params)
