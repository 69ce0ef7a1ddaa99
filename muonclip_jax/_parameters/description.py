"""What happens to every parameter, as a table to read and as a plain structure."""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import numpy as np

from muonclip_jax._core import paths
from muonclip_jax._core.masks import Frozen, Mask, check_mask, read_frozen
from muonclip_jax._core.meshes import mesh_of
from muonclip_jax._core.shardings import Shardings, shardings_of
from muonclip_jax._core.tables import Readable, Sheet
from muonclip_jax._layouts.blocks import Layouts, find_blocks
from muonclip_jax._layouts.find import line_for
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz, check_newton_schulz
from muonclip_jax._parameters import matrices, routing
from muonclip_jax._parameters.decay import decays
from muonclip_jax._parameters.granularity import PER_HEAD, Granularity
from muonclip_jax._parameters.matrices import MatrixKind
from muonclip_jax._spread.moves import way_to_matrices
from muonclip_jax._spread.plan import DevicesPerMatrix, Plan, check_devices_per_matrix
from muonclip_jax._spread.stacks import plans

_NUMBER = re.compile(r"\d+")


@dataclass(frozen=True)
class AttentionPiece:
    """What a parameter is to attention."""

    role: str  # "q", "k_nope", ...
    heads: int  # per layer; 1 when all heads share it


@dataclass(frozen=True)
class ParameterRow:
    """One line of `describe`."""

    path: str
    shape: tuple[int, ...]
    optimizer: str  # "muon", "other" or "frozen"
    matrices: tuple[MatrixKind, ...]  # () for all but Muon
    attention: tuple[AttentionPiece, ...]  # () for what the layout does not name
    qk_norm: bool  # whether it belongs to a norm behind the queries or keys
    decays: bool  # whether weight decay reaches it
    why: str  # what told how it is read; "" where a rule, the layout or its own name did
    hint: str  # the layout that would split what it holds as one matrix; "" where nothing would


class Description(Readable, tuple[ParameterRow, ...]):
    """The rows of `describe`: prints as a table, in which layers that are alike share a line; so
    do `rich` and a notebook. Below it stand the layouts that would split what is one matrix without
    them. On a mesh a second table tells which device orthogonalizes what.

    `rows.asdicts()` are dicts, lists, strings and numbers only, for a program or `json.dumps`.

    Attributes:
      stacks: The rows of the second table: for the matrices of one shape that Muon orthogonalizes
        together, the `Plan` with its costs per device. Times are estimates for comparing plans, by
        the peaks of the devices and their links, where the mesh says what they are. Most sending
        goes on while products run.
      newton_schulz: How they are orthogonalized, with the dtype that "auto" is on JAX's default
        backend and the `Rates` that it goes by: kept with a run, it gives the same program on
        another machine.
    """

    stacks: tuple[Plan, ...]
    newton_schulz: NewtonSchulz

    def __new__(
        cls, rows: Iterable[ParameterRow], stacks: Iterable[Plan], newton_schulz: NewtonSchulz
    ) -> "Description":
        self = super().__new__(cls, rows)
        self.stacks = tuple(stacks)
        self.newton_schulz = newton_schulz
        return self

    def asdicts(self) -> list[dict[str, Any]]:
        """Every row as plain data."""
        return [dataclasses.asdict(row) for row in self]

    def __repr__(self) -> str:
        counts = ", ".join(
            f"{sum(row.optimizer == name for row in self)} {name}"
            for name in ("muon", "other", "frozen")
        )
        return f"Description({len(self)} parameters: {counts})"

    def _sheets(self) -> list[Sheet]:
        spread = any(plan.stack.devices > 1 for plan in self.stacks)
        return [self._parameters(), *([self._stacks()] if spread else [])]

    def _stacks(self) -> Sheet:
        devices = max(plan.stack.devices for plan in self.stacks)
        where = ("matrices", "split by", "devices each", "on a device")
        costs = ("GFLOP", "of even share", "MB sent", "ms of products", "ms of sending")
        rows = []
        for plan in self.stacks:
            stack = plan.stack
            sent = plan.bytes_sent / 1e6, plan.seconds_of_sending * 1e3
            unknown = "unknown" in stack.stored
            row = (
                f"{stack.count} × [{stack.n}, {stack.m}]",
                ", ".join(f"{axis}: {split}" for axis, split in stack.split.items()),
                str(plan.devices_per_matrix),
                str(plan.matrices_per_device),
                f"{plan.flops / 1e9:.3g}",
                f"{plan.ratio_to_even_share:.2f}",
                "?" if unknown else f"{sent[0]:.3g}",
                f"{plan.seconds_of_products * 1e3:.2g}",
                "?" if unknown else f"{sent[1]:.2g}",
            )
            rows.append(row)
        machine = self.stacks[0].machine
        rates = f"{machine.name}'s peaks" + ", for want of theirs" * machine.assumed
        title = f"One update's matrices on {devices} devices; times by a {rates}"
        return Sheet((*where, *costs), rows, title=title, numbers=costs)

    def _parameters(self) -> Sheet:
        muon, other, frozen = (
            sum(math.prod(row.shape) for row in self if row.optimizer == name)
            for name in ("muon", "other", "frozen")
        )
        refused = "; QK-Clip and QuacK refuse what is behind a QK-norm"
        alike = list(_alike(self))
        hints = [
            f"\n{path} holds several projections of attention as one matrix; "
            f"layout={row.hint} splits it into heads"
            for path, row in alike
            if row.hint
        ]
        caption = (
            f"{muon:,} parameters with muon, {other:,} with the other optimizer"
            + f", {frozen:,} frozen" * bool(frozen)
            + refused * any(row.qk_norm for row in self)
            + _iteration(self.newton_schulz) * bool(self.stacks)
            + "".join(hints)
        )
        headers = ["parameter", "shape", "optimizer", "matrices [in, out]", "decays", "attention"]
        told = any(row.why for row in self)
        rows = []
        for path, row in alike:
            attention = [f"{piece.role} ×{piece.heads}" for piece in row.attention]
            cells = [
                path,
                str(row.shape),
                row.optimizer,
                "\n".join(map(str, row.matrices)),
                "yes" if row.decays else "",
                ", ".join(attention + ["QK-norm"] * row.qk_norm),
            ]
            rows.append(cells + [row.why] * told)
        return Sheet(headers + ["read as"] * told, rows, caption=caption)


def describe(
    params: Any,
    layout: Layouts | None = None,
    *,
    granularity: Granularity = PER_HEAD,
    rules: routing.Rules | None = None,
    dimension_numbers: routing.DimensionNumbers | None = None,
    weight_decay_mask: Mask | None = None,
    frozen: Frozen | None = None,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008 (frozen)
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> Description:
    """What happens to every parameter: its optimizer, matrices, decay, and role in attention.

    Args:
      params: The parameters (arrays or `jax.ShapeDtypeStruct`s), or an NNX module.
      layout: The attention layout given to the recipe, if any; several as a list.
      granularity: As given to the recipe.
      rules: As given to the recipe.
      dimension_numbers: As given to the recipe.
      weight_decay_mask: As given to the recipe.
      frozen: As given to the recipe.
      newton_schulz: As given to the recipe.
      shardings: As given to the recipe. Arrays on a mesh tell themselves here; on Auto meshes
        they cannot under `jax.jit`, and the recipe needs it.
      devices_per_matrix: As given to the recipe.

    Returns:
      A tuple of `ParameterRow`s that prints as a table; its `stacks` are `Plan`s.

    Raises:
      ValueError: What the routing or the layout would raise at the first training step. (A
        QK-norm, which `qk_clip` and `scale_by_quack` refuse, is shown.)

    Example:
      >>> for row in mc.describe(params, layout):
      ...     if row.optimizer == "muon":
      ...         print(row.path, *row.matrices)
      attn/key/kernel k 2 × [8, 4]
      attn/out/kernel o 2 × [4, 8]
      attn/query/kernel q 2 × [8, 4]
      attn/value/kernel v 2 × [8, 4]
      mlp/kernel 1 × [8, 16]
    """
    check_mask("weight_decay_mask", weight_decay_mask)
    still = read_frozen(frozen, params)
    check_newton_schulz(newton_schulz)
    check_devices_per_matrix(devices_per_matrix)
    if dimension_numbers is None:
        specs, readings = routing.work_out(params, rules, layout, granularity)
    else:
        numbers = routing.choose(dimension_numbers, layout, granularity, rules)
        specs, readings = routing.resolve(numbers, params), {}
    decay = decays(weight_decay_mask, params, routing.Resolved(specs), layout)
    blocks = () if layout is None else find_blocks(layout, params)
    norms = {path for block in blocks for path in block.qk_norms}
    attention: dict[paths.Path, list[AttentionPiece]] = {}
    for part in (part for block in blocks for part in block.parts):
        for path, _ in part.leaves:
            attention.setdefault(path, []).append(AttentionPiece(part.role, part.heads))
    fused = [path for path, reading in readings.items() if reading.fused and layout is None]
    hints = line_for(fused, paths.shapes(params)) if fused else {}
    places = shardings_of(params, shardings)
    rows: list[ParameterRow] = []
    arrays: list[matrices.MatrixArray] = []
    for path, leaf in paths.leaves(params):
        spec, shape = None if path in still else specs[path], np.shape(leaf)
        kinds: tuple[MatrixKind, ...] = ()
        if spec is not None:
            kinds = spec.kinds
            way = way_to_matrices(spec.views, places[path])
            split = partial(matrices.split, spec=spec, way=way)
            arrays += jax.eval_shape(split, jax.ShapeDtypeStruct(shape, paths.dtype_of(leaf)))
        optimizer = "frozen" if path in still else "other" if spec is None else "muon"
        role = tuple(attention.get(path, ()))
        decaying = decay[path] and path not in still
        why = readings[path].why if path in readings else ""
        hint = hints.get(path, "") if path not in still else ""
        facts = optimizer, kinds, role, path in norms, decaying, why, hint
        rows.append(ParameterRow(paths.show(path), shape, *facts))
    known = (sharding.mesh.abstract_mesh for sharding in places.values() if sharding)
    mesh = next(known, mesh_of(params))
    how = newton_schulz.settled().on(jax.default_backend())
    stacks = (plan for plan, _ in plans(arrays, mesh, how, devices_per_matrix))
    return Description(rows, stacks, how)


def _iteration(how: NewtonSchulz) -> str:
    rates = (
        f", as a CPU does with products of {how.rates.bfloat16:.0f} GFLOP/s in bfloat16 and "
        f"{how.rates.float32:.0f} in float32"
        if how.rates and jax.default_backend() == "cpu"
        else ""
    )
    return f"\northogonalized by {how.schedule.name} in {how.dtype or 'their own dtype'}{rates}"


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
        numbers = sorted(int(match[0]) for row in group if (match := _NUMBER.search(row.path)))
        yield pattern.replace("#", f"{{{','.join(_ranges(numbers))}}}", 1), group[0]


def _ranges(numbers: list[int]) -> Iterator[str]:
    """Ascending numbers as `0..6`, `8..11`."""
    for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        first, *rest = (number for _, number in run)
        yield f"{first}..{rest[-1]}" if rest else str(first)
