"""Muon under a scaling rule, with rates for all other parameters that no rule changes."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import optax

import muonclip_jax as mc
from studies.common.optimizers import KINDS, NUMBERS, Optimizer

KERNELS = "layers in out"  # of the decoder, all of them stacked by the scan over layers


@partial(
    jax.tree_util.register_dataclass,
    data_fields=(*NUMBERS, "gain_rate", "embedding_rate"),
    meta_fields=(*KINDS, "sphere"),
)
@dataclass(frozen=True)
class Scaled(Optimizer):
    """An optimizer whose `learning_rate` is that of the hidden matrices alone. The other rates
    warm up and fall as it does."""

    gain_rate: float = 1e-2
    """Adam's learning rate for gains."""
    embedding_rate: float = 1e-2
    """Adam's learning rate for the embedding, which is the unembedding too."""
    sphere: bool = False
    """Whether hidden matrices keep their first norm, by Hyperball, in place of decay."""

    def _recipe(self, layout: mc.Layout | None) -> optax.GradientTransformation:
        adam = optax.chain(
            optax.scale_by_adam(b1=0.9, b2=0.95),
            optax.masked(optax.scale(self.embedding_rate / self.gain_rate), _is_embedding),
        )
        if self.sphere:
            muon_h = optax.chain(
                mc.scale_by_muon(dimension_numbers=_as_kernels),
                mc.hyperball(self.rate, dimension_numbers=_as_kernels),
            )
            decay = optax.add_decayed_weights(self.weight_decay, _is_embedding)
            other = optax.chain(adam, decay, optax.scale_by_learning_rate(self.rate_of_gains))
            return optax.partition({"kernel": muon_h, "other": other}, _groups)
        return mc.muon(
            self.rate,
            other_learning_rate=self.rate_of_gains,
            other=adam,
            update_rms=self.update_rms,
            weight_decay=self.weight_decay,
            dimension_numbers=mc.muon_dimension_numbers,  # whole kernels
        )

    def rate_of_gains(self, step: jax.Array) -> jax.Array:
        """The gains' learning rate of a step, counted from 0."""
        return self.gain_rate * self.rate(step) / self.learning_rate


def _groups(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "kernel" if path[-1].key == "kernel" else "other", params
    )


def _as_kernels(params: Any) -> Any:
    return jax.tree.map(lambda _: KERNELS, params)


def _is_embedding(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "embedding", params)
