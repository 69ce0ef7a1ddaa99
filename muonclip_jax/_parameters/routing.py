"""Which parameters Muon takes, and as which matrices."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._core import paths
from muonclip_jax._core.axes import MatrixPattern
from muonclip_jax._core.options import is_function
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import Layouts, find_blocks
from muonclip_jax._layouts.checks import some
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._layouts.roles import EVERY_ROLE, GAIN_ROLES, Role, family
from muonclip_jax._parameters import matrices, reading
from muonclip_jax._parameters.matrices import MatrixSpec, spec_of, spec_of_parts

# A tree of patterns (None: not for Muon), or a function from parameters to one.
DimensionNumbers = Any | Callable[[Any], Any]

OnePattern = str | MatrixPattern | MuonDimensionNumbers
Rules = Mapping[str, OnePattern | Sequence[OnePattern] | None]


def muon_dimension_numbers(
    params: Any,
    rules: Rules | None = None,
    *,
    layout: Layouts | None = None,
    per_head: Collection[Role] = EVERY_ROLE,
) -> Any:
    """The default routing: for every matrix that Muon should take, how to read it.

    First come `rules`. Then a `layout`, if given: the parameters that it describes are split into
    its pieces, and those with a role in `per_head` into their heads, however they are stored: fused
    or separate, flat or with head axes, scanned or not.

    Of the rest, to the other optimizer (None) go: parameters named `bias` or `scale` (norms),
    everything with fewer than two axes, embeddings (a parameter or its module has "embed" in its
    name) and unembeddings (a module whose name is, or ends with `_` and, `head`, `unembed...`,
    `logits...`, `classifier` or `output_layer`). To Muon go `kernel`s:

    - `[in, out]` as one matrix, `[stack..., in, out]` (scanned or vmapped layers) as a batch;
    - in Flax's attention modules, query, key and value `[stack..., in, heads, head_features]`
      as one `[in, head_features]` matrix per head, and out `[stack..., heads, head_features, out]`
      as one `[head_features, out]` matrix per head.

    Leading axes count as a stack of layers when the bias beside the kernel and the norm scales
    nearest to it have them too; without either, when everything in the same top-level module has
    the same first axis. A kernel that does not fit (a convolution, an expert axis, a projection
    to heads outside Flax's attention, layers stacked on another axis than the first) could mean
    several things, so it raises.

        params                            rules                              each is
        layers/mlp/up/kernel [12, 64, 256]   (norm scales [12, 64] near it)  12 × [64, 256]
        layers/attn/query/kernel [12, 64, 4, 16]                             48 × [64, 16]
        experts/kernel [8, 64, 256]       {"experts/*": "experts in out"}    8 × [64, 256]
        patch/kernel [3, 3, 4, 64]        {"patch/*": "h w in out -> (h w in) out"}   1 × [36, 64]
        embed/embedding [512, 64]                                            None

    Args:
      params: The parameters; only shapes and paths are read.
      rules: Glob over parameter paths → what to do; the first that matches a parameter decides.
        `{"*/experts/kernel": "experts in out", "*/patch/kernel": None}`; a value is a pattern
        (`MatrixPattern`, or its text), several for one parameter as a list, an
        `optax.contrib.MuonDimensionNumbers`, or None for the other optimizer. `*` also crosses `/`.
        What is masked or None may be named.
      layout: The model's attention; several layouts as a list.
      per_head: Roles of the layout's pieces that are orthogonalized head by head, `("q", "k")`
        for example, which are MLA's parts of queries and keys as well; the heads of the others make
        one matrix, `[in, heads*features]`. `()` splits fused kernels into their pieces only.

    Returns:
      A tree like `params`, each leaf a `MatrixSpec` or None.

    Raises:
      TypeError: A rule that is no pattern.
      ValueError: A parameter that nothing covers, a rule that matches nothing or never decides, an
        unknown role, or what `find_blocks` raises; with path, shape and fix.

    Example:
      >>> specs = mc.muon_dimension_numbers({"mlp": {"kernel": jnp.ones((64, 256))}})
      >>> specs["mlp"]["kernel"]
      MatrixSpec(mlp/kernel (64, 256): 1 × [64, 256])
    """
    _check_tree(params)
    rules = rules or {}
    tree = reading.Surroundings(params)
    if layout is None and per_head is not EVERY_ROLE:
        raise ValueError(f"per_head={per_head!r} needs layout=, which tells where the heads are.")
    described = {} if layout is None else _described(layout, params, per_head)
    deciding = _deciding_rules(rules, tree.shapes, paths.absent(params))
    ruled = {path: rules[pattern] for path, pattern in deciding.items()}
    return paths.map_with_path(lambda path, _: _route(path, tree, ruled, described), params)


def choose(
    dimension_numbers: DimensionNumbers | None,
    layout: Layouts | None,
    per_head: Collection[Role],
    rules: Rules | None,
) -> DimensionNumbers:
    """The dimension numbers given, or `muon_dimension_numbers` with the rest.

    Raises:
      TypeError: Both.
    """
    if dimension_numbers is None:
        return partial(muon_dimension_numbers, rules=rules, layout=layout, per_head=per_head)
    if rules is not None or per_head is not EVERY_ROLE:
        raise TypeError(
            "rules= and per_head= are for the default routing, which dimension_numbers= replaces; "
            "give the one or the other."
        )
    return dimension_numbers


@dataclass(frozen=True)
class Resolved:
    """Dimension numbers worked out from the whole tree, before any of it was masked.

    Attributes:
      specs: How every parameter is read, by its path.
    """

    specs: Mapping[Path, MatrixSpec | None]


def resolve(dimension_numbers: DimensionNumbers, params: Any) -> dict[Path, MatrixSpec | None]:
    """How every parameter is read, by its path, from a tree, a prefix of one, or a function.

    Masked parameters (inside `optax.partition`) are skipped.

    Raises:
      TypeError: An entry that is no pattern.
      ValueError: A parameter that the tree does not cover, an entry that matches nothing, or
        axes that the parameter does not have.
    """
    if paths.holds_nothing(params):
        return {}
    shapes = paths.shapes(params)
    if isinstance(dimension_numbers, Resolved):
        return {path: dimension_numbers.specs[path] for path in shapes}
    given = dimension_numbers
    tree = given(params) if is_function(given) else given
    entries = dict(paths.leaves(tree, is_leaf=matrices.is_pattern))
    resolved = {}
    for path, shape in shapes.items():
        matching = [path[:depth] for depth in range(len(path) + 1) if path[:depth] in entries]
        if not matching:
            raise ValueError(
                f"dimension_numbers says nothing about {paths.show(path)} {shape}. "
                "Give it a pattern or a MuonDimensionNumbers, or None for the other optimizer."
            )
        resolved[path] = spec_of(path, shape, entries[matching[-1]])
    # What is masked, or None, may be named.
    every_path = [*shapes, *paths.absent(params)]
    prefixes = {path[:depth] for path in every_path for depth in range(len(path) + 1)}
    for entry in entries:
        if entry not in prefixes:
            raise ValueError(
                f"dimension_numbers has an entry for {paths.show(entry)}, which is no parameter; "
                f"remove it or correct it. There are: {some(every_path)}."
            )
    return resolved


def resolve_matrices(
    dimension_numbers: DimensionNumbers | None, params: Any
) -> dict[Path, MatrixSpec]:
    """`resolve` for transformations that were given matrices only: nothing may be left out.

    Without dimension numbers, parameters of two axes are matrices whatever their name.

    Raises:
      TypeError: As `resolve`.
      ValueError: As `resolve`, and a parameter that is no matrix.
    """
    if paths.holds_nothing(params):
        return {}
    if dimension_numbers is None:
        tree = reading.Surroundings(params)
        found = {
            path: spec_of(path, shape, reading.MATRIX)
            if len(shape) == 2
            else _route(path, tree, {}, {})
            for path, shape in tree.shapes.items()
        }
    else:
        found = resolve(dimension_numbers, params)
    resolved = {path: spec for path, spec in found.items() if spec is not None}
    for path, shape in paths.shapes(params).items():
        if path not in resolved:
            raise ValueError(
                f"{paths.show(path)} of shape {shape} is no matrix for Muon. Use mc.muon(...), "
                "which sends such parameters to another optimizer, or put scale_by_muon inside "
                "optax.partition, and not behind optax.flatten, which makes one vector of all."
            )
    return resolved


def _deciding_rules(
    rules: Rules, shapes: Mapping[Path, tuple[int, ...]], absent: Sequence[Path]
) -> dict[Path, str]:
    """The rule that decides each parameter that any rule matches: the first. A rule may be there
    for what is absent only, masked or None.

    Raises:
      ValueError: A rule that matches nothing, or only what an earlier one takes.
    """
    taken: dict[Path, str] = {}
    for pattern in rules:
        named = [path for path in (*shapes, *absent) if fnmatchcase(paths.show(path), pattern)]
        matching = [path for path in named if path in shapes]
        if not named:
            nearest = get_close_matches(pattern, map(paths.show, shapes), n=8, cutoff=0)
            raise ValueError(
                f"The routing rule {pattern!r} matches no parameter; remove it or correct it. "
                f"Nearest are: {', '.join(nearest)}."
            )
        if matching and all(path in taken for path in matching):
            earlier = ", ".join(repr(rule) for rule in dict.fromkeys(map(taken.get, matching)))
            raise ValueError(
                f"The routing rule {pattern!r} decides nothing: the first rule that matches a "
                f"parameter decides, and {earlier} comes before it. Put the narrower rule first."
            )
        taken |= {path: pattern for path in matching if path not in taken}
    return taken


def _described(
    layout: Layouts, params: Any, per_head: Collection[Role]
) -> Mapping[Path, Callable[[], MatrixSpec | None]]:
    """What the layout says of each parameter that it describes, when it is asked for."""
    if isinstance(per_head, str):
        raise ValueError(f"per_head={per_head!r} must be a tuple of roles: ({per_head!r},).")
    if unknown := set(per_head) - set(EVERY_ROLE):
        raise ValueError(
            f"per_head={per_head!r}: {', '.join(sorted(unknown))} is no role; choose from "
            f"{', '.join(EVERY_ROLE)}."
        )
    every_part = [part for block in find_blocks(layout, params) for part in block.parts]
    there = {role for part in every_part for role in family(part.role)}
    if per_head is not EVERY_ROLE and (absent := set(per_head) - there):
        raise ValueError(
            f"per_head={tuple(per_head)!r}: no attention block of the layout has the role "
            f"{' or '.join(sorted(absent))}; they have {', '.join(sorted(there))}."
        )
    parts: dict[Path, list[Part]] = {}
    vectors = [part.bias for part in every_part if part.bias]
    for part in every_part:
        if part.role in GAIN_ROLES:
            vectors.append(part.kernel)
        else:
            parts.setdefault(part.kernel, []).append(part)
    found: dict[Path, Callable[[], MatrixSpec | None]] = dict.fromkeys(vectors, lambda: None)
    return found | {path: partial(spec_of_parts, few, per_head) for path, few in parts.items()}


def _route(
    path: Path,
    tree: reading.Surroundings,
    ruled: Mapping[Path, OnePattern | Sequence[OnePattern] | None],
    described: Mapping[Path, Callable[[], MatrixSpec | None]],
) -> MatrixSpec | None:
    """Rules, then the layout, then names and shapes."""
    shape = tree.shapes[path]
    if path in ruled:
        return spec_of(path, shape, ruled[path])
    if path in described:
        return described[path]()
    return spec_of(path, shape, reading.read(path, tree))


def _check_tree(params: Any) -> None:
    of_array = getattr(params, "shape", None) == ()
    if isinstance(params, int) or (of_array and not jnp.issubdtype(params.dtype, jnp.inexact)):
        raise TypeError(
            "Expected the parameters, got one number. optax.inject_hyperparams takes every "
            'function for a schedule: name this argument in static_args=("dimension_numbers", ...).'
        )
