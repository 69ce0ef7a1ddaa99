"""Layouts: finding blocks in trees of every kind, and splitting kernels into heads."""

import dataclasses
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import muonclip_jax as mc


def shapes(tree):
    """A tree of shapes as a tree of `ShapeDtypeStruct`s."""
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=is_shape
    )


def linen_params(stacked, normalize_qk=False):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            def layer(module, x, _):
                return module(x, sow_weights=True), None

            attention = nn.MultiHeadDotProductAttention(
                4, name="attn", normalize_qk=normalize_qk, attention_fn=mc.dot_product_attention
            )
            if not stacked:
                return attention(x)
            axes = {"params": 0, "intermediates": 0}
            scanned = nn.scan(layer, variable_axes=axes, split_rngs={"params": True}, length=3)
            return scanned(attention, x, None)[0]

    return jax.eval_shape(lambda: Model().init(jax.random.key(0), jnp.ones((1, 2, 8))))["params"]


def nnx_params(**options):
    class Model(nnx.Module):
        def __init__(self, rngs):
            attention = lambda: nnx.MultiHeadAttention(4, 8, decode=False, rngs=rngs, **options)  # noqa: E731
            self.layers = nnx.List([attention() for _ in range(2)])

    return nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)


@pytest.mark.parametrize("stacked", [False, True])
def test_flax_linen_attention(stacked):
    params = linen_params(stacked)
    layout = mc.find_layout(params)
    assert layout == mc.layouts.mha()
    (block,) = layout.blocks(params)
    assert block.name == "attn"
    assert block.shape == ((3, 4) if stacked else (4,))
    (same,) = layout.blocks({"params": params})
    assert same.name == "attn" and same.path == ("params", "attn")


def test_flax_nnx_attention():
    params = nnx_params()
    layout = mc.find_layout(params)
    assert layout == mc.layouts.mha()
    assert [block.name for block in layout.blocks(params)] == ["layers/0", "layers/1"]


@pytest.mark.skipif(
    "num_kv_heads" not in inspect.signature(nnx.MultiHeadAttention.__init__).parameters,
    reason="this Flax has no grouped-query attention in NNX",
)
def test_flax_nnx_grouped_attention():
    params = nnx_params(num_kv_heads=2)
    layout = mc.find_layout(params)
    assert layout == mc.layouts.gqa()
    assert {(block.heads, block.kv_heads) for block in layout.blocks(params)} == {(4, 2)}


def test_find_layout_sees_grouped_heads():
    kernel = lambda *shape: {"kernel": shape}  # noqa: E731
    block = {"query": kernel(8, 4, 2), "key": kernel(8, 2, 2), "value": kernel(8, 2, 2)}
    params = shapes({"a": {**block, "out": kernel(4, 2, 8)}})
    assert mc.find_layout(params) == mc.layouts.gqa()


@pytest.mark.parametrize(
    "make", [lambda: linen_params(False, True), lambda: nnx_params(normalize_qk=True)]
)
def test_qk_norm_is_refused(make):
    params = make()
    with pytest.raises(ValueError, match=r"key_ln/scale \(2,\) normalises queries or keys after"):
        mc.find_layout(params).blocks(params)


def test_qk_norm_is_known_by_its_length_whatever_its_name():
    block = {name: {"kernel": (16, 2, 4)} for name in ("query", "key")}
    for norm in (
        {"ln": {"scale": (4,)}},
        {"q_layernorm": {"weight": (4,)}},
        {"LayerNorm_0": {"scale": (8,), "bias": (8,)}},  # over both heads
        {"norm_q": {"gamma": (16,)}},
        {"WeightNorm_0": {"query/kernel/scale": (2, 4)}},
    ):
        params = shapes({"a": {**block, **norm}})
        with pytest.raises(ValueError, match="normalises queries or keys after"):
            mc.layouts.mha().blocks(params)
        (name,) = norm
        harmless = dataclasses.replace(mc.layouts.mha(), harmless_norms=(name,))
        assert len(harmless.blocks(params)) == 1
    before = shapes({"a": {**block, "norm": {"scale": (16,)}}})  # in front of the projections
    assert len(mc.layouts.mha().blocks(before)) == 1


def test_latent_norms_of_mla_are_in_front_of_the_projections():
    mla = {"wq_b": {"kernel": (12, 12)}, "wkv_b": {"kernel": (4, 14)}}
    latent = {"q_norm": {"scale": (12,)}, "kv_norm": {"scale": (4,)}}  # 4 is nope as well
    assert len(mc.layouts.mla(4, 2, 3).blocks(shapes({"a": {**mla, **latent}}))) == 1
    partial = {"q_rope_norm": {"scale": (2,)}}
    with pytest.raises(ValueError, match="q_rope_norm/scale"):
        mc.layouts.mla(4, 2, 3).blocks(shapes({"a": {**mla, **latent, **partial}}))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
@pytest.mark.parametrize("query", ["wq", "wq_b"])
def test_mla_reads_head_counts_from_its_sizes(flat, stack, query):
    out = lambda heads, features: (heads * features,) if flat else (heads, features)  # noqa: E731
    params = shapes(
        {
            "attn": {
                query: {"kernel": (*stack, 16, *out(4, 6))},
                "wkv_a": {"kernel": (*stack, 16, 10)},
                "wkv_b": {"kernel": (*stack, 8, *out(4, 7))},
            }
        }
    )
    (block,) = mc.layouts.mla(nope=4, rope=2, v=3, query=query).blocks(params)
    assert block.shape == (*stack, 4)
    assert all(projection.flat == flat for projection in block.projections)


def test_flat_grouped_kernels_split_by_the_declared_counts():
    params = shapes({"a": {"q": {"kernel": (8, 24)}, "k": {"kernel": (8, 12), "bias": (12,)}}})
    layout = mc.layouts.gqa(2, heads=4, query="q", key="k")
    (block,) = layout.blocks(params)
    assert (block.heads, block.kv_heads) == (4, 2)
    factors = {"q": jnp.arange(1.0, 5), "k": jnp.array([10.0, 20])}
    multipliers = block.multipliers(factors)
    np.testing.assert_array_equal(
        multipliers[("a", "q", "kernel")], np.repeat([1, 2, 3, 4], 6)[None]
    )
    np.testing.assert_array_equal(multipliers[("a", "k", "kernel")], np.repeat([10, 20], 6)[None])
    np.testing.assert_array_equal(multipliers[("a", "k", "bias")], np.repeat([10, 20], 6))


def test_mla_multipliers_touch_their_slices_only():
    params = shapes({"wq_b": {"kernel": (5, 2, 6)}, "wkv_b": {"kernel": (5, 2, 7)}})
    (block,) = mc.layouts.mla(4, 2, 3).blocks(params)
    two = lambda a, b: jnp.array([a, b], jnp.float32)  # noqa: E731
    multipliers = block.multipliers({"q_nope": two(2, 3), "q_rope": two(4, 5), "k_nope": two(6, 7)})
    chex.assert_shape(multipliers[("wq_b", "kernel")], (1, 2, 6))
    np.testing.assert_array_equal(
        multipliers[("wq_b", "kernel")][0], [[2, 2, 2, 2, 4, 4], [3, 3, 3, 3, 5, 5]]
    )
    np.testing.assert_array_equal(
        multipliers[("wkv_b", "kernel")][0], [[6, 6, 6, 6, 1, 1, 1], [7, 7, 7, 7, 1, 1, 1]]
    )


def test_block_pattern_takes_some_blocks():
    params = nnx_params()
    (block,) = mc.layouts.mha(block="layers/1").blocks(params)
    assert block.name == "layers/1"


def test_nested_projections():
    params = shapes({"a": {"proj": {"q": {"kernel": (8, 2, 4)}, "k": {"kernel": (8, 2, 4)}}}})
    (block,) = mc.layouts.mha(query="proj/q", key="proj/k").blocks(params)
    assert block.name == "a" and block.heads == 2
