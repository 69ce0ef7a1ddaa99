"""Which parameters Muon takes, and as which matrices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from optax.contrib import MuonDimensionNumbers

from muonclip_jax._core import paths
from muonclip_jax._core.axes import MatrixPattern
from muonclip_jax._core.options import is_function
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import Layouts, as_layouts, find_blocks
from muonclip_jax._layouts.pieces import Part
from muonclip_jax._parameters import matrices
from muonclip_jax._parameters.granularity import PER_HEAD, Granularity, check_fits
from muonclip_jax._parameters.matrices import MatrixSpec, spec_of, spec_of_parts
from muonclip_jax._parameters.neighbours import MATRIX, Neighbours, Reading
from muonclip_jax._parameters.reading import Unclear, check_all_clear, read

# A tree of patterns (None: not for Muon), or a function from parameters to one.
DimensionNumbers = Any | Callable[[Any], Any]

OnePattern = str | MatrixPattern | MuonDimensionNumbers
# Which parameters: a glob over paths, or with it the number of axes that they have.
Which = str | tuple[str, int]
How = OnePattern | Sequence[OnePattern] | None
Rules = Mapping[str, How] | Mapping[tuple[str, int], How] | Mapping[Which, How]


def muon_dimension_numbers(
    params: Any,
    rules: Rules | None = None,
    *,
    layout: Layouts | None = None,
    granularity: Granularity = PER_HEAD,
) -> Any:
    """The default routing: for every matrix that Muon should take, how to read it.

    First come `rules`. Then a `layout`, if given: the parameters that it describes are split into
    its pieces and heads, as `granularity` says, however they are stored: fused or separate, flat or
    with head axes, scanned or not.

    Of the rest, to the other optimizer (None) go biases and gains (`bias`, `scale`, `gamma`, ...),
    everything with fewer than two axes, embeddings and unembeddings. To Muon go `kernel`s and `w`s:

    - `[in, out]` as one matrix, `[stack..., in, out]` (scanned or vmapped layers) as a batch;
    - attention of the models that `find_layout` knows, as it is stored: one `[in, head_features]`
      matrix (of the output `[head_features, out]`) for each head that has an axis of its own, and
      flat kernels `[in, heads*features]` as one;
    - experts and convolutions, and `[out, in]` or fused matrices of MLPs, where names and shapes
      leave one reading:

    | what | how it is told | each is |
    | --- | --- | --- |
    | `moe/up [8, 64, 256]` | beside `moe/router/kernel [64, 8]`; up takes in 64 | 8 × [64, 256] |
    | `moe/gate_up [8, 64, 2, 256]` | the same; the 2 are gate and up | 16 × [64, 256] |
    | `up_proj/weight [256, 64]` | beside norms of 64, which up takes in: [out, in] | 1 × [64, 256] |
    | `c_fc/kernel [256, 64]` | beside `c_fc/bias [256]`: [out, in] | 1 × [64, 256] |
    | `per_layer_projection/w [64, 12, 8]` | beside a table `[V, 12, 8]`, with which it gives each of 12 layers an input | 12 × [64, 8] |
    | `conv/kernel [3, 3, 64, 128]` | its name: [window..., in, out] | 1 × [576, 128] |
    | `layers/2/kernel [3, 3, 64, 128]` | the square, beside a bias of 128 or unstacked norms | the same |
    | `conv1d/kernel [4, 1, 512]` | depthwise: it is called so, or is in linear attention, or something gives 512 beside it | no matrix |

    A convolution is flattened as in Jordan's Muon. A depthwise one filters each feature by itself. It maps nothing to anything, so its
    columns have no singular values to even out: it goes to the other optimizer. (A grouped one is
    not told from others.)

    All others raise, and so does what could be several things, all of it in one error. Nothing is
    guessed: a reading needs a witness. `describe` shows it.

    **Stacks** of layers are what attention of a known model shows, on axis 0 or 1, in all modules
    of which everything has these axes. Elsewhere leading axes are a stack when the norm scales
    nearest to the kernel have them too (axis 1 when only so all kernels around have them); without
    norms, when the bias beside it has; without either, when a module around it is called `layers`,
    `blocks`, ..., everything in there has the axis, and its kernels give every length that they
    take in. What is a vector in one layer is for the other optimizer.

        q [64, 4, 16], stem [7, 3, 64]                     raise: heads? a convolution? a stack?
        layers/{up [12, 64, 256], down [12, 256, 64]}      12 × [64, 256], 12 × [256, 64]
        layers/{q, k, v [64, 4, 16]}                       raise: nothing gives the 4

    An **embedding** is a parameter called so (`embedding`, `tok_emb`, `wte`), a `weight` in a
    module whose whole name says so (`token_embedder`), and a `kernel` or `w` where it speaks of
    tokens (`wte`, `word_embeddings`). `patch_embedding/kernel` and what is deeper inside
    (`template_embedding/block/w`) are none.

    An **unembedding** is what is called so, in any spelling (`lm_head`, `LMHead`, `heads/0`,
    `unembed`, `to_logits`, `classifier`), outside of attention. Such a module may hold several
    matrices: it is the ones whose outputs nothing in there takes in. Of other names it is a kernel
    `[in, V]`, outside of attention, where an embedding (not of positions) has V rows, nothing else
    takes in V features, no layers have it alike and no head `[in, V]` is known by its name. Hidden
    features can be as many: taken in, and alike in several layers or by a kernel `[V, in]` of one
    module with it, it is hidden. Else it raises.

        embed [99, 16], Dense_2 [16, 99]                   an unembedding: nothing takes in 99
        the same, and lm_head [16, 99]                     hidden: the unembedding is known
        embed [64, 64], layers_{0..5}/Dense_0 [64, 64]     hidden
        embed [99, 16], mlp/{up [16, 99], down [99, 16]}   hidden
        embed [64, 64], Dense_0 [64, 64]                   raise: 64 is taken in

    `output_layer` and `output_projection` are unembeddings where nothing takes in what they give,
    and settle it where an embedding has as many rows.

    A `weight` is `[out, in]` in Equinox and PyTorch and `[in, out]` elsewhere, which matters to
    `scale_by_update_rms`: where nothing tells, it raises. Masked parameters (`optax.masked`,
    `optax.partition`) are no witnesses: where they could be, it raises.

        params                            rules                              each is
        layers/mlp/up/kernel [12, 64, 256]   (norm scales [12, 64] near it)  12 × [64, 256]
        layers/attn/query/kernel [12, 64, 4, 16]                             48 × [64, 16]
        experts/kernel [8, 64, 256]       {"experts/*": "experts in out"}    8 × [64, 256]
        patch/kernel [3, 3, 4, 64]        {"patch/*": "h w in out -> (h w in) out"}   1 × [36, 64]
        up/weight [256, 64]               {("*/weight", 2): "out in -> in out"}       1 × [64, 256]
        embed/embedding [512, 64]                                            None

    Args:
      params: The parameters; only shapes and paths are read.
      rules: Glob over parameter paths → what to do; the first that matches a parameter decides.
        `{"*/experts/kernel": "experts in out", "*/patch/kernel": None}`. A glob with a number of
        axes, `("*/weight", 2)`, matches only parameters that have as many. A value is a pattern
        (`MatrixPattern`, or its text), several for one parameter as a list, an
        `optax.contrib.MuonDimensionNumbers`, or None for the other optimizer. `*` also crosses `/`.
        What is masked or None may be named.
      layout: The model's attention; several layouts as a list.
      granularity: Which of the layout's heads and pieces make one matrix; each by itself, unless
        told otherwise.

    Returns:
      A tree like `params`, each leaf a `MatrixSpec` or None.

    Raises:
      TypeError: A rule that is no pattern.
      ValueError: All parameters whose reading is unclear, a rule that matches nothing or never
        decides, what `find_blocks` raises, or a granularity that does not fit; with path, shape
        and fix.

    Example:
      >>> specs = mc.muon_dimension_numbers({"mlp": {"kernel": jnp.ones((64, 256))}})
      >>> specs["mlp"]["kernel"]
      MatrixSpec(mlp/kernel (64, 256): 1 × [64, 256])
    """  # noqa: E501
    specs, _ = work_out(params, rules, layout, granularity)
    return paths.map_with_path(lambda path, _: specs[path], params)


def work_out(
    params: Any, rules: Rules | None, layout: Layouts | None, granularity: Granularity
) -> "Routing":
    """`muon_dimension_numbers`, by path, and what told it."""
    _check_options(layout, granularity, rules)
    if layout is None and granularity != PER_HEAD:
        raise ValueError(f"{granularity} needs layout=, which tells where the heads are.")
    _check_tree(params)
    told: dict[Which, How] = dict((rules or {}).items())
    near = Neighbours(params)
    described = {} if layout is None else _described(layout, params, granularity)
    deciding = _deciding_rules(told, near.shapes, paths.absent(params))
    ruled = {path: told[pattern] for path, pattern in deciding.items()}
    return _routes(near, ruled, described)


class Routing(NamedTuple):
    """How the parameters are read.

    Attributes:
      specs: Every parameter's matrices; None: it is not for Muon.
      readings: Those that neither a rule nor the layout decides, and what told them.
    """

    specs: dict[Path, MatrixSpec | None]
    readings: dict[Path, Reading]


def choose(
    dimension_numbers: DimensionNumbers | None,
    layout: Layouts | None,
    granularity: Granularity,
    rules: Rules | None,
) -> DimensionNumbers:
    """The dimension numbers given, or `muon_dimension_numbers` with the rest.

    Raises:
      TypeError: Both.
    """
    _check_options(layout, granularity, rules)
    if dimension_numbers is None:
        return partial(muon_dimension_numbers, rules=rules, layout=layout, granularity=granularity)
    if rules is not None or granularity != PER_HEAD:
        raise TypeError(
            "rules= and granularity= are for the default routing, which dimension_numbers= "
            "replaces; give the one or the other."
        )
    check_dimension_numbers(dimension_numbers)
    return dimension_numbers


def check_dimension_numbers(given: DimensionNumbers | None) -> None:
    """Raises TypeError for what is neither a tree of patterns nor a function."""
    if given is None or isinstance(given, Resolved) or is_function(given):
        return
    for path, entry in paths.leaves(given, is_leaf=matrices.is_pattern):
        if not matrices.is_pattern(entry):
            raise TypeError(
                f"dimension_numbers has {entry!r} for {paths.show(path)}; give a pattern, a "
                "MuonDimensionNumbers, or None for the other optimizer; or in its place a function "
                "from parameters to a tree of them."
            )


def _check_options(layout: Layouts | None, granularity: Granularity, rules: Rules | None) -> None:
    """Raises for what no parameters could be routed by."""
    if layout is not None:
        as_layouts(layout)
    if not isinstance(granularity, Granularity):
        raise TypeError(
            "granularity must be a muonclip_jax.Granularity, such as Granularity(heads=2), got "
            f"{granularity!r}."
        )
    if rules is not None and not isinstance(rules, Mapping):
        raise TypeError(f"rules must map globs to patterns, {{'*/w': 'in out'}}, got {rules!r}.")
    for which, how in (rules or {}).items():
        _glob_and_axes(which)
        several: Any = how if isinstance(how, list | tuple) else [how]
        if not (matrices.is_pattern(how) or all(map(matrices.is_pattern, several))):
            raise TypeError(
                f"rules has {{{which!r}: {how!r}}}; it must map a glob over paths to a pattern "
                "such as 'experts in out', a muonclip_jax.MatrixPattern, an "
                "optax.contrib.MuonDimensionNumbers, several of them, or None."
            )


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
        entry = paths.entry_for(path, entries)
        if entry is None:
            raise ValueError(
                f"dimension_numbers says nothing about {paths.show(path)} {shape}. "
                "Give it a pattern or a MuonDimensionNumbers, or None for the other optimizer."
            )
        resolved[path] = spec_of(path, shape, entries[entry])
    # What is masked, or None, may be named.
    paths.check_no_stray("dimension_numbers", entries, [*shapes, *paths.absent(params)])
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
        near = Neighbours(params)
        matrices_by_shape = {path: MATRIX for path, shape in near.shapes.items() if len(shape) == 2}
        found = _routes(near, matrices_by_shape, {}).specs
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
    rules: Mapping[Which, How], shapes: Mapping[Path, tuple[int, ...]], absent: Sequence[Path]
) -> dict[Path, Which]:
    """The rule that decides each parameter that any rule matches: the first. A rule may be there
    for what is absent only, masked or None.

    Raises:
      ValueError: A rule that matches nothing, or only what an earlier one takes.
    """
    taken: dict[Path, Which] = {}
    for pattern in rules:
        glob, axes = _glob_and_axes(pattern)
        named = [path for path in (*shapes, *absent) if fnmatchcase(paths.show(path), glob)]
        named = [p for p in named if axes is None or p not in shapes or len(shapes[p]) == axes]
        matching = [path for path in named if path in shapes]
        if not named:
            known = (f"{paths.show(path)} {shape}" for path, shape in shapes.items())
            raise ValueError(
                f"The routing rule {pattern!r} matches no parameter; remove it or correct it. "
                f"Nearest are: {paths.nearest(glob, known)}."
            )
        if matching and all(path in taken for path in matching):
            earlier = ", ".join(repr(rule) for rule in dict.fromkeys(map(taken.get, matching)))
            raise ValueError(
                f"The routing rule {pattern!r} decides nothing: the first rule that matches a "
                f"parameter decides, and {earlier} comes before it. Put the narrower rule first."
            )
        taken |= {path: pattern for path in matching if path not in taken}
    return taken


def _glob_and_axes(which: Which) -> tuple[str, int | None]:
    match which:
        case str():
            return which, None
        case (str() as glob, int() as axes):
            return glob, axes
    raise TypeError(
        f"rules has {which!r}; it must map a glob over paths, '*/kernel', or one with a number of "
        "axes, ('*/kernel', 3), to a pattern."
    )


def _described(
    layout: Layouts, params: Any, granularity: Granularity
) -> Mapping[Path, Callable[[], MatrixSpec | None]]:
    """What the layout says of each parameter that it describes, when it is asked for."""
    blocks = find_blocks(layout, params)
    check_fits(granularity, blocks)
    every_part = [part for block in blocks for part in block.parts]
    parts: dict[Path, list[Part]] = {}
    vectors = [part.bias for part in every_part if part.bias]
    for part in every_part:
        if part.is_vector:
            vectors.append(part.kernel)
        else:
            parts.setdefault(part.kernel, []).append(part)
    found: dict[Path, Callable[[], MatrixSpec | None]] = dict.fromkeys(vectors, lambda: None)
    return found | {path: partial(spec_of_parts, few, granularity) for path, few in parts.items()}


def _routes(
    near: Neighbours,
    ruled: Mapping[Path, How],
    described: Mapping[Path, Callable[[], MatrixSpec | None]],
) -> Routing:
    """Rules, then the layout, then names and shapes.

    Raises:
      ValueError: Parameters that none of these decides, all of them.
    """
    found = Routing({}, {})
    unclear: dict[Path, Unclear] = {}
    for path, shape in near.shapes.items():
        if path in described and path not in ruled:
            found.specs[path] = described[path]()
            continue
        try:
            if path not in ruled:
                found.readings[path] = read(path, near)
            how = ruled[path] if path in ruled else found.readings[path].matrices
            found.specs[path] = spec_of(path, shape, how)
        except Unclear as why:
            unclear[path] = why
    check_all_clear(unclear, near)
    return found


def _check_tree(params: Any) -> None:
    of_array = getattr(params, "shape", None) == ()
    if isinstance(params, int) or (of_array and not jnp.issubdtype(params.dtype, jnp.inexact)):
        raise TypeError(
            "Expected the parameters, got one number. optax.inject_hyperparams takes every "
            'function for a schedule: name this argument in static_args=("dimension_numbers", ...).'
        )
