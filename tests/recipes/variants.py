"""Optimizers of Muon's family, transcribed in float64 NumPy, a line of the source at a time.

Matrices are PyTorch's `[out, in]`, as all four sources have them: rows are neurons. Nothing of the
package is used here.

    moonlight   arXiv 2502.16982, and examples/toy_train.py of github.com/MoonshotAI/Moonlight
    normuon     arXiv 2510.05491, Algorithm 1
    muonh       arXiv 2606.16899; lib/levanter/src/levanter/optim/muonh.py of levanter
    nanochat    nanochat/optim.py of github.com/karpathy/nanochat, `muon_step_fused`
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

Quintics = Sequence[tuple[float, float, float]]
JORDAN = [(3.4445, -4.7750, 2.0315)] * 5
NANOCHAT = [
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
]


def newton_schulz(g: np.ndarray, quintics: Quintics, factor: float, eps: float) -> np.ndarray:
    """Each step X ← aX + (bA + cA²)X with A = XXᵀ, on the wide form."""
    x = g.T if g.shape[0] > g.shape[1] else g
    x = x / (np.linalg.norm(x) * factor + eps)
    for a, b, c in quintics:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if g.shape[0] > g.shape[1] else x


@dataclass
class Matrix:
    """A weight, and what its optimizer keeps."""

    w: np.ndarray
    momentum: np.ndarray = field(init=False)
    v: np.ndarray | float = 0.0

    def __post_init__(self):
        self.w = np.array(self.w, np.float64)
        self.momentum = np.zeros_like(self.w)


def moonlight(p: Matrix, g: np.ndarray, lr: float, wd: float) -> None:
    p.momentum = 0.95 * p.momentum + g
    u = newton_schulz(g + 0.95 * p.momentum, JORDAN, 1.0, 1e-7)
    adjusted = lr * 0.2 * np.sqrt(max(p.w.shape))
    p.w = p.w * (1 - lr * wd)
    p.w = p.w - adjusted * u


def normuon(p: Matrix, g: np.ndarray, lr: float, wd: float) -> None:
    m, n = p.w.shape
    p.momentum = 0.95 * p.momentum + (1 - 0.95) * g
    o = newton_schulz(p.momentum, JORDAN, 1.0, 1e-7)
    p.v = 0.95 * p.v + (1 - 0.95) * np.mean(o * o, axis=1)
    o_hat = o / (np.sqrt(p.v) + 1e-8)[:, None]
    eta_hat = 0.2 * lr * np.sqrt(m * n) / np.linalg.norm(o_hat)
    p.w = p.w - lr * wd * p.w - eta_hat * o_hat


def muonh(p: Matrix, g: np.ndarray, lr: float, wd: float) -> None:
    del wd
    p.momentum = 0.95 * p.momentum + g
    u = newton_schulz(0.95 * p.momentum + g, JORDAN, 1.0, 1e-8)
    norm = np.linalg.norm(p.w)  # which every step keeps: that of the first weights
    new = p.w - lr * u * norm / max(np.linalg.norm(u), 1e-10)
    p.w = new / np.linalg.norm(new) * norm


def nanochat(p: Matrix, g: np.ndarray, lr: float, wd: float) -> None:
    out, ins = p.w.shape
    p.momentum = p.momentum + (1 - 0.95) * (g - p.momentum)
    x = g + 0.95 * (p.momentum - g)
    target = np.linalg.norm(x) / np.sqrt(out)
    x = x * (target / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6))
    x = newton_schulz(x, NANOCHAT, 1.01, 1e-6)
    x = x * (np.sqrt(min(out, ins)) / np.linalg.norm(x))
    axis = 1 if out >= ins else 0
    v_mean = np.mean(x * x, axis=axis, keepdims=True)
    p.v = p.v + (1 - 0.95) * (v_mean - p.v)
    scaled = x / np.sqrt(np.maximum(p.v, 1e-10))
    x = scaled * (np.linalg.norm(x) / np.linalg.norm(scaled))
    lr = lr * max(1.0, out / ins) ** 0.5
    mask = x * p.w >= 0
    p.w = p.w - (lr * x + lr * wd * p.w * mask)


def adam(
    w: np.ndarray, grads: Sequence[np.ndarray], lr: float, wd: float, b1: float, eps: float
) -> np.ndarray:
    """AdamW with b2 = 0.95, over all steps."""
    w = np.array(w, np.float64)
    m = v = 0.0
    for t, g in enumerate(grads, 1):
        m, v = b1 * m + (1 - b1) * g, 0.95 * v + (1 - 0.95) * g * g
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - 0.95**t)) + eps)
        w = w - lr * (step + wd * w)
    return w
