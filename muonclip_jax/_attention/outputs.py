"""The largest entry of what each head writes, for the clip of outputs."""

import einops
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._attention import call as arguments
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.maxima import largest


def measure_max_output(
    attended: ArrayLike,
    kernel: ArrayLike,
    *,
    dtype: DTypeLike | None = None,
    precision: lax.PrecisionLike = None,
) -> jax.Array:
    """Measures the largest entry, in size, of what each head writes: `max |attended_h @ W_o,h|`.

    The output projection adds up what all heads write, so this multiplies by it once more, head by
    head: T·N·H·out multiply-adds and no backward pass. Tokens are taken in N parts, so that the
    buffer is as large as the block's output.

    Args:
      attended: `[..., T, N, H]`, what attention gives to the output projection.
      kernel: W_o, `[N, H, out]`, or flat, `[N·H, out]`.
      dtype: of the products' factors, the operands' common dtype by default; they accumulate in
        float32 (float64 for float64).
      precision: of the products, as in `jax.lax.dot_general`.

    Returns:
      `[N]` in float32 (float64 for float64), without gradient, to be sown with
      `sow_signal(self, "max_output", ...)`; NaN where an entry is NaN.

    Raises:
      ValueError: shapes that do not fit.
      TypeError: a dtype that does not fit.

    Example:
      >>> mc.measure_max_output(jnp.ones((2, 5, 4, 8)), 3 * jnp.ones((4, 8, 16)))
      Array([24., 24., 24., 24.], dtype=float32)
    """
    attended = arguments.floating("attended", attended)
    kernel = arguments.floating("kernel", kernel)
    if attended.ndim < 3:
        raise ValueError(f"attended must be [..., T, N, H], found {attended.shape}.")
    heads, features = attended.shape[-2:]
    fitting = kernel.shape[:-1] in ((heads, features), (heads * features,))
    if not fitting:
        raise ValueError(
            f"kernel {kernel.shape} is not [N, H, out] or [N·H, out] of attended [..., T, N, H] "
            f"{attended.shape}: expected ({heads}, {features}, out) or ({heads * features}, out)."
        )
    dtype = arguments.compute_dtype(dtype, attended, kernel)
    kernel = kernel.reshape(heads, features, -1)
    attended, kernel = (lax.stop_gradient(x.astype(dtype)) for x in (attended, kernel))
    # Tokens [..., 10, 4, H] in 4 parts of 3, two of them zeros, which are larger than nothing.
    missing = -attended.shape[-3] % heads
    padding = [(0, 0)] * (attended.ndim - 3) + [(0, missing), (0, 0), (0, 0)]
    parts = einops.rearrange(
        jnp.pad(attended, padding), "... (parts t) n h -> parts ... t n h", parts=heads
    )

    def step(highest: jax.Array, part: jax.Array):
        written = jnp.einsum(
            "...nh,nho->...no",
            part,
            kernel,
            precision=precision,
            preferred_element_type=highest.dtype,
        )
        axes = (*range(written.ndim - 2), written.ndim - 1)
        return jnp.maximum(highest, largest(jnp.abs(written), axes)), None

    nothing = jnp.zeros(heads, accumulation_dtype(dtype))
    return lax.scan(step, nothing, parts)[0]
