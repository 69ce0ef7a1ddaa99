"""MuonClip as published, transcribed in float64 NumPy, one line of the source at a time.

Source: Su Jianlin, "QK-Clip" (spaces.ac.cn/archives/11126), the box "MuonClip"; the same in the
Kimi K2 report, arXiv 2507.20534, Algorithm 1. Nothing of the package is used here.

A kernel is a matrix `[in, out]` as it is stored, with its heads side by side: `[in, heads *
features]`. W in the source is n × m, and both formulas that use n and m are the same for either
order of the axes.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

Kernels = dict[str, np.ndarray]
Clip = Callable[[Kernels, np.ndarray], None]


@dataclass(frozen=True)
class Settings:
    """The numbers of the box."""

    learning_rate: float  # η
    weight_decay: float  # λ
    momentum: float  # μ
    threshold: float  # τ


def msign(m: np.ndarray) -> np.ndarray:
    """U Vᵀ of the singular value decomposition U S Vᵀ."""
    u, _, vt = np.linalg.svd(m, full_matrices=False)
    return u @ vt


def step(
    weights: Kernels, momenta: Kernels, grads: Mapping[str, np.ndarray], settings: Settings
) -> tuple[Kernels, Kernels]:
    """The three lines above the clip: (weights, momenta) after one step."""
    new_weights, new_momenta = {}, {}
    for name, w in weights.items():
        n, m = w.shape
        momentum = settings.momentum * momenta[name] + grads[name].astype(np.float64)
        o = msign(momentum) * np.sqrt(max(n, m)) * 0.2
        new_weights[name] = w - settings.learning_rate * (o + settings.weight_decay * w)
        new_momenta[name] = momentum
    return new_weights, new_momenta


def gammas(maxima: np.ndarray, threshold: float) -> np.ndarray:
    """τ / S of every head above τ, 1 of the others."""
    return np.array([threshold / s if s > threshold else 1.0 for s in maxima])


def clip_plain(weights: Kernels, gamma: np.ndarray, *, query: str, key: str, features: int) -> None:
    """The clip of plain attention, in place: queries `[in, heads * features]`, keys `[in, kv_heads
    * features]`. A key of its own takes half of it; of a key that heads share the queries take
    all."""
    heads, kv_heads = (weights[name].shape[1] // features for name in (query, key))
    for head, g in enumerate(gamma):
        own = slice(head * features, (head + 1) * features)
        if heads == kv_heads:
            weights[query][:, own] *= np.sqrt(g)
            weights[key][:, own] *= np.sqrt(g)
        else:
            weights[query][:, own] *= g


def clip_latent(
    weights: Kernels, gamma: np.ndarray, *, query: str, key_value: str, nope: int, rope: int, v: int
) -> None:
    """The clip of multi-head latent attention, in place: W_qc and W_qr side by side in each head of
    the queries, W_kc and W_v in each head of the keys and values. W_kr is left alone."""
    for head, g in enumerate(gamma):
        q, kv = head * (nope + rope), head * (nope + v)
        weights[query][:, q : q + nope] *= np.sqrt(g)
        weights[query][:, q + nope : q + nope + rope] *= g
        weights[key_value][:, kv : kv + nope] *= np.sqrt(g)


def train(
    weights: Mapping[str, np.ndarray],
    grads: list[dict[str, np.ndarray]],
    maxima: list[np.ndarray],
    settings: Settings,
    clip: Clip,
) -> Kernels:
    """The weights after as many steps as there are gradients.

    Args:
      weights: The first ones; not changed.
      grads: Of each step.
      maxima: Of each step, one number a head: S_max.
      settings: The box's numbers.
      clip: Scales weights in place by γ of every head, after the step.
    """
    current = {name: w.astype(np.float64) for name, w in weights.items()}
    momenta = {name: np.zeros_like(w) for name, w in current.items()}
    for grad, s in zip(grads, maxima, strict=True):
        current, momenta = step(current, momenta, grad, settings)
        clip(current, gammas(s, settings.threshold))
    return current
