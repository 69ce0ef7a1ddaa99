"""Linen: maxima through a TrainState, and modules of one API inside the other."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state

import muonclip_jax as mc

X = jax.random.normal(jax.random.key(0), (2, 3, 8))
LAYOUT = mc.layouts.mha(value=None, out=None)
TX = optax.chain(optax.sgd(0.1), mc.qk_clip(LAYOUT, threshold=1.0))
MAXIMA = {"max_logits": jnp.ones(2)}


class Attention(nn.Module):
    """Attention that sows, of which only the logits matter."""

    @nn.compact
    def __call__(self, x):
        q, k = (nn.DenseGeneral((2, 4), use_bias=False, name=n)(x) for n in ("query", "key"))
        logits = jnp.einsum("btnh,bsnh->bnts", q, k)
        mc.sow_max_logits(self, logits.max((0, 2, 3)))
        return logits.sum()


def reference(params, x=X):
    """The maxima in float64."""
    kernels = (np.float64(params[name]["kernel"][...]) for name in ("query", "key"))
    q, k = (np.einsum("btd,dnh->btnh", np.float64(x), kernel) for kernel in kernels)
    return np.einsum("btnh,bsnh->bnts", q, k).max((0, 2, 3))


def create(kind, tx=TX, **fields):
    params = Attention().init(jax.random.key(1), X)["params"]
    return kind.create(apply_fn=Attention().apply, params=params, tx=tx, **fields)


def gradient(state):
    def loss(params):
        return state.apply_fn({"params": params}, X, mutable=["intermediates"])

    return jax.grad(loss, has_aux=True)(state.params)


def test_apply_gradients_hands_the_maxima_on():
    @jax.jit
    def step(state):
        grads, sown = gradient(state)
        return state.apply_gradients(grads=grads, max_logits=sown)

    first = create(mc.TrainState)
    state = step(first)
    assert int(state.step) == 1 and state.tx is first.tx
    seen = mc.qk_clip_state(state.opt_state).max_logits["<root>"]
    # Products of a few float32 numbers.
    np.testing.assert_allclose(seen, reference(first.params), rtol=1e-5)
    assert int(mc.qk_clip_state(state.opt_state).heads_clipped) > 0


def test_without_maxima_it_is_flaxs():
    """And so it is where the optimizer takes none."""
    sgd = optax.sgd(0.1)  # takes no extra arguments
    ours, flaxs = create(mc.TrainState, sgd), create(train_state.TrainState, sgd)
    expected = flaxs.apply_gradients(grads=flaxs.params)
    for given in ({}, {"max_logits": MAXIMA}):
        state = ours.apply_gradients(grads=ours.params, **given)
        assert jax.tree.structure(state.params) == jax.tree.structure(expected.params)
        jax.tree.map(np.testing.assert_array_equal, state.params, expected.params)


def test_a_state_with_fields_of_its_own():
    class WithStatistics(mc.TrainState):
        batch_stats: jax.Array

    state = create(WithStatistics, batch_stats=jnp.zeros(2))
    given = {"max_logits": MAXIMA, "batch_stats": jnp.ones(2)}
    state = state.apply_gradients(grads=state.params, **given)
    assert isinstance(state, WithStatistics) and (state.batch_stats == 1).all()


@pytest.mark.bad_input
def test_without_maxima_the_clip_says_what_to_call():
    state = create(mc.TrainState)
    with pytest.raises(ValueError, match=r"apply_gradients\(grads=grads, max_logits="):
        state.apply_gradients(grads=state.params)


def test_linen_inside_nnx():
    """`ToNNX` hands on what its module sows where it is told that this may be written."""
    model = nnx.bridge.ToNNX(Attention(), rngs=nnx.Rngs(0)).lazy_init(X)
    nnx.pop(model, nnx.Intermediate)  # of the pass that initialised

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            out = model(X, mutable=["intermediates"])
            return out, nnx.pop(model, nnx.Intermediate)

        grads, sown = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, grads, max_logits=sown)

    expected = reference({name: getattr(model, name) for name in ("query", "key")})
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)
    step(model, optimizer)
    seen = mc.qk_clip_state(optimizer.opt_state).max_logits["<root>"]
    np.testing.assert_allclose(seen, expected, rtol=1e-5)
    assert not nnx.state(model, nnx.Intermediate), "nothing stays for the next step"


class Two(nn.Module):
    """Attention deeper inside, and a layer that mixes nothing."""

    @nn.compact
    def __call__(self, x):
        first = Attention(name="first")(nn.LayerNorm(use_scale=False, use_bias=False)(x))
        return first + Attention(name="second")(x)


class Holder(nnx.Module):
    def __init__(self, linen):
        self.inner = nnx.bridge.ToNNX(linen, rngs=nnx.Rngs(0)).lazy_init(X)

    def __call__(self, x, **options):
        return self.inner(x, **options)


def normalized(x):
    x = np.float64(x)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


# Name of the attention → what it gets.
INSIDE = {
    "alone": (Attention, {"": X}),
    "two": (Two, {"first": normalized(X), "second": X}),
}


@pytest.mark.parametrize("kind", INSIDE)
@pytest.mark.parametrize("options", [{}, {"mutable": ["intermediates"]}], ids=["plain", "asked"])
@pytest.mark.versions
def test_linen_inside_nnx_records(kind, options):
    """For a trainer that owns its step. Who asks for what was sown still gets it."""
    linen, inputs = INSIDE[kind]
    model = Holder(linen())
    expected = {
        "/".join(filter(None, ("inner", name))): reference(
            {side: dict_of(model.inner, name)[side] for side in ("query", "key")}, x
        )
        for name, x in inputs.items()
    }
    for _ in range(2):  # a second call changes nothing
        mc.record_max_logits(model, LAYOUT)
    optimizer = mc.use_recorded_max_logits(nnx.Optimizer(model, TX, wrt=nnx.Param))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            out = model(X, **options)
            return out, nnx.pop(model, nnx.Intermediate)

        model(100 * X)  # evaluation
        grads, sown = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, grads)
        return sown

    sown = step(model, optimizer)
    seen = mc.qk_clip_state(optimizer.opt_state).max_logits
    assert seen.keys() == expected.keys()
    for name, maxima in expected.items():
        np.testing.assert_allclose(seen[name], maxima, rtol=1e-5)
    if options:
        told = {"/".join(path): x for path, x in mc.read_max_logits(sown).items()}
        assert told.keys() == expected.keys()
    else:
        assert not sown
    waiting = jax.tree.leaves(nnx.state(model, mc.MaxLogits))
    assert len(waiting) == len(expected) and all((x == np.inf).all() for x in waiting)


def dict_of(wrapper, name):
    return getattr(wrapper, name) if name else vars(wrapper)


def test_maxima_of_what_the_layout_leaves_out_go_nowhere():
    model = Holder(Two())
    plain = model(X)
    mc.record_max_logits(model, mc.layouts.mha(block="inner/second", value=None, out=None))
    assert nnx.grad(lambda model: model(X))(model) is not None
    np.testing.assert_array_equal(model(X), plain)
    (recorded,) = jax.tree.leaves(nnx.state(model, mc.MaxLogits))
    np.testing.assert_allclose(recorded, reference(model.inner.second), rtol=1e-5)


@pytest.mark.bad_input
def test_the_softmax_of_a_linen_module_is_not_watched():
    with pytest.raises(ValueError, match=r"inner/first is in a Linen .*attention_fn=mc.attention"):
        mc.record_max_logits(Holder(Two()), LAYOUT, softmax="b heads t s -> heads")
