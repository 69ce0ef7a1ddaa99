"""Updates brought to one RMS: whole matrices, or each of their rows or columns."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes, specs_of
from muonclip_jax._core.options import check_choice, check_number
from muonclip_jax._core.shardings import Shardings, check_shardings, shardings_of
from muonclip_jax._orthogonalize.normalization import nonzero
from muonclip_jax._parameters import routing
from muonclip_jax._parameters.matrices import change_matrices
from muonclip_jax._spread.stacks import MatrixArray

Of = Literal["matrix", "inputs", "outputs", "both"]


def normalize_rms(
    rms: ArrayLike = 1.0,
    *,
    of: Of = "matrix",
    dimension_numbers: routing.DimensionNumbers | None = None,
    shardings: Shardings | None = None,
) -> optax.GradientTransformation:
    """Brings each matrix of the updates, or each of its rows or columns, to the RMS `rms`.

    The RMS is the root of the mean square: `sqrt(sum(x²) / count)`. Of a Flax kernel `[in, out]`

    | `of` | what gets this RMS | PyTorch's `[out, in]` calls it |
    | --- | --- | --- |
    | `"matrix"` | the whole matrix | |
    | `"outputs"` | each column: what goes into one output neuron | a row |
    | `"inputs"` | each row: what comes from one input feature | a column |
    | `"both"` | the whole matrix, after each entry was divided by its row's RMS and its column's RMS, both of the matrix that came in | rows and columns |

    Before `scale_by_orthogonalization` only directions count, since msign ignores the size. Behind
    it the link takes the place of `scale_by_update_rms`: the size is then the same for every
    spectrum, where that one's is for flat ones only. Published are

    | source | there | here |
    | --- | --- | --- |
    | MuonEq, arXiv 2603.28254 | before msign, rows of `[out, in]` (R, its default), columns (C) or both at once (RC), each divided by `sqrt(sum(x²) + 1e-8)` | `of="outputs"`, `"inputs"`, `"both"` |
    | Muon+, arXiv 2602.21545 | behind msign, columns of `[out, in]`, rows, or the one and then the other, each divided by `sqrt(sum(x²) + 1e-7)`; times `sqrt(out/in)` | one link or two (`of="inputs"`, then `"outputs"`); behind them `scale_by_update_rms(lambda ins, outs: outs**0.5 / ins)`, or `outs**-0.5 * (outs / ins)**0.5` where `"inputs"` is last |
    | NorMuon, arXiv 2510.05491; AdaMuon, arXiv 2507.11005 | last of all, times `0.2 sqrt(in·out) / ‖O‖_F` | `normalize_rms(0.2)` |
    | Moonlight, arXiv 2502.16982 | times `0.2 sqrt(max(in, out))`, which is an RMS of 0.2 if all singular values are 1 | `normalize_rms(0.2)` where that RMS is meant for every spectrum |

    There is no ε here: rows, columns and matrices of zeros stay zero, all others get their RMS to
    rounding, be they tiny or huge. A NaN or an infinity makes NaN of its row, its column or its
    matrix, and of no other.

    Cost: a few FLOPs an entry and no products of matrices. Updates are read three times (the
    largest entry, squares, the result), with `"both"` eight times, and written once; XLA on CPU
    stores what it squares, and moves the bytes of the updates 6 times, of `"both"` 17 times. No
    state. On a mesh sums cross devices where they split a row, a column or a matrix: two numbers
    each.

    Args:
      rms: The RMS, above 0.
      of: See above.
      dimension_numbers: Which parameters are which matrices, as for `scale_by_orthogonalization`;
        give both the same.
      shardings: On meshes with Auto axes, as for `scale_by_orthogonalization`.

    Returns:
      A stateless transformation. Updates keep their shapes and dtypes; sums are in float32 or
      wider.

    Raises:
      TypeError: An option of the wrong type; at init, a parameter that is not floating point.
      ValueError: When built, an `rms` that is not above 0, an unknown `of`; at init and update, as
        `scale_by_orthogonalization`.

    Example:
        >>> tx = mc.normalize_rms(0.5, of="outputs")
        >>> updates = {"up": jnp.array([[3.0, 0.0], [3.0, 0.0], [3.0, 7.0], [3.0, 0.0]])}
        >>> updates, _ = tx.update(updates, tx.init(updates))
        >>> updates["up"]
        Array([[0.5, 0. ],
               [0.5, 0. ],
               [0.5, 1. ],
               [0.5, 0. ]], dtype=float32)
    """  # noqa: E501
    check_number("rms", rms, lambda x: 0 < x < math.inf, "above 0 and finite", "normalize_rms")
    check_choice("of", of, ("matrix", "inputs", "outputs", "both"))
    routing.check_dimension_numbers(dimension_numbers)
    check_shardings(shardings)

    def init(params: optax.Params) -> optax.EmptyState:
        paths.check_trainable("normalize_rms", params)
        routing.resolve_matrices(dimension_numbers, params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        specs = routing.resolve_matrices(dimension_numbers, updates)
        known = shardings_of(updates, shardings)

        def normalized(tree, rms):
            change = lambda arrays: [_normalized(array, of, rms) for array in arrays]  # noqa: E731
            return change_matrices(change, tree, specs, known)

        return in_auto_axes(normalized, specs_of(updates))(updates, rms), state

    return optax.GradientTransformation(init, update)


def unit_rms(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """What has an RMS of 1 along these axes, and the RMS that it had, of float32 or wider.

    Squares neither overflow nor vanish, and zeros stay zeros, since all is in units of the largest
    entry. Along the last axis of `[[3, 4], [0, 0]]` they are `[[0.85, 1.13], [0, 0]]` and
    `[[3.54], [0]]`.
    """
    largest = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axes, keepdims=True))
    x = x / nonzero(largest)
    size = jnp.sqrt(nonzero(jnp.mean(jnp.square(x), axes, keepdims=True)))
    return x / size, largest * size


def sides(array: MatrixArray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of its rows and those of its columns, `[batch..., rows..., cols...]`."""
    rows, cols = array.rows, array.cols
    return tuple(range(-rows - cols, -cols)), tuple(range(-cols, 0))


def _normalized(array: MatrixArray, of: Of, rms: Any) -> jax.Array:
    x = array.values.astype(accumulation_dtype(array.values.dtype))
    rows, cols = sides(array)
    whole = rows + cols
    if of == "both":
        # How large columns are beside each other: x [in, out] has these of [1, out].
        among, _ = unit_rms(unit_rms(x, rows)[1], whole)
        x = unit_rms(x, cols)[0] / nonzero(among)
    # A column is one output's, so its mean is over the rows.
    x, _ = unit_rms(x, {"outputs": rows, "inputs": cols}.get(of, whole))
    return x * jnp.asarray(rms, x.dtype)
