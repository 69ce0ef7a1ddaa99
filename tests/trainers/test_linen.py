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


def reference(params):
    """The maxima in float64."""
    kernels = (np.float64(params[name]["kernel"][...]) for name in ("query", "key"))
    q, k = (np.einsum("btd,dnh->btnh", np.float64(X), kernel) for kernel in kernels)
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
