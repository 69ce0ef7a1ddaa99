"""What happens to every parameter, as a table to read and as a plain structure."""

import dataclasses
import io
import math
from dataclasses import dataclass
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from muonclip_jax import matrices, paths, routing
from muonclip_jax.layouts import Block, Layouts, find_blocks
from muonclip_jax.matrices import HeadMatrices, Spec
from muonclip_jax.paths import Path


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


class Description(tuple[ParameterRow, ...]):
    """The rows of `describe`: prints as a table, and `rich` renders it as one.

    `rows.asdicts()` are dicts, lists, strings and numbers only, for a program or `json.dumps`.
    """

    def asdicts(self) -> list[dict[str, Any]]:
        """Every row as plain data."""
        return [dataclasses.asdict(row) for row in self]

    def __rich__(self) -> Table:
        muon, other = (
            sum(math.prod(row.shape) for row in self if row.optimizer == name)
            for name in ("muon", "other")
        )
        table = Table(
            caption=f"{muon:,} parameters with muon, {other:,} with the other optimizer",
            caption_justify="left",
        )
        for header in ("parameter", "shape", "optimizer", "matrices [in, out]", "attention"):
            table.add_column(header, overflow="fold")
        for row in self:
            attention = [f"{piece.role} ×{piece.heads}" for piece in row.attention]
            table.add_row(
                row.path,
                str(row.shape),
                row.optimizer,
                "\n".join(map(str, row.matrices)),
                ", ".join(attention + ["QK-norm"] * row.qk_norm),
            )
        return table

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=10_000, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()


def describe(
    params: Any,
    layout: Layouts | None = None,
    *,
    dimension_numbers: routing.DimensionNumbers | None = None,
) -> Description:
    """What happens to every parameter: its optimizer, its matrices, its role in attention.

    Args:
      params: The parameters (arrays or `jax.ShapeDtypeStruct`s).
      layout: The attention layout given to `muonclip`, `quack` or `qk_clip`, if any; several as a
        list.
      dimension_numbers: As given to the recipe; None for its default, which is
        `muon_dimension_numbers` with the same layout.

    Returns:
      A tuple of `ParameterRow`s that prints as a table.

    Raises:
      ValueError: What the routing or the layout would raise at the first training step.
    """
    if dimension_numbers is None:
        dimension_numbers = partial(routing.muon_dimension_numbers, layout=layout)
    specs = routing.resolve(dimension_numbers, params)
    blocks = () if layout is None else find_blocks(layout, params)
    attention = _attention(blocks)
    norms = {path for block in blocks for path in block.qk_norms}
    return Description(
        ParameterRow(
            paths.show(path),
            tuple(leaf.shape),
            "other" if specs[path] is None else "muon",
            _batches(tuple(leaf.shape), specs[path]),
            tuple(attention.get(path, ())),
            path in norms,
        )
        for path, leaf in paths.leaves(params)
    )


def _attention(blocks: tuple[Block, ...]) -> dict[Path, list[AttentionPiece]]:
    pieces: dict[Path, list[AttentionPiece]] = {}
    for block in blocks:
        for part in block.parts:
            for path in filter(None, (part.kernel, part.bias)):
                pieces.setdefault(path, []).append(AttentionPiece(part.role, part.heads))
    return pieces


def _batches(shape: tuple[int, ...], spec: Spec | None) -> tuple[MatrixBatch, ...]:
    if spec is None:
        return ()
    roles = [part.role for part in spec.parts] if isinstance(spec, HeadMatrices) else [""]
    return tuple(
        MatrixBatch(role, *each)
        for role, each in zip(roles, matrices.shapes(shape, spec), strict=True)
    )
