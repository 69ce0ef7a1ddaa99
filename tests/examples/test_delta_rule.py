"""The delta rule in chunks is the delta rule, and learns."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from examples.delta_rule import Options, chunked, main, recurrent


def tokens(time=24):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(2, time, 4)), "float32") for _ in range(3))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    return q, k, v, jnp.asarray(rng.uniform(size=(2, time)), "float32")


def with_gradients(run):
    """Outputs, and the gradients by keys and β of a sum over 24 tokens."""
    q, k, v, beta = tokens()
    weights = jnp.cos(jnp.arange(24.0))[:, None]

    def total(k, beta):
        out = run(q, k, v, beta)
        return jnp.sum(weights * out), out

    (_, out), gradients = jax.jit(jax.value_and_grad(total, (0, 1), has_aux=True))(k, beta)
    return out, gradients


def test_chunks_are_the_recurrence():
    out, gradients = with_gradients(recurrent)
    for size in (6, 24):
        in_chunks, their_gradients = with_gradients(functools.partial(chunked, size=size))
        np.testing.assert_allclose(in_chunks, out, atol=1e-5)
        for got, expected in zip(their_gradients, gradients, strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_the_rule_by_hand():
    """A key that comes again with β = 1 has its new value."""
    k = jnp.array([[1.0, 0], [0, 1], [1, 0], [1, 0]])
    v = jnp.array([[1.0], [2], [3], [0]])
    read = recurrent(k, k, v, jnp.array([1.0, 1, 1, 0]))
    np.testing.assert_allclose(read[:, 0], [1, 2, 3, 3])


def test_training(capsys):
    losses, right, apart = main(Options(steps=3, width=16, heads=1, pairs=8, chunk=4))
    assert np.isfinite(losses).all() and 0 <= right <= 1
    assert apart < 1e-5
    assert "token by token differ by" in capsys.readouterr().out
