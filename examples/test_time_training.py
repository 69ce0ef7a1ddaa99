"""Test-time training: fast weights that take a step of Muon for each chunk that the model reads.

    python -m examples.test_time_training

A head's memory is a matrix W. For each chunk of keys K and values V it takes the gradient of
½‖KW − V‖², each token at a rate of its own, and steps along its matrix sign, W ← W − msign(∇), as
"Test-Time Training Done Right" (arXiv 2505.23884) does. The whole is trained through these steps:
the exact derivative of msign carries what later questions need back to the keys and values that
were stored. It is trained once with this derivative and once without, as if msign were a constant.
"""

from dataclasses import dataclass
from typing import Literal

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax import lax

import muonclip_jax as mc
from examples.recall import Reader, accuracy, draw, train

Derivative = Literal["exact", "none"]


class FastWeights(nnx.Module):
    """One layer with so many heads, whose weights W `[keys, values]` are updated as it reads."""

    def __init__(self, width: int, heads: int, chunk: int, derivative: Derivative, rngs: nnx.Rngs):
        self.heads, self.chunk, self.derivative = heads, chunk, derivative
        self.inputs = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.rate = nnx.Linear(width, heads, rngs=rngs)
        self.outputs = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        chunks = x.reshape(x.shape[0], -1, self.chunk, x.shape[-1])  # batch, chunks, time, width
        by_head = self.inputs(chunks).reshape(*chunks.shape[:-1], 3, self.heads, -1)
        rates = jax.nn.softplus(self.rate(chunks))[..., None]  # each token has its own
        # The scan's axis comes first: chunks, batch, heads, time, features.
        q, k, v = jnp.moveaxis(by_head, (3, 1, 4), (0, 1, 3))
        rates = jnp.moveaxis(rates, (1, 3), (0, 2))
        weights = jnp.zeros((*q.shape[1:3], q.shape[-1], q.shape[-1]), x.dtype)
        outputs = lax.scan(self.read, weights, (q, k, v, rates))[1]
        return self.outputs(jnp.moveaxis(outputs, (0, 2), (1, 3)).reshape(x.shape))

    def read(self, weights: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        """What the weights of before say of a chunk's queries, and the weights after it."""
        q, k, v, rate = chunk
        gradient = k.mT @ (rate * (k @ weights - v))
        # A chunk of few tokens has a gradient of low rank. What rounding adds to it, 1e-7 of the
        # largest singular value, stays far below `lower` and so counts as nothing.
        step = mc.linalg.msign(gradient, lower=1e-3)
        if self.derivative == "none":
            step = lax.stop_gradient(step)
        return weights - step, q @ weights


@dataclass(frozen=True)
class Options:
    """Fast weights updated by msign, trained on recall, with and without its derivative."""

    steps: int = 150
    width: int = 64
    heads: int = 2
    chunk: int = 8
    """Tokens for each step of the fast weights."""


def main(options: Options) -> dict[Derivative, tuple[list[float], float]]:
    found: dict[Derivative, tuple[list[float], float]] = {}
    for derivative in ("exact", "none"):
        rngs = nnx.Rngs(0)
        layer = FastWeights(options.width, options.heads, options.chunk, derivative, rngs)
        model = Reader(layer, options.width, rngs)
        losses = train(model, options.steps, draw)
        right = accuracy(model, draw(jax.random.key(10**6), size=256))
        found[derivative] = losses, right
        print(
            f"derivative of msign {derivative:>5}: loss {losses[0]:.3f} → {losses[-1]:.3f}; "
            f"{right:.1%} of unseen questions right",
            flush=True,
        )
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
