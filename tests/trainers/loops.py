"""How other people's trainers call an optimizer: the lines around it, transcribed.

Each function takes what its trainer's user chooses, an Optax transformation, and trains a step as
that trainer does. Models are not theirs; only the trees that they hand over are.
"""

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from flax import nnx, struct
from flax.training import train_state


def loss_of(params: Any) -> jax.Array:
    """Some loss, by which every parameter has a gradient."""
    return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(params))


def train_state_donated(tx, params):
    """nanodo's and lm1b's train.py: a TrainState, donated; the loss has no further outputs."""

    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state):
        grads = jax.grad(loss_of)(state.params)
        return state.apply_gradients(grads=grads)

    params = jax.tree.map(jnp.copy, params)
    state = train_state.TrainState.create(apply_fn=None, params=params, tx=tx)
    return train_step(state).params


def big_vision(scale_by, params):
    """big_vision's optax.py: clip, the configured `scale_by_...`, then decay, schedule and sign of
    its own."""
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        scale_by,
        optax.add_decayed_weights(1e-4, jax.tree.map(lambda x: x.ndim > 1, params)),
        optax.scale_by_schedule(lambda step: 1e-2),
        optax.scale(-1.0),
    )

    @jax.jit
    def update_fn(params, opt):
        grads = jax.grad(loss_of)(params)
        updates, opt = tx.update(grads, opt, params)
        return optax.apply_updates(params, updates)

    return update_fn(params, tx.init(params))


def nnx_optimizer(tx, model):
    """bonsai's examples: an `nnx.Optimizer`, `update(model, grads)` under `nnx.jit`."""
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def train_step(model, optimizer):
        grads = nnx.grad(lambda model: loss_of(nnx.state(model, nnx.Param)))(model)
        optimizer.update(model, grads)

    train_step(model, optimizer)
    return nnx.state(model, nnx.Param)


def kauldron(tx, params, frozen):
    """Kauldron's partial updates: what is frozen gets `set_to_zero`, by a mask."""
    labels = jax.tree.map(lambda leave: "freeze" if leave else "train", frozen)
    tx = optax.multi_transform({"train": tx, "freeze": optax.set_to_zero()}, labels)

    @jax.jit
    def step(params, opt_state):
        grads = jax.grad(loss_of)(params)
        updates, _ = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates)

    return step(params, tx.init(params))


def equinox(tx, model):
    """Equinox's and Levanter's: only what is floating point, the rest None; params by keyword."""
    trainable = functools.partial(eqx.filter, filter_spec=eqx.is_inexact_array)
    opt_state = tx.init(trainable(model))

    @eqx.filter_jit
    def step(model, opt_state):
        grads = eqx.filter_grad(lambda model: loss_of(trainable(model)))(model)
        updates, opt_state = tx.update(grads, opt_state, params=trainable(model))
        return eqx.apply_updates(model, updates)

    return step(model, opt_state)


def brax(tx, params):
    """Brax's gradients.py: gradients averaged over devices; update without the parameters."""

    def f(params, optimizer_state):
        grads = jax.lax.pmean(jax.grad(loss_of)(params), axis_name="i")
        params_update, optimizer_state = tx.update(grads, optimizer_state)
        return optax.apply_updates(params, params_update)

    stack = functools.partial(jax.tree.map, lambda x: jnp.stack([x, x]))
    trained = jax.pmap(f, axis_name="i")(stack(params), stack(tx.init(params)))
    return jax.tree.map(lambda x: x[0], trained)


class ParameterValue(struct.PyTreeNode):
    """Penzai's: an array whose name is a label, no part of the tree."""

    value: jax.Array
    label: str = struct.field(pytree_node=False)


def penzai(tx, params):
    """Penzai's basic_training.py: a tuple of parameters, unbound from their model."""

    @jax.jit
    def step(params, opt_state):
        updates, _ = tx.update(jax.grad(loss_of)(params), opt_state, params)
        return optax.apply_updates(params, updates)

    return step(params, tx.init(params))


def plain_loop(tx, params):
    """Haiku's examples, and a loop of one's own: several steps under one `jax.lax.scan`."""

    @jax.jit
    def train(params, opt_state):
        def step(carry, _):
            params, opt_state = carry
            updates, opt_state = tx.update(jax.grad(loss_of)(params), opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), None

        return jax.lax.scan(step, (params, opt_state), length=2)[0][0]

    return train(params, tx.init(params))
