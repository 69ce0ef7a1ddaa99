"""The pictures of clips.md and linalg.md: what a clip does to a spectrum, and msign in a loss.

python docs/pictures.py          # seconds; the third, of a training, is benchmarks.bounds'
"""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import rc_context
from matplotlib.figure import Figure

import muonclip_jax as mc
from examples import test_time_training
from examples.mla.figures import STYLE

FOLDER = Path(__file__).parent / "pictures"


def spectra() -> dict[str, np.ndarray]:
    """Singular values of a weight matrix [64, 96], and of what the three links make of it."""
    values = np.float32(4 * np.arange(1, 65) ** -0.7)
    left, right = (
        np.linalg.qr(np.random.default_rng(seed).normal(size=(n, 64)))[0]
        for seed, n in enumerate((64, 96))
    )
    weights = {"up": {"kernel": jnp.asarray((left * values) @ right.T, jnp.float32)}}
    links = {
        "weights": optax.identity(),
        "clip_singular_values(1)": mc.clip_singular_values(1.0),
        "cap_spectral_norm(1)": mc.cap_spectral_norm(1.0),
        "decay_spectral_norm(0.5)": mc.decay_spectral_norm(0.5),
    }
    found = {}
    for name, tx in links.items():
        zeros = jax.tree.map(jnp.zeros_like, weights)
        updates, _ = tx.update(zeros, tx.init(weights), weights)
        found[name] = mc.singular_values(optax.apply_updates(weights, updates)["up"]["kernel"])
    return found


def losses() -> dict[str, np.ndarray]:
    """The training losses of fast weights that msign steps, by which derivative of it."""
    names = {"exact": "through msign's exact derivative", "none": "the derivative left out"}
    found = test_time_training.main(test_time_training.Options())
    return {names[derivative]: np.array(curve) for derivative, (curve, _) in found.items()}


def main() -> None:
    """Draws both."""
    FOLDER.mkdir(exist_ok=True)
    with rc_context(STYLE):
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, values in spectra().items():
            axes.plot(np.arange(1, len(values) + 1), values, label=name)
        axes.set(xlabel="singular value, by size", ylabel="size", xscale="log", yscale="log")
        axes.legend()
        figure.savefig(FOLDER / "singular_values.png", dpi=110)
        figure = Figure(figsize=(5.6, 3.4), layout="constrained")
        axes = figure.subplots()
        for name, values in losses().items():
            axes.plot(values, label=name)
        axes.set(xlabel="step of training", ylabel="training loss (nats)")
        axes.legend()
        figure.savefig(FOLDER / "msign_in_a_loss.png", dpi=110)


if __name__ == "__main__":
    main()
