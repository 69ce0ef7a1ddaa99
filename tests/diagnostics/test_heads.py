"""Numbers of heads are those of heads extracted by hand, on every storage of attention."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._layouts.roles import GAIN_ROLES
from tests.layouts.test_layouts import STACKS, STORAGES, heads_by_hand, stacked

every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)


def model_of(storage, stack=(), axis=0, seed=0):
    """Parameters drawn at random, `{path: array}`, and the layout."""
    rng = np.random.default_rng(seed)
    params = {
        path: rng.normal(size=stacked(shape, stack, axis)).astype(np.float32)
        for path, shape in storage.shapes.items()
    }
    return params, dataclasses.replace(storage.layout, stack_axis=axis)


def by_hand(storage, params, stack=(), axis=0):
    """For each role `[stack..., heads, in, features]`, float64."""
    return {
        role: heads_by_hand(heads, params[name].astype(np.float64), stack, axis)
        for role, (name, heads) in storage.heads.items()
        if role not in GAIN_ROLES
    }


@pytest.mark.parametrize(("stack", "axis"), STACKS, ids=str)
@every_storage
def test_head_matrices_are_heads_by_hand(storage, stack, axis):
    params, layout = model_of(storage, stack, axis)
    found = mc.head_matrices({"attn": unflatten_dict(params, sep="/")}, layout)
    chex.assert_trees_all_equal(found, {"attn": by_hand(storage, params, stack, axis)})


@every_storage
def test_report_is_that_of_heads_by_hand(storage):
    params, layout = model_of(storage, stack=(2,))
    heads = by_hand(storage, params, (2,))
    w_q, w_k = maps_by_hand(heads)
    w_k_of_query = np.repeat(w_k, w_q.shape[1] // w_k.shape[1], axis=1)
    maxima = {"attn": {"max_logits": jnp.ones(w_q.shape[:2])}}
    found = mc.attention_report(
        {"attn": unflatten_dict(params, sep="/")}, None, maxima, layout
    ).blocks["attn"]
    # A QR, a product of MLA's kernels and an SVD, each a few float32 roundings of the largest.
    close = lambda found, wanted: np.testing.assert_allclose(found, wanted, rtol=1e-5)  # noqa: E731
    close(found.query_norms, np.linalg.norm(w_q, 2, axis=(-2, -1)))
    close(found.key_norms, np.linalg.norm(w_k, 2, axis=(-2, -1)))
    close(found.ranks, effective_rank(w_q @ w_k_of_query.mT))


def maps_by_hand(heads):
    """W_q and W_k `[stack..., heads, in, features]` of the pieces."""
    if "q" in heads:
        return heads["q"], heads["k"]
    queries = np.concatenate([heads["q_nope"], heads["q_rope"]], axis=-1)
    if "q_down" in heads:
        queries = heads["q_down"] @ queries
    k_nope = heads["kv_down"] @ heads["k_nope"]
    k_rope = np.broadcast_to(heads["k_rope"], (*k_nope.shape[:-1], heads["k_rope"].shape[-1]))
    return queries, np.concatenate([k_nope, k_rope], axis=-1)


def effective_rank(x):
    values = np.linalg.svd(x, compute_uv=False)
    p = values / values.sum(axis=-1, keepdims=True)
    p = np.where(p < 1e-12, 1, p)  # the product has more rows than rank; these count nothing
    return np.exp(-(p * np.log(p)).sum(axis=-1))


def test_measures_of_updates_and_gradients_go_through_the_same_layout():
    storage = STORAGES["fused, grouped, interleaved"]
    params, layout = model_of(storage)
    gradients = {path: 3 * x**2 for path, x in params.items()}
    tree = {"attn": unflatten_dict(gradients, sep="/")}
    found = jax.tree.map(mc.stable_rank, mc.head_matrices(tree, layout))["attn"]
    for role, heads in by_hand(storage, gradients).items():
        values = np.linalg.svd(heads, compute_uv=False)
        wanted = (values**2).sum(-1) / values[..., 0] ** 2
        # float32 roundings of the gradient and of an SVD
        np.testing.assert_allclose(found[role], wanted, rtol=1e-5)


def test_nnx_and_half_precision_keep_their_dtype():
    attention = nnx.MultiHeadAttention(
        2, 8, param_dtype=jnp.bfloat16, decode=False, rngs=nnx.Rngs(0)
    )
    state = nnx.state(nnx.Dict(attn=attention), nnx.Param)
    found = mc.head_matrices(state, mc.find_layout(state))["attn"]
    chex.assert_shape([found["q"], found["k"], found["v"]], (2, 8, 4))
    chex.assert_shape(found["o"], (2, 4, 8))
    assert found["q"].dtype == jnp.bfloat16
    kernel = attention.query.kernel[...]
    chex.assert_trees_all_equal(found["q"], jnp.moveaxis(kernel, 1, 0))


@pytest.mark.slow
def test_explicit_mesh():
    """Heads keep their sharding, numbers are those of one device."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)
    attention = {
        "query": {"kernel": jax.random.normal(jax.random.key(0), (8, 4, 6))},
        "key": {"kernel": jax.random.normal(jax.random.key(1), (8, 4, 6))},
    }
    layout = mc.layouts.mha(value=None, out=None)
    sharding = NamedSharding(mesh, P("fsdp", "tp"))
    spread = jax.tree.map(lambda x: jax.device_put(x, sharding), {"attn": attention})
    found = mc.head_matrices(spread, layout)["attn"]["q"]
    assert jax.typeof(found).sharding.spec == P("tp", "fsdp", None)

    maxima = {"attn": {"max_logits": jnp.ones(4)}}
    report = jax.jit(lambda params: mc.attention_report(params, None, maxima, layout))
    # float32 roundings: the program is another one
    chex.assert_trees_all_close(report(spread), report({"attn": attention}), rtol=1e-6)
    ranks = mc.effective_rank(found)
    chex.assert_trees_all_close(ranks, mc.effective_rank(np.asarray(found)), rtol=1e-6)


def test_a_tree_of_another_structure_is_refused():
    params, layout = model_of(STORAGES["headed"])
    del params["key/kernel"]
    with pytest.raises(ValueError, match=r"layouts\.mha expects key, or key/kernel"):
        mc.head_matrices({"attn": unflatten_dict(params, sep="/")}, layout)
