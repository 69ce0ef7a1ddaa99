"""What the clips and the spectral links hold in training, and what that costs in loss.

    python -m benchmarks.bounds --json PATH --picture PATH     # about 12 minutes on one CPU core

A decoder of two layers is trained with Muon at a rate at which its logits and outputs explode, on
the Python standard library's sources: without a clip, with QK-Clip, with the singular values of W_q
and W_k clipped, with QK-Clip every few steps only, with its outputs clipped, and with all matrices
capped. All settings of a seed see the same batches. "Cost" is what the compiled optimizer does for
a step, over that of Muon alone.
"""

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import rich
import tyro
from rich.table import Table

import muonclip_jax as mc
from benchmarks.compiled import dots, flops
from studies.common.model import BLOCK, Attention, Decoder, ModelConfig, attention_layout
from studies.common.pictures import lines, picture
from studies.common.tables import paired, spread
from studies.common.training import (
    Plan,
    cross_entropy,
    first_params,
    load_text,
    training_batches,
    validation,
)

MODEL = ModelConfig(
    d_model=64, layers=2, heads=2, kv_heads=2, rope=32, v=32, d_ff=256, mlp="swiglu", init_std=0.06
)
WARMUP = 20
PER_HEAD = partial(mc.muon_dimension_numbers, layout=attention_layout(MODEL))


@dataclass(frozen=True)
class Options:
    """What clips of logits, outputs and weights bound, and what they cost."""

    steps: int = 300
    seeds: int = 3
    learning_rate: float = 0.1
    only: str | None = None
    """A word that a setting's name must have."""
    json: Path | None = None
    picture: Path | None = None


def of_queries_and_keys(params: Any) -> Any:
    """The matrices of W_q's and W_k's heads alone."""
    keep = lambda path, spec: spec if {"wq", "wk"} & {key.key for key in path} else None  # noqa: E731
    return jax.tree_util.tree_map_with_path(
        keep, PER_HEAD(params), is_leaf=lambda node: node is None
    )


def every(steps: int, threshold: float) -> Callable[[jax.Array], jax.Array]:
    """A threshold that clips at every so many steps only, as if nothing were measured between."""
    return lambda step: jnp.where(step % steps == 0, threshold, jnp.inf)


def settings() -> dict[str, list[optax.GradientTransformation]]:
    """What follows Muon."""
    layout = attention_layout(MODEL)
    clip = partial(mc.qk_clip, layout)
    values = partial(mc.clip_singular_values, dimension_numbers=of_queries_and_keys)
    return {
        "Muon": [],
        "QK-Clip τ=30": [clip(30.0)],
        **{f"σ of W_q, W_k ≤ {limit:g}": [values(limit)] for limit in (0.4, 0.6, 1.5, 3.0)},
        **{f"QK-Clip τ=30, every {k}": [clip(every(k, 30.0))] for k in (2, 5, 10, 20)},
        "outputs ≤ 10": [mc.max_output_clip(layout, 10.0)],
        "outputs ≤ 3": [mc.max_output_clip(layout, 3.0)],
        "all σ ≤ 2": [mc.clip_singular_values(2.0)],
        "all ‖W‖₂ ≤ 2": [mc.cap_spectral_norm(2.0)],
        "all ‖W‖₂ ≤ 4": [mc.cap_spectral_norm(4.0)],
    }


def chain(links: list[optax.GradientTransformation], rate: float) -> Any:
    """Muon on each head's matrices, and what follows it."""
    warm = optax.linear_schedule(rate / WARMUP, rate, WARMUP - 1)
    return optax.chain(mc.muon(warm, weight_decay=0.0, dimension_numbers=PER_HEAD), *links)


def loss_and_sown(params: Any, batch: jax.Array) -> tuple[jax.Array, Any]:
    """The loss, and what attention sowed: max logits, and each block's largest output."""
    is_attention = lambda module, name: isinstance(module, Attention) and name == "__call__"  # noqa: E731
    logits, sown = Decoder(MODEL).apply(
        {"params": params},
        batch[:, :-1],
        mutable=["intermediates"],
        capture_intermediates=is_attention,
    )
    (written,) = sown["intermediates"]["layers"]["attn"].pop("__call__")  # [layers, b, t, d]
    outputs = jnp.abs(written).max((1, 2, 3))[:, None].astype(jnp.float32)
    return cross_entropy(logits, batch), (mc.read_max_logits(sown), {BLOCK: outputs})


def train(links: list[Any], text: Any, plan: Plan, seed: int, rate: float) -> dict[str, Any]:
    """Curves of every step, and the loss on held-out text."""
    tx, valid = chain(links, rate), validation(text, plan)
    params, _ = first_params(MODEL, seed, valid[0, :1])

    @jax.jit
    def run(params, batches):
        def step(carry, batch):
            params, state = carry
            (loss, (logits, outputs)), grads = jax.value_and_grad(loss_and_sown, has_aux=True)(
                params, batch
            )
            updates, state = tx.update(grads, state, params, max_logits=logits, max_output=outputs)
            seen = {"loss": loss, "logit": logits[BLOCK].max(), "output": outputs[BLOCK].max()}
            return (optax.apply_updates(params, updates), state), seen

        (params, _), curves = jax.lax.scan(step, (params, tx.init(params)), batches)
        losses = jax.lax.map(lambda batch: loss_and_sown(params, batch)[0], valid)
        return params, curves, losses.mean()

    params, curves, valid_loss = run(params, jnp.asarray(training_batches(text, plan, seed)))
    matrices = mc.muon_dimension_numbers(params, layout=attention_layout(MODEL))
    norms = jax.tree.leaves(
        mc.cap_spectral_norm(1.0, dimension_numbers=matrices).init(params).norms
    )
    largest = max(float(norm.max()) for norm in norms)
    # Five digits, which is more than seeds have in common.
    tidy = {name: [float(f"{x:.5g}") for x in curve] for name, curve in curves.items()}
    return {"valid_loss": float(valid_loss), "norm": largest, **tidy}


def cost(links: list[Any], rate: float) -> int:
    """FLOPs of the compiled optimizer's matrix products, a step."""
    tx = chain(links, rate)
    params, _ = jax.eval_shape(partial(first_params, MODEL, 0), jnp.zeros((1, 9), jnp.int32))
    sown = {BLOCK: jax.ShapeDtypeStruct((MODEL.layers, MODEL.heads), jnp.float32)}
    outputs = {BLOCK: jax.ShapeDtypeStruct((MODEL.layers, 1), jnp.float32)}
    state = jax.eval_shape(tx.init, params)
    update = jax.jit(lambda g, s, p, m, o: tx.update(g, s, p, max_logits=m, max_output=o))
    return flops(dots(update.lower(params, state, params, sown, outputs).compile()))


def tail(curve: list[float]) -> float:
    """The largest of the last fifth."""
    return max(curve[-len(curve) // 5 :])


def show(runs: Mapping[str, list[dict[str, Any]]], costs: Mapping[str, float]) -> Table:
    """A line a setting; losses less those of Muon and of QK-Clip by pairs of seeds."""
    headers = ["", "validation loss", "less Muon's", "less QK-Clip's", "largest logit"]
    headers += ["largest output", "largest ‖W‖₂", "cost"]
    table = Table(*headers)
    losses = {
        name: {seed: run["valid_loss"] for seed, run in enumerate(some)}
        for name, some in runs.items()
    }
    for name, some in runs.items():
        less = [
            paired(losses[name], losses[other]) if other in losses and other != name else ""
            for other in ("Muon", "QK-Clip τ=30")
        ]
        table.add_row(
            name,
            spread([run["valid_loss"] for run in some], ".3f"),
            *less,
            spread([tail(run["logit"]) for run in some], ".1f"),
            spread([tail(run["output"]) for run in some], ".1f"),
            spread([run["norm"] for run in some], ".2f"),
            f"{costs[name] / costs['Muon']:.2f}" if "Muon" in costs else "",
        )
    return table


def draw(runs: Mapping[str, list[dict[str, Any]]], path: Path) -> None:
    """Largest outputs and losses, with the clip of outputs and without."""
    some = {name: runs[name] for name in ("Muon", "outputs ≤ 10", "outputs ≤ 3") if name in runs}
    with picture(path, 2) as (outputs, losses):
        for axes, curve, label in (
            (outputs, "output", "largest output of a block"),
            (losses, "loss", "training loss (nats per token)"),
        ):
            bands = {
                name: (np.arange(len(each[0][curve])), np.array([run[curve] for run in each]))
                for name, each in some.items()
            }
            lines(axes, bands, of=some)
            axes.set(xlabel="step", ylabel=label)
        outputs.set(yscale="log")


def main(options: Options) -> None:
    """Trains, prints and records."""
    plan = Plan(steps=options.steps, context=64, measure_every=options.steps)
    text = load_text(plan, MODEL.vocab_size)
    chosen = {n: links for n, links in settings().items() if not options.only or options.only in n}
    runs: dict[str, list[dict[str, Any]]] = {}
    for name, links in chosen.items():
        seeds = range(options.seeds)
        runs[name] = [train(links, text, plan, seed, options.learning_rate) for seed in seeds]
        rich.print(name, *(f"{run['valid_loss']:.3f}" for run in runs[name]), flush=True)
    costs = {name: cost(links, options.learning_rate) for name, links in chosen.items()}
    rich.print(show(runs, costs))
    if options.json:
        setup = {"date": str(date.today()), "python": platform.python_version()}
        setup |= {"jax": jax.__version__, "device": jax.devices()[0].device_kind}
        setup |= {"machine": platform.machine(), "learning rate": options.learning_rate}
        record = {"setup": setup, "costs": costs, "runs": runs}
        options.json.write_text(json.dumps(record) + "\n")
    if options.picture:
        draw(runs, options.picture)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
