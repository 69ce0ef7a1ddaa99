"""Attention on any shapes, options, chunks and dtypes is the plain form in float64."""

import jax
import jax.numpy as jnp
import numpy as np

from tests.attention.test_attention import LOWEST, packing, reference, value_and_grads
from tests.fuzz.draws import cases, choose

DTYPES = ["float64", "float64", "float32", "bfloat16", "float16"]


def draw_call(rng, dtype):
    """Operands, the output's cotangent and the options of one call."""
    batch = choose(rng, [(), (2,), (2, 1, 2)])
    length, keys = rng.integers(1, 24, 2)
    kv_heads, group, size, value_size = rng.integers(1, 4, 4)
    heads = kv_heads * group
    weights = (*batch, heads, length, keys)

    def some(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    def broadcastable():
        kept = [n if rng.random() < 0.6 else 1 for n in weights]
        return tuple(kept[rng.integers(len(batch) + 2) :])

    operands = [
        some(*batch, length, heads, size),
        some(*batch, keys, kv_heads, size),
        some(*batch, keys, kv_heads, value_size),
    ]
    if rng.random() < 0.5:
        bias = rng.normal(size=broadcastable())
        hidden = -np.inf if dtype != "float64" else choose(rng, [-np.inf, LOWEST])
        operands.append(jnp.asarray(np.where(rng.random(bias.shape) < 0.2, hidden, bias), dtype))
    window = [None, int(rng.integers(0, 9)), tuple(int(n) for n in rng.integers(0, 9, 2))]
    options = {
        "is_causal": bool(rng.random() < 0.5),
        "local_window_size": choose(rng, window),
        "scale": choose(rng, [None, -1.0, 0.3]),
        "soft_cap": choose(rng, [None, None, 1.5]),
        "mask": jnp.asarray(rng.random(broadcastable()) < 0.7) if rng.random() < 0.5 else None,
    } | packing(rng, batch, length, keys, heads, dtype)
    return operands, some(*batch, length, heads, value_size), options


@cases(few=6)
def test_attention_is_the_plain_form(rng):
    dtype = choose(rng, DTYPES)
    with jax.enable_x64(dtype == "float64"):
        operands, d_out, options = draw_call(rng, dtype)
        chunk_size = choose(rng, [None, 2, 5, 16])
        out, maxima, grads = value_and_grads(operands, d_out, chunk_size=chunk_size, **options)
        expected = reference(*operands, d_out=d_out, **options)
        # Operands, probabilities and output are rounded to the dtype: sums of some hundred terms
        # of order one, in 16 bits each rounded before it is summed.
        eps = float(jnp.finfo(dtype).eps)
        terms = d_out.size / d_out.shape[-1] * 2
        close(out, expected[0], 16 * eps)
        close(maxima, expected[1], 32 * float(jnp.finfo(jnp.promote_types(dtype, "float32")).eps))
        for found, wanted in zip(grads, expected[2], strict=True):
            close(found, wanted, (32 + np.sqrt(terms)) * eps)


def close(found, wanted, tolerance):
    """To the largest entry, or 1 if that is more."""
    found = np.asarray(found, np.float64)
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(found[~finite], wanted[~finite])
    size = max(1.0, np.abs(wanted[finite]).max(initial=0))
    np.testing.assert_allclose(found[finite], wanted[finite], rtol=0, atol=tolerance * size)
