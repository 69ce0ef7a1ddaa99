"""Known models: `find_layout` alone finds each head where the model's source has it, and each
head's step is the one that its recipe says."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import muonclip_jax as mc
from tests.families.trees import TREES, Tree

every_tree = pytest.mark.parametrize("tree", TREES.values(), ids=TREES)

RATE = 0.1
ONE_STEP = mc.NewtonSchulz(mc.schedules.polar_express(steps=1), "float32")


def random_params(tree: Tree, seed: int = 0):
    """float32 of mixed sizes, biases and gains too; layers and heads differ."""
    rng = np.random.default_rng(seed)
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


def max_logits(tree: Tree, params, block: str):
    """`[stack..., heads]`."""
    return logits(tree, params, block).max((-1, -2))


def trees(qk_norm: bool):
    chosen = {name: tree for name, tree in TREES.items() if tree.qk_norm == qk_norm}
    return pytest.mark.parametrize("tree", chosen.values(), ids=chosen)


def maxima_of(tree: Tree, params):
    """Of every block, `[stack..., heads]`, and half of the largest of all."""
    maxima = {block: max_logits(tree, params, block) for block in tree.blocks}
    return maxima, 0.5 * float(max(x.max() for x in maxima.values()))


def as_sown(maxima):
    return {tuple(block.split("/")): jnp.asarray(x, "float32") for block, x in maxima.items()}


def orthogonalized(x):
    """By singular values in float64, `[..., in, out]`."""
    schedule = ONE_STEP.schedule
    u, s, v = np.linalg.svd(x.astype(np.float64), full_matrices=False)
    s = s / np.linalg.norm(s, 4, axis=-1, keepdims=True)
    return (u * schedule.apply(s / schedule.norm_factor)[..., None, :]) @ v


def check_steps(tree: Tree, grads, updates, block: str, factors):
    """Asserts of each head of a block that Muon's first step was taken, times a role's factor."""
    for role in {**tree.blocks, **tree.linear}[block]:
        if role.endswith("gain"):  # a vector
            continue
        heads = by_hand(tree, grads, block, role)
        # The size that `match_adam` gives; of a first gradient momentum is a multiple.
        size = 0.2 * math.sqrt(max(heads.shape[-2:])) * factors.get(role, 1)
        np.testing.assert_allclose(
            by_hand(tree, updates, block, role),
            -RATE * size * orthogonalized(heads),
            atol=1e-5 * RATE * size,  # float32 products of three matrices whose entries are ≤ 1
            err_msg=f"{block}, {role}",
        )


def quack_factors(block):
    """By role, when all norms are twice the first ones: half for each norm in the paper's product
    of a role's partners."""
    compressed = "q_down" in block
    partners = {"q": 1, "k": 1, "q_down": 3}
    partners |= dict.fromkeys(("q_rope", "k_rope"), 1 + compressed)
    partners |= dict.fromkeys(("q_nope", "k_nope", "kv_down"), 2 + compressed)
    return {role: 0.5**count for role, count in partners.items() if role in block}


@trees(qk_norm=False)
def test_a_step_of_muonclip_with_quack_and_then_the_clip_alone(tree):
    params, grads = random_params(tree), random_params(tree, seed=1)
    half = jax.tree.map(lambda x: x / 2, params)
    layout = mc.find_layout(params, **tree.told)
    maxima, threshold = maxima_of(tree, params)
    quack = mc.quack(
        RATE,
        layout=layout,
        direction=mc.muon_direction(layout=layout, newton_schulz=ONE_STEP),
        weight_decay=0,
    )
    both = optax.chain(quack, mc.qk_clip(layout, threshold))

    @jax.jit
    def step(grads, start, params, sown):
        """The parameters after QuacK alone and after both, and γ."""
        held, _ = quack.update(grads, quack.init(start), params)
        updates, state = both.update(grads, both.init(start), params, max_logits=sown)
        after = [optax.apply_updates(params, each) for each in (held, updates)]
        return held, *after, mc.qk_clip_state(state).gamma

    # Everything has grown to twice of what it was when QuacK measured it.
    held, unclipped, after, gamma = step(grads, half, params, as_sown(maxima))
    for block in tree.blocks:
        check_steps(tree, grads, held, block, quack_factors(tree.blocks[block]))
        expected = threshold / np.maximum(maxima[block], threshold)
        np.testing.assert_allclose(gamma[block], expected, rtol=1e-6)
        # To float32 rounding of each kernel: γ scales what the logits became in the step.
        np.testing.assert_allclose(
            max_logits(tree, after, block),
            expected * max_logits(tree, unclipped, block),
            rtol=1e-5,
        )

    maxima, threshold = maxima_of(tree, after)
    clipped = mc.apply_qk_clip(after, as_sown(maxima), layout, threshold)
    for block, before in maxima.items():
        np.testing.assert_allclose(
            max_logits(tree, clipped, block), np.minimum(before, threshold), rtol=1e-5
        )


@trees(qk_norm=True)
def test_clip_and_quack_refuse_a_qk_norm_by_its_name(tree):
    params = random_params(tree)
    layout = mc.find_layout(params, **tree.told)
    for transformation in (mc.qk_clip(layout), mc.scale_by_quack(layout)):
        with pytest.raises(
            ValueError, match=r"(q|k|query|key)_norm.* normalises queries.*mc\.muon"
        ):
            transformation.init(params)


@every_tree
def test_a_step_of_muon(tree):
    params, grads = random_params(tree), random_params(tree, seed=1)
    muon = mc.muon(
        RATE, layout=mc.find_layout(params, **tree.told), newton_schulz=ONE_STEP, weight_decay=0
    )

    @jax.jit
    def step(grads, params):
        return muon.update(grads, muon.init(params), params)[0]

    updates = step(grads, params)
    for path, update in flatten_dict(updates, sep="/").items():
        assert np.isfinite(update).all() and np.any(update), f"{path} did not move"
    for block in (*tree.blocks, *tree.linear):
        check_steps(tree, grads, updates, block, {})


@every_tree
def test_muon_takes_one_matrix_a_head(tree):
    params = random_params(tree)
    layout = mc.find_layout(params, **tree.told)
    blocks = mc.layouts.find_blocks(layout, params)
    parts = [part for block in blocks for part in block.parts]
    rows = {row.path: row for row in mc.describe(params, layout)}
    for part in parts:
        row = rows["/".join(part.kernel)]
        if part.role.endswith("gain"):
            assert row.optimizer == "other"
            continue
        kinds = [(kind.role, kind.count, kind.ins, kind.outs) for kind in row.matrices]
        assert (part.role, math.prod((*part.stack, part.heads)), *part.matrix) in kinds
