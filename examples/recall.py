"""Associative recall: pairs of a key and a value are read, then keys are asked for.

What linear attention and fast weights are compared on: all of the past has to go through one
matrix. A position has a key, and a value or the question what it was.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import muonclip_jax as mc

SYMBOLS = 16  # keys, and values
QUESTION = SYMBOLS  # in place of a value


class Batch(NamedTuple):
    """Attributes: keys `[batch, time]`, values with questions among them, and what is asked for."""

    keys: jax.Array
    values: jax.Array
    answers: jax.Array


def draw(seed: jax.Array, size: int = 32, pairs: int = 16, distinct: bool = True) -> Batch:
    """So many pairs, then as many questions. Keys that are not distinct have their latest value."""
    for_keys, for_values, for_questions = jax.random.split(seed, 3)
    if distinct:
        order = jnp.broadcast_to(jnp.arange(SYMBOLS), (size, SYMBOLS))
        keys = jax.random.permutation(for_keys, order, axis=1, independent=True)[:, :pairs]
    else:
        keys = jax.random.randint(for_keys, (size, pairs), 0, SYMBOLS)
    values = jax.random.randint(for_values, (size, pairs), 0, SYMBOLS)
    places = jax.random.randint(for_questions, (size, pairs), 0, pairs)
    asked = jnp.take_along_axis(keys, places, 1)
    latest = jnp.where(keys[:, None] == asked[..., None], jnp.arange(pairs), -1).max(-1)
    return Batch(
        jnp.concatenate([keys, asked], 1),
        jnp.concatenate([values, jnp.full_like(asked, QUESTION)], 1),
        jnp.take_along_axis(values, latest, 1),
    )


class Reader(nnx.Module):
    """Embeddings, one layer that remembers, and what the answers are read from."""

    def __init__(self, memory: nnx.Module, width: int, rngs: nnx.Rngs):
        self.keys = nnx.Embed(SYMBOLS, width, rngs=rngs)
        self.values = nnx.Embed(SYMBOLS + 1, width, rngs=rngs)
        self.memory = memory
        self.head = nnx.Linear(width, SYMBOLS, rngs=rngs)

    def __call__(self, batch: Batch) -> jax.Array:
        """Logits of the answers, `[batch, questions, SYMBOLS]`."""
        x = self.keys(batch.keys) + self.values(batch.values)
        return self.head(self.memory(x))[:, -batch.answers.shape[1] :]


def train(
    model: Reader, steps: int, batch: Callable[[jax.Array], Batch], learning_rate: float = 3e-2
) -> list[float]:
    """Trains with Muon, AdamW's share at a tenth of its rate, and gives the loss of each step."""
    schedule = optax.cosine_decay_schedule(learning_rate, steps)
    tx = mc.muon(
        schedule,
        other_learning_rate=optax.cosine_decay_schedule(learning_rate / 3, steps),
        weight_decay=0.0,
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model: Reader, optimizer: nnx.Optimizer, seed: jax.Array) -> jax.Array:
        def loss(model: Reader) -> jax.Array:
            drawn = batch(seed)
            return optax.softmax_cross_entropy_with_integer_labels(
                model(drawn), drawn.answers
            ).mean()

        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer, jax.random.key(number))) for number in range(steps)]


def accuracy(model: Reader, batch: Batch) -> float:
    """The share of questions that are answered right."""
    return float((model(batch).argmax(-1) == batch.answers).mean())
