"""Max logits on their way out of Flax models, Linen and NNX."""

import functools
import warnings

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

from muonclip_jax._attention.max_logits import MAX_LOGITS, read_max_logits, sow_max_logits

X = jax.random.normal(jax.random.key(0), (2, 5, 8))
pytestmark = pytest.mark.filterwarnings("error::DeprecationWarning")


def maxima_of(x):
    """What both test blocks sow: the largest activation of each of 4 'heads' of size 2."""
    return jnp.max(x.reshape(-1, 4, 2), axis=(0, 2))


def expected_maxima(kernels, x):
    """The maxima along a chain of linear layers: one row a layer."""
    rows = []
    for kernel in kernels:
        x = x @ kernel
        rows.append(maxima_of(x))
    return jnp.stack(rows)


# Matrix products of the same float32 numbers, inside and outside of a model.
assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5)


# ---- Linen ----


class Block(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, use_bias=False, name="dense")(x)
        sow_max_logits(self, maxima_of(x))
        return x


class Two(nn.Module):
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        return self.block(name="second")(self.block(name="first")(x))


class Scanned(nn.Module):
    collections: tuple[str, ...] = ("params", "intermediates")
    block: type[nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes=dict.fromkeys(self.collections, 0),
            split_rngs={"params": True},
            length=3,
        )
        return scan(self.block(name="layers"), x, None)[0]


def run_linen(model, x=X, seed=1):
    params = model.init(jax.random.key(seed), x)["params"]
    _, state = model.apply({"params": params}, x, mutable=["intermediates"])
    return params, state


@pytest.mark.parametrize("block", [Block, nn.remat(Block)], ids=["plain", "remat"])
def test_linen_blocks_by_path(block):
    params, state = run_linen(Two(block))
    kernels = [params[name]["dense"]["kernel"] for name in ("first", "second")]
    first, second = expected_maxima(kernels, X)
    assert_close(read_max_logits(state), {("first",): first, ("second",): second})


@pytest.mark.parametrize("block", [Block, nn.remat(Block)], ids=["plain", "remat"])
def test_linen_scan_stacks_the_layers(block):
    params, state = run_linen(Scanned(block=block))
    expected = expected_maxima(params["layers"]["dense"]["kernel"], X)
    found = read_max_logits(state)
    assert_close(found, {("layers",): expected})
    chex.assert_shape(found[("layers",)], (3, 4))


def test_linen_scan_that_drops_the_collection_raises():
    _, state = run_linen(Scanned(collections=("params",)))
    with pytest.raises(ValueError, match=r"variable_axes=\{'intermediates': 0\}"):
        read_max_logits(state)


def test_linen_block_called_twice_keeps_the_maximum():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            block = Block(name="block")
            return block(block(x))

    params, state = run_linen(Twice())
    chex.assert_shape(state["intermediates"]["block"][MAX_LOGITS], (4,))
    kernel = params["block"]["dense"]["kernel"]
    assert_close(read_max_logits(state)[("block",)], expected_maxima([kernel] * 2, X).max(0))


def test_linen_vmapped_block_keeps_the_axis():
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes = {"params": None, "intermediates": 0}
            mapped = nn.vmap(Block, variable_axes=axes, split_rngs={"params": False})
            return mapped(name="block")(x)

    params, state = run_linen(Mapped())
    expected = jnp.stack([maxima_of(x @ params["block"]["dense"]["kernel"]) for x in X])
    assert_close(read_max_logits(state), {("block",): expected})


def test_linen_under_jit_and_value_and_grad():
    model = Two()
    params = model.init(jax.random.key(1), X)["params"]

    def loss(params, sow_weight):
        out, state = model.apply({"params": params}, X, mutable=["intermediates"])
        sown = sum(jnp.sum(m) for m in read_max_logits(state).values())
        return jnp.sum(out**2) + sow_weight * sown, state

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (_, state), grads = step(params, 0.0)
    assert set(read_max_logits(state)) == {("first",), ("second",)}
    # The sown values carry no gradient, whatever weight they have in the loss.
    chex.assert_trees_all_equal(step(params, 1.0)[1], grads)


def test_linen_sow_says_whether_anything_collects():
    class Model(nn.Module):
        @nn.compact
        def __call__(self):
            return sow_max_logits(self, jnp.ones(4))

    assert Model().apply({}, mutable=["intermediates"])[0]
    assert not Model().apply({})
    assert "intermediates" not in Model().init(jax.random.key(0))


# ---- NNX ----


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.dense = nnx.Linear(8, 8, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = self.dense(x)
        sow_max_logits(self, maxima_of(x))
        return x


class NnxStack(nnx.Module):
    """`call(block, x)` is how the model calls its blocks."""

    def __init__(self, call=NnxBlock.__call__, seed=1):
        rngs = nnx.Rngs(seed)
        self.blocks = nnx.List([NnxBlock(rngs) for _ in range(2)])
        self.call = call

    def __call__(self, x):
        for block in self.blocks:
            x = self.call(block, x)
        return x


class NnxScanned(nnx.Module):
    def __init__(self):
        self.layers = nnx.vmap(NnxBlock)(nnx.Rngs(1).split(3))

    def __call__(self, x):
        scan = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return scan(x, self.layers)


def capture(model, x=X):
    return nnx.capture(model, nnx.Intermediate)(x)[1]


def nnx_kernels(model):
    return [block.dense.kernel[...] for block in model.blocks]


@pytest.mark.parametrize(
    "call", [NnxBlock.__call__, nnx.remat(NnxBlock.__call__)], ids=["plain", "remat"]
)
def test_nnx_blocks_by_path(call):
    model = NnxStack(call)
    first, second = expected_maxima(nnx_kernels(model), X)
    assert_close(read_max_logits(capture(model)), {("blocks", "0"): first, ("blocks", "1"): second})


def test_nnx_scan_stacks_the_layers():
    model = NnxScanned()
    expected = expected_maxima(model.layers.dense.kernel[...], X)
    assert_close(read_max_logits(capture(model)), {("layers",): expected})


def test_nnx_block_called_twice_keeps_the_maximum():
    model = NnxStack(lambda block, x: block(block(x)))
    rows = expected_maxima([kernel for kernel in nnx_kernels(model) for _ in range(2)], X)
    found = read_max_logits(capture(model))
    assert_close(found[("blocks", "0")], rows[:2].max(0))
    assert_close(found[("blocks", "1")], rows[2:].max(0))


def test_nnx_vmapped_block_keeps_the_axis():
    axes = nnx.StateAxes({nnx.Intermediate: 0, ...: None})
    model = NnxStack(nnx.vmap(NnxBlock.__call__, in_axes=(axes, 0)))
    expected = jnp.stack([maxima_of(x @ nnx_kernels(model)[0]) for x in X])
    assert_close(read_max_logits(capture(model))[("blocks", "0")], expected)


def test_nnx_under_jit_and_value_and_grad():
    @nnx.jit
    def step(model, x, sow_weight):
        def loss(model):
            out, state = nnx.capture(model, nnx.Intermediate)(x)
            sown = sum(jnp.sum(m) for m in read_max_logits(state).values())
            return jnp.sum(out**2) + sow_weight * sown, state

        return nnx.value_and_grad(loss, has_aux=True)(model)

    model = NnxStack()
    (_, state), grads = step(model, X, 0.0)
    assert set(read_max_logits(state)) == {("blocks", "0"), ("blocks", "1")}
    chex.assert_trees_all_equal(step(model, X, 1.0)[1], grads)


def test_nnx_outside_of_capture_neither_warns_nor_stores():
    model = NnxStack()
    model(X)  # DeprecationWarnings are errors here
    jax.jit(lambda x: model(x))(X)
    assert not nnx.state(model, nnx.Intermediate)
    assert not sow_max_logits(model.blocks[0], jnp.ones(4))


# ---- what read_max_logits takes ----


A, B = jnp.array([1.0, -5.0]), jnp.array([-2.0, 3.0])
EXPECTED = {("layers", "0", "attn"): A, ("attn",): B}
PLAIN = {"layers": {"0": {"attn": {MAX_LOGITS: A}}}, "attn": {MAX_LOGITS: B}}


@pytest.mark.parametrize(
    "sown",
    [
        PLAIN,
        FrozenDict(PLAIN),
        {"intermediates": PLAIN},
        {"batch_stats": {"mean": A}, "intermediates": FrozenDict(PLAIN)},
        {**PLAIN, "layers": [{"attn": {MAX_LOGITS: A}}]},
        {"layers": {0: {"attn": {MAX_LOGITS: (A,)}}}, "attn": {MAX_LOGITS: (B, B - 1)}},
        {**PLAIN, "mlp": {"features": (jnp.ones(()),), "count": 3}},
        nnx.State({**PLAIN, "attn": {MAX_LOGITS: nnx.Intermediate(B)}}),
        EXPECTED,
        read_max_logits(PLAIN),
    ],
)
def test_read_takes(sown):
    chex.assert_trees_all_equal(read_max_logits(sown), EXPECTED)


def test_read_takes_what_plain_sow_made():
    """Of a user who sowed without our function, in both APIs."""

    class Linen(nn.Module):
        @nn.compact
        def __call__(self):
            for value in (A, B):
                self.sow("intermediates", "max_logits", value)

    class Nnx(nnx.Module):
        def __call__(self):
            for value in (A, B):
                self.sow(nnx.Intermediate, "max_logits", value)

    expected = {(): jnp.maximum(A, B)}
    _, state = Linen().apply({}, mutable=["intermediates"])
    chex.assert_trees_all_equal(read_max_logits(state), expected)
    model = Nnx()
    captured = nnx.capture(model, nnx.Intermediate)()[1]
    chex.assert_trees_all_equal(read_max_logits(captured), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model()
    popped = nnx.pop(model, nnx.Intermediate)
    chex.assert_trees_all_equal(read_max_logits(popped), expected)


def test_nan_stays_visible_in_the_maximum_of_calls():
    sown = {"attn": {MAX_LOGITS: (A, A.at[0].set(jnp.nan))}}
    np.testing.assert_array_equal(read_max_logits(sown)[("attn",)], [np.nan, -5.0])


CURES = ["sow_weights=True", "mutable=['intermediates']", "variable_axes", "nnx.capture", "jit"]


@pytest.mark.parametrize(
    ("error", "sown", "words"),
    [
        (ValueError, None, ["found nothing", *CURES]),
        (ValueError, {}, ["found nothing", *CURES]),
        (ValueError, {"intermediates": {}}, ["found nothing", *CURES]),
        (ValueError, nnx.State({}), ["found nothing", *CURES]),
        (ValueError, {"attn": {"attention_weights": (A,)}}, ["attn/attention_weights", *CURES]),
        (ValueError, {f"b{i}": {"x": A} for i in range(11)}, ["b0/x", "and 3 more"]),
        (ValueError, {"attn": {MAX_LOGITS: jnp.ones(())}}, ["attn/max_logits", "[..., heads]"]),
        (ValueError, {"attn": {MAX_LOGITS: ()}}, ["attn/max_logits", "[]"]),
        (ValueError, {"attn": {MAX_LOGITS: (A, A[:1])}}, ["attn/max_logits", "(2,), (1,)"]),
        (TypeError, {"attn": {MAX_LOGITS: jnp.ones(4, int)}}, ["attn/max_logits", "int32"]),
        (TypeError, {"attn": {MAX_LOGITS: "4"}}, ["attn/max_logits", "floating"]),
        (TypeError, {("attn",): jnp.ones(4, int)}, ["attn", "int32"]),
        (TypeError, (X, PLAIN), ["tuple", "output, intermediates"]),
        (TypeError, A, ["mapping"]),
    ],
)
def test_read_refuses(error, sown, words):
    with pytest.raises(error) as caught:
        read_max_logits(sown)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("error", "module", "value", "words"),
    [
        (TypeError, NnxStack, A, ["module", "flax.linen.Module", "ModuleMeta"]),
        (TypeError, NnxStack(), jnp.ones(4, int), ["max_logits", "int32"]),
        (ValueError, NnxStack(), jnp.ones(()), ["max_logits", "[..., heads]"]),
    ],
)
def test_sow_refuses(error, module, value, words):
    with pytest.raises(error) as caught:
        sow_max_logits(module, value)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_sown_values_are_float32(dtype):
    class Model(nn.Module):
        @nn.compact
        def __call__(self):
            sow_max_logits(self, jnp.ones(4, dtype))

    with jax.enable_x64(dtype == "float64"):
        _, state = Model().apply({}, mutable=["intermediates"])
        chex.assert_type(read_max_logits(state)[()], jnp.float32)
