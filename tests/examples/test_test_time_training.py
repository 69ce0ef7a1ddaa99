"""Fast weights take their steps, and what is trained through them depends on msign's derivative."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from examples.recall import SYMBOLS, draw
from examples.test_time_training import FastWeights, Options, main


def layer(derivative):
    return FastWeights(width=4, heads=1, chunk=2, derivative=derivative, rngs=nnx.Rngs(0))


def test_against_numpy():
    x = np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)
    model = layer("exact")
    read = x[0] @ np.asarray(model.inputs.kernel[...])
    rates = np.log1p(np.exp(x[0] @ np.asarray(model.rate.kernel[...])))
    weights, expected = np.zeros((4, 4)), []
    by_chunk = (np.split(y, 3) for y in (*np.split(read, 3, -1), rates))
    for q, k, v, rate in zip(*by_chunk, strict=True):
        expected.append(q @ weights)
        u, _, vt = np.linalg.svd(k.T @ (rate * (k @ weights - v)))
        weights = weights - u[:, :2] @ vt[:2]  # two tokens: of rank two
    expected = np.concatenate(expected) @ np.asarray(model.outputs.kernel[...])
    np.testing.assert_allclose(model(jnp.asarray(x))[0], expected, atol=1e-3)  # of the steps


def test_the_derivative_passes_through_the_steps():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 6, 4)), "float32")

    def gradient(derivative):
        grads = nnx.grad(lambda model: model(x).sum())(layer(derivative))
        return np.asarray(grads.rate.kernel[...])

    assert np.abs(gradient("exact")).max() > 1e-3 and not gradient("none").any()


def test_training(capsys):
    found = main(Options(steps=3, width=8, heads=1))
    assert list(found) == ["exact", "none"]
    assert all(np.isfinite(losses).all() for losses, _ in found.values())
    assert capsys.readouterr().out.count("questions right") == 2


def test_the_task():
    """What is asked for is the latest value of the key."""
    for distinct in (True, False):
        batch = jax.tree.map(np.asarray, draw(jax.random.key(0), 4, 8, distinct))
        for keys, values, answers in zip(*batch, strict=True):
            latest = dict(zip(keys[:8], values[:8], strict=True))
            assert [latest[key] for key in keys[8:]] == answers.tolist()
            assert (values[8:] == SYMBOLS).all()
            assert len(set(keys[:8].tolist())) == 8 or not distinct
