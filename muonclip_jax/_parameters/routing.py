"""Which parameters Muon takes, and as which matrices."""

import re
from collections.abc import Callable, Collection, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, get_args

from optax import MaskedNode
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._core import paths
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import Layouts, find_blocks, module_path
from muonclip_jax._layouts.find import is_flax_attention
from muonclip_jax._layouts.roles import GAIN_ROLES, Role
from muonclip_jax._parameters import matrices
from muonclip_jax._parameters.matrices import HeadMatrices, Spec, role_and_family

# A tree of `Spec`s (None: not for Muon), or a function from parameters to one.
DimensionNumbers = Any | Callable[[Any], Any]

Rules = Mapping[str, MuonDimensionNumbers | None]

EVERY_ROLE: tuple[Role, ...] = get_args(Role)

MATRIX = MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
_INPUT_HEADS = MuonDimensionNumbers(reduction_axis=-3, output_axis=-1)  # [in, heads, head_features]
_FIX = (
    "Say how to treat it: rules={{'{pattern}': optax.contrib.MuonDimensionNumbers("
    "reduction_axis=..., output_axis=...)}}, or None for the other optimizer."
)

_UNEMBEDDING = re.compile(r"(^|_)(head|unembed\w*|logits\w*|classifier|output_layer)$")


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

    Args:
      params: The parameters; only shapes and paths are read.
      rules: Glob over parameter paths → what to do, tried first. `{"*/experts/kernel":
        MuonDimensionNumbers(-2, -1), "*/patch/kernel": None}`; `*` also crosses `/`.
      layout: The model's attention; several layouts as a list.
      per_head: Roles of the layout's pieces that are orthogonalized head by head, `("q", "k")`
        for example, which are MLA's parts of queries and keys as well; the heads of the others make
        one matrix, `[in, heads*features]`. `()` splits fused kernels into their pieces only.

    Returns:
      A tree like `params`, each leaf a `MuonDimensionNumbers`, a `HeadMatrices` or None.

    Raises:
      ValueError: A parameter that nothing covers, a rule that matches nothing, two rules
        that disagree on a parameter, an unknown role, or what `find_blocks` raises; with path,
        shape and fix.
    """
    _check_tree(params)
    rules = rules or {}
    tree = _Tree(params)
    if layout is None and per_head is not EVERY_ROLE:
        raise ValueError(f"per_head={per_head!r} needs layout=, which tells where the heads are.")
    heads = {} if layout is None else _head_matrices(layout, params, per_head)
    for pattern, rule in rules.items():
        if rule is not None and not isinstance(rule, MuonDimensionNumbers):
            raise TypeError(
                f"The routing rule for {pattern!r} must be a MuonDimensionNumbers or None, got "
                f"{rule!r}."
            )
        if not any(_matches(path, pattern) for path in tree.shapes):
            nearest = get_close_matches(pattern, map(paths.show, tree.shapes), n=8, cutoff=0)
            raise ValueError(
                f"The routing rule {pattern!r} matches no parameter; remove it or correct it. "
                f"Nearest are: {', '.join(nearest)}."
            )
    return paths.map_with_path(lambda path, _: _route(path, tree, rules, heads), params)


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


def _head_matrices(
    layout: Layouts, params: Any, per_head: Collection[Role]
) -> dict[Path, HeadMatrices | None]:
    """What the layout says of each parameter that it describes."""
    if isinstance(per_head, str) or (unknown := set(per_head) - set(EVERY_ROLE)):
        raise ValueError(
            f"per_head={per_head!r} must be a tuple of roles, of {', '.join(EVERY_ROLE)}"
            + (
                f": per_head=({per_head!r},)."
                if isinstance(per_head, str)
                else f"; {', '.join(sorted(unknown))} is none."
            )
        )
    parts: dict[Path, list] = {}
    vectors: dict[Path, None] = {}
    blocks = find_blocks(layout, params)
    for block in blocks:
        for part in block.parts:
            if part.role in GAIN_ROLES:
                vectors[part.kernel] = None
            else:
                parts.setdefault(part.kernel, []).append(part)
            if part.bias:
                vectors[part.bias] = None
    there = {
        role for block in blocks for part in block.parts for role in role_and_family(part.role)
    }
    if per_head is not EVERY_ROLE and (absent := set(per_head) - there):
        raise ValueError(
            f"per_head={tuple(per_head)!r}: no attention block of the layout has the role "
            f"{' or '.join(sorted(absent))}; they have {', '.join(sorted(there))}."
        )
    split = {path: HeadMatrices(tuple(few), frozenset(per_head)) for path, few in parts.items()}
    return vectors | split


def resolve(dimension_numbers: DimensionNumbers, params: Any) -> dict[Path, Any]:
    """Dimension numbers for every parameter path, from a tree, a prefix of one, or a function.

    Masked parameters (inside `optax.partition`) are skipped.

    Raises:
      ValueError: A parameter that the tree does not cover, an entry that matches nothing, or
        axes that the parameter does not have.
    """
    tree = dimension_numbers(params) if callable(dimension_numbers) else dimension_numbers
    entries = dict(paths.leaves(tree, is_leaf=matrices.is_spec))
    resolved = {}
    for path, leaf in paths.leaves(params):
        matching = [path[:depth] for depth in range(len(path) + 1) if path[:depth] in entries]
        if not matching:
            raise ValueError(
                f"dimension_numbers says nothing about {paths.show(path)} {tuple(leaf.shape)}. "
                "Give it a MuonDimensionNumbers, or None for the other optimizer."
            )
        resolved[path] = entries[matching[-1]]
        matrices.check(path, tuple(leaf.shape), resolved[path])
    every_path = [path for path, _ in paths.leaves(params, is_leaf=_is_masked)]
    prefixes = {path[:depth] for path in every_path for depth in range(len(path) + 1)}
    for entry, spec in entries.items():
        # A function that maps over the parameters also gives None where they have None.
        if entry not in prefixes and not (spec is None and callable(dimension_numbers)):
            raise ValueError(
                f"dimension_numbers has an entry for {paths.show(entry)}, which is no parameter; "
                f"remove it or correct it. There are: {', '.join(map(paths.show, every_path[:8]))}."
            )
    return resolved


def resolve_matrices(dimension_numbers: DimensionNumbers | None, params: Any) -> dict[Path, Spec]:
    """`resolve` for transformations that were given matrices only: nothing may be left out.

    Without dimension numbers, parameters of two axes are matrices whatever their name.
    """
    if dimension_numbers is None:
        tree = _Tree(params)
        resolved = {
            path: MATRIX if len(shape) == 2 else _route(path, tree, {}, {})
            for path, shape in tree.shapes.items()
        }
    else:
        resolved = resolve(dimension_numbers, params)
    for path, leaf in paths.leaves(params):
        if resolved[path] is None:
            raise ValueError(
                f"{paths.show(path)} of shape {tuple(leaf.shape)} is no matrix for Muon. Use "
                "mc.muon(...), which sends such parameters to another optimizer, or put "
                "scale_by_muon inside optax.partition."
            )
    return resolved


def decay_mask(params: Any, layout: Layouts | None = None) -> Any:
    """Weight decay for everything but biases, norm scales and scalars (a tree of bools). The
    layout knows biases by other names."""
    _check_tree(params)
    blocks = () if layout is None else find_blocks(layout, params)
    biases = {part.bias for block in blocks for part in block.parts}
    return paths.map_with_path(
        lambda path, leaf: path not in biases and not _is_vector(path, leaf.shape), params
    )


def _route(
    path: Path,
    tree: "_Tree",
    rules: Mapping[str, Any],
    heads: Mapping[Path, HeadMatrices | None],
) -> Spec | None:
    shape = tree.shapes[path]
    matching = [pattern for pattern in rules if _matches(path, pattern)]
    if any(rules[pattern] != rules[matching[0]] for pattern in matching):
        raise ValueError(
            f"Routing rules {matching} disagree on {paths.show(path)} {shape}: make one of the "
            "patterns narrower."
        )
    if matching:
        matrices.check(path, shape, rules[matching[0]])
        return rules[matching[0]]
    if path in heads:
        matrices.check(path, shape, heads[path])
        return heads[path]
    if _is_vector(path, shape) or _is_embedding(path):
        return None
    if path[-1] != "kernel":
        raise ValueError(
            f"{paths.show(path)} of shape {shape} is neither a kernel nor an embedding, bias or "
            "scale by its name. If it belongs to attention, describe it with layout=. Else: "
            + _FIX.format(pattern=paths.show(path))
        )
    return _kernel_matrices(path, tree)


def _kernel_matrices(path: Path, tree: "_Tree") -> MuonDimensionNumbers:
    shape, module = tree.shapes[path], path[:-1]
    # What one layer's kernel looks like, and which of its axes its bias has.
    in_attention = is_flax_attention(module[:-1], tree.shapes)
    if in_attention and module[-1] in ("query", "key", "value"):
        own_axes, bias_axes, spec = 3, 2, _INPUT_HEADS
    elif in_attention and module[-1] == "out":
        own_axes, bias_axes, spec = 3, 1, MATRIX
    else:
        own_axes, bias_axes, spec = 2, 1, MATRIX
    stack = shape[: len(shape) - own_axes]
    bias = tree.shapes.get((*module, "bias"), (*stack, *shape[-bias_axes:]))
    if bias == (*stack, *shape[-bias_axes:]) and (not stack or tree.stacked_by(path, stack)):
        return spec
    raise ValueError(
        f"{paths.show(path)} of shape {shape} does not look like "
        f"{'a stack of kernels' if stack else 'one kernel'} [stack..., "
        f"{'in, heads, head_features' if own_axes == 3 else 'in, out'}] to the parameters around "
        f"it ({tree.around(path)}): is it a convolution, a stack of experts, a projection to "
        "heads, a scan axis other than 0? (One matrix per head: reduction_axis=-3, output_axis=-1; "
        "of an output projection from heads: -2 and -1.) " + _FIX.format(pattern=paths.show(path))
    )


class _Tree:
    """The shapes of a parameter tree, and what they tell about stacked layers."""

    def __init__(self, params: Any):
        self.shapes = paths.shapes(params)
        self._scales: dict[Path, list[Path]] = {}  # module → norm scales anywhere inside
        self._modules: dict[Path, list[Path]] = {}  # top-level module → its parameters
        for path, shape in self.shapes.items():
            self._modules.setdefault(module_path(path)[:1], []).append(path)
            if path[-1] == "scale" and shape:
                for depth in range(len(path) - 1):
                    self._scales.setdefault(path[:depth], []).append(path)

    def stacked_by(self, kernel: Path, stack: tuple[int, ...]) -> bool:
        """Whether the kernel's first axes are a stack of layers: the bias beside it has been
        compared, the nearest norm has these axes in front of its own one, or, where there is
        neither, everything in the top-level module has the same first axis."""
        scales = self._nearest_scales(kernel)
        if scales:
            return stack == min((self.shapes[path][:-1] for path in scales), key=len)
        if (*kernel[:-1], "bias") in self.shapes:
            return True
        shapes = {path: self.shapes[path] for path in self._modules[module_path(kernel)[:1]]}
        return (
            len(stack) == 1
            and "conv" not in "".join(kernel[-2:]).lower()
            and all(
                shape[:1] == stack and len(shape) >= (3 if path[-1] == "kernel" else 2)
                for path, shape in shapes.items()
            )
        )

    def around(self, kernel: Path) -> str:
        """What `stacked_by` looked at, in words."""
        bias = (*kernel[:-1], "bias")
        looked_at = [bias] * (bias in self.shapes) + self._nearest_scales(kernel)[:2]
        return (
            ", ".join(f"{paths.show(p)} {self.shapes[p]}" for p in looked_at) or "no bias, no norm"
        )

    def _nearest_scales(self, kernel: Path) -> list[Path]:
        nearest = (self._scales.get(kernel[:depth]) for depth in reversed(range(len(kernel) - 1)))
        return next(filter(None, nearest), [])


def _check_tree(params: Any) -> None:
    if isinstance(params, int | float) or getattr(params, "shape", None) == ():
        raise TypeError(
            "Expected the parameters, got one number. optax.inject_hyperparams takes every "
            'function for a schedule: name this argument in static_args=("dimension_numbers", ...).'
        )


def _is_vector(path: Path, shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or path[-1] in ("bias", "scale")


def _is_embedding(path: Path) -> bool:
    return any("embed" in part.lower() for part in path[-2:]) or any(
        _UNEMBEDDING.search(part.lower()) for part in path[-2:]
    )


def _matches(path: Path, pattern: str) -> bool:
    return fnmatchcase(paths.show(path), pattern)


def _is_masked(node: Any) -> bool:
    return isinstance(node, MaskedNode)
