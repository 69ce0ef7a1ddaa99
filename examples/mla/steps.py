"""The work of the devices: the optimizer's chain, a training step, a validation."""

from typing import Any

import jax
import optax
from einops import rearrange
from flax import nnx

import muonclip_jax as mc
from examples.mla.mesh import replicate
from examples.mla.model import EXPERT_LOAD, Decoder, ModelConfig, attention_layout
from examples.mla.partition import keep_in_place, shardings
from examples.mla.settings import Settings


def learning_rates(settings: Settings) -> optax.Schedule:
    """Linear warm-up, then a cosine down to a tenth."""
    return optax.warmup_cosine_decay_schedule(
        init_value=settings.learning_rate / (settings.warmup_steps + 1),
        peak_value=settings.learning_rate,
        warmup_steps=settings.warmup_steps,
        decay_steps=settings.steps,
        end_value=settings.learning_rate / 10,
    )


def make_optimizer(
    settings: Settings, config: ModelConfig, on_mesh: nnx.State | None = None
) -> optax.GradientTransformationExtraArgs:
    """The chain that `--optimizer` names; on a mesh, `on_mesh` are the parameters' shardings."""
    rate, decay = learning_rates(settings), settings.weight_decay
    layout, how = attention_layout(config), mc.NewtonSchulz(rates=settings.rates)
    # Muon's matrices: those of the layout, or whole kernels.
    numbers = None if settings.per_head else mc.muon_dimension_numbers
    quack = mc.quack(
        rate,
        layout=layout,
        relative_learning_rate=settings.relative_learning_rate,
        rule="latent_norm" if config.attention == "mla" else "paper",
        direction=mc.muon_direction(
            dimension_numbers=numbers, newton_schulz=how, shardings=on_mesh, layout=layout
        ),
        weight_decay=decay,
    )
    muon = mc.muon(
        rate,
        layout=layout,
        dimension_numbers=numbers,
        newton_schulz=how,
        weight_decay=decay,
        shardings=on_mesh,
    )
    adamw = optax.with_extra_args_support(optax.adamw(rate, weight_decay=decay))
    clip = mc.qk_clip(layout, settings.threshold)
    match settings.optimizer:
        case "muonclip":  # what mc.muonclip is
            return optax.chain(muon, clip)
        case "muon":
            return muon
        case "quackclip":
            return optax.chain(quack, clip)
        case "quack":
            return quack
        case "adamclip":
            return optax.chain(adamw, clip)
        case "adamw":
            return adamw


def create(settings: Settings, config: ModelConfig) -> tuple[Decoder, nnx.Optimizer]:
    """Makes the model and its optimizer. On a mesh no device ever holds more than its part."""

    def make() -> tuple[Decoder, nnx.Optimizer]:
        model = Decoder(config, rngs=nnx.Rngs(settings.seed))
        on_mesh = shardings(nnx.state(model, nnx.Param), config)
        optimizer = nnx.Optimizer(model, make_optimizer(settings, config, on_mesh), wrt=nnx.Param)
        keep_in_place(model, optimizer)
        return model, optimizer

    return make() if jax.sharding.get_mesh().empty else nnx.jit(make)()


def cross_entropy(model: Decoder, batch: jax.Array) -> jax.Array:
    """Mean loss, in nats per token, of each next token of int32 `[batch, context + 1]`."""
    logits = model(batch[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


@nnx.jit(static_argnames="clips")
def train_step(
    model: Decoder, optimizer: nnx.Optimizer, batch: jax.Array, *, clips: bool
) -> dict[str, Any]:
    """Updates the model.

    Returns:
      The step's numbers, without waiting for them: `loss`, `max_logits` `{block: [heads]}`; the
      other fields of the `QKClipState` when the optimizer clips; `expert_load`
      `{module: [experts]}`, each expert's share of what was sent, when there are experts.
    """

    def loss_fn(model):
        return nnx.capture(lambda m: cross_entropy(m, batch), nnx.Intermediate)(model)

    (loss, intermediates), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads, max_logits=intermediates)
    balance = {}
    if model.config.experts:
        loads = mc.read_signal(intermediates, EXPERT_LOAD)
        model.balance(loads)
        balance = {EXPERT_LOAD: {"/".join(path): load for path, load in loads.items()}}
    keep_in_place(model, optimizer)
    maxima = {"/".join(path): heads for path, heads in mc.read_max_logits(intermediates).items()}
    clip = mc.qk_clip_state(optimizer.opt_state)._asdict() if clips else {}
    return replicate({**clip, **balance, "loss": loss, "max_logits": maxima})


@nnx.jit
def validate(model: Decoder, batch: jax.Array) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Returns the loss, and of every attention block its keys `[batch, context, heads, features]`
    as they enter the logits."""
    keys = model.keys(batch[:, :-1])
    loss = replicate(cross_entropy(model, batch))
    return loss, {f"layers/{i}/attn": k for i, k in enumerate(keys)}


@jax.jit
def participation(keys: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The participation ratio of each block's keys, mean over heads."""
    by_head = {block: rearrange(k, "b t h f -> h (b t) f") for block, k in keys.items()}
    return replicate({block: mc.participation_ratio(k).mean() for block, k in by_head.items()})
