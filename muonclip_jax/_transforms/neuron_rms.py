"""NorMuon's second moment: one number for each neuron of an orthogonalized update."""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from muonclip_jax._core import paths
from muonclip_jax._core.axes import View
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes, mesh_axes, specs_of
from muonclip_jax._core.options import check_choice, check_flag, check_number
from muonclip_jax._core.paths import Path
from muonclip_jax._core.shardings import Shardings, check_shardings, placed, shardings_of
from muonclip_jax._core.states import check_same, without_parameters
from muonclip_jax._orthogonalize.normalization import nonzero
from muonclip_jax._parameters import routing
from muonclip_jax._parameters.matrices import MatrixSpec, take_matrices
from muonclip_jax._spread.moves import way_to_matrices
from muonclip_jax._spread.stacks import MatrixArray
from muonclip_jax._transforms.normalize_rms import sides

Neurons = Literal["outputs", "inputs", "longer"]
_Places = dict[str, tuple[NamedSharding | None, ...]]


class NeuronRMSState(NamedTuple):
    """What `scale_by_neuron_rms` keeps: `optax.tree.get(opt_state, "NeuronRMSState")`.

    Attributes:
      nu: By the parameter's path, for each kind of matrix in it the mean squares of its neurons,
        `[batch..., neurons...]`, float32, or float64 of such updates.

    Example:
        >>> mc.scale_by_neuron_rms().init({"up": {"kernel": jnp.ones((4, 8))}}).nu["up/kernel"][0]
        Array([0., 0., 0., 0., 0., 0., 0., 0.], dtype=float32)
    """

    nu: dict[str, tuple[jax.Array, ...]]


def scale_by_neuron_rms(
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    *,
    of: Neurons = "outputs",
    keep_rms: bool = False,
    dimension_numbers: routing.DimensionNumbers | None = None,
    shardings: Shardings | None = None,
) -> optax.GradientTransformation:
    """Divides each neuron of an orthogonalized update by the root of its running mean square.

    Of a Flax kernel `[in, out]`, for each output neuron, that is each column O of the update,

        v ← b2 v + (1 - b2) mean over the inputs of O²
        O ← O / (√v + eps)

    NorMuon, arXiv 2510.05491: it stands behind `scale_by_orthogonalization`, whose updates have
    neurons of different sizes. v starts at 0 and is not corrected for it, as in the paper, so the
    first updates are up to `1/√(1 - b2)` too large; the link behind, or `keep_rms`, sets the size.

    | source | here |
    | --- | --- |
    | the paper: v for each row of `[out, in]`, then `0.2 √(in·out) / ‖O‖_F` | the defaults, then `normalize_rms(0.2)` |
    | the authors' code: the norm of each matrix stays, then `√max(1, out/in)` | `eps=1e-10, keep_rms=True`, then `scale_by_update_rms("jordan")` |
    | nanochat and modded-nanogpt: the same with v for each entry of the longer side | `of="longer"` as well |

    Means are of squares: entries below 1e-19 or above 1e19, which orthogonalization does not give,
    leave float32. Neurons of zeros stay zero. A NaN stays in its neuron, and in its matrix with
    `keep_rms`; in v it stays for good.

    Cost: a few FLOPs an entry and no products of matrices. Updates are read twice and written
    once, with `keep_rms` too, whose norms are sums over neurons. State: one float32 number a
    neuron, `1/in` of a float32 momentum, 0.2% on a decoder of width 768. On a mesh it is split as
    the neurons are, and means over inputs that a mesh splits cross devices.

    Args:
      b2: Decay of the mean square, in [0, 1).
      eps: Added to the root, at least 0.
      of: What has one number: `"outputs"` (the paper), each column; `"inputs"`, each row; or
        `"longer"`, each entry of the matrix's longer side (of square ones the outputs).
      keep_rms: Whether each matrix is scaled back to the RMS that it came with.
      dimension_numbers: Which parameters are which matrices, as for `scale_by_orthogonalization`;
        give both the same. With attention's layout a neuron is a column of one head's matrix.
      shardings: On meshes with Auto axes, as for `scale_by_orthogonalization`.

    Returns:
      A transformation with a `NeuronRMSState`. Updates keep their shapes and dtypes.

    Raises:
      TypeError: An option of the wrong type; at init, a parameter that is not floating point.
      ValueError: When built, an option out of range; at init and update, as
        `scale_by_orthogonalization`; at update, a state of other parameters or another routing.

    Example:
        >>> tx = mc.scale_by_neuron_rms(0.75, eps=0.0)
        >>> updates = {"up": jnp.array([[4.0, 1.0], [4.0, -1.0]])}
        >>> updates, state = tx.update(updates, tx.init(updates))
        >>> updates["up"], state.nu["up"][0]
        (Array([[ 2.,  2.],
               [ 2., -2.]], dtype=float32), Array([4.  , 0.25], dtype=float32))
    """  # noqa: E501
    owner = "scale_by_neuron_rms"
    check_number("b2", b2, lambda x: 0 <= x < 1, "in [0, 1)", owner)
    check_number("eps", eps, lambda x: 0 <= x < math.inf, "at least 0 and finite", owner)
    check_choice("of", of, ("outputs", "inputs", "longer"))
    check_flag("keep_rms", keep_rms)
    routing.check_dimension_numbers(dimension_numbers)
    check_shardings(shardings)

    def init(params: optax.Params) -> NeuronRMSState:
        if paths.holds_nothing(params):
            return without_parameters(NeuronRMSState)
        paths.check_trainable(owner, params)
        specs = routing.resolve_matrices(dimension_numbers, params)
        known = shardings_of(params, shardings)
        places = _places(specs, known, of)
        zeros = in_auto_axes(lambda tree: _zeros(tree, specs, of), _explicit(params, places))
        return NeuronRMSState(_placed(zeros(params), places))

    def update(updates, state, params=None):
        del params
        specs = routing.resolve_matrices(dimension_numbers, updates)
        known = shardings_of(updates, shardings)
        wanted = jax.eval_shape(lambda tree: _zeros(tree, specs, of), updates)
        check_same("mean squares", state.nu, wanted, "the parameters or their routing")

        def act(tree, nu, *numbers):
            leaves = dict(paths.leaves(tree))
            arrays, put_back = take_matrices(leaves, specs, known)
            before = [v for path in leaves for v in nu[paths.show(path)]]
            steps = [
                _scaled(array, v, of, keep_rms, *numbers)
                for array, v in zip(arrays, before, strict=True)
            ]
            done = put_back([values for values, _ in steps])
            rest = iter(v for _, v in steps)
            after = {key: tuple(next(rest) for _ in nu[key]) for key in map(paths.show, leaves)}
            return paths.map_with_path(lambda path, _: done[path], tree), after

        places = _places(specs, known, of)
        split = specs_of(updates), _explicit(updates, places)
        new, nu = in_auto_axes(act, split)(updates, state.nu, b2, 1 - b2, eps)
        return new, NeuronRMSState(_placed(nu, places))

    return optax.GradientTransformation(init, update)


def _scaled(
    array: MatrixArray, v: jax.Array, of: Neurons, keep_rms: bool, b2: Any, rest: Any, eps: Any
) -> tuple[jax.Array, jax.Array]:
    """The matrices after the step, and v."""
    # O [4 heads, 64 in, 16 out], of="outputs": v [4, 16] is [4, 1, 16] beside it.
    o = array.values.astype(accumulation_dtype(array.values.dtype))
    rows, cols = sides(array)
    over = cols if _side(array.shape, of) == "inputs" else rows
    number = lambda x: jnp.asarray(x, o.dtype)  # noqa: E731
    beside = jnp.expand_dims(v, tuple(o.ndim + axis for axis in over)).astype(o.dtype)
    now = jnp.mean(jnp.square(o), over, keepdims=True)
    after = number(b2) * beside + number(rest) * now
    factor = 1 / nonzero(_root(after) + number(eps))
    if keep_rms:
        # A matrix's norm is that of its neurons' sizes: no entry is read for it.
        sizes, whole = _root(now), rows + cols
        norms = (jnp.sum(jnp.square(x), whole, keepdims=True) for x in (sizes, sizes * factor))
        before, behind = map(_root, norms)
        factor = factor * (before / nonzero(behind))
    new = o * factor
    return new, after.reshape(v.shape).astype(v.dtype)


def _root(x: jax.Array) -> jax.Array:
    """The square root, with a derivative at zero: that of what is zero and stays so."""
    return jnp.where(x == 0, 0, jnp.sqrt(nonzero(x)))


# Where v has its place: for each view its batch axes and those of its neurons.


def _side(shape: tuple[int, int, int], of: Neurons) -> Neurons:
    """Which side of matrices (count, in, out) the neurons are."""
    _, ins, outs = shape
    longer: Neurons = "inputs" if ins > outs else "outputs"
    return longer if of == "longer" else of


def _kept(view: View, of: Neurons, of_axes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Of what each axis `[batch..., rows..., cols...]` has, that of the axes of v."""
    batch, rows = len(view.batch), len(view.rows)
    if _side(view.matrices, of) == "inputs":
        return of_axes[: batch + rows]
    return of_axes[:batch] + of_axes[batch + rows :]


def _zeros(
    tree: Any, specs: Mapping[Path, MatrixSpec], of: Neurons
) -> dict[str, tuple[jax.Array, ...]]:
    def zeros(view: View, dtype: Any) -> jax.Array:
        lengths = tuple(view.length((name,)) for name in (*view.batch, *view.rows, *view.cols))
        return jnp.zeros(_kept(view, of, lengths), accumulation_dtype(dtype))

    return {
        paths.show(path): tuple(zeros(view, paths.dtype_of(x)) for view in specs[path].views)
        for path, x in paths.leaves(tree)
    }


def _places(
    specs: Mapping[Path, MatrixSpec], known: Mapping[Path, NamedSharding | None], of: Neurons
) -> _Places:
    """How v is split: as the neurons are where the matrices are taken."""

    def place(view: View, taken: NamedSharding | None) -> NamedSharding | None:
        spec = view.spec(taken)
        if taken is None or spec is None:
            return None
        return NamedSharding(taken.mesh, PartitionSpec(*_kept(view, of, tuple(spec))))

    def places(path: Path) -> tuple[NamedSharding | None, ...]:
        views = specs[path].views
        taken = way_to_matrices(views, known[path]).sharding
        return tuple(place(view, taken) for view in views)

    return {paths.show(path): places(path) for path in known}


def _explicit(tree: Any, places: _Places) -> dict[str, tuple[PartitionSpec, ...]]:
    """The same over Explicit axes alone, as `in_auto_axes` is told it."""
    explicit = {
        axis for x in jax.tree.leaves(tree) for axis in jax.typeof(x).sharding.mesh.explicit_axes
    }

    def spec(place: NamedSharding | None) -> PartitionSpec:
        entries = () if place is None else place.spec
        kept = (tuple(a for a in mesh_axes(entry) if a in explicit) for entry in entries)
        return PartitionSpec(*(axes or None for axes in kept))

    return {key: tuple(map(spec, few)) for key, few in places.items()}


def _placed(nu: dict[str, tuple[jax.Array, ...]], places: _Places) -> Any:
    """v held to its place on Auto axes, where all parameters have one."""
    known = all(place is not None for few in places.values() for place in few)
    return placed(nu, places) if known else nu
