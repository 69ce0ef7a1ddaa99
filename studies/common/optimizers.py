"""The optimizer of a setting, declared as data and built from the package's own recipes."""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

import muonclip_jax as mc
from studies.common.links import clip_by_each_head, clip_by_least_change
from studies.common.model import ModelConfig, attention_layout

NUMBERS = (
    "learning_rate",
    "relative_learning_rate",
    "threshold",
    "weight_decay",
    "other_rate",
    "decay_steps",
    "pretrained",
)
KINDS = ("direction", "quack", "scope", "shared_keys", "update_rms", "warmup", "decay_of")


@partial(jax.tree_util.register_dataclass, data_fields=NUMBERS, meta_fields=KINDS)
@dataclass(frozen=True)
class Optimizer:
    """What follows what. A pytree of its numbers, so that a sweep over them compiles once."""

    direction: Literal["muon", "per_head_muon", "adam"] = "muon"
    """Muon on whole kernels, Muon on each head's matrices, or Adam."""
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    decay_of: Literal["all", "queries_and_keys"] = "all"
    """What decays: all that the package's recipes decay, or the kernels `wq` and `wk` alone, which
    only grouped attention has."""
    quack: Literal["paper", "latent_norm", "fixed"] | None = None
    """The rule of `mc.scale_by_quack`; fixed is a fixed lower rate for queries and keys."""
    relative_learning_rate: float = 1.0
    """QuacK's τ."""
    threshold: float | None = None
    """QK-Clip's τ; None does not clip."""
    scope: Literal["head", "layer"] = "head"
    """Which heads QK-Clip clips together."""
    shared_keys: Literal["untouched", "split", "least_change", "each_head"] = "untouched"
    """What a clip per head does to a key that several query heads read: `mc.qk_clip`'s two options,
    what moves the weights least, or what each head would do to a key of its own."""
    update_rms: Literal["match_adam", "jordan", "unit_rms_norm", "none"] = "match_adam"
    """How large Muon's updates are."""
    other_rate: float = 1.0
    """The learning rate of what is not Muon's, relative to Muon's."""
    warmup: int = 20
    """Steps of linear warm-up; after it the learning rate is constant, or falls."""
    decay_steps: int | None = None
    """The step at which the learning rate, falling linearly since the warm-up, is 0; None keeps it
    constant."""
    pretrained: "Optimizer | None" = None
    """What trained the model on the plan's first text before; None starts from the seed alone."""

    def chain(self, config: ModelConfig) -> optax.GradientTransformationExtraArgs:
        """The transformation for a model."""
        layout = attention_layout(config)
        if self.decay_of == "queries_and_keys" and config.attention != "grouped":
            raise ValueError(
                f"{config.attention} attention has kernels that values share; "
                "decay_of='queries_and_keys' takes attention='grouped'."
            )
        links = [self._recipe(layout)]
        if self.threshold is not None:
            links.append(self._clip(layout, self.threshold))
        return optax.chain(*links)

    def _clip(
        self, layout: mc.Layout | None, threshold: float
    ) -> optax.GradientTransformationExtraArgs:
        match self.shared_keys:
            case "least_change":
                return clip_by_least_change(layout, threshold)
            case "each_head":
                return clip_by_each_head(layout, threshold)
            case "untouched" | "split" as rule:
                return mc.qk_clip(layout, threshold, scope=self.scope, shared_keys=rule)

    def _recipe(self, layout: mc.Layout | None) -> optax.GradientTransformation:
        adam = optax.scale_by_adam(b1=0.9, b2=0.95)
        # Whole kernels, or what the layout makes of them.
        numbers = mc.muon_dimension_numbers if self.direction == "muon" else None
        muon: dict[str, Any] = {
            "other": optax.chain(adam, optax.scale(self.other_rate)),
            "update_rms": self.update_rms,
            "dimension_numbers": numbers,
            "layout": layout,
        }
        decays = _is_query_or_key if self.decay_of == "queries_and_keys" else None
        if self.quack is not None:
            return mc.quack(
                self.rate,
                layout=layout,
                rule=self.quack,
                relative_learning_rate=self.relative_learning_rate,
                direction=adam if self.direction == "adam" else mc.muon_direction(**muon),
                weight_decay=self.weight_decay,
                weight_decay_mask=decays,
            )
        if self.direction == "adam":
            decay = optax.add_decayed_weights(self.weight_decay, decays or _is_no_scale)
            return optax.chain(adam, decay, optax.scale_by_learning_rate(self.rate))
        return mc.muon(self.rate, weight_decay=self.weight_decay, weight_decay_mask=decays, **muon)

    def rate(self, step: jax.Array) -> jax.Array:
        """The learning rate of a step, counted from 0."""
        rate = self.learning_rate * jnp.minimum(1, (step + 1) / (self.warmup + 1))
        if self.decay_steps is None:
            return rate
        left = (self.decay_steps - step) / (self.decay_steps - self.warmup)
        return rate * jnp.clip(left, 0, 1)


def _is_no_scale(params: Any) -> Any:
    """Everything but the norms' scales, as in the package's recipes."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key != "scale", params)


def _is_query_or_key(params: Any) -> Any:
    """The kernels of which nothing but queries and keys is made."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: any(part.key in ("wq", "wk") for part in path), params
    )
