"""Queries and keys on their way from a forward pass to per-head matrices."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc

pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning")

X = jax.random.normal(jax.random.key(0), (2, 3, 8))  # [batch, length, in]


def heads_first(x):
    """[batch, length, heads, features] → [heads, tokens, features], by hand."""
    return np.stack([np.asarray(x[:, :, h]).reshape(-1, x.shape[-1]) for h in range(x.shape[2])])


def keys_of(kernel, x=X):
    return jnp.einsum("bti,ihf->bthf", x, kernel)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        keys = nn.DenseGeneral((2, 4), use_bias=False, name="key")(x)
        mc.sow_activations(self, keys_before_norm=keys, keys=nn.RMSNorm(name="key_norm")(keys))
        return keys.reshape(x.shape)


class Layers(nn.Module):
    collected: bool = True

    @nn.compact
    def __call__(self, x):
        axes = {"params": 0} | ({"intermediates": 0} if self.collected else {})
        layers = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes=axes,
            split_rngs={"params": True},
            length=3,
        )
        return layers(Block(name="attn"), x, None)[0]


def run_linen(model, **options):
    params = model.init(jax.random.key(1), X)["params"]
    return params, model.apply({"params": params}, X, mutable=["intermediates"], **options)[1]


def test_linen_by_name_and_path():
    params, sown = run_linen(Block())
    keys = heads_first(keys_of(params["key"]["kernel"]))
    # float32 roundings of sums of 8, and of a norm of 4
    before = mc.read_activations(sown, "keys_before_norm")
    chex.assert_trees_all_close(before, {(): keys}, rtol=1e-5, atol=1e-6)
    normed = keys / np.sqrt((keys**2).mean(axis=-1, keepdims=True) + 1e-6)
    chex.assert_trees_all_close(mc.read_activations(sown), {(): normed}, rtol=1e-5, atol=1e-6)
    # Any measure runs per head.
    ratios = jax.tree.map(mc.participation_ratio, mc.read_activations(sown))
    values = np.linalg.svd(np.float64(normed), compute_uv=False)
    np.testing.assert_allclose(ratios[()], values.sum(-1) ** 2 / (values**2).sum(-1), rtol=1e-5)


def test_linen_scan_stacks_the_layers():
    params, sown = run_linen(Layers())
    found = mc.read_activations(sown, "keys_before_norm")[("attn",)]
    chex.assert_shape(found, (3, 2, 6, 4))
    first = heads_first(keys_of(params["attn"]["key"]["kernel"][0]))
    chex.assert_trees_all_close(found[0], first, rtol=1e-5, atol=1e-6)  # float32 sums of 8


def test_linen_scan_that_drops_the_collection_raises():
    _, sown = run_linen(Layers(collected=False))
    with pytest.raises(ValueError, match=r"No value named 'keys'.*found nothing.*variable_axes"):
        mc.read_activations(sown)


def test_linen_capture_without_changing_the_model():
    _, sown = run_linen(
        Block(), capture_intermediates=lambda module, _: module.name in ("key", "key_norm")
    )
    found = mc.read_activations(sown, "__call__")
    assert set(found) == {("key",), ("key_norm",)}
    chex.assert_trees_all_equal(found[("key_norm",)], mc.read_activations(sown)[()])


def test_linen_says_whether_anything_collects():
    class Model(nn.Module):
        @nn.compact
        def __call__(self):
            return mc.sow_activations(self, keys=jnp.ones((1, 2, 3, 4)))

    assert Model().apply({}, mutable=["intermediates"])[0]
    assert not Model().apply({})


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.LinearGeneral(8, (2, 4), use_bias=False, rngs=rngs)

    def __call__(self, x):
        keys = self.dense(x)
        mc.sow_activations(self, keys=keys)
        return keys.reshape(x.shape)


class NnxTwice(nnx.Module):
    def __init__(self):
        self.attn = NnxBlock(nnx.Rngs(1))

    def __call__(self, x):
        return self.attn(self.attn(x)[:, :2])


class NnxScanned(nnx.Module):
    def __init__(self):
        self.layers = nnx.vmap(NnxBlock)(nnx.Rngs(1).split(3))

    def __call__(self, x):
        scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.layers)


def test_nnx_keeps_the_tokens_of_all_calls():
    model = NnxTwice()
    _, sown = nnx.capture(model, nnx.Intermediate)(X)
    first = keys_of(model.attn.dense.kernel[...])
    second = keys_of(model.attn.dense.kernel[...], first.reshape(X.shape)[:, :2])
    wanted = np.concatenate([heads_first(first), heads_first(second)], axis=1)
    found = mc.read_activations(sown)[("attn",)]
    chex.assert_trees_all_close(found, wanted, rtol=1e-5, atol=1e-6)  # float32 sums of 8


def test_nnx_scan_stacks_the_layers():
    model = NnxScanned()
    _, sown = nnx.capture(model, nnx.Intermediate)(X)
    found = mc.read_activations(sown)[("layers",)]
    chex.assert_shape(found, (3, 2, 6, 4))
    first = heads_first(keys_of(model.layers.dense.kernel[...][0]))
    chex.assert_trees_all_close(found[0], first, rtol=1e-5, atol=1e-6)  # float32 sums of 8


def test_nnx_outside_of_capture_neither_warns_nor_stores():
    model = NnxTwice()
    model(X)  # DeprecationWarnings are errors here
    assert not nnx.state(model, nnx.Intermediate)
    assert not mc.sow_activations(model.attn, keys=jnp.ones((1, 2, 3, 4)))


def test_no_gradient_goes_through():
    model = NnxTwice()

    @nnx.jit
    def gradients(model, weight):
        def loss(model):
            out, sown = nnx.capture(model, nnx.Intermediate)(X)
            return out.sum() + weight * mc.read_activations(sown)[("attn",)].sum()

        return nnx.grad(loss)(model)

    chex.assert_trees_all_equal(gradients(model, 0.0), gradients(model, 1.0))


@pytest.mark.parametrize("spec", [P("data"), P("data", "context", "heads")], ids=str)
def test_explicit_mesh(spec):
    """Also with a length that is spread."""
    sizes, names = (2, 2, 2), ("data", "context", "heads")
    mesh = jax.make_mesh(sizes, names, axis_types=(AxisType.Explicit,) * 3)
    keys = jax.random.normal(jax.random.key(0), (2, 4, 2, 3))
    spread = jax.device_put(keys, NamedSharding(mesh, spec))
    read = jax.jit(lambda *calls: mc.read_activations({"keys": calls})[()])
    twice = np.concatenate([heads_first(keys)] * 2, axis=1)
    np.testing.assert_array_equal(read(spread, spread), twice)


@pytest.mark.parametrize(
    ("error", "activations", "words"),
    [
        (TypeError, {}, "name what to sow"),
        (TypeError, {"keys": jnp.ones((1, 2, 3, 4), int)}, "keys must be floating point.*int32"),
        (ValueError, {"keys": jnp.ones((1, 2, 12))}, r"keys must be \[batch.*\(1, 2, 12\)"),
        (ValueError, {"keys": jnp.ones((5, 1, 2, 3, 4))}, r"found shape \(5, 1, 2, 3, 4\)"),
    ],
)
def test_sow_refuses(error, activations, words):
    with pytest.raises(error, match=words):
        mc.sow_activations(NnxBlock(nnx.Rngs(0)), **activations)


def test_sow_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"module must be a flax\.linen\.Module or.*found dict"):
        mc.sow_activations({}, keys=jnp.ones((1, 2, 3, 4)))


KEYS = jnp.ones((1, 2, 3, 4))


@pytest.mark.parametrize(
    ("error", "sown", "words"),
    [
        (TypeError, [KEYS], "intermediates must be a mapping.*found list"),
        (ValueError, None, r"found nothing.*sow_activations\(self, keys=\.\.\.\)"),
        (ValueError, {"attn": {"queries": (KEYS,)}}, r"found attn/queries\."),
        (TypeError, {"attn": {"keys": (KEYS.astype(int),)}}, "attn/keys must be floating"),
        (ValueError, {"attn": {"keys": KEYS[0]}}, r"attn/keys: expected.*\(2, 3, 4\)"),
        (ValueError, {"attn": {"keys": (KEYS, KEYS[..., :2])}}, "must differ in tokens only"),
    ],
)
def test_read_refuses(error, sown, words):
    with pytest.raises(error, match=words):
        mc.read_activations(sown)
