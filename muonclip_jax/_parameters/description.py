"""What happens to every parameter, as a table to read and as a plain structure."""

import dataclasses
import io
import itertools
import math
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding
from rich.console import Console, Group
from rich.table import Table

from muonclip_jax._core import paths
from muonclip_jax._core.meshes import mesh_of
from muonclip_jax._core.paths import Path
from muonclip_jax._core.shardings import Shardings, shardings_of
from muonclip_jax._layouts.blocks import Block, Layouts, find_blocks
from muonclip_jax._layouts.roles import Role
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._parameters import matrices, routing
from muonclip_jax._parameters.matrices import MatrixSpec
from muonclip_jax._spread.plan import DevicesPerMatrix, Plan
from muonclip_jax._spread.stacks import MatrixArray, plans

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class AttentionPiece:
    """What a parameter is to attention."""

    role: str  # "q", "k_nope", ...
    heads: int  # per layer; 1 when all heads share it


@dataclass(frozen=True)
class MatrixBatch:
    """Matrices of one shape in a parameter."""

    role: str  # the piece that they are, "" for a parameter that is not split into pieces
    count: int
    ins: int
    outs: int

    def __str__(self) -> str:
        return f"{self.role} {self.count} × [{self.ins}, {self.outs}]".lstrip()


@dataclass(frozen=True)
class ParameterRow:
    """One line of `describe`."""

    path: str
    shape: tuple[int, ...]
    optimizer: str  # "muon" or "other"
    matrices: tuple[MatrixBatch, ...]  # () for the other optimizer
    attention: tuple[AttentionPiece, ...]  # () for what the layout does not name
    qk_norm: bool  # whether it belongs to a norm behind the queries or keys


@dataclass(frozen=True)
class StackRow:
    """Matrices of one shape that Muon orthogonalizes together, in one update.

    Costs are per device; `matrices_per_device` counts the zeros that make the shares equal.
    """

    n: int  # the shorter side
    m: int
    count: int
    split: dict[str, str]  # mesh axis → "stack", "rows" (of n), "cols" (of m) or "replicated"
    devices: int
    devices_per_matrix: int
    matrices_per_device: int
    flops: int
    ratio_to_even_share: float  # of FLOPs, 1 when no device waits or repeats
    bytes_sent: int


class Description(tuple[ParameterRow, ...]):
    """The rows of `describe`: prints as a table, in which layers that are alike share a line, and
    `rich` renders it as one. On a mesh a second table tells which device orthogonalizes what.

    `rows.asdicts()` are dicts, lists, strings and numbers only, for a program or `json.dumps`;
    `rows.stacks` are the rows of the second table.
    """

    stacks: tuple[StackRow, ...]

    def __new__(cls, rows: Iterable[ParameterRow], stacks: Iterable[StackRow]) -> "Description":
        self = super().__new__(cls, rows)
        self.stacks = tuple(stacks)
        return self

    def asdicts(self) -> list[dict[str, Any]]:
        """Every row as plain data."""
        return [dataclasses.asdict(row) for row in self]

    def __rich__(self) -> Group:
        spread = any(stack.devices > 1 for stack in self.stacks)
        return Group(self._parameters(), *[self._stacks()] * spread)

    def _stacks(self) -> Table:
        devices = max(stack.devices for stack in self.stacks)
        table = Table(
            title=f"One update's matrices on {devices} devices",
            title_justify="left",
        )
        for header in ("matrices", "split by", "devices each", "on a device"):
            table.add_column(header, overflow="fold")
        for header in ("GFLOP", "of even share", "MB sent"):
            table.add_column(header, justify="right")
        for stack in self.stacks:
            table.add_row(
                f"{stack.count} × [{stack.n}, {stack.m}]",
                ", ".join(f"{axis}: {place}" for axis, place in stack.split.items()),
                str(stack.devices_per_matrix),
                str(stack.matrices_per_device),
                f"{stack.flops / 1e9:.3g}",
                f"{stack.ratio_to_even_share:.2f}",
                f"{stack.bytes_sent / 1e6:.3g}",
            )
        return table

    def _parameters(self) -> Table:
        muon, other = (
            sum(math.prod(row.shape) for row in self if row.optimizer == name)
            for name in ("muon", "other")
        )
        refused = "; QK-Clip and QuacK refuse what is behind a QK-norm"
        table = Table(
            caption=f"{muon:,} parameters with muon, {other:,} with the other optimizer"
            + refused * any(row.qk_norm for row in self),
            caption_justify="left",
        )
        for header in ("parameter", "shape", "optimizer", "matrices [in, out]", "attention"):
            table.add_column(header, overflow="fold")
        for path, row in _alike(self):
            attention = [f"{piece.role} ×{piece.heads}" for piece in row.attention]
            table.add_row(
                path,
                str(row.shape),
                row.optimizer,
                "\n".join(map(str, row.matrices)),
                ", ".join(attention + ["QK-norm"] * row.qk_norm),
            )
        return table

    def __str__(self) -> str:
        width = shutil.get_terminal_size(fallback=(10_000, 24)).columns
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()


def describe(
    params: Any,
    layout: Layouts | None = None,
    *,
    per_head: Collection[Role] = routing.EVERY_ROLE,
    rules: routing.Rules | None = None,
    dimension_numbers: routing.DimensionNumbers | None = None,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008 (frozen)
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> Description:
    """What happens to every parameter: its optimizer, its matrices, its role in attention.

    Args:
      params: The parameters (arrays or `jax.ShapeDtypeStruct`s), or an NNX module.
      layout: The attention layout given to the recipe, if any; several as a list.
      per_head: As given to the recipe.
      rules: As given to the recipe.
      dimension_numbers: As given to the recipe.
      newton_schulz: As given to the recipe.
      shardings: As given to the recipe. Arrays on a mesh tell themselves here; on Auto meshes
        they cannot under `jax.jit`, and the recipe needs it.
      devices_per_matrix: As given to the recipe.

    Returns:
      A tuple of `ParameterRow`s that prints as a table; its `stacks` are `StackRow`s.

    Raises:
      ValueError: What the routing or the layout would raise at the first training step. (A
        QK-norm, which `qk_clip` and `scale_by_quack` refuse, is shown.)
    """
    specs = routing.resolve(routing.choose(dimension_numbers, layout, per_head, rules), params)
    blocks = () if layout is None else find_blocks(layout, params)
    attention = _attention(blocks)
    norms = {path for block in blocks for path in block.qk_norms}
    rows = (
        ParameterRow(
            paths.show(path),
            tuple(leaf.shape),
            "other" if specs[path] is None else "muon",
            _batches(specs[path]),
            tuple(attention.get(path, ())),
            path in norms,
        )
        for path, leaf in paths.leaves(params)
    )
    places = shardings_of(params, shardings)
    batches = [
        batch
        for path, leaf in paths.leaves(params)
        if specs[path] is not None
        for batch in _matrices(leaf, specs[path], places[path])
    ]
    mesh = next((sharding.mesh for sharding in places.values() if sharding), mesh_of(params))
    stacks = plans(batches, mesh, newton_schulz, devices_per_matrix)
    return Description(rows, map(_stack_row, (plan for plan, _ in stacks)))


def _matrices(leaf: Any, spec: MatrixSpec, sharding: NamedSharding | None) -> list[MatrixArray]:
    """`matrices.split` of an array's shape."""
    shape = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return jax.eval_shape(partial(matrices.split, spec=spec, sharding=sharding), shape)


def _stack_row(plan: Plan) -> StackRow:
    axes = (axis for axis, _ in plan.stack.mesh)
    return StackRow(
        n=plan.stack.n,
        m=plan.stack.m,
        count=plan.stack.count,
        split=dict(zip(axes, plan.stack.stored, strict=True)),
        devices=plan.stack.devices,
        devices_per_matrix=plan.devices_per_matrix,
        matrices_per_device=plan.matrices_per_device,
        flops=plan.flops,
        ratio_to_even_share=plan.ratio_to_even_share,
        bytes_sent=plan.bytes_sent,
    )


def _alike(rows: Iterable[ParameterRow]) -> Iterator[tuple[str, ParameterRow]]:
    """Rows by path; those that differ in its first number only as `layers/{0..11}/attn/query`."""
    groups: dict[Any, list[ParameterRow]] = {}
    for row in rows:
        pattern = _NUMBER.sub("#", row.path, count=1)
        groups.setdefault((pattern, replace(row, path="")), []).append(row)
    for (pattern, _), group in groups.items():
        if len(group) == 1:
            yield group[0].path, group[0]
            continue
        numbers = sorted(int(_NUMBER.search(row.path)[0]) for row in group)
        yield pattern.replace("#", f"{{{','.join(_ranges(numbers))}}}", 1), group[0]


def _ranges(numbers: list[int]) -> Iterator[str]:
    """Ascending numbers as `0..6`, `8..11`."""
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *rest = (number for _, number in run)
        yield f"{first}..{rest[-1]}" if rest else str(first)


def _attention(blocks: tuple[Block, ...]) -> dict[Path, list[AttentionPiece]]:
    pieces: dict[Path, list[AttentionPiece]] = {}
    for block in blocks:
        for part in block.parts:
            for path in filter(None, (part.kernel, part.bias)):
                pieces.setdefault(path, []).append(AttentionPiece(part.role, part.heads))
    return pieces


def _batches(spec: MatrixSpec | None) -> tuple[MatrixBatch, ...]:
    if spec is None:
        return ()
    return tuple(
        MatrixBatch(role, *each) for role, each in zip(spec.roles, spec.shapes, strict=True)
    )
