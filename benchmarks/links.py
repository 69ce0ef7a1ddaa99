"""What each link of Muon's family costs by itself, on a decoder of 12 layers: compiled, not run.

    python -m benchmarks.links --json PATH

Products are floating-point operations of matrix products, with loops counted as often as they run.
Other work and bytes are XLA's own count for the CPU, of programs without loops; an entry is one
number of the parameters. Sent is what the collectives of a device give it, when the parameters are
split over eight devices, four by two. Of the links that do another thing every few steps both
branches are compiled, and what is shown is the mean over a period.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jax
import optax
import tyro
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.table import Table

import muonclip_jax as mc
from benchmarks import timing
from benchmarks.compiled import collectives, dots, flops, totals
from benchmarks.optimizer_step import decoder

PERIOD = 4
DEVICES = (4, 2)


@dataclass(frozen=True)
class Options:
    """What each link costs."""

    layers: int = 12
    width: int = 512
    only: str = ""
    """Links whose names begin so."""
    json: Path | None = None
    """Write the figures there as well."""


@dataclass(frozen=True)
class Cost:
    """Of one step.

    Attributes:
      product_gflop: Of matrix products, on one device that has everything.
      other_flop_an_entry: Everything else, there.
      bytes_an_entry: Read and written, there, of arrays of float32.
      state_mb: What it keeps.
      sent_mb: Between eight devices, to each.
    """

    product_gflop: float
    other_flop_an_entry: float | None
    bytes_an_entry: float | None
    state_mb: float
    sent_mb: float


def links() -> dict[str, Callable[[], optax.GradientTransformation]]:
    """By name; built where the mesh is known."""
    momentum = lambda dtype: lambda: optax.trace(0.95, True, dtype)  # noqa: E731
    eight_bits = lambda: mc.scale_by_muon(mu_dtype="int8")  # noqa: E731
    return {
        "momentum, float32": momentum(None),
        "momentum, bfloat16": momentum("bfloat16"),
        "momentum in 8 bits, and orthogonalization": eight_bits,
        "orthogonalization": mc.scale_by_orthogonalization,
        f"orthogonalization, whole every {PERIOD}": lambda: mc.scale_by_periodic_orthogonalization(
            PERIOD
        ),
        "orthogonalization, 8 cubic steps": lambda: mc.scale_by_orthogonalization(
            mc.NewtonSchulz(mc.schedules.cubic(8))
        ),
        "scale_by_update_rms": mc.scale_by_update_rms,
        'normalize_rms(of="matrix")': mc.normalize_rms,
        'normalize_rms(of="outputs")': lambda: mc.normalize_rms(of="outputs"),
        'normalize_rms(of="both")': lambda: mc.normalize_rms(of="both"),
        "scale_by_neuron_rms": mc.scale_by_neuron_rms,
        "scale_by_neuron_rms(keep_rms=True)": lambda: mc.scale_by_neuron_rms(keep_rms=True),
        "optax.scale_by_rms (AdaMuon)": lambda: optax.scale_by_rms(0.95, eps_in_sqrt=False),
        "add_decayed_weights": lambda: mc.add_decayed_weights(0.1),
        "add_decayed_weights(cautious=True)": lambda: mc.add_decayed_weights(0.1, cautious=True),
        "hyperball": lambda: mc.hyperball(0.02),
    }


def kernels(options: Options) -> Any:
    """The shapes of the decoder's matrices, by layer."""
    layers = decoder(options.layers, options.width, 256)["layers"]
    return {i: {name: layer[name] for name in ("attn", "mlp")} for i, layer in layers.items()}


def compiled(tx: optax.GradientTransformation, params: Any) -> jax.stages.Compiled:
    """The program of one update."""
    state = jax.eval_shape(tx.init, params)
    return jax.jit(tx.update, donate_argnums=(0, 1)).lower(params, state, params).compile()


def state_bytes(tx: optax.GradientTransformation, params: Any) -> int:
    leaves = jax.tree.leaves(jax.eval_shape(tx.init, params))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def sent_bytes(build: Callable[[], optax.GradientTransformation], params: Any) -> int:
    """What the collectives of one device give it, every branch taken once."""
    mesh = jax.make_mesh(DEVICES, ("fsdp", "tp"), (AxisType.Explicit,) * 2)
    sharding = NamedSharding(mesh, P("fsdp", "tp"))
    placed = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), params
    )
    with jax.set_mesh(mesh):
        program = compiled(build(), placed)
    return sum(total.bytes for total in totals(collectives(program)).values())


def cost(name: str, build: Callable[[], optax.GradientTransformation], params: Any) -> Cost:
    """Of one link."""
    tx, entries = build(), sum(leaf.size for leaf in jax.tree.leaves(params))
    program = compiled(tx, params)
    multiplied, sent = flops(dots(program)), sent_bytes(build, params)
    other = bytes_ = None
    if not multiplied:
        analysis = program.cost_analysis()
        other = round(analysis["flops"] / entries, 2)
        bytes_ = round(analysis["bytes accessed"] / entries, 2)
    if f"every {PERIOD}" in name:
        # On one device a block is the whole matrix, so both branches are alike. Of eight, only the
        # branch of whole matrices sends.
        multiplied, sent = multiplied / 2, sent / PERIOD
    return Cost(multiplied / 1e9, other, bytes_, state_bytes(tx, params) / 1e6, sent / 1e6)


def show(costs: dict[str, Cost]) -> Table:
    table = Table()
    for header in ("link", "products, GFLOP", "other, an entry", "bytes, an entry"):
        table.add_column(header)
    table.add_column("state, MB")
    table.add_column("sent, MB")
    for name, c in costs.items():
        numbers = (c.product_gflop, c.other_flop_an_entry, c.bytes_an_entry, c.state_mb, c.sent_mb)
        table.add_row(name, *("" if x is None else f"{x:.4g}" for x in numbers))
    return table


def main(options: Options) -> None:
    jax.config.update("jax_num_cpu_devices", DEVICES[0] * DEVICES[1])
    params = kernels(options)
    wanted = {name: build for name, build in links().items() if name.startswith(options.only)}
    costs = {name: cost(name, build, params) for name, build in wanted.items()}
    timing.console().print(show(costs))
    rows = [{"link": name, **asdict(each)} for name, each in costs.items()]
    timing.write(timing.record(options, rows), options.json)


if __name__ == "__main__":
    main(tyro.cli(Options))
