"""Muon's family: one chain, of which a method changes a link or two."""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import optax

import muonclip_jax as mc
from studies.common.optimizers import KINDS, NUMBERS, Optimizer

Method = Literal[
    "AdamW",
    "Muon",
    "Muon, each head",
    "Muon, two heads",
    "NorMuon",
    "MuonEq",
    "Muon+",
    "cautious decay",
    "Hyperball",
]
HEADS = {"Muon, each head": mc.Granularity(), "Muon, two heads": mc.Granularity(2)}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(*NUMBERS, "rate_of_others"),
    meta_fields=(*KINDS, "method"),
)
@dataclass(frozen=True)
class Member(Optimizer):
    """A method for the hidden matrices, at `learning_rate`; Adam for all others, at a rate of its
    own that warms up and falls as that one does."""

    method: Method = "Muon"
    rate_of_others: float = 1e-2

    def _recipe(self, layout: mc.Layout | None) -> optax.GradientTransformation:
        other = optax.chain(
            optax.scale_by_adam(b1=0.9, b2=0.95),
            mc.add_decayed_weights(self.weight_decay),
            optax.scale_by_learning_rate(self._others),
        )
        granularity = HEADS.get(self.method, mc.Granularity.kimi_k2())  # whole kernels
        return mc.partition_matrices(self._links, other, layout=layout, granularity=granularity)

    def _links(self, numbers) -> optax.GradientTransformation:
        direction = self._direction(numbers)
        if self.method == "Hyperball":
            return optax.chain(direction, mc.hyperball(self.rate, dimension_numbers=numbers))
        decay = mc.add_decayed_weights(
            self.weight_decay, cautious=self.method == "cautious decay", dimension_numbers=numbers
        )
        return optax.chain(direction, decay, optax.scale_by_learning_rate(self.rate))

    def _direction(self, numbers) -> optax.GradientTransformation:
        """Updates of RMS 0.2, Adam's."""
        muon = mc.scale_by_muon(dimension_numbers=numbers)
        match self.method:
            case "AdamW":
                return optax.scale_by_adam(b1=0.9, b2=0.95)
            case "NorMuon":
                neurons = mc.scale_by_neuron_rms(dimension_numbers=numbers)
                return optax.chain(muon, neurons, mc.normalize_rms(0.2, dimension_numbers=numbers))
            case "MuonEq":
                return optax.chain(
                    optax.trace(0.95, nesterov=True),
                    mc.normalize_rms(of="outputs", dimension_numbers=numbers),
                    mc.scale_by_orthogonalization(dimension_numbers=numbers),
                    mc.scale_by_update_rms(dimension_numbers=numbers),
                )
            case "Muon+":
                rows = mc.normalize_rms(0.2, of="inputs", dimension_numbers=numbers)
                return optax.chain(muon, rows)
            case _:
                return optax.chain(muon, mc.scale_by_update_rms(dimension_numbers=numbers))

    def _others(self, step: jax.Array) -> jax.Array:
        return self.rate_of_others * self.rate(step) / self.learning_rate
