"""What happens to every parameter, as a table to read and as a plain structure."""

import dataclasses
import io
import itertools
import math
import re
import shutil
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from muonclip_jax import matrices, paths, routing
from muonclip_jax.layouts import Block, Layouts, Role, find_blocks
from muonclip_jax.matrices import HeadMatrices, Spec
from muonclip_jax.paths import Path

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


class Description(tuple[ParameterRow, ...]):
    """The rows of `describe`: prints as a table, in which layers that are alike share a line, and
    `rich` renders it as one.

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
) -> Description:
    """What happens to every parameter: its optimizer, its matrices, its role in attention.

    Args:
      params: The parameters (arrays or `jax.ShapeDtypeStruct`s), or an NNX module.
      layout: The attention layout given to the recipe, if any; several as a list.
      per_head: As given to the recipe.
      rules: As given to the recipe.
      dimension_numbers: As given to the recipe.

    Returns:
      A tuple of `ParameterRow`s that prints as a table.

    Raises:
      ValueError: What the routing or the layout would raise at the first training step. (A
        QK-norm, which `qk_clip` and `scale_by_quack` refuse, is shown.)
    """
    specs = routing.resolve(routing.choose(dimension_numbers, layout, per_head, rules), params)
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


def _batches(shape: tuple[int, ...], spec: Spec | None) -> tuple[MatrixBatch, ...]:
    if spec is None:
        return ()
    roles = [part.role for part in spec.parts] if isinstance(spec, HeadMatrices) else [""]
    return tuple(
        MatrixBatch(role, *each)
        for role, each in zip(roles, matrices.shapes(shape, spec), strict=True)
    )
