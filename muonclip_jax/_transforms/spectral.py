"""Spectral control of weights: clip, cap or decay the singular values that a step arrives at.

    params + updates ─► the matrices that routing describes ─► each within its limit ─► updates

Sources: Su Jianlin, "Matrix functions by msign" (mclip) and "Spectral weight decay",
spaces.ac.cn; power iteration, warm: Miyato et al., arXiv 1802.05957.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from muonclip_jax._core import paths
from muonclip_jax._core.axes import View
from muonclip_jax._core.dtypes import accumulation_dtype, of_product
from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._core.options import check_count, check_number, check_rate
from muonclip_jax._core.paths import Path
from muonclip_jax._core.shardings import Shardings, check_shardings, shardings_of
from muonclip_jax._core.states import check_same, without_parameters
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz, check_newton_schulz
from muonclip_jax._orthogonalize.normalization import nonzero
from muonclip_jax._orthogonalize.schedules import polar_express
from muonclip_jax._parameters import routing
from muonclip_jax._parameters.matrices import MatrixSpec, by_path, take_matrices
from muonclip_jax._spread.plan import DevicesPerMatrix, check_devices_per_matrix
from muonclip_jax._spread.stacks import MatrixArray, orthogonalize_all
from muonclip_jax._transforms.arrivals import (
    arrive_at,
    arrive_at_multiple,
    arrived,
    check_params,
)
from muonclip_jax._transforms.orthogonalization import warn_of_unknown

_Pair = tuple[jax.Array, jax.Array]  # singular vectors, [batch..., in] and [batch..., out]
Limit = ArrayLike | Callable[[int, int], float]

# Where M Mᵀ − 1 has a norm of 100, no singular value ends more than 7e-6 from where it should.
_ACCURATE = NewtonSchulz(polar_express(12, lower=1e-5), dtype="float32")

# Power iterations of `init`, so that the first step knows the norms.
_FIRST = 30


class SpectralNormState(NamedTuple):
    """What power iteration knows: `optax.tree.get(opt_state, "SpectralNormState")`.

    Attributes:
      norms: By the parameter's path, for each kind of matrix in it the estimates of ‖W‖₂ before the
        link acted, float32 `[batch...]`.
      vectors: Same keys, singular vectors of the shorter side, float32 `[batch..., n]`.
      step: int32, the steps so far.

    Example:
        >>> state = mc.cap_spectral_norm(1.0).init({"up": {"kernel": 3 * jnp.eye(4, 8)}})
        >>> state.norms["up/kernel"][0].round().item()
        3.0
    """

    norms: dict[str, tuple[jax.Array, ...]]
    vectors: dict[str, tuple[jax.Array, ...]]
    step: jax.Array


def clip_singular_values(
    limit: Limit,
    *,
    dimension_numbers: routing.DimensionNumbers | None = None,
    newton_schulz: NewtonSchulz = _ACCURATE,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformation:
    """Clips the singular values of the weights that a step arrives at: `mclip`.

    Singular values above `limit` become `limit`, the others and all singular vectors stay. It
    stands behind the learning rate, at the end of a chain; an Optax chain in front of it may be any
    optimizer's. With M = W / limit, wide (n <= m) and s = msign(M), it is

        mclip(M) = ½ [(s + M) + msign(M Mᵀ − 1) (s − M)]

    in which what msign leaves undone cancels: of small singular values in s, near the limit in the
    second, where s − M is small.

    Cost, per matrix: two orthogonalizations, one of `[n, m]` and one of `[n, n]`, each of 12 steps
    in float32, and two products: for square matrices five times the FLOPs of Muon's own five
    steps. No state. `cap_spectral_norm` costs two matrix-vector products and is for those who need
    ‖W‖₂ only; `optax.conditionally_transform` does this one every few steps.

    Accuracy: singular values end within 1e-5 of where they should, in units of the limit, if
    `‖M Mᵀ − 1‖_F` is at most 100: of matrices with up to ten thousand rows, or with one singular
    value of ten times the limit. Furthest off are those within 1e-3 of the limit. All of a matrix
    is written anew, so what is not clipped moves by rounding. With Muon's own `mc.NewtonSchulz()`,
    five steps in bfloat16, they err by up to 1%, and by bfloat16's rounding.

    Args:
      limit: The largest singular value, above 0; or a function of a matrix's `(in, out)` to one,
        as for a norm that depends on the shape: `lambda ins, outs: (outs / ins) ** 0.5`.
      dimension_numbers: Which parameters are which matrices, as for `mc.muon`; all others pass.
        None: as `muon_dimension_numbers` reads them. With attention's layout,
        `functools.partial(mc.muon_dimension_numbers, layout=layout)`, each head is clipped by
        itself.
      newton_schulz: How to compute both msigns.
      shardings: On meshes with Auto axes, as for `scale_by_orthogonalization`.
      devices_per_matrix: As for `scale_by_orthogonalization`.

    Returns:
      A transformation whose `update` needs `params`.

    Raises:
      TypeError: An option of the wrong type.
      ValueError: A limit that is not above 0; at init and update, as `muon_dimension_numbers`; no
        `params`.

    Example:
        >>> tx = optax.chain(optax.sgd(0.1), mc.clip_singular_values(1.0))
        >>> weights = {"up": {"kernel": jnp.diag(jnp.array([3.0, 0.5]))}}
        >>> update, _ = tx.update(jax.tree.map(jnp.zeros_like, weights), tx.init(weights), weights)
        >>> optax.apply_updates(weights, update)["up"]["kernel"].diagonal().round(3)
        Array([1. , 0.5], dtype=float32)
    """
    owner = "clip_singular_values"
    _check_limit(limit, owner)
    check_newton_schulz(newton_schulz)
    check_devices_per_matrix(devices_per_matrix)
    routing.check_dimension_numbers(dimension_numbers)
    check_shardings(shardings)
    signs = functools.partial(
        orthogonalize_all, how=newton_schulz, devices_per_matrix=devices_per_matrix
    )

    def init(params: optax.Params) -> optax.EmptyState:
        _resolved(dimension_numbers, params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        check_params(owner, params)
        specs = _resolved(dimension_numbers, params)
        known = shardings_of(params, shardings)
        warn_of_unknown(params, known, owner)

        def clip(updates, params, *traced):
            arrays, put_back = take_matrices(_arrived(updates, params, specs), specs, known)
            limits = _limits(arrays, _of(limit, traced))
            goals = put_back(_clipped(arrays, limits, signs))
            return _with(updates, goals, params, arrive_at)

        traced = _traced(limit)
        return in_auto_axes(clip, specs_of(updates))(updates, params, *traced), state

    return optax.GradientTransformation(init, update)


def cap_spectral_norm(
    limit: Limit,
    *,
    dimension_numbers: routing.DimensionNumbers | None = None,
    iterations: int = 1,
    shardings: Shardings | None = None,
) -> optax.GradientTransformation:
    """Caps ‖W‖₂ of the weights that a step arrives at: `W · min(1, limit / ‖W‖₂)`.

    The whole matrix shrinks, not its largest singular values only (`clip_singular_values`). It
    stands behind the learning rate, at the end of a chain. ‖W‖₂ comes from power iteration, whose
    vectors the state keeps from step to step, so that one iteration a step follows weights that
    move slowly.

    The estimate never exceeds ‖W‖₂, so what it misses is how far a matrix may stand above the
    limit. From random weights (of which many singular values are nearly the largest) that Muon
    moves at a rate of 0.02, one iteration a step: 4% in the first twenty steps, later 0.6% at most;
    with four 1% and 0.2%.

    Cost, per matrix and iteration: two matrix-vector products, that is reading the weights twice
    (for `[n, m]` 4nm FLOPs). State: a vector of the shorter side for each matrix.

    Args:
      limit: The largest norm, above 0; or a function of a matrix's `(in, out)` to one.
      dimension_numbers: Which parameters are which matrices; all others pass. See
        `clip_singular_values`.
      iterations: Power iterations a step. `init` does 30. For `optax.inject_hyperparams` it is one
        of the `static_args`.
      shardings: On meshes with Auto axes, as for `scale_by_orthogonalization`.

    Returns:
      A transformation whose `update` needs `params`; its state is a `SpectralNormState`.

    Raises:
      TypeError: An option of the wrong type.
      ValueError: As `clip_singular_values`; fewer than one iteration; a state of other parameters.

    Example:
        >>> tx = optax.chain(optax.sgd(0.1), mc.cap_spectral_norm(1.0))
        >>> weights = {"up": {"kernel": jnp.diag(jnp.array([4.0, 1.0]))}}
        >>> update, _ = tx.update(jax.tree.map(jnp.zeros_like, weights), tx.init(weights), weights)
        >>> optax.apply_updates(weights, update)["up"]["kernel"].diagonal()
        Array([1.  , 0.25], dtype=float32)
    """
    _check_limit(limit, "cap_spectral_norm")

    def capped(arrays: list[MatrixArray], norms, pairs, limit, step):
        del pairs, step
        return [
            _spread(jnp.minimum(1, bound / jnp.maximum(norm, bound)), array)
            for norm, bound, array in zip(norms, _limits(arrays, limit), arrays, strict=True)
        ]

    def arrive(multiplier: jax.Array, update: jax.Array, param: jax.Array) -> jax.Array:
        return arrive_at_multiple(update, param, multiplier)

    return _ByPowerIteration(
        "cap_spectral_norm", capped, arrive, limit, dimension_numbers, iterations, shardings
    ).transformation()


def decay_spectral_norm(
    rate: ArrayLike | Callable[[Any], ArrayLike],
    *,
    dimension_numbers: routing.DimensionNumbers | None = None,
    iterations: int = 1,
    shardings: Shardings | None = None,
) -> optax.GradientTransformation:
    """Decays the largest singular value alone: `W − rate · σ₁ u₁ v₁ᵀ`.

    Weight decay is the gradient of `½‖W‖_F²` and shrinks all singular values; this is that of
    `½‖W‖₂²`. It stands behind the learning rate, at the end of a chain, so the rate is that of a
    step: for decay λ at a learning rate η give `η λ`, or a schedule of it. Of several equal largest
    values some one direction decays, and the next step another.

    Cost and state are those of `cap_spectral_norm`, and one pass over the weights.

    Args:
      rate: The share of σ₁ that a step takes, at least 0, or an Optax schedule of it.
      dimension_numbers: As in `cap_spectral_norm`, and so are all others.
      iterations: The same.
      shardings: The same.

    Returns:
      A transformation whose `update` needs `params`; its state is a `SpectralNormState`.

    Raises:
      TypeError: An option of the wrong type.
      ValueError: A negative rate; as `cap_spectral_norm`.

    Example:
        >>> tx = optax.chain(optax.sgd(0.1), mc.decay_spectral_norm(0.5))
        >>> weights = {"up": {"kernel": jnp.diag(jnp.array([4.0, 1.0]))}}
        >>> update, _ = tx.update(jax.tree.map(jnp.zeros_like, weights), tx.init(weights), weights)
        >>> optax.apply_updates(weights, update)["up"]["kernel"].diagonal()
        Array([2., 1.], dtype=float32)
    """
    check_rate("rate", rate)

    def decayed(arrays: list[MatrixArray], norms, pairs, rate, step):
        share = jnp.asarray(rate(step) if callable(rate) else rate)
        return [
            jnp.einsum("...,...i,...o->...io", -share * norm, *pair).reshape(array.values.shape)
            for norm, pair, array in zip(norms, pairs, arrays, strict=True)
        ]

    def add(change: jax.Array, update: jax.Array, param: jax.Array) -> jax.Array:
        return arrive_at(arrived(update, param) + change, update, param)

    return _ByPowerIteration(
        "decay_spectral_norm", decayed, add, rate, dimension_numbers, iterations, shardings
    ).transformation()


# Clip of singular values


def _clipped(
    arrays: Sequence[MatrixArray],
    limits: Sequence[Any],
    signs: Callable[[Sequence[MatrixArray]], list[jax.Array]],
) -> list[jax.Array]:
    """`linalg.mclip(form="squared")` of the matrices of all parameters; each msign is one call for
    all of them."""
    # M [heads=4, in=64, out=16]: the shorter side is 16, so MᵀM − 1 [4, 16, 16] stands to the
    # right of s − M.
    units = [
        replace(array, values=array.values / limit)
        for array, limit in zip(arrays, limits, strict=True)
    ]
    polar = signs(units)
    above = signs([_above(array) for array in units])
    return [
        _mix(s, a, array) * limit
        for s, a, array, limit in zip(polar, above, units, limits, strict=True)
    ]


def _above(array: MatrixArray) -> MatrixArray:
    """`M Mᵀ − 1` (of tall ones `Mᵀ M − 1`), whose sign tells which singular values are above 1."""
    m = array.apart(array.values)
    wide = m.mT if array.turned else m
    gram = jnp.matmul(wide, wide.mT, **of_product(wide.dtype)) - jnp.eye(wide.shape[-2])
    batch = tuple(array.spec or ())[: gram.ndim - 2]
    spec = None if array.spec is None else PartitionSpec(*batch)
    return MatrixArray(gram, spec=spec)


def _mix(sign: jax.Array, above: jax.Array, array: MatrixArray) -> jax.Array:
    m, s = array.apart(array.values), array.apart(sign)
    factors = (s - m, above) if array.turned else (above, s - m)
    mixed = 0.5 * (s + m + jnp.matmul(*factors, **of_product(m.dtype)))
    return mixed.reshape(array.values.shape)


# Power iteration


@dataclass(frozen=True)
class _ByPowerIteration:
    """A link that knows ‖W‖₂ and its singular vectors of the weights that a step arrives at.

    Attributes:
      owner: The public function.
      change: From matrices, norms, pairs of singular vectors, `number` and the step to an array
        like each kind of matrices.
      arrive: From that array, put together, update and parameter to the new update.
      number: The public function's, maybe traced.
      dimension_numbers: As of the public functions.
      iterations: The same.
      shardings: The same.
    """

    owner: str
    change: Callable[..., list[jax.Array]]
    arrive: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    number: Any
    dimension_numbers: routing.DimensionNumbers | None
    iterations: int
    shardings: Shardings | None

    def transformation(self) -> optax.GradientTransformation:
        check_count("iterations", self.iterations)
        routing.check_dimension_numbers(self.dimension_numbers)
        check_shardings(self.shardings)
        return optax.GradientTransformation(self._init, self._update)

    def _init(self, params: optax.Params) -> SpectralNormState:
        if paths.holds_nothing(params):
            return without_parameters(SpectralNormState)
        specs = _resolved(self.dimension_numbers, params)
        known = shardings_of(params, self.shardings)

        def first(params):
            arrays, _ = take_matrices(_trained(params, specs), specs, known)
            starts = list(map(_start, arrays))
            norms, _, vectors = _look(arrays, starts, _FIRST)
            return by_path(norms, specs, jnp.float32), by_path(vectors, specs, jnp.float32)

        norms, vectors = in_auto_axes(first, PartitionSpec())(params)
        return SpectralNormState(norms, vectors, jnp.zeros([], jnp.int32))

    def _update(self, updates, state, params=None):
        check_params(self.owner, params)
        specs = _resolved(self.dimension_numbers, params)
        known = shardings_of(params, self.shardings)
        _check_vectors(state.vectors, specs)

        def act(updates, params, state, *traced):
            arrays, put_back = take_matrices(_arrived(updates, params, specs), specs, known)
            before = [vector for path in specs for vector in state.vectors[paths.show(path)]]
            norms, pairs, vectors = _look(arrays, before, self.iterations)
            number = _of(self.number, traced)
            changes = put_back(self.change(arrays, norms, pairs, number, state.step))
            step = jnp.asarray(optax.safe_increment(state.step))
            norms, vectors = (by_path(each, specs, jnp.float32) for each in (norms, vectors))
            after = SpectralNormState(norms, vectors, step)
            return _with(updates, changes, params, self.arrive), after

        split, traced = (specs_of(updates), PartitionSpec()), _traced(self.number)
        return in_auto_axes(act, split)(updates, params, state, *traced)


def _look(
    arrays: Sequence[MatrixArray], before: Sequence[jax.Array], iterations: int
) -> tuple[list[jax.Array], list[_Pair], list[jax.Array]]:
    """Norms, pairs of singular vectors, and of these what the state keeps, from the vectors of
    before."""
    found = [_norm(x, v, iterations) for x, v in zip(arrays, before, strict=True)]
    norms, pairs = [norm for norm, _ in found], [pair for _, pair in found]
    shorter = [pair[array.turned] for array, pair in zip(arrays, pairs, strict=True)]
    return norms, pairs, list(map(_kept, shorter, before))


def _check_vectors(
    vectors: dict[str, tuple[jax.Array, ...]], specs: Mapping[Path, MatrixSpec]
) -> None:
    """Raises ValueError for the state of other parameters, or of other matrices of them."""

    def wanted(view: View) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*view.batch_shape, min(view.matrices[1:])), jnp.float32)

    now = {paths.show(path): tuple(map(wanted, spec.views)) for path, spec in specs.items()}
    check_same("vectors", vectors, now, "the parameters or their routing")


def _norm(array: MatrixArray, vector: jax.Array, iterations: int) -> tuple[jax.Array, _Pair]:
    """‖W‖₂ `[batch...]` from below, and its singular vectors `[batch..., in]`, `[batch..., out]`.

    NaN where the matrix has one. Of zero matrices the vectors are zero."""
    w = array.apart(array.values)
    wide = w.mT if array.turned else w
    times = functools.partial(jnp.einsum, **of_product(wide.dtype))

    def iterate(_, pair):
        short, _ = pair
        long = _unit(times("...n,...nm->...m", short, wide))
        return _unit(times("...nm,...m->...n", wide, long)), long

    zeros = jnp.zeros((*wide.shape[:-2], wide.shape[-1]), wide.dtype)
    start = vector.astype(wide.dtype), zeros
    short, long = jax.lax.fori_loop(0, iterations, iterate, start)
    norm = times("...n,...n->...", short, times("...nm,...m->...n", wide, long))
    return norm, (long, short) if array.turned else (short, long)


def _unit(x: jax.Array) -> jax.Array:
    """Vectors of length 1; squares neither overflow nor vanish."""
    x = x / nonzero(jnp.abs(x).max(-1, keepdims=True))
    return x / nonzero(jnp.linalg.norm(x, axis=-1, keepdims=True))


def _start(array: MatrixArray) -> jax.Array:
    """A vector that no weights were made orthogonal to."""
    *batch, ins, outs = array.apart(array.values).shape
    drawn = np.random.default_rng(0).standard_normal(min(ins, outs))
    return jnp.broadcast_to(_unit(jnp.asarray(drawn, array.values.dtype)), (*batch, drawn.size))


def _kept(new: jax.Array, before: jax.Array) -> jax.Array:
    """The new vectors; where the weights are zero, or not finite, those of before."""
    told = jnp.isfinite(new).all(-1, keepdims=True) & (new != 0).any(-1, keepdims=True)
    return jnp.where(told, new.astype(before.dtype), before)


def _spread(values: jax.Array, array: MatrixArray) -> jax.Array:
    """One number a matrix, `[batch...]`, for each of its entries."""
    shape = array.apart(array.values).shape
    return jnp.broadcast_to(values[..., None, None], shape).reshape(array.values.shape)


# What both have


def _resolved(
    dimension_numbers: routing.DimensionNumbers | None, params: Any
) -> dict[Path, MatrixSpec]:
    """How the parameters that are matrices are read."""
    found = routing.resolve(dimension_numbers or routing.muon_dimension_numbers, params)
    return {path: spec for path, spec in found.items() if spec is not None}


def _trained(params: Any, specs: Mapping[Path, MatrixSpec]) -> dict[Path, jax.Array]:
    """The parameters that are matrices, in float32 or wider."""
    return {
        path: x.astype(accumulation_dtype(x.dtype))
        for path, x in paths.leaves(params)
        if path in specs
    }


def _arrived(updates: Any, params: Any, specs: Mapping[Path, MatrixSpec]) -> dict[Path, jax.Array]:
    """The same that the step arrives at."""
    moved = dict(paths.leaves(updates))
    return {path: arrived(moved[path], x) for path, x in paths.leaves(params) if path in specs}


def _traced(number: Any) -> tuple[Any, ...]:
    """What `in_auto_axes` is to hand over: a number, which may be traced. A function, of a matrix's
    shape or of the step, is no array that a mesh could have."""
    return () if callable(number) else (number,)


def _of(number: Any, traced: tuple[Any, ...]) -> Any:
    """The number as it was handed over, or the function."""
    return traced[0] if traced else number


def _with(
    updates: Any, made: dict[Path, jax.Array], params: Any, arrive: Callable[..., jax.Array]
) -> Any:
    by_path = dict(paths.leaves(params))
    return paths.map_with_path(
        lambda path, u: arrive(made[path], u, by_path[path]) if path in made else u, updates
    )


def _limits(arrays: Sequence[MatrixArray], limit: Limit) -> list[Any]:
    of_shape = limit if callable(limit) else lambda ins, outs: limit
    return [jnp.asarray(of_shape(*array.shape[1:]), array.values.dtype) for array in arrays]


def _check_limit(limit: Limit, owner: str) -> None:
    if not callable(limit):
        check_number("limit", limit, lambda x: x > 0, "above 0 (a singular value)", owner)
