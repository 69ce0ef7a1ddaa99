"""Known models: `find_layout` alone finds each head where the model's source has it."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import muonclip_jax as mc
from muonclip_jax._layouts.blocks import as_layouts
from tests.families.trees import TREES, Tree

every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)


def random_params(tree: Tree):
    """float32 of mixed sizes, biases and gains too; layers and heads differ."""
    rng = np.random.default_rng(0)
    return unflatten_dict(
        {path: rng.normal(size=shape).astype("float32") for path, shape in tree.shapes.items()},
        sep="/",
    )


def by_hand(tree: Tree, params, block: str, role: str):
    """`[stack..., heads, in, features]`, from the slices in the source."""
    name, heads = {**tree.blocks, **tree.linear}[block][role]
    flat = flatten_dict(params, sep="/")
    (path,) = [path for path in flat if path.removeprefix("params/") == f"{block}/{name}"]
    x = np.asarray(flat[path])
    stack = x.shape[tree.axis : tree.axis + tree.depth]
    layers = [np.stack(heads(x[(slice(None),) * tree.axis + index])) for index in np.ndindex(stack)]
    return np.stack(layers).reshape(*stack, *layers[0].shape)


@every_tree
def test_find_layout_finds_every_head_where_the_source_has_it(tree):
    params = random_params(tree)
    layout = mc.find_layout(params, **tree.told)
    blocks = {block.name: block for block in mc.layouts.find_blocks(layout, params)}
    expected = {**tree.blocks, **tree.linear}
    assert blocks.keys() == expected.keys()
    assert {name for name, block in blocks.items() if block.layout.softmax} == tree.blocks.keys()
    flat = flatten_dict(params)
    for name, block in blocks.items():
        assert {part.role for part in block.parts} == expected[name].keys()
        for part in block.parts:
            taken = part.take(flat[part.kernel])
            np.testing.assert_array_equal(taken, by_hand(tree, params, name, part.role))


def logits(tree: Tree, params, block: str):
    """`[stack..., heads, tokens, tokens]` in float64, from slices by hand. (Positions rotate
    queries and keys, and norms on latents divide them; neither sees what clips scale.)"""
    heads = {
        role: by_hand(tree, params, block, role).astype(np.float64) for role in tree.blocks[block]
    }
    rng = np.random.default_rng(1)

    def through(role, x):
        return x @ heads[role] + bias(role) if role in heads else x

    def bias(role):
        name = f"{block}/{role}_bias"
        if name not in tree.shapes:
            return 0
        return flatten_dict(params, sep="/")[name].reshape(-1, 1, heads[role].shape[-1])

    def product(query, key):
        group = query.shape[-3] // key.shape[-3]
        return query @ np.repeat(key, group, axis=-3).swapaxes(-1, -2)

    q_role, k_role = ("q_nope", "k_nope") if "q_nope" in heads else ("q", "k")
    width = heads["q_down" if "q_down" in heads else q_role].shape[-2]
    x = rng.normal(size=(6, width))
    query, key = through("q_down", x), through("kv_down", x)
    if "q_gain" in heads:
        query = query * heads["q_gain"]
    if "kv_gain" in heads:
        key = key * heads["kv_gain"]
    found = product(through(q_role, query), through(k_role, key))
    if "q_rope" in heads:
        found = found + product(through("q_rope", query), through("k_rope", x))
    return found


def trees(qk_norm: bool):
    chosen = {name: tree for name, tree in TREES.items() if tree.qk_norm == qk_norm}
    return pytest.mark.parametrize("tree", chosen.values(), ids=chosen)


def maxima_of(tree: Tree, params):
    """Of every block, `[stack..., heads]`, and half of the largest of all."""
    maxima = {block: logits(tree, params, block).max((-1, -2)) for block in tree.blocks}
    return maxima, 0.5 * float(max(x.max() for x in maxima.values()))


@trees(qk_norm=False)
def test_clip_brings_each_head_to_the_threshold_and_leaves_the_others(tree):
    params = random_params(tree)
    maxima, threshold = maxima_of(tree, params)
    sown = {tuple(block.split("/")): jnp.asarray(x) for block, x in maxima.items()}
    clipped = mc.apply_qk_clip(params, sown, mc.find_layout(params, **tree.told), threshold)
    for block, before in maxima.items():
        after = logits(tree, clipped, block).max((-1, -2))
        # Products of float32 kernels that were rounded once more.
        np.testing.assert_allclose(after, np.minimum(before, threshold), rtol=1e-5)


@trees(qk_norm=True)
def test_clip_and_quack_refuse_a_qk_norm_by_its_name(tree):
    params = random_params(tree)
    layout = mc.find_layout(params, **tree.told)
    for transformation in (mc.qk_clip(layout), mc.scale_by_quack(layout)):
        with pytest.raises(
            ValueError, match=r"(q|k|query|key)_norm.* normalises queries.*mc\.muon"
        ):
            transformation.init(params)


def attention_of(layout, params):
    """What the layout describes: without what is no attention, for which some trees need rules."""
    flat = flatten_dict(params)
    parts = [part for block in mc.layouts.find_blocks(layout, params) for part in block.parts]
    return unflatten_dict({path: flat[path] for part in parts for path, _ in part.leaves})


@every_tree
def test_muon_takes_one_matrix_a_head(tree):
    params = random_params(tree)
    layout = mc.find_layout(params, **tree.told)
    blocks = mc.layouts.find_blocks(layout, params)
    parts = [part for block in blocks for part in block.parts]
    own = attention_of(layout, params)
    described = [one for one in as_layouts(layout) if one.pieces]
    rows = {row.path: row for row in mc.describe(own, described)}
    for part in parts:
        row = rows["/".join(part.kernel)]
        if part.role.endswith("gain"):
            assert row.optimizer == "other"
            continue
        kinds = [(kind.role, kind.count, kind.ins, kind.outs) for kind in row.matrices]
        assert (part.role, math.prod((*part.stack, part.heads)), *part.matrix) in kinds
