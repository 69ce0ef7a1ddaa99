"""What compiled programs cost on CPU, against a checked-in record.

    python -m benchmarks.budgets            # exit status 1 where a figure is off by more than 2%
    python -m benchmarks.budgets --write    # record what is so now

Nothing is run. The figures are the compiler's: FLOPs and bytes accessed (the body of a loop counts
once), temporary bytes on a device, and operations that are dispatched: a fusion is one, and what
only names or groups data (parameters, constants, tuples, bitcasts) is none.

They depend on JAX's version: there is one set of figures for each that was recorded, and no
comparison for any other.
"""

import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import rich.console
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

import muonclip_jax as mc
from benchmarks import overhead
from benchmarks.hlo import Computation, parse

RECORD = Path(__file__).parent / "records" / "budgets.json"
TOLERANCE = 0.02
DEVICES = 8  # of the sharded step
BATCH, LENGTH, HEADS, FEATURES = 2, 128, 4, 16
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")
CALLS = {  # operations that run other computations, operation by operation
    "while": ("body", "condition"),
    "conditional": ("branch_computations", "true_computation", "false_computation"),
    "call": ("to_apply",),
}

Cost = dict[str, int]  # figure → value


class Program(NamedTuple):
    """A function and the shapes of its arguments.

    Attributes:
      function: What is compiled.
      arguments: The shapes of its arguments.
      donated: Which of them it may write its results to.
      mesh: The mesh that it is compiled for; None is one device.
    """

    function: Callable
    arguments: tuple
    donated: tuple[int, ...] = ()
    mesh: jax.sharding.Mesh | None = None


@dataclass(frozen=True)
class Options:
    """Compares what compiled programs cost with the record."""

    write: bool = False
    """Record what is so now, for this version of JAX and this processor."""
    only: tuple[str, ...] = ()
    """These programs only."""
    file: Path = RECORD
    """The record."""


def array(*shape: int, dtype: str = "float32") -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))


def decoder(attention: str = "mha", layers: int = 1) -> Any:
    """The parameters of a decoder of width 64 with four heads; gqa has two for keys and values."""
    kind = "mla" if attention == "mla" else "mha"
    params = overhead.decoder(overhead.Options(layers, 64, HEADS, kind, vocab_size=256))
    if attention == "gqa":
        for layer in params["layers"].values():
            layer["attn"] |= {name: {"kernel": array(64, 2, 16)} for name in ("key", "value")}
    return params


LAYOUTS = {
    "mha": mc.layouts.mha(),
    "gqa": mc.layouts.gqa(2),
    "mla": mc.layouts.mla(8, 8, 16),
}


def step(tx: optax.GradientTransformation, params: Any) -> Program:
    """An optimizer's step: parameters and state by gradients and max logits."""
    chain = optax.with_extra_args_support(tx)
    maxima = {("layers", i, "attn"): array(HEADS) for i in params.get("layers", {})}

    def one(grads, state, params, maxima):
        updates, state = chain.update(grads, state, params, max_logits=maxima)
        return optax.apply_updates(params, updates), state

    return Program(one, (params, jax.eval_shape(chain.init, params), params, maxima), (1, 2))


def matrices() -> Any:
    """What Muon takes of the decoder."""
    layers = decoder()["layers"]
    return {
        "layers": {
            i: {name: part for name, part in layer.items() if not name.endswith("norm")}
            for i, layer in layers.items()
        }
    }


def muonclip() -> optax.GradientTransformationExtraArgs:
    return mc.muonclip(1e-3, layout=LAYOUTS["mha"], newton_schulz=HOW)


def quack() -> optax.GradientTransformationExtraArgs:
    direction = mc.muon_direction(layout=LAYOUTS["mha"], newton_schulz=HOW)
    return mc.quack(1e-3, layout=LAYOUTS["mha"], direction=direction)


def sharded_step() -> Program:
    """A step of all of MuonClip on eight devices; the parameters' types say how they are split."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), (AxisType.Explicit,) * 2)

    def placed(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if leaf.ndim == 1 else P("fsdp", "tp")  # of kernels' inputs and outputs or heads
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    params = jax.tree.map(placed, decoder())
    tx = muonclip()
    with jax.set_mesh(mesh):
        return step(tx, params)._replace(mesh=mesh)


def attention(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    return mc.dot_product_attention(q, k, v, is_causal=True)


def attention_gradient(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
    def loss(q, k, v):
        out, maxima = attention(q, k, v)
        return out.sum(), maxima

    return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)


def report() -> Program:
    params = decoder()
    sown = {"layers": {i: {"attn": {"max_logits": (array(HEADS),)}} for i in params["layers"]}}

    def of(params, sown):
        return mc.attention_report(params, None, sown, LAYOUTS["mha"])

    return Program(of, (params, sown))


def orthogonalization(method: str, dtype: str, *shape: int) -> Program:
    return Program(lambda x: mc.orthogonalize(x, method=method, dtype=dtype), (array(*shape),))


# The same programs on every processor.
HOW = mc.NewtonSchulz(rates=mc.Rates(bfloat16=1470, float32=290))
QKV = (array(BATCH, LENGTH, HEADS, FEATURES),) * 3
PROGRAMS: dict[str, Callable[[], Program]] = {
    "orthogonalize, standard, float32": lambda: orthogonalization("standard", "float32", 256, 256),
    "orthogonalize, standard, bfloat16": lambda: orthogonalization(
        "standard", "bfloat16", 256, 256
    ),
    "orthogonalize, gram, float32": lambda: orthogonalization("gram", "float32", 256, 1024),
    "orthogonalize, gram, bfloat16": lambda: orthogonalization("gram", "bfloat16", 256, 1024),
    "scale_by_muon": lambda: step(mc.scale_by_muon(newton_schulz=HOW), matrices()),
    "muonclip": lambda: step(muonclip(), decoder()),
    "muonclip, eight devices": sharded_step,
    "quack": lambda: step(quack(), decoder()),
    **{
        f"qk_clip, {kind}": lambda kind=kind: step(
            mc.qk_clip(LAYOUTS[kind]), decoder(kind, layers=2)
        )
        for kind in LAYOUTS
    },
    "accumulate": lambda: step(mc.accumulate(muonclip(), 4), decoder()),
    "attention": lambda: Program(attention, QKV),
    "attention, gradient": lambda: Program(attention_gradient, QKV),
    "attention_report": report,
}


def cost(program: Program) -> Cost:
    """The compiler's figures."""
    jitted = jax.jit(program.function, donate_argnums=program.donated)
    if program.mesh is None:
        compiled = jitted.lower(*program.arguments).compile()
    else:
        with jax.set_mesh(program.mesh):
            compiled = jitted.lower(*program.arguments).compile()
    analysis = compiled.cost_analysis()
    return {
        "FLOPs": round(analysis.get("flops", 0)),
        "bytes": round(analysis["bytes accessed"]),
        "temporaries": compiled.memory_analysis().temp_size_in_bytes,
        "operations": sum(1 for _ in operations(parse(compiled.as_text()))),
    }


def operations(computation: Computation) -> Iterator[str]:
    """The codes of the operations that are dispatched, those of a loop's body once."""
    for op in computation.operations.values():
        if op.code not in FREE:
            yield op.code
        for called in op.called(*CALLS.get(op.code, ())):
            yield from operations(called)


def off(now: Cost, recorded: Cost | None) -> dict[str, float]:
    """Figure → by what share it is off the record, where that is more than `TOLERANCE`."""
    recorded = recorded or dict.fromkeys(now, 0)
    shares = {
        name: value / recorded[name] - 1 if recorded[name] else float("inf") if value else 0.0
        for name, value in now.items()
    }
    return {name: share for name, share in shares.items() if abs(share) > TOLERANCE}


def place() -> str:
    """What the figures depend on. (Not the processor: with AVX2 alone and with bfloat16 units they
    are the same, though the code that is generated differs.)"""
    return f"JAX {jax.__version__}, {platform.machine()}"


def main(options: Options) -> int:
    """Runs the command.

    Returns:
      The exit status: 1 where a figure is off.
    """
    record = json.loads(options.file.read_text()) if options.file.exists() else {}
    recorded = record.get(place(), {}).get("programs")
    if recorded is None and not options.write:
        print(f"Nothing compared: {options.file.name} has no figures for {place()}.")
        return 0
    costs = {name: cost(PROGRAMS[name]()) for name in options.only or PROGRAMS}
    known = recorded or costs  # nothing is off what was never recorded
    differences = {name: off(each, known.get(name)) for name, each in costs.items()}
    show(costs, differences, f"{place()}; recorded {record.get(place(), {}).get('date', 'never')}")
    if options.write:
        record[place()] = {
            "date": date.today().isoformat(),
            "programs": {**(recorded or {} if options.only else {}), **costs},
        }
        options.file.write_text(json.dumps(record, indent=1) + "\n")
        return 0
    return int(any(differences.values()))


def show(costs: dict[str, Cost], differences: dict[str, dict[str, float]], title: str) -> None:
    """A table, with the change from the record behind each figure that is off."""
    table = Table("program", title=title)
    for figure in next(iter(costs.values())):
        table.add_column(figure, justify="right")
    for name, each in costs.items():
        changes = differences[name]
        table.add_row(
            name,
            *(
                f"{v:,}" + (f" ({changes[f]:+.1%})" if f in changes else "")
                for f, v in each.items()
            ),
        )
    rich.console.Console(width=120).print(table)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    sys.exit(main(tyro.cli(Options)))
