"""The inverse of a diagonal matrix plus the lower triangle of a product of low rank."""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.meshes import in_auto_axes
from muonclip_jax._linalg.factors import product
from muonclip_jax._orthogonalize.newton_schulz import check_matrices


def inverse_low_rank_triangular(diagonal: ArrayLike, q: ArrayLike, k: ArrayLike) -> jax.Array:
    """Inverts T = Λ + QKᵀ ⊙ M⁻, a diagonal plus the part of QKᵀ below it, in O(n²d).

    Linear attention with the delta rule needs it: within a chunk of n tokens, u = T⁻¹(βv) with
    Λ = I, Q = βK takes the values to what is written into the memory
    (`examples/delta_rule.py`).

    By halves: the lower left block of T⁻¹ is −(B⁻¹Q₂)(K₁ᵀA⁻¹), products of rank d, so that
    all of it costs 4n²d FLOPs (of n rounded up to a power of two) in log₂ n levels of products.
    A general triangular inverse takes n³/3 and n steps one after another.

    Conditioning: rounding counts by the condition of T. With Λ = I, Q = βK and rows of K of norm 1
    (n = 512, d = 16) the relative error in float32 is 3e-7, 4e-7 and 3e-6 at β = 0.5, 1 and 2,
    where the condition is 19, 54 and 2900. A zero in Λ gives Inf and NaN.

    Args:
      diagonal: Λ, `[..., n]`.
      q: Q, `[..., n, d]`.
      k: K, `[..., n, d]`. All of one dtype, bfloat16, float16, float32 or float64; leading axes are
        broadcast. 16 bits are computed in float32.

    Returns:
      T⁻¹, `[..., n, n]`, zero above the diagonal.

    Raises:
      TypeError: The dtypes differ or are none of the four.
      ValueError: The shapes do not fit, or one has an axis of length zero.

    Example:
      >>> q = k = jnp.ones((3, 1))
      >>> mc.linalg.inverse_low_rank_triangular(jnp.ones(3), q, k)[1:].tolist()
      [[-1.0, 1.0, 0.0], [-0.0, -1.0, 1.0]]

    Source: the problem and its cost are Su Jianlin's, "Inverting triangular matrices of diagonal
    plus low rank", kexue.fm, July 2025; by halves it is products, for which accelerators are made.
    """
    diagonal, q, k = (jnp.asarray(x) for x in (diagonal, q, k))
    check_matrices("inverse_low_rank_triangular: q", q)
    check_matrices("inverse_low_rank_triangular: k", k)
    if not diagonal.dtype == q.dtype == k.dtype:
        raise TypeError(
            f"inverse_low_rank_triangular: diagonal is {diagonal.dtype}, q is {q.dtype} and k is "
            f"{k.dtype}; cast them to one dtype."
        )
    if q.shape[-2:] != k.shape[-2:] or diagonal.shape[-1:] != q.shape[-2:-1]:
        raise ValueError(
            f"inverse_low_rank_triangular: diagonal {diagonal.shape}, q {q.shape} and k {k.shape} "
            "must be [..., n], [..., n, d] and [..., n, d]."
        )
    return in_auto_axes(_inverse, PartitionSpec())(diagonal, q, k)


@jax.jit
def _inverse(diagonal: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """By halves: of [[A, 0], [Q₂K₁ᵀ, B]] the inverse is [[A⁻¹, 0], [−(B⁻¹Q₂)(K₁ᵀA⁻¹), B⁻¹]].

    At each level all blocks of one size are a batch.
    """
    n, d = q.shape[-2:]
    batch = jnp.broadcast_shapes(diagonal.shape[:-1], q.shape[:-2], k.shape[:-2])
    size = 1 << (n - 1).bit_length()  # rows of the identity below make it a power of two
    total = accumulation_dtype(q.dtype)

    def padded(x, shape, value):
        x = jnp.broadcast_to(x, (*batch, *shape)).astype(total)
        widths = [(0, size - n if axis == len(batch) else 0) for axis in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=value)

    blocks = (1 / padded(diagonal, (n,), 1))[..., None, None]
    left, right = (padded(x, (n, d), 0) for x in (q, k))
    while (rows := blocks.shape[-1]) < size:

        def halves(x, rows=rows):
            pairs = x.reshape(*batch, -1, 2, rows, x.shape[-1])
            return pairs[..., 0, :, :], pairs[..., 1, :, :]

        first, second = halves(blocks)
        below = -product(product(second, halves(left)[1]), product(halves(right)[0].mT, first))
        top = jnp.concatenate([first, jnp.zeros_like(first)], -1)
        blocks = jnp.concatenate([top, jnp.concatenate([below, second], -1)], -2)
    return blocks[..., 0, :n, :n].astype(q.dtype)
