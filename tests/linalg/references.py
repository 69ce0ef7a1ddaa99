"""Matrices of known singular values or eigenvalues, and what float64 NumPy makes of them."""

import numpy as np


def rectangular(seed, *shape, values=None):
    """`[..., n, m]` with these singular values; 0.5 to 2 where none are given."""
    u, _, vt = np.linalg.svd(np.random.default_rng(seed).normal(size=shape), full_matrices=False)
    values = np.linspace(0.5, 2, min(shape[-2:])) if values is None else np.asarray(values)
    return (u * values) @ vt


def symmetric(seed, *shape, values=None):
    """`[..., n, n]` with these eigenvalues; 0.3 to 2 where none are given."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=shape))
    values = np.linspace(0.3, 2, shape[-1]) if values is None else np.asarray(values)
    return (q * values) @ np.swapaxes(q, -1, -2)


def general(seed, values):
    """`[n, n]` with these real eigenvalues, and its sign."""
    noise = np.random.default_rng(seed).normal(size=(len(values), len(values)))
    p = noise / np.linalg.norm(noise, 2) + 1.5 * np.eye(len(values))  # condition at most 5
    inverse = np.linalg.inv(p)
    return p * np.asarray(values) @ inverse, p * np.sign(values) @ inverse


def on_singular_values(x, fn):
    u, values, vt = np.linalg.svd(np.asarray(x, np.float64), full_matrices=False)
    return (u * fn(values)[..., None, :]) @ vt


def on_eigenvalues(x, fn):
    values, vectors = np.linalg.eigh(np.asarray(x, np.float64))
    return (vectors * fn(values)[..., None, :]) @ np.swapaxes(vectors, -1, -2)


def distance(got, expected):
    """In the spectral norm, of the expected one's."""
    expected = np.asarray(expected, np.float64)
    difference = np.asarray(got, np.float64) - expected
    largest = np.linalg.norm(expected, 2, axis=(-2, -1)).max()
    return np.linalg.norm(difference, 2, axis=(-2, -1)).max() / largest
