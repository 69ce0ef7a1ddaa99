"""One training run: curves of every step, and what is measured between them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import rearrange

import muonclip_jax as mc
from examples.mla import data
from studies.common import synthetic
from studies.common.model import (
    BLOCK,
    Decoder,
    ModelConfig,
    attention_logits,
    init_params,
    queries_and_keys,
)
from studies.common.optimizers import Optimizer
from studies.common.texts import TwoTexts, code_then_words

CACHE = Path(".cache/studies")


@dataclass(frozen=True)
class Plan:
    """What all runs of a grid share."""

    text: Literal["package", "standard_library", "installed_packages"] = "standard_library"
    """Python sources: this package's, the standard library's, or with those all installed ones."""
    steps: int = 300
    batch: int = 8
    """Sequences per step."""
    context: int = 128
    """Tokens per sequence."""
    measure_every: int = 50
    """Steps between measurements, of which the first is before training and the last after it."""
    valid_batches: int = 8
    """Held-out batches per measurement."""
    synthetic: float = 0.0
    """The share of each batch's sequences that are no text, but what `synthetic.mixed` makes."""
    pretrain_steps: int = 0
    """Steps of a first phase on the code of these files, after which the others are on their words,
    the docstrings. 0 trains on whole files, from the start."""

    def __post_init__(self):
        for steps in (self.steps, self.pretrain_steps):
            if steps % self.measure_every:
                raise ValueError(f"{steps} steps do not divide by {self.measure_every}.")


class Setting(NamedTuple):
    """What a grid varies."""

    model: ModelConfig
    optimizer: Optimizer


class State(NamedTuple):
    """What a step passes on to the next."""

    params: Any
    opt_state: Any
    probed: jax.Array  # attention logits of a held-out sequence


Measure = Callable[[Setting, State, jax.Array, data.TokenizedText], Mapping[str, Any]]


def load_text(plan: Plan, vocab_size: int) -> data.TokenizedText:
    """The text of a plan, split by file: validation text is never trained on."""
    folders = [Path(mc.__file__).parent] if plan.text == "package" else []
    installed = plan.text == "installed_packages"
    if plan.pretrain_steps:
        corpus = data.read_corpus(folders, installed_packages=installed)
        return code_then_words(corpus, vocab_size, CACHE)
    return data.load_text(folders, installed_packages=installed, vocab_size=vocab_size, cache=CACHE)


def training_batches(text: data.TokenizedText, plan: Plan, seed: int) -> np.ndarray:
    """All batches of a run, int32 `[steps, batch, context + 1]`; each epoch in a new order, and
    synthetic sequences drawn for each batch."""
    windows = data.windows(text.train, plan.context)
    rng = np.random.default_rng(seed)
    wanted = plan.steps * plan.batch
    epochs = -(-wanted // len(windows))
    order = np.concatenate([rng.permutation(len(windows)) for _ in range(epochs)])[:wanted]
    batches = windows[order].reshape(plan.steps, plan.batch, plan.context + 1)
    return synthetic.mixed(batches, plan.synthetic, rng) if plan.synthetic else batches


def train(
    setting: Setting,
    plan: Plan,
    text: data.TokenizedText,
    seed: int,
    *,
    measure: Measure | None = None,
    pretrained: Any | None = None,
    on_progress: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Trains a model from its seed, which is that of the parameters and of the data's order.

    If the optimizer names one that it comes after, the model has been trained by that one before,
    see `pretrain`; the optimizer's state is new.

    Args:
      setting: The model and its optimizer.
      plan: The data and the number of steps.
      text: The plan's text.
      seed: Two settings with the same seed see the same batches.
      measure: What else to measure: a function of the setting, the state, the next batch and the
        text.
      pretrained: The parameters that `pretrain` gives for this setting and seed, where they are at
        hand; None makes them if they are needed.
      on_progress: Told the number of steps done.

    Returns:
      `curves`, a value a step, and `measurements`, with the `step` that each was taken after.
      Max logits, `[steps, layers, heads]`, are those of the batch before the step, and so before
      its clip; logit changes, `[steps, layers]`, are the largest on a held-out sequence from before
      to after the step. Both are before a soft cap. After a first phase, the measurements hold too
      what `kept` tells.
    """
    config, optimizer = setting
    valid = validation(text, plan)
    batches = training_batches(text, plan, seed)
    first, optimizer = optimizer.pretrained, replace(optimizer, pretrained=None)
    if first is not None and pretrained is None:
        pretrained = pretrain(config, first, plan, text, seed)
    state = start(config, optimizer, seed, valid[0, :1], pretrained)

    def measured(step: int) -> dict[str, Any]:
        batch = jnp.asarray(batches[step % plan.steps])
        more = measure(setting, state, batch, text) if measure else {}
        if pretrained is not None:
            more = {**more, **kept(config, state.params, pretrained, validation(text.first, plan))}
        return {"step": step, **evaluate(config, state.params, valid), **more}

    curves, measurements = [], [measured(0)]
    for done in range(0, plan.steps, plan.measure_every):
        segment = jnp.asarray(batches[done : done + plan.measure_every])
        state, curve = take_steps(config, optimizer, state, segment, valid[0, :1])
        curves.append(jax.device_get(curve))
        measurements.append(measured(done + plan.measure_every))
        on_progress(done + plan.measure_every)
    joined = {name: np.concatenate([c[name] for c in curves]) for name in curves[0]}
    return {"curves": joined, "measurements": jax.device_get(measurements)}


def pretrain(
    config: ModelConfig, optimizer: Optimizer, plan: Plan, text: TwoTexts, seed: int
) -> Any:
    """The parameters after the first phase of a plan, on the first of two texts; as NumPy arrays,
    which many runs can start from."""
    first = replace(plan, steps=plan.pretrain_steps)
    batches = training_batches(text.first, first, seed)
    probe = validation(text.first, plan)[0, :1]
    state = start(config, optimizer, seed, probe)
    for done in range(0, first.steps, plan.measure_every):
        segment = jnp.asarray(batches[done : done + plan.measure_every])
        state, _ = take_steps(config, optimizer, state, segment, probe)
    return jax.tree.map(np.array, state.params)


def validation(text: data.TokenizedText, plan: Plan) -> jax.Array:
    """The held-out batches of a plan, int32 `[n, batch, context + 1]`."""
    batches = data.validation_batches(
        text, context=plan.context, batch=plan.batch, count=plan.valid_batches
    )
    return jnp.asarray(np.stack(batches))


def start(
    config: ModelConfig,
    optimizer: Optimizer,
    seed: int,
    probe: jax.Array,
    pretrained: Any | None = None,
) -> State:
    """The state before the first step, of pretrained parameters or of the seed's."""
    if pretrained is None:
        params, logits = first_params(config, seed, probe)
    else:
        # Copies, for the steps give their state's memory away.
        params = jax.tree.map(jnp.array, pretrained)
        logits = jax.jit(probed, static_argnames="config")(params, config, probe)
    return State(params, optimizer.chain(config).init(params), logits)


@partial(jax.jit, static_argnames="config")
def first_params(config: ModelConfig, seed: int, probe: jax.Array) -> tuple[Any, jax.Array]:
    """The parameters of a seed, and the probed logits."""
    params = init_params(config, seed)
    return params, probed(params, config, probe)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def take_steps(
    config: ModelConfig, optimizer: Optimizer, state: State, batches: jax.Array, probe: jax.Array
) -> tuple[State, dict[str, jax.Array]]:
    """A step for each of `batches`, in one dispatch.

    Returns:
      The state, and the curves as `train` describes them.
    """
    tx = optimizer.chain(config)

    def step(state: State, batch: jax.Array):
        (loss, sown), grads = jax.value_and_grad(loss_and_sown, has_aux=True)(
            state.params, config, batch
        )
        updates, opt_state = tx.update(grads, state.opt_state, state.params, max_logits=sown)
        params = optax.apply_updates(state.params, updates)
        logits = probed(params, config, probe)
        change = jnp.abs(logits - state.probed).max(axis=(1, 2, 3, 4))
        maxima = mc.read_max_logits(sown)[BLOCK]
        curve = {"loss": loss, "max_logits": maxima, "logit_change": change}
        return State(params, opt_state, logits), curve

    return jax.lax.scan(step, state, batches)


def loss_and_sown(params: Any, config: ModelConfig, batch: jax.Array) -> tuple[jax.Array, Any]:
    """Mean cross-entropy in nats per token of int32 `[batch, context + 1]`, and what was sown."""
    model = Decoder(config)
    logits, sown = model.apply({"params": params}, batch[:, :-1], mutable=["intermediates"])
    return cross_entropy(logits, batch), sown


def cross_entropy(logits: jax.Array, batch: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def probed(params: Any, config: ModelConfig, probe: jax.Array) -> jax.Array:
    """The attention logits of one sequence, int32 `[1, context + 1]`."""
    _, queries, keys = queries_and_keys(params, config, probe[:, :-1])
    return attention_logits(queries, keys)


@partial(jax.jit, static_argnames="config")
def evaluate(config: ModelConfig, params: Any, valid: jax.Array) -> dict[str, jax.Array]:
    """The loss on held-out batches `[n, batch, context + 1]`, and the participation ratios of the
    keys of a batch's tokens, by singular values and by eigenvalues, `[layers, key heads]`; all are
    means over the batches."""

    def one(batch: jax.Array) -> dict[str, jax.Array]:
        logits, _, keys = queries_and_keys(params, config, batch[:, :-1])
        keys = rearrange(keys, "l b s k f -> l k (b s) f").astype(jnp.float32)
        return {
            "valid_loss": cross_entropy(logits, batch),
            "key_ratio": mc.participation_ratio(keys),
            "key_eigenvalue_ratio": mc.eigenvalue_participation_ratio(keys),
        }

    return jax.tree.map(lambda each: each.mean(axis=0), jax.lax.map(one, valid))


def kept(config: ModelConfig, params: Any, pretrained: Any, valid: jax.Array) -> dict[str, Any]:
    """What a second phase left of the first.

    Args:
      config: The model.
      params: The parameters now.
      pretrained: Those at the end of the first phase.
      valid: Held-out batches of the first text, as for `evaluate`.

    Returns:
      `first_loss`, the loss on the first text; and by kernel `weight_rank` and `change_rank`,
      `[layers]`, the effective ranks (γ = 1) of the weights and of what was added to them since,
      over the rank that they can have; 0 while nothing was added.
    """
    kernels, before = map(layer_kernels, (params, pretrained))
    return {
        "first_loss": evaluate(config, params, valid)["valid_loss"],
        "weight_rank": {name: rank_share(w) for name, w in kernels.items()},
        "change_rank": {name: rank_share(w - before[name]) for name, w in kernels.items()},
    }


def layer_kernels(params: Any) -> dict[str, jax.Array]:
    """Name → kernels `[layers, in, out]` of attention and MLP."""
    return {
        name: jnp.asarray(module["kernel"])
        for block in ("attn", "mlp")
        for name, module in params["layers"][block].items()
        if "kernel" in module
    }


@jax.jit
def rank_share(x: jax.Array) -> jax.Array:
    """The effective rank of `[..., n, m]` over min(n, m)."""
    return mc.effective_rank(x) / min(x.shape[-2:])
