"""The rows of the contract: every link and recipe, as a user builds it.

A new link is covered by one more row of `LINKS`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import muonclip_jax as mc

# Whole float32 products: what is compared are wrappers, not iterations, which have tests of their
# own; and it compiles fastest.
FLOAT32 = mc.NewtonSchulz(dtype="float32", method="standard")

LAYOUT = mc.layouts.mha()
HEADS = 2


def _random(*shape: int) -> np.ndarray:
    rng = np.random.default_rng(shape)
    return (0.5 * rng.standard_normal(shape)).astype(np.float32)


def model() -> dict[str, Any]:
    """A model with one of everything: embedding, norm, attention with biases, MLP, unembedding."""
    project = lambda: {"kernel": _random(8, HEADS, 4), "bias": _random(HEADS, 4)}  # noqa: E731
    return {
        "embed": {"embedding": _random(32, 8)},
        "block": {
            "norm": {"scale": np.ones(8, np.float32)},
            "attn": {
                "query": project(),
                "key": project(),
                "value": project(),
                "out": {"kernel": _random(HEADS, 4, 8), "bias": _random(8)},
            },
            "mlp": {"kernel": _random(8, 4), "bias": _random(4)},
        },
        "lm_head": {"kernel": _random(8, 32)},
    }


def matrices() -> dict[str, Any]:
    """Only what Muon takes."""
    return {"up": {"kernel": _random(8, 4)}, "down": {"kernel": _random(4, 8)}}


@dataclass(frozen=True)
class Link:
    """One link or recipe.

    Attributes:
      name: For the cell's name.
      make: The public function.
      numbers: Its hyper-parameters, those that `optax.inject_hyperparams` may inject.
      options: Its other arguments.
      params: Makes its parameters, nested dicts of NumPy arrays.
      signal: The argument of `update` that brings maxima; the attention module sows under it.
      place: Whether it takes `shardings=`.
      tolerance: Of runs that round at other places, relative to the largest entry. float32 products
        in another order of summation differ by 1e-6; the iteration takes that of small singular
        values up to a tenfold. Momentum in bfloat16 is rounded to 4e-3, in 8 bits to 8e-3.
    """

    name: str
    make: Callable[..., optax.GradientTransformation]
    numbers: Mapping[str, float] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    params: Callable[[], dict[str, Any]] = model
    signal: str | None = None
    place: bool = False
    tolerance: float = 2e-5

    def arguments(self, shardings: Any = None) -> dict[str, Any]:
        """What `make` is called with."""
        placed = {"shardings": shardings} if self.place and shardings is not None else {}
        return {**self.numbers, **self.options, **placed}

    def extra(self, step: int = 0) -> dict[str, Any]:
        """The update's further arguments: maxima, of which one head's is above the threshold."""
        if self.signal is None:
            return {}
        maxima = np.array([20.0 + step, 0.5], np.float32)
        return {self.signal: {"block": {"attn": {self.signal: jnp.asarray(maxima)}}}}

    def grads(self, step: int = 0) -> dict[str, Any]:
        """Gradients like the parameters, others at every step."""

        def one(x: np.ndarray) -> np.ndarray:
            rng = np.random.default_rng((step, *x.shape))
            return rng.standard_normal(x.shape).astype(np.float32)

        return jax.tree.map(one, self.params())


def _accumulated(learning_rate, threshold, newton_schulz=FLOAT32, shardings=None):
    chain = mc.muonclip(
        learning_rate,
        layout=LAYOUT,
        threshold=threshold,
        newton_schulz=newton_schulz,
        shardings=shardings,
        other=optax.trace(0.9),
    )
    return mc.accumulate(chain, every=2)


def _partitioned(momentum, layout, shardings=None):
    def links(numbers):
        return mc.scale_by_muon(
            momentum, newton_schulz=FLOAT32, dimension_numbers=numbers, shardings=shardings
        )

    return mc.partition_matrices(links, optax.trace(0.9), layout=layout)


_EXACT = {"newton_schulz": FLOAT32}
_TWO_RATES = {"learning_rate": 0.01, "other_learning_rate": 0.001}
_ONCE = {"iterations": 1}
_LAYOUT = {"layout": LAYOUT}
# In place of Adam, which does not itself keep to strict promotion.
_TRACE = {"other": optax.trace(0.9)}

LINKS = [
    Link("scale_by_muon", mc.scale_by_muon, {"momentum": 0.9}, _EXACT, matrices, place=True),
    Link(
        "scale_by_muon corrected",
        mc.scale_by_muon,
        {"momentum": 0.9},
        _EXACT | {"bias_correction": True, "mu_dtype": "bfloat16"},
        matrices,
        place=True,
        tolerance=5e-3,
    ),
    Link(
        "scale_by_muon in 8 bits",
        mc.scale_by_muon,
        {"momentum": 0.9},
        _EXACT | {"mu_dtype": "int8"},
        matrices,
        place=True,
        tolerance=2e-2,
    ),
    Link(
        "scale_by_orthogonalization",
        mc.scale_by_orthogonalization,
        options=_EXACT,
        params=matrices,
        place=True,
    ),
    Link(
        "scale_by_periodic_orthogonalization",
        mc.scale_by_periodic_orthogonalization,
        {"block_scale": 0.5},
        _EXACT | {"period": 2, "blocks": (2, 2)},
        matrices,
        place=True,
    ),
    Link("scale_by_update_rms", mc.scale_by_update_rms, params=matrices),
    Link("normalize_rms", mc.normalize_rms, {"rms": 0.2}, {"of": "both"}, matrices, place=True),
    Link(
        "scale_by_neuron_rms",
        mc.scale_by_neuron_rms,
        {"b2": 0.9, "eps": 1e-8},
        {"keep_rms": True},
        matrices,
        place=True,
    ),
    Link(
        "add_decayed_weights",
        mc.add_decayed_weights,
        {"weight_decay": 0.1},
        _LAYOUT | {"cautious": True},
    ),
    Link("partition_matrices", _partitioned, {"momentum": 0.9}, _LAYOUT, place=True),
    Link("muon_direction", mc.muon_direction, {"momentum": 0.9}, _EXACT | _TRACE, place=True),
    Link("muon", mc.muon, {"learning_rate": 0.01, "momentum": 0.9}, _EXACT | _LAYOUT, place=True),
    Link(
        "muonclip",
        mc.muonclip,
        {"learning_rate": 0.01, "threshold": 10.0, "weight_decay": 0.1},
        _EXACT | _LAYOUT,
        signal="max_logits",
        place=True,
    ),
    Link(
        "kimi_muonclip",
        mc.kimi_muonclip,
        {"learning_rate": 0.01, "threshold": 10.0, "weight_decay": 0.1},
        _EXACT | _LAYOUT,
        signal="max_logits",
        place=True,
    ),
    Link("moonlight", mc.moonlight, {"learning_rate": 0.01}, _EXACT | _LAYOUT, place=True),
    Link("normuon", mc.normuon, {"learning_rate": 0.01, "b2": 0.9}, _EXACT | _LAYOUT, place=True),
    Link("muonh", mc.muonh, _TWO_RATES, _EXACT | _LAYOUT, place=True),
    Link("nanochat", mc.nanochat, _TWO_RATES, _EXACT | _LAYOUT, place=True),
    Link("qk_clip", mc.qk_clip, {"threshold": 10.0, "alpha": 0.5}, _LAYOUT, signal="max_logits"),
    Link(
        "clip_by_signal",
        mc.clip_by_signal,
        {"threshold": 10.0},
        _LAYOUT | {"signal": "max_output", "factors": lambda block, gamma: {"o": gamma}},
        signal="max_output",
    ),
    Link(
        "qk_clip until a step",
        mc.qk_clip,
        {"alpha": 0.5},
        _LAYOUT | {"threshold": lambda step: jnp.where(step < 2, 10.0, jnp.inf)},
        signal="max_logits",
    ),
    Link("max_output_clip", mc.max_output_clip, {"threshold": 10.0}, _LAYOUT, signal="max_output"),
    Link(
        "clip_singular_values",
        mc.clip_singular_values,
        {"limit": 0.5},
        _EXACT,
        params=matrices,
        place=True,
    ),
    Link("cap_spectral_norm", mc.cap_spectral_norm, {"limit": 0.5}, _ONCE, place=True),
    Link("decay_spectral_norm", mc.decay_spectral_norm, {"rate": 0.5}, _ONCE, place=True),
    Link("hyperball", mc.hyperball, {"learning_rate": 0.1}, params=matrices, place=True),
    Link("scale_by_quack", mc.scale_by_quack, {"relative_learning_rate": 0.5}, _LAYOUT),
    Link(
        "quack",
        mc.quack,
        {"learning_rate": 0.01, "weight_decay": 0.1},
        _LAYOUT | {"direction": mc.muon_direction(**_LAYOUT, **_EXACT, **_TRACE)},
    ),
    Link(
        "accumulate",
        _accumulated,
        {"learning_rate": 0.01, "threshold": 10.0},
        _EXACT,
        signal="max_logits",
        place=True,
    ),
]
