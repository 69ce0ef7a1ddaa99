"""What QuacK and QK-Clip add to the optimizer's compiled step, by the compiler's cost analysis.

    python -m benchmarks.overhead

Compiles `update` and `apply_updates` for a decoder's parameters, nothing is run: with Muon alone,
with QuacK, with QK-Clip, and with both. XLA counts the body of the Newton–Schulz loop once and not
once per step, so the shares are upper bounds.
"""

import json
import platform
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
import rich
import tyro
from rich.table import Table

import muonclip_jax as mc

FIELDS = {"flops": "flops", "bytes": "bytes accessed"}  # ours → XLA's


@dataclass(frozen=True)
class Options:
    """QuacK's and QK-Clip's share of the optimizer's cost."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    attention: Literal["mha", "mla"] = "mha"
    """mla has half of each head rotary, values of its whole size, and latents of width/2 and
    width/4."""
    vocab_size: int = 50304
    dtype: str = "bfloat16"
    """Of the Newton–Schulz iteration."""
    json: Path | None = None
    """Write the figures there as well."""


def decoder(options: Options) -> Any:
    """The shapes of a GPT-like decoder's parameters, float32."""
    d, heads = options.width, options.heads

    def kernel(*shape: int) -> dict[str, jax.ShapeDtypeStruct]:
        return {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)}

    def scale() -> dict[str, jax.ShapeDtypeStruct]:
        return {"scale": jax.ShapeDtypeStruct((d,), jnp.float32)}

    def attention() -> dict[str, Any]:
        size, half = d // heads, d // heads // 2
        if options.attention == "mha":
            separate = {name: kernel(d, heads, size) for name in ("query", "key", "value")}
            return {**separate, "out": kernel(heads, size, d)}
        return {
            "wq_a": kernel(d, d // 2),
            "wq_b": kernel(d // 2, heads, size),
            "wkv_a": kernel(d, d // 4 + half),
            "wkv_b": kernel(d // 4, heads, half + size),
            "wo": kernel(heads, size, d),
        }

    def layer() -> dict[str, Any]:
        return {
            "attn_norm": scale(),
            "attn": attention(),
            "mlp_norm": scale(),
            "mlp": {"up": kernel(d, 4 * d), "down": kernel(4 * d, d)},
        }

    return {
        "embed": {"embedding": jax.ShapeDtypeStruct((options.vocab_size, d), jnp.float32)},
        "layers": {str(i): layer() for i in range(options.layers)},
        "norm": scale(),
    }


def chains(options: Options) -> dict[str, optax.GradientTransformationExtraArgs]:
    size = options.width // options.heads
    mla = mc.layouts.mla(size // 2, size // 2, size)
    layout = mc.layouts.mha() if options.attention == "mha" else mla
    how = mc.NewtonSchulz(dtype=options.dtype)
    muon = mc.muon(1e-3, layout=layout, newton_schulz=how)
    direction = mc.muon_direction(layout=layout, newton_schulz=how)
    quack = mc.quack(1e-3, layout=layout, direction=direction)
    clip = mc.qk_clip(layout)
    return {
        "muon": muon,
        "muon, QK-Clip": optax.chain(muon, clip),
        "muon, QuacK": quack,
        "muon, QuacK, QK-Clip": optax.chain(quack, clip),
    }


def cost(tx: optax.GradientTransformationExtraArgs, options: Options) -> dict[str, float]:
    """FLOPs and bytes of one optimizer step."""
    params = decoder(options)
    maxima = {
        ("layers", str(i), "attn"): jax.ShapeDtypeStruct((options.heads,), jnp.float32)
        for i in range(options.layers)
    }

    def step(grads, state, params, maxima):
        updates, state = optax.with_extra_args_support(tx).update(
            grads, state, params, max_logits=maxima
        )
        return optax.apply_updates(params, updates), state

    state = jax.eval_shape(tx.init, params)
    compiled = jax.jit(step, donate_argnums=(1, 2)).lower(params, state, params, maxima).compile()
    analysis = compiled.cost_analysis()
    return {ours: analysis[theirs] for ours, theirs in FIELDS.items()}


def main(options: Options) -> dict[str, Any]:
    costs = {name: cost(tx, options) for name, tx in chains(options).items()}
    base = costs["muon"]
    record = {
        "date": date.today().isoformat(),
        "device": f"{jax.devices()[0].device_kind}, {platform.machine()}",
        "versions": {"jax": jax.__version__, "optax": optax.__version__},
        "model": {k: v for k, v in vars(options).items() if k != "json"},
        "costs": costs,
        "added": {
            name: {field: each[field] / base[field] - 1 for field in FIELDS}
            for name, each in costs.items()
            if name != "muon"
        },
    }
    title = f"One optimizer step, {options.layers} layers of width {options.width}"
    table = Table(title=f"{title}, {options.attention}")
    for header in ("chain", "GFLOP", "added", "GB", "added"):
        table.add_column(header, justify="left" if header == "chain" else "right")
    for name, each in costs.items():
        added = record["added"].get(name)
        table.add_row(
            name,
            f"{each['flops'] / 1e9:.1f}",
            f"{added['flops']:.2%}" if added else "",
            f"{each['bytes'] / 1e9:.3f}",
            f"{added['bytes']:.2%}" if added else "",
        )
    rich.print(table)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
