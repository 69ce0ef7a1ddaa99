"""What Muon costs on each device of a TPU pod or of eight GPUs, by their compilers, next to Optax
and MaxText.

    python -m benchmarks.pod --json record.json     # needs libtpu and JAX's CUDA plugin, no device

Compiles `update` of `mc.scale_by_muon`, of `optax.contrib.scale_by_muon` and of MaxText's own
(gradients and momentum in, updates and momentum out, all in float32 and in the parameters'
sharding, momentum donated); nothing is run. All with their defaults, five Newton–Schulz steps: ours
in bfloat16, theirs in the parameters' float32, whose products a TPU does in bfloat16 all the same.

The figures of a row, per device:

    flops_per_device            of the matrix products that run, loops multiplied in
    even_share_standard_flops   4n²m + 2n³ for each step and matrix, over the number of devices
    ratio_to_even_share         the former over the latter
    optimal_seconds             the TPU's compiler's estimate: every operation as fast as arithmetic
                                or memory allow, the network not counted
    temp_bytes                  memory besides arguments and results
    local_shard_bytes           of the parameters, in float32
    collective_counts           executions, by kind
    collective_bytes            likewise, see `benchmarks.compiled.Collective`
    largest_all_gather_bytes    of the result of one
    behind_products             the part of these bytes that is on its way while products run
    least_bytes                 what any program must send, see `least_bytes`

and, prefixed with optax_ and maxtext_, those that these have others of, or an error where they do
not compile.
"""

import functools
import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import distributions, version
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
from benchmarks import gpu, tpu
from benchmarks.compiled import collectives, dots, flops, totals
from benchmarks.overlap import overlap
from benchmarks.peers import maxtext_missing, maxtext_muon

STEPS = 5  # all defaults
MESHES = {
    "v5p:8x8x8": {"fsdp": 64, "tp": 8},
    "v5p:4x4x4": {"fsdp": 16, "tp": 4},
    "h100:1x1x8": {"fsdp": 4, "tp": 2},
}
# Without it a TPU's compiler lets all else wait for an all-to-all. GPU's needs no option.
ASYNCHRONOUS = {"xla_tpu_enable_async_all_to_all": True}


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
Topology = Literal["v5p:8x8x8", "v5p:4x4x4", "h100:1x1x8"]
LAYERS, EXPERTS = 4, 384
SPLIT = P(None, "fsdp", "tp")
CASES: dict[str, Model] = {
    "a": {f"layer_{i}": Leaf((7168, 18432), P("fsdp", "tp")) for i in range(61)},
    "b": {
        "gate": Leaf((LAYERS, EXPERTS, 7168, 2048), P(None, "fsdp", None, "tp")),
        "up": Leaf((LAYERS, EXPERTS, 7168, 2048), P(None, "fsdp", None, "tp")),
        "down": Leaf((LAYERS, EXPERTS, 2048, 7168), P(None, "fsdp", "tp", None)),
    },
    "c": {
        "query": Leaf((16, 4096, 4096), SPLIT),
        "key": Leaf((16, 4096, 1024), SPLIT),
        "value": Leaf((16, 4096, 1024), SPLIT),
        "out": Leaf((16, 4096, 4096), P(None, "tp", "fsdp")),
        "gate": Leaf((16, 4096, 14336), SPLIT),
        "up": Leaf((16, 4096, 14336), SPLIT),
        "down": Leaf((16, 14336, 4096), P(None, "tp", "fsdp")),
    },
    "d": {"up": Leaf((12, 4096, 14336), SPLIT)},
    "e": {"up": Leaf((165, 1024, 4096), SPLIT)},
}
WHERE: dict[str, tuple[Topology, ...]] = {
    "a": ("v5p:8x8x8", "v5p:4x4x4"),
    "b": ("v5p:8x8x8", "v5p:4x4x4"),
    **dict.fromkeys("cde", ("h100:1x1x8",)),
}


@dataclass(frozen=True)
class Options:
    """Muon's cost on TPU pods and on eight GPUs, without any."""

    cases: tuple[Literal["a", "b", "c", "d", "e"], ...] = tuple(CASES)
    """a: 61 dense matrices of 7168×18432, each a parameter. b: four layers of Kimi K2's experts,
    384 × 3 matrices of 7168×2048 in each, stacked in three parameters. c: 16 scanned layers with
    the shapes of Llama 3 8B. d: 12 matrices of 4096×14336. e: 165 of 1024×4096."""
    topologies: tuple[Topology, ...] = tuple(MESHES)
    """Meshes of fsdp 64 × tp 8, of fsdp 16 × tp 4, and of fsdp 4 × tp 2. a and b are for TPUs, the
    others for GPUs."""
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


def compile_maxtext(model: Model, mesh: Mesh) -> jax.stages.Compiled:
    """MaxText's Muon, which takes its all-to-alls where an axis of layers is not split."""
    if why := maxtext_missing():
        raise ImportError(why)
    shardings = _shardings(model, mesh)
    numbers = {
        name: maxtext_muon.MuonDimensionNumbers(*each, shardings[name])
        for name, each in _numbers(model).items()
    }
    tx = maxtext_muon.scale_by_muon(weight_dimension_numbers=numbers)
    return _compile(tx, model, mesh)


PEERS: dict[str, Compile] = {"optax": compile_optax, "maxtext": compile_maxtext}


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
    replicated = NamedSharding(mesh, P())
    state = optax.tree_map_params(
        tx,
        lambda x, grad: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=grad.sharding),
        jax.eval_shape(tx.init, grads),
        grads,
        transform_non_params=lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=replicated),
    )
    out = jax.tree.map(lambda x: x.sharding, (grads, state))
    lowered = jax.jit(tx.update, out_shardings=out, donate_argnums=1).lower(grads, state)
    return lowered.compile(compiler_options=ASYNCHRONOUS if _on_tpu(mesh) else None)


def make_mesh(topology: str) -> Mesh:
    make = gpu.make_mesh if topology.startswith("h100") else tpu.make_mesh
    return make(topology, **MESHES[topology])


def _on_tpu(mesh: Mesh) -> bool:
    return mesh.devices.flat[0].platform == "tpu"


def cost(compile: Compile, model: Model, mesh: Mesh) -> dict[str, Any]:
    """One side's figures of a row."""
    compiled = compile(model, mesh)
    moved = collectives(compiled)
    executed = flops(dots(compiled))
    return {
        "flops_per_device": executed,
        "ratio_to_even_share": executed / even_share(model, mesh),
        "optimal_seconds": _seconds(compile, compiled, model, mesh),
        "temp_bytes": compiled.memory_analysis().temp_size_in_bytes,
        "collective_counts": {kind: each.count for kind, each in totals(moved).items()},
        "collective_bytes": {kind: each.bytes for kind, each in totals(moved).items()},
        "largest_all_gather_bytes": max(
            (each.bytes for each in moved if each.kind == "all-gather"), default=0
        ),
        "behind_products": overlap(compiled).share,
    }


def _seconds(
    compile: Compile, compiled: jax.stages.Compiled, model: Model, mesh: Mesh
) -> float | None:
    """On a GPU the compiler says nothing; MaxText's loop cannot be written out."""
    if not _on_tpu(mesh) or compile is compile_maxtext:
        return None
    return optimal_seconds(compiled, functools.partial(compile, model, mesh))


def even_share(model: Model, mesh: Mesh) -> float:
    return sum(leaf.standard_flops for leaf in model.values()) / mesh.size


def least_bytes(model: Model, mesh: Mesh) -> float:
    """What a device must receive, in bfloat16, given the device groups of our plans.

    A device that works on w whole matrices has 1/s of each, where s devices split a matrix, and
    leaves as much of the results where they belong: 2w(1 - 1/s)nm entries.

    Of a device group each device also does its part of a step, V = n²m/p products of two entries
    for WX. With a entries of W, b of X and c of WX it can do √(abc) at most (Loomis and Whitney),
    so a + b + c ≥ 3V^⅔. Those that lie on it before and after, a pth of each matrix, need not come.
    """
    numbers, shardings = _numbers(model), _shardings(model, mesh)
    shapes = {name: jax.ShapeDtypeStruct(leaf.shape, jnp.float32) for name, leaf in model.items()}
    described = mc.describe(shapes, dimension_numbers=numbers, shardings=shardings)
    entries = 0.0
    for plan in described.stacks:
        n, m, group = plan.stack.n, plan.stack.m, plan.devices_per_matrix
        split = plan.stack.n * plan.stack.m // (plan.stack.local("rows") * plan.stack.local("cols"))
        trips = 2 * max(0.0, 1 / group - 1 / split) * n * m
        step = max(0.0, 3 * (n**2 * m / group) ** (2 / 3) - (n**2 + 2 * n * m) / group)
        entries += plan.matrices_per_device * (trips + STEPS * step * (group > 1))
    return 2 * entries


def local_shard_bytes(model: Model, mesh: Mesh) -> int:
    """Of float32 parameters, which all devices have equal shares of."""
    return sum(4 * math.prod(leaf.shape) for leaf in model.values()) // mesh.size


def optimal_seconds(
    compiled: jax.stages.Compiled, compile_again: Callable[[], jax.stages.Compiled]
) -> float:
    """The compiler counts the body of a loop once. So if products or collectives are in one, this
    is of the same program with its scans and maps written out."""
    if _has_loops(compiled):
        original = jax.lax.scan

        def scan(*args, **kwargs):
            return original(*args, **kwargs | {"unroll": True})

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
    model, mesh = CASES[case], make_mesh(topology)
    figures = {
        "case": case,
        "topology": topology,
        "mesh": MESHES[topology],
        "even_share_standard_flops": even_share(model, mesh),
        "local_shard_bytes": local_shard_bytes(model, mesh),
        "least_bytes": least_bytes(model, mesh),
        **cost(compile_ours, model, mesh),
    }
    for name, compile in PEERS.items():
        try:
            theirs = cost(compile, model, mesh)
        except (jax.errors.JaxRuntimeError, ImportError) as error:  # such as a lack of memory
            theirs = {"error": str(error).splitlines()[0]}
        figures |= {f"{name}_{figure}": value for figure, value in theirs.items()}
    return figures


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Muon's update on each device, compiled, not run")
    for header in ("case", "topology", ""):
        table.add_column(header)
    headers = ("TFLOP", "of even share", "optimal ms", "temps GB", "sent GB", "at least")
    headers += ("of 2 shards", "behind products")
    for header in headers:
        table.add_column(header, justify="right")
    for each in rows:
        for name, prefix in (("ours", ""), *((peer, f"{peer}_") for peer in PEERS)):
            table.add_row(each["case"], each["topology"], name, *_cells(each, prefix))
    console = Console()
    console.print(table)
    for each, peer in itertools.product(rows, PEERS):
        if error := each.get(f"{peer}_error"):
            about = f"{each['case']}, {each['topology']}: {peer} does not compile. {error}"
            console.print(about, markup=False, soft_wrap=True)


def _cells(row: dict[str, Any], prefix: str) -> tuple[str, ...]:
    if f"{prefix}error" in row:
        return ("none",) * 8
    sent = sum(row[f"{prefix}collective_bytes"].values())
    seconds = row[f"{prefix}optimal_seconds"]
    return (
        f"{row[f'{prefix}flops_per_device'] / 1e12:.2f}",
        f"{row[f'{prefix}ratio_to_even_share']:.2f}",
        "" if seconds is None else f"{seconds * 1e3:.1f}",
        f"{row[f'{prefix}temp_bytes'] / 1e9:.2f}",
        f"{sent / 1e9:.2f}",
        "" if prefix else f"{row['least_bytes'] / 1e9:.2f}",
        f"{sent / row['local_shard_bytes']:.2f}",  # float32 has as many bytes as two of bfloat16
        f"{row[f'{prefix}behind_products']:.0%}",
    )


def versions() -> dict[str, str]:
    packages = ("jax", "libtpu", "jax-cuda13-plugin", "optax", "maxtext")
    installed = {each.metadata["Name"].replace("_", "-") for each in distributions()}
    return {package: version(package) for package in packages if package in installed}


def main(options: Options) -> dict[str, Any]:
    jax.config.update("jax_platforms", "cpu")  # not to look for devices: libtpu takes its time
    wanted = itertools.product(options.topologies, options.cases)
    rows = [row(case, topology) for topology, case in wanted if topology in WHERE[case]]
    record = {
        "date": date.today().isoformat(),
        "what": "compiled, not run",
        "versions": versions(),
        "rows": rows,
    }
    show(rows)
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n")
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
