"""What Muon costs on each device of a TPU pod, by the TPU's compiler, next to Optax.

    python -m benchmarks.pod --json record.json        # needs libtpu, no TPU

Compiles `update` of `mc.scale_by_muon` and of `optax.contrib.scale_by_muon` (gradients and momentum
in, updates and momentum out, all in float32 and in the parameters' sharding, momentum donated) for
whole pods; nothing is run. Both with their defaults, five Newton–Schulz steps: ours in bfloat16,
Optax in the parameters' float32, whose products a TPU does in bfloat16 all the same.

The figures of a row, per device:

    flops_per_device            of the matrix products that run, loops multiplied in
    even_share_standard_flops   4n²m + 2n³ for each step and matrix, over the number of devices
    ratio_to_even_share         the former over the latter
    optimal_seconds             the compiler's estimate: every operation as fast as arithmetic or
                                memory allow, the network not counted
    temp_bytes                  memory besides arguments and results
    local_shard_bytes           of the parameters
    collective_counts           executions, by kind
    collective_bytes            likewise, see `benchmarks.compiled.Collective`
    largest_all_gather_bytes    of the result of one

and, prefixed with optax_, those that Optax has others of, or optax_error if it does not compile.
"""

import functools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import optax
import tyro
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from rich.table import Table

import muonclip_jax as mc
from benchmarks.compiled import collectives, dots, flops, totals
from benchmarks.tpu import make_mesh

STEPS = 5  # both defaults
MESHES = {"v5p:8x8x8": {"fsdp": 64, "tp": 8}, "v5p:4x4x4": {"fsdp": 16, "tp": 4}}


class Leaf(NamedTuple):
    """A parameter `[..., in, out]`: matrices in its last two axes."""

    shape: tuple[int, ...]
    spec: P

    @property
    def numbers(self) -> optax.contrib.MuonDimensionNumbers:
        return optax.contrib.MuonDimensionNumbers(len(self.shape) - 2, len(self.shape) - 1)

    @property
    def standard_flops(self) -> int:
        *batch, rows, columns = self.shape
        n, m = sorted((rows, columns))
        return STEPS * math.prod(batch) * (4 * n**2 * m + 2 * n**3)


Model = dict[str, Leaf]
LAYERS, EXPERTS = 4, 384
CASES: dict[str, Model] = {
    "a": {f"layer_{i}": Leaf((7168, 18432), P("fsdp", "tp")) for i in range(61)},
    "b": {
        "gate": Leaf((LAYERS, EXPERTS, 7168, 2048), P(None, "fsdp", None, "tp")),
        "up": Leaf((LAYERS, EXPERTS, 7168, 2048), P(None, "fsdp", None, "tp")),
        "down": Leaf((LAYERS, EXPERTS, 2048, 7168), P(None, "fsdp", "tp", None)),
    },
}


@dataclass(frozen=True)
class Options:
    """Muon's cost on TPU pods, without a TPU."""

    cases: tuple[Literal["a", "b"], ...] = tuple(CASES)
    """a: 61 dense matrices of 7168×18432, each a parameter. b: four layers of Kimi K2's experts,
    384 × 3 matrices of 7168×2048 in each, stacked in three parameters."""
    topologies: tuple[Literal["v5p:8x8x8", "v5p:4x4x4"], ...] = tuple(MESHES)
    """Meshes of fsdp 64 × tp 8 and of fsdp 16 × tp 4."""
    json: Path | None = None
    """Write the figures there as well."""


Compile = Callable[[Model, Mesh], jax.stages.Compiled]


def compile_ours(model: Model, mesh: Mesh) -> jax.stages.Compiled:
    numbers, shardings = _numbers(model), _shardings(model, mesh)
    tx = mc.scale_by_muon(dimension_numbers=numbers, shardings=shardings)
    return _compile(tx, model, mesh)


def compile_optax(model: Model, mesh: Mesh) -> jax.stages.Compiled:
    tx = optax.contrib.scale_by_muon(weight_dimension_numbers=_numbers(model))
    return _compile(tx, model, mesh)


def _numbers(model: Model) -> dict[str, optax.contrib.MuonDimensionNumbers]:
    return {name: leaf.numbers for name, leaf in model.items()}


def _shardings(model: Model, mesh: Mesh) -> dict[str, NamedSharding]:
    return {name: NamedSharding(mesh, leaf.spec) for name, leaf in model.items()}


def _compile(tx: optax.GradientTransformation, model: Model, mesh: Mesh) -> jax.stages.Compiled:
    """The same arguments, results and shardings, whatever `tx` is."""
    grads = {
        name: jax.ShapeDtypeStruct(model[name].shape, jnp.float32, sharding=sharding)
        for name, sharding in _shardings(model, mesh).items()
    }
    # The state is the momentum, sharded as parameters of its shape are, and a few numbers.
    like = {grad.shape: grad.sharding for grad in grads.values()}
    replicated = NamedSharding(mesh, P())
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=like.get(x.shape, replicated)),
        jax.eval_shape(tx.init, grads),
    )
    out = jax.tree.map(lambda x: x.sharding, (grads, state))
    return jax.jit(tx.update, out_shardings=out, donate_argnums=1).lower(grads, state).compile()


def cost(compile: Compile, model: Model, mesh: Mesh) -> dict[str, Any]:
    """One side's figures of a row."""
    compiled = compile(model, mesh)
    moved = collectives(compiled)
    executed = flops(dots(compiled))
    return {
        "flops_per_device": executed,
        "ratio_to_even_share": executed / even_share(model, mesh),
        "optimal_seconds": optimal_seconds(compiled, functools.partial(compile, model, mesh)),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "collective_counts": {kind: each.count for kind, each in totals(moved).items()},
        "collective_bytes": {kind: each.bytes for kind, each in totals(moved).items()},
        "largest_all_gather_bytes": max(
            (each.bytes for each in moved if each.kind == "all-gather"), default=0
        ),
    }


def even_share(model: Model, mesh: Mesh) -> float:
    return sum(leaf.standard_flops for leaf in model.values()) / mesh.size


def local_shard_bytes(model: Model, mesh: Mesh) -> int:
    """Of float32 parameters, which all devices have equal shares of."""
    return sum(4 * math.prod(leaf.shape) for leaf in model.values()) // mesh.size


def optimal_seconds(
    compiled: jax.stages.Compiled, compile_again: Callable[[], jax.stages.Compiled]
) -> float:
    """The compiler counts the body of a loop once. So if products or collectives are in one, this
    is of the same program with its scans and maps written out."""
    if _has_loops(compiled):
        scan = functools.partial(jax.lax.scan, unroll=True)
        with mock.patch.multiple(
            jax.lax,
            scan=scan,
            map=lambda f, xs: scan(lambda carry, x: (carry, f(x)), None, xs)[1],
        ):
            compiled = compile_again()
        if _has_loops(compiled):
            raise NotImplementedError("A loop is left, and optimal_seconds would count it once.")
    return compiled.cost_analysis()["optimal_seconds"]


def _has_loops(compiled: jax.stages.Compiled) -> bool:
    return any(op.times > 1 for op in (*dots(compiled), *collectives(compiled)))


def row(case: str, topology: str) -> dict[str, Any]:
    model, mesh = CASES[case], make_mesh(topology, **MESHES[topology])
    ours = cost(compile_ours, model, mesh)
    try:
        optaxs = cost(compile_optax, model, mesh)
    except jax.errors.JaxRuntimeError as error:  # more memory than a device has
        optaxs = {"error": str(error).splitlines()[0]}
    return {
        "case": case,
        "topology": topology,
        "mesh": MESHES[topology],
        "even_share_standard_flops": even_share(model, mesh),
        "local_shard_bytes": local_shard_bytes(model, mesh),
        **ours,
        **{f"optax_{figure}": value for figure, value in optaxs.items()},
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Muon's update on each device, by the TPU's compiler")
    for header in ("case", "topology", ""):
        table.add_column(header)
    for header in ("TFLOP", "of even share", "optimal ms", "temps GB", "sent GB"):
        table.add_column(header, justify="right")
    for each in rows:
        for name, prefix in (("ours", ""), ("optax", "optax_")):
            table.add_row(each["case"], each["topology"], name, *_cells(each, prefix))
    console = Console()
    console.print(table)
    for each in rows:
        if error := each.get("optax_error"):
            about = f"{each['case']}, {each['topology']}: optax does not compile. {error}"
            console.print(about, markup=False, soft_wrap=True)


def _cells(row: dict[str, Any], prefix: str) -> tuple[str, ...]:
    if f"{prefix}error" in row:
        return ("none",) * 5
    return (
        f"{row[f'{prefix}flops_per_device'] / 1e12:.2f}",
        f"{row[f'{prefix}ratio_to_even_share']:.2f}",
        f"{row[f'{prefix}optimal_seconds'] * 1e3:.1f}",
        f"{row[f'{prefix}temp_bytes'] / 1e9:.2f}",
        f"{sum(row[f'{prefix}collective_bytes'].values()) / 1e9:.2f}",
    )


def main(options: Options) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")  # not to look for TPUs: libtpu takes its time
    rows = [row(case, topology) for topology in options.topologies for case in options.cases]
    packages = ("jax", "libtpu", "optax")
    record = {
        "date": date.today().isoformat(),
        "versions": {package: version(package) for package in packages},
        "rows": rows,
    }
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
