"""Logits so large, and masks so written, that attention went wrong."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import muonclip_jax as mc


def operands(size=5, length=40, seed=0, scale=1.0):
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (2, length, 4, size), (2, length, 2, size), (2, length, 2, size)
    q, k, v = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    return q * scale**0.5, k * scale**0.5, v


@pytest.mark.parametrize("scale", [1e9, 1e20, 1e36])
@pytest.mark.parametrize("options", [{}, {"chunk_size": 16}, {"soft_cap": 1e37}], ids=str)
def test_huge_finite_logits_give_what_jax_nn_gives(scale, options):
    """There an ulp is 64 and more. exp of one above 0 was infinite, of one below it zero."""
    q, k, v = operands(scale=scale)

    @jax.jit
    def run(q, k, v):
        def loss(q, k, v):
            out, maxima = mc.dot_product_attention(q, k, v, **options)
            return jnp.square(out).sum() / 2, (out, maxima)

        return jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)

    grads, (out, maxima) = run(q, k, v)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    logits = np.einsum("btnh,bsnh->bnts", q, np.repeat(k, 2, axis=-2)) / np.sqrt(5)
    np.testing.assert_allclose(maxima, logits.max((0, 2, 3)), rtol=1e-5)
    # One key takes the whole weight of each row (`jax.nn`, jitted, gives NaN for some).
    weights = np.eye(40)[logits.argmax(-1)]
    expected = np.einsum("bnts,bsnv->btnv", weights, np.repeat(v, 2, axis=-2))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    d_values = np.einsum("bnts,btnv->bsnv", weights, expected).reshape(2, 40, 2, 2, 5).sum(3)
    np.testing.assert_allclose(grads[2], d_values, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grads[0], 0, atol=1e-3 * scale**0.5)  # weights 0 and 1 have no slope
    assert np.isfinite(grads[1]).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_huge_logits_of_sixteen_bits(dtype):
    """The largest logits that float16 factors make: 65504² · 4."""
    q, k = (jnp.full((3, 1, 4), sign * 60000.0, dtype) for sign in (1, -1))
    k = k.at[1].multiply(-1)
    out, maxima = mc.dot_product_attention(q, k, jnp.arange(3.0).reshape(3, 1, 1).astype(dtype))
    np.testing.assert_array_equal(np.asarray(out, np.float32), 1)
    np.testing.assert_allclose(maxima, [2 * 60000.0**2], rtol=1e-2)  # 60000 is rounded


def additive(hidden, dtype="float32"):
    """`large_negative_mask` of the reports: queries 6 … 1 and keys 0 … 5, the future hidden."""
    q = (6.0 - jnp.arange(6.0)).reshape(1, 6, 1, 1).astype(dtype)
    k = jnp.arange(6.0).reshape(1, 6, 1, 1).astype(dtype)
    bias = jnp.where(jnp.tri(6, dtype=bool), 0.0, hidden).astype(dtype)
    return q, k, bias


@pytest.mark.parametrize(
    ("hidden", "dtype"),
    [
        *((hidden, "float32") for hidden in (-1e9, -1e10, -1e30, -np.inf, np.finfo("f4").min)),
        *((hidden, "bfloat16") for hidden in (-1e9, -1e10, -1e30, -np.inf)),
        *((hidden, "float16") for hidden in (-65504.0, -np.inf)),
    ],
)
def test_what_an_additive_mask_hides_does_not_count(hidden, dtype):
    q, k, bias = additive(hidden, dtype)
    out, maxima = mc.dot_product_attention(q, k, k, bias)
    np.testing.assert_array_equal(maxima, [9.0])  # (6 - i) j, j <= i: 3 · 3. All pairs: 6 · 5
    masked = mc.dot_product_attention(q, k, k, mask=jnp.tri(6, dtype=bool))[0]
    np.testing.assert_array_equal(np.asarray(out, "f4"), np.asarray(masked, "f4"))
    chunked = mc.dot_product_attention(q, k, k, bias, chunk_size=4)[1]
    np.testing.assert_array_equal(chunked, [9.0])
    flax = mc.attention_fn(q, k, k, bias)
    np.testing.assert_array_equal(np.asarray(flax, "f4"), np.asarray(out, "f4"))


SPLASH = -0.7 * float(np.finfo("f4").max)  # what splash and MaxText write for hidden


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("hidden", [-1e8, -1e9, SPLASH])
def test_a_mask_within_a_position_bias_hides_as_alone(hidden, dtype):
    """T5 and BLOOM add both up, and hand on the sum; its rounding moves no mask across the line."""
    q, k, bias = additive(hidden, dtype)
    positions = (-jnp.abs(jnp.arange(6.0)[:, None] - jnp.arange(6.0))).astype(dtype)
    _, maxima = mc.dot_product_attention(q, k, k, bias + positions, chunk_size=4, soft_cap=50.0)
    np.testing.assert_array_equal(maxima, [9.0])


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"segment_ids": jnp.arange(6) // 3}, [12.0]),  # 6 · 2, and 3 · 3 in the second
        ({"key_value_seq_lengths": 3}, [12.0]),  # 6 · 2
        ({"is_causal": True, "sinks": jnp.full(1, 1e6)}, [9.0]),
    ],
    ids=["segments", "length", "causal, sinks"],
)
def test_an_additive_mask_beside_other_ways_to_hide(options, expected):
    q, k, _ = additive(0.0)
    padding = jnp.where(jnp.arange(6) < 4, 0.0, -1e10)  # of the keys 4 and 5
    _, maxima = mc.dot_product_attention(q, k, k, padding, chunk_size=4, **options)
    np.testing.assert_array_equal(maxima, expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_berts_ten_thousand_counts_in_every_dtype(dtype):
    """A slope of 1/2 gets there at 20,000 positions: a bias says no more. A mask hides."""
    q, k, bias = additive(-1e4, dtype)
    assert mc.dot_product_attention(q, k, k, bias)[1][0] == 30
    assert mc.dot_product_attention(q, k, k, mask=bias == 0)[1][0] == 9


@pytest.mark.parametrize(
    "bias",
    [
        pytest.param(-jnp.abs(jnp.arange(6.0)[:, None] - jnp.arange(6.0)) * 1e4, id="ALiBi, far"),
        pytest.param(jnp.linspace(-12, 9, 36).reshape(6, 6), id="T5"),
        pytest.param(jnp.full((6, 6), -1e7), id="all alike"),
    ],
)
def test_a_position_bias_hides_nothing(bias):
    q, k, _ = additive(0.0)
    assert mc.dot_product_attention(q, k, k, bias)[1][0] == 30


def test_a_row_that_an_additive_mask_hides_as_a_whole_keeps_its_weights():
    q, k, _ = additive(0.0)
    bias = jnp.where(jnp.arange(6) < 1, -1e10, 0.0)[:, None]  # the padding's query
    out, maxima = mc.dot_product_attention(q, k, k, bias)
    expected = jax.nn.dot_product_attention(q, k, k, bias[None, None] * jnp.ones((1, 1, 6, 6)))
    np.testing.assert_allclose(out, expected, rtol=1e-6)
    assert maxima[0] == 25  # 5 · 5, not 6 · 5
    assert np.isnan(mc.dot_product_attention(q.at[0].set(jnp.nan), k, k)[1]).all()
