"""The spectra of weights and of their next updates, and how the two meet."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from examples.mla.data import TokenizedText
from studies.common.model import ModelConfig
from studies.common.optimizers import Optimizer
from studies.common.training import Setting, State, loss_and_sown

KERNELS = {
    "q": ("attn", "wq"),
    "k": ("attn", "wk"),
    "v": ("attn", "wv"),
    "o": ("attn", "wo"),
    "up": ("mlp", "up"),
    "down": ("mlp", "down"),
}
TOP = 8  # singular pairs of a weight that are followed


def measure(
    setting: Setting, state: State, batch: jax.Array, _text: TokenizedText
) -> dict[str, Any]:
    """Kernel by kernel, what `meeting` says of the weights and their next update."""
    model, optimizer = setting
    both = next_updates(model, optimizer, state.params, state.opt_state, batch)
    return {"kernels": {name: meeting(*pair) for name, pair in jax.device_get(both).items()}}


@partial(jax.jit, static_argnames="config")
def next_updates(
    config: ModelConfig, optimizer: Optimizer, params: Any, opt_state: Any, batch: jax.Array
) -> dict[str, tuple[jax.Array, jax.Array]]:
    """Kernel → weights and next updates, `[layers, in, out]`. Without the weight decay, which is
    along the weights themselves: what is asked is where the optimizer goes."""
    grads, sown = jax.grad(loss_and_sown, has_aux=True)(params, config, batch)
    tx = replace(optimizer, weight_decay=0.0).chain(config)
    updates, _ = tx.update(grads, opt_state, params, max_logits=sown)
    return {
        name: tuple(tree["layers"][block][kernel]["kernel"] for tree in (params, updates))
        for name, (block, kernel) in KERNELS.items()
    }


def meeting(weights: np.ndarray, updates: np.ndarray) -> dict[str, np.ndarray]:
    """Of weights W and updates D, `[layers, in, out]`, with W = Σ σᵢ uᵢ vᵢᵀ; by NumPy in float64.

    Returns:
      `[layers]` each: the entropies of the spectra, `-Σ p log p / log n` with p = σ² / Σσ² (as in
      Moonlight); D's effective rank over n, with p = σ / Σσ; both spectral norms and D's Frobenius
      norm; and `projections` `[layers, TOP]`, uᵢᵀ D vᵢ, by which σᵢ grows to first order. D's own
      singular vectors would not do: all of its singular values are nearly equal under Muon, so that
      they are any basis.
    """
    weights, updates = np.float64(weights), np.float64(updates)
    if not (np.isfinite(weights).all() and np.isfinite(updates).all()):
        raise FloatingPointError("The run diverged, and has no spectra; lower its learning rate.")
    n = min(weights.shape[-2:])
    u, of_weights, vt = np.linalg.svd(weights, full_matrices=False)
    of_updates = np.linalg.svd(updates, compute_uv=False)
    top = np.einsum("lni,lnm,lim->li", u[..., :TOP], updates, vt[:, :TOP])
    return {
        "weight_entropy": entropy(of_weights**2) / np.log(n),
        "update_entropy": entropy(of_updates**2) / np.log(n),
        "update_rank": np.exp(entropy(of_updates)) / n,
        "weight_norm": of_weights[:, 0],
        "update_norm": of_updates[:, 0],
        "update_frobenius": np.linalg.norm(of_updates, axis=-1),
        "projections": top,
    }


def entropy(weights: np.ndarray) -> np.ndarray:
    """-Σ p log p of weights `[layers, n]`, p being their shares."""
    shares = weights / weights.sum(axis=-1, keepdims=True)
    return -np.sum(shares * np.log(np.maximum(shares, np.finfo(float).tiny)), axis=-1)
