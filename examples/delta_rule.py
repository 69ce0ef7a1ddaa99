"""A DeltaNet layer: linear attention that writes by the delta rule, in chunks.

    python -m examples.delta_rule

The memory S `[values, keys]` is corrected at each token by what it got wrong:
S ← S + β(v − Sk)kᵀ. Token by token that is a scan of as many steps. In chunks of c tokens all
corrections of a chunk are U = T⁻¹β(V − KSᵀ), T being triangular (docs/explanation/linalg.md):
products, and a scan of c times fewer steps. Trained on pairs of which keys come again with another
value, so that the memory has to forget.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import tyro
from flax import nnx
from jax import lax

import muonclip_jax as mc
from examples.recall import Reader, accuracy, draw, train


def recurrent(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array) -> jax.Array:
    """Token by token. q, k `[..., time, d]`, v `[..., time, e]`, beta `[..., time]` → as v."""

    def step(memory, token):
        q, k, v, beta = token
        error = v - jnp.einsum("...ed,...d->...e", memory, k)
        memory = memory + beta[..., None, None] * error[..., :, None] * k[..., None, :]
        return memory, jnp.einsum("...ed,...d->...e", memory, q)

    memory = jnp.zeros((*v.shape[:-2], v.shape[-1], k.shape[-1]), v.dtype)
    tokens = (*(jnp.moveaxis(x, -2, 0) for x in (q, k, v)), jnp.moveaxis(beta, -1, 0))
    return jnp.moveaxis(lax.scan(step, memory, tokens)[1], 0, -2)


def chunked(q: jax.Array, k: jax.Array, v: jax.Array, beta: jax.Array, size: int) -> jax.Array:
    """The same, `size` tokens at a time; `size` divides the time."""

    def in_chunks(x):
        return x.reshape(*x.shape[:-2], -1, size, x.shape[-1])

    q, k, v, beta = (in_chunks(x) for x in (q, k, v, beta[..., None]))
    inverse = mc.linalg.inverse_low_rank_triangular(jnp.ones_like(beta[..., 0]), beta * k, k)
    written, read = inverse @ (beta * v), inverse @ (beta * k)
    inside = jnp.tril(q @ k.mT)

    def step(memory, chunk):
        q, k, written, read, inside = chunk
        corrections = written - read @ memory.mT
        return memory + corrections.mT @ k, q @ memory.mT + inside @ corrections

    memory = jnp.zeros((*v.shape[:-3], v.shape[-1], k.shape[-1]), v.dtype)
    chunks = tuple(jnp.moveaxis(x, -3, 0) for x in (q, k, written, read, inside))
    return jnp.moveaxis(lax.scan(step, memory, chunks)[1], 0, -3).reshape(
        *v.shape[:-3], -1, v.shape[-1]
    )


class DeltaNet(nnx.Module):
    """One layer with so many heads. Keys have norm 1, so that β = 1 replaces what was stored."""

    def __init__(self, width: int, heads: int, chunk: int | None, rngs: nnx.Rngs):
        self.heads, self.chunk = heads, chunk
        self.inputs = nnx.Linear(width, 3 * width, use_bias=False, rngs=rngs)
        self.beta = nnx.Linear(width, heads, rngs=rngs)
        self.outputs = nnx.Linear(width, width, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        by_head = self.inputs(x).reshape(*x.shape[:-1], 3, self.heads, -1)
        q, k, v = jnp.moveaxis(by_head, (-3, -2), (0, -3))  # [batch, heads, time, features] each
        k = k / (jnp.linalg.norm(k, axis=-1, keepdims=True) + 1e-6)
        beta = jax.nn.sigmoid(self.beta(x)).swapaxes(-1, -2)
        run = recurrent if self.chunk is None else functools.partial(chunked, size=self.chunk)
        return self.outputs(run(q, k, v, beta).swapaxes(-2, -3).reshape(x.shape))


@dataclass(frozen=True)
class Options:
    """A layer of linear attention by the delta rule, trained on recall."""

    steps: int = 300
    width: int = 64
    heads: int = 2
    pairs: int = 32
    """Of a key and a value, keys coming again; then as many questions."""
    chunk: int = 16
    """Tokens at a time."""


def main(options: Options) -> tuple[list[float], float, float]:
    """The losses, the share of right answers, and how far chunks are from token by token."""
    rngs = nnx.Rngs(0)
    layer = DeltaNet(options.width, options.heads, options.chunk, rngs)
    model = Reader(layer, options.width, rngs)
    batch = functools.partial(draw, pairs=options.pairs, distinct=False)
    losses = train(model, options.steps, batch)
    unseen = batch(jax.random.key(10**6), size=256)
    right = accuracy(model, unseen)
    in_chunks, layer.chunk = model(unseen), None
    apart = float(jnp.abs(model(unseen) - in_chunks).max() / jnp.abs(in_chunks).max())
    print(f"loss {losses[0]:.3f} → {losses[-1]:.3f}; {right:.1%} of unseen questions right")
    print(f"chunks of {options.chunk} and token by token differ by {apart:.1e} of the logits")
    return losses, right, apart


if __name__ == "__main__":
    main(tyro.cli(Options))
