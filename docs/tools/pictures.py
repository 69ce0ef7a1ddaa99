"""The pictures of clips.md, linalg.md and scaling.md: what a clip does to a spectrum, msign in a
loss, and whose activations grow with the width.

python -m docs.tools.pictures   # a minute; clips.md's of a training is benchmarks.bounds'
"""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from matplotlib import rc_context
from matplotlib.figure import Figure

import muonclip_jax as mc
from examples import test_time_training
from examples.mla.figures import STYLE

FOLDER = Path(__file__).parents[1] / "pictures"


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


BASE = 64  # the width that muP's ratios start from
HEAD = 32  # features of a head, at every width
TOKENS = jax.random.randint(jax.random.key(0), (4, 17), 0, 64)
SHOWN = ("embed", "query", "attn", "down")


class Block(nn.Module):
    """Attention and MLP of a width."""

    width: int

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(self.width // HEAD, use_bias=False, name="attn")
        normed = nn.RMSNorm(name="attn_norm")(x)
        x = x + attention(normed, mask=nn.make_causal_mask(x[..., 0]))
        up = nn.Dense(4 * self.width, use_bias=False, name="up")(nn.RMSNorm(name="mlp_norm")(x))
        return x + nn.Dense(self.width, use_bias=False, name="down")(nn.relu(up))


class Transformer(nn.Module):
    """Two blocks. In muP the unembedding keeps its first standard deviation, and logits are
    multiplied by what `mc.scaling.transfer` gives."""

    width: int
    mup: bool

    @nn.compact
    def __call__(self, tokens):
        init = nn.initializers.normal
        x = nn.Embed(64, self.width, embedding_init=init(1.0), name="embed")(tokens)
        for i in range(2):
            x = Block(self.width, name=f"block_{i}")(x)
        std = (BASE if self.mup else self.width) ** -0.5
        unembed = nn.Dense(64, use_bias=False, kernel_init=init(std), name="unembed")
        return unembed(nn.RMSNorm(name="norm")(x)) * (BASE / self.width if self.mup else 1.0)


def transformer(width: int, mup: bool = False):
    """The model as `mc.coordinate_check` takes it."""
    model, inputs, targets = Transformer(width, mup), TOKENS[:, :-1], TOKENS[:, 1:]

    def loss(params):
        logits, sown = model.apply(
            {"params": params}, inputs, capture_intermediates=lambda module, _: module.name in SHOWN
        )
        value = optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()
        return value, {**sown["intermediates"], "logits": logits}

    return lambda key: model.init(key, inputs)["params"], loss


def coordinates() -> dict[str, mc.CoordinateCheck]:
    """Changes of activations over widths, at one rate and under muP's, of Adam and of Muon."""
    muon = functools.partial(mc.muon, weight_decay=0.0)
    mup = functools.partial(muon, 4e-3, other_learning_rate=2e-3, update_rms="unit_rms_norm")
    whole = {"layout": mc.layouts.mha(), "granularity": mc.Granularity({"o": "all"})}
    runs = {
        "Adam, one rate": (False, lambda width: optax.adam(1e-3)),
        "Muon, match_adam, one rate": (False, lambda width: muon(2e-3)),
        "muP, outputs per head": (True, lambda width: mup()),
        "muP, outputs whole": (True, lambda width: mup(**whole)),
    }
    return {
        name: mc.coordinate_check(
            functools.partial(transformer, mup=is_mup), optimizer, (64, 128, 256), steps=3
        )
        for name, (is_mup, optimizer) in runs.items()
    }


def main() -> None:
    """Draws them."""
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
    checks = coordinates()
    mc.plots.coordinates(checks).savefig(FOLDER / "coordinates.png", dpi=110)
    for name, check in checks.items():
        print(name, check, sep="\n")


if __name__ == "__main__":
    main()
