"""Chunked attention against the plain form in float64 NumPy."""

import functools
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from muonclip_jax._attention.attention import dot_product_attention

LOWEST = np.finfo(np.float64).min


def visibility(
    shape,
    mask=None,
    bias=None,
    is_causal=False,
    local_window_size=None,
    segment_ids=None,
    query_seq_lengths=None,
    key_value_seq_lengths=None,
):
    *_, length, keys = shape
    i, j = np.arange(length)[:, None], np.arange(keys)
    visible = np.ones(shape, bool)
    if is_causal:
        visible &= j <= i
    if local_window_size is not None:
        left, right = np.broadcast_to(local_window_size, 2)
        visible &= (i - left <= j) & (j <= i + right)
    if mask is not None:
        visible &= mask
    if segment_ids is not None:
        pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids,) * 2
        of_query, of_key = map(np.asarray, pair)
        visible &= of_query[..., None, :, None] == of_key[..., None, None, :]
    if query_seq_lengths is not None:
        visible &= i < np.asarray(query_seq_lengths)[..., None, None, None]
    if key_value_seq_lengths is not None:
        visible &= j < np.asarray(key_value_seq_lengths)[..., None, None, None]
    if bias is not None:
        visible &= bias > LOWEST / 2
    return visible


def summed_to(x, shape):
    """The gradient of what was broadcast from `shape`."""
    padded = (1,) * (x.ndim - len(shape)) + shape
    axes = tuple(axis for axis in range(x.ndim) if padded[axis] != x.shape[axis])
    return x.sum(axes).reshape(shape)


def reference(
    query,
    key,
    value,
    bias=None,
    *,
    d_out,
    scale=None,
    soft_cap=None,
    sinks=None,
    dropout=1.0,
    **visible,
):
    """Output, maxima and the gradients of all operands, the [T, S] way."""
    query, key, value, d_out = (np.asarray(x, np.float64) for x in (query, key, value, d_out))
    num_heads, kv_heads, size = query.shape[-2], key.shape[-2], query.shape[-1]
    scale = size**-0.5 if scale is None else scale
    keys, values = (np.repeat(x, num_heads // kv_heads, axis=-2) for x in (key, value))
    raw = scale * np.einsum("...tnh,...snh->...nts", query, keys)
    visible = visibility(raw.shape, bias=bias, **visible)
    capped = raw if soft_cap is None else soft_cap * np.tanh(raw / soft_cap)
    logits = np.where(visible, capped + (0 if bias is None else bias), -np.inf)
    added = -np.inf if sinks is None else np.asarray(sinks, np.float64)[:, None, None]
    peak = np.maximum(logits.max(-1, keepdims=True), added)
    peak = np.where(peak == -np.inf, 0, peak)
    weights, to_sinks = np.exp(logits - peak), np.exp(added - peak)
    total = weights.sum(-1, keepdims=True) + to_sinks
    total = np.where(total == 0, 1, total)
    weights, to_sinks = weights / total, to_sinks / total
    out = np.einsum("...nts,...snv->...tnv", weights * dropout, values)
    heads_last = np.moveaxis(np.where(visible, raw, -np.inf), -3, -1)
    max_logits = heads_last.reshape(-1, num_heads).max(0)

    d_weights = np.einsum("...tnv,...snv->...nts", d_out, values) * dropout
    d_logits = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True))
    d_raw = d_logits * (1 if soft_cap is None else 1 - (capped / soft_cap) ** 2)

    def per_kv_head(x):
        return x.reshape(*x.shape[:-2], kv_heads, -1, x.shape[-1]).sum(-2)

    grads = [
        scale * np.einsum("...nts,...snh->...tnh", d_raw, keys),
        per_kv_head(scale * np.einsum("...nts,...tnh->...snh", d_raw, query)),
        per_kv_head(np.einsum("...nts,...tnv->...snv", weights * dropout, d_out)),
    ]
    if bias is not None:
        grads.append(summed_to(d_logits, bias.shape))
    if sinks is not None:
        d_sinks = -to_sinks * (weights * d_weights).sum(-1, keepdims=True)
        grads.append(summed_to(d_sinks, (num_heads, 1, 1)).reshape(num_heads))
    return out, max_logits, grads


def normal(rng, *shape, dtype=np.float64):
    return jnp.asarray(rng.normal(size=shape), dtype)


def value_and_grads(operands, d_out, sinks=None, **options):
    """`(out, max_logits, grads)` in one compilation, the maxima's cotangent being ones."""

    @jax.jit
    def run(operands, sinks, d_out):
        (out, max_logits), vjp = jax.vjp(
            lambda operands, sinks: dot_product_attention(*operands, sinks=sinks, **options),
            operands,
            sinks,
        )
        grads, d_sinks = vjp((d_out, jnp.ones_like(max_logits)))
        return out, max_logits, [*grads, *jax.tree.leaves(d_sinks)]

    return run(operands, sinks, d_out)


def packing(rng, batch, length, keys, num_heads, dtype=np.float64):
    """Segments, lengths and sinks of one call, each of them there or not."""

    def some(value):
        return value if rng.random() < 0.5 else None

    def ids(size):
        shape = (*(n if rng.random() < 0.6 else 1 for n in batch), size)
        return jnp.asarray(rng.integers(-1, 2, shape[rng.integers(len(batch) + 1) :]))

    def lengths(size):
        shape = batch[rng.integers(len(batch) + 1) :]
        return jnp.asarray(rng.integers(-1, size + 3, shape))

    one = length == keys and rng.random() < 0.5
    sinks = rng.normal(size=num_heads)
    sinks[rng.random(num_heads) < 0.2] = -np.inf
    return {
        "segment_ids": some(ids(length) if one else (ids(length), ids(keys))),
        "query_seq_lengths": some(lengths(length)),
        "key_value_seq_lengths": some(lengths(keys)),
        "sinks": some(jnp.asarray(sinks, dtype)),
    }


@st.composite
def calls(draw):
    """Shapes, masks and options of one attention call, with the arrays drawn from a seed."""
    few, size = st.integers(1, 3), st.integers(1, 9)
    batch = draw(st.sampled_from([(), (2,), (2, 1, 3)]))
    length, keys, kv_heads, group = draw(size), draw(size), draw(few), draw(few)
    head_size, value_size = draw(few), draw(few)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    weights_shape = (*batch, kv_heads * group, length, keys)

    def broadcastable():
        kept = tuple(n if draw(st.booleans()) else 1 for n in weights_shape)
        return kept[draw(st.integers(0, len(batch) + 1)) :]

    operands = [
        normal(rng, *batch, length, kv_heads * group, head_size),
        normal(rng, *batch, keys, kv_heads, head_size),
        normal(rng, *batch, keys, kv_heads, value_size),
    ]
    if draw(st.booleans()):
        bias = rng.normal(size=broadcastable())
        hidden = rng.random(bias.shape) < 0.2
        operands.append(jnp.where(hidden, draw(st.sampled_from([-np.inf, LOWEST])), bias))
    options = {
        "is_causal": draw(st.booleans()),
        "local_window_size": draw(
            st.none() | st.integers(0, 4) | st.tuples(st.integers(0, 4), st.integers(0, 4))
        ),
        "scale": draw(st.none() | st.sampled_from([-1.0, 0.3])),
        "soft_cap": draw(st.none() | st.just(1.5)),
        "mask": jnp.asarray(rng.random(broadcastable()) < 0.7) if draw(st.booleans()) else None,
    } | packing(rng, batch, length, keys, kv_heads * group)
    d_out = normal(rng, *batch, length, kv_heads * group, value_size)
    return operands, d_out, options, draw(st.integers(2, 5))


def assert_equals_the_plain_form(operands, d_out, options, chunk_size):
    found = value_and_grads(operands, d_out, chunk_size=chunk_size, **options)
    expected = reference(*operands, d_out=d_out, **options)
    # Float64 on both sides; sums of at most a few hundred terms of order one.
    chex.assert_trees_all_close(found, expected, rtol=1e-11, atol=1e-11)
    chex.assert_trees_all_equal_dtypes(found, jax.tree.map(jnp.float64, found))


@pytest.mark.slow
@settings(max_examples=20)  # each is one compilation
@given(st.data())
def test_output_maxima_and_gradients_equal_the_plain_form(data):
    with jax.enable_x64(True):
        assert_equals_the_plain_form(*data.draw(calls()))
    assert jnp.ones(1).dtype == jnp.float32


@pytest.mark.parametrize(
    ("batch", "bias_shape", "mask_shape", "options"),
    [
        ((), (6, 1, 8), (7, 1), {"is_causal": True, "soft_cap": 1.5}),
        ((2, 3), (3, 1, 7, 8), (2, 1, 6, 1, 8), {"local_window_size": (4, 2), "scale": -1.0}),
        ((2,), None, (8,), {"is_causal": True, "local_window_size": 3, "scale": 0.3}),
        (
            (2,),
            (8,),
            (2, 1, 7, 1),
            {
                "segment_ids": (np.arange(7) // 3, np.arange(16).reshape(2, 8) // 6),
                "query_seq_lengths": np.array([7, 5]),
                "key_value_seq_lengths": np.array([8, 7], np.uint8),
                "sinks": np.array([0.0, 1.0, -1.0, -np.inf, 30.0, -30.0]),
                "soft_cap": 2.0,
            },
        ),
    ],
    ids=["cap", "window", "causal window", "packed, with sinks"],
)
def test_every_option_equals_the_plain_form(batch, bias_shape, mask_shape, options):
    """Four calls that have everything among them; many more are the slow test above."""
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        operands = [
            normal(rng, *batch, *shape) for shape in ((7, 6, 3), (8, 2, 3), (8, 2, 2))
        ]  # 7 queries, 8 keys, groups of 3 heads, values of another size
        if bias_shape is not None:
            bias = rng.normal(size=bias_shape)
            bias.flat[::7], bias.flat[3::7] = -np.inf, LOWEST
            operands.append(jnp.asarray(bias))
        mask = jnp.asarray(rng.random(mask_shape) < 0.7)
        d_out = normal(rng, *batch, 7, 6, 2)
        assert_equals_the_plain_form(operands, d_out, options | {"mask": mask}, chunk_size=3)


@pytest.mark.parametrize(
    "dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow), "float32", "float64"]
)
def test_every_dtype(dtype):
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        operands = [normal(rng, 2, 7, heads, 4, dtype=dtype) for heads in (4, 2, 2)]
        d_out = normal(rng, 2, 7, 4, 4, dtype=dtype)
        options = {"is_causal": True, "soft_cap": 2.0}
        out, max_logits, grads = value_and_grads(operands, d_out, chunk_size=3, **options)
        expected = reference(*operands, d_out=d_out, **options)
        chex.assert_type([out, *grads], dtype)
        wide = jnp.promote_types(dtype, jnp.float32)
        chex.assert_type(max_logits, wide)
        # Operands, probabilities and output are rounded to the dtype; the output is an average
        # and a gradient a sum of fewer than 4·7 terms of order one.
        eps = float(jnp.finfo(dtype).eps)
        as_float64 = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
        chex.assert_trees_all_close(as_float64(out), expected[0], atol=4 * eps, rtol=0)
        chex.assert_trees_all_close(as_float64(grads), expected[2], atol=16 * eps, rtol=eps)
        # Exact products accumulated in the wide dtype: the maxima do not see the narrow one.
        wide_eps = float(jnp.finfo(wide).eps)
        chex.assert_trees_all_close(as_float64(max_logits), expected[1], rtol=8 * wide_eps)


def test_output_dtype_is_the_given_one_or_the_querys():
    narrow, wide = jnp.ones((3, 2, 4), jnp.bfloat16), jnp.ones((3, 2, 4))
    chex.assert_type(dot_product_attention(narrow, wide, wide)[0], jnp.bfloat16)
    chex.assert_type(dot_product_attention(wide, wide, wide, dtype=jnp.float16)[0], jnp.float16)


@pytest.mark.parametrize(("window", "is_causal"), [(2, False), ((0, 3), False), ((3, 1), True)])
def test_window_means_what_it_means_in_jax(window, is_causal):
    rng = np.random.default_rng(0)
    query, key, value = (normal(rng, 1, 9, heads, 4, dtype=np.float32) for heads in (4, 2, 2))
    options = {"local_window_size": window, "is_causal": is_causal}
    ours, _ = dot_product_attention(query, key, value, chunk_size=4, **options)
    # The mask is for JAX 0.8, which ignores a window that comes alone.
    theirs = jax.nn.dot_product_attention(
        query, key, value, mask=jnp.ones((1, 1, 1, 1), bool), **options
    )
    # Averages of numbers of order one, in float32 on both sides.
    chex.assert_trees_all_close(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "tiles"),
    [
        ({}, 16),
        ({"is_causal": True}, 10),
        ({"local_window_size": 0}, 4),
        ({"local_window_size": (4, 0)}, 7),
        ({"is_causal": True, "local_window_size": (5, 3)}, 9),
    ],
)
def test_hidden_tiles_are_not_computed(options, tiles):
    x = jnp.ones((16, 1, 2))
    attend = functools.partial(dot_product_attention, chunk_size=4, **options)
    gradient = jax.make_jaxpr(jax.grad(lambda x: attend(x, x, x)[0].sum()))(x)
    assert re.findall(r"length=(\d+)", str(gradient)) == [str(tiles)] * 2  # a scan in each pass


def test_queries_and_heads_that_see_nothing():
    rng = np.random.default_rng(0)
    operands = [normal(rng, 5, 2, 3, dtype=np.float32) for _ in range(3)]
    mask = np.ones((2, 5, 5), bool)
    mask[0] = False  # a whole head
    mask[1, 3] = False  # one query of the other
    out, max_logits, (d_query, d_key, d_value) = value_and_grads(
        operands, jnp.ones((5, 2, 3)), mask=mask, chunk_size=2
    )
    chex.assert_tree_all_finite([out, d_query, d_key, d_value])
    assert max_logits[0] == -jnp.inf and np.isfinite(max_logits[1])
    for x in (out, d_query, d_key, d_value):
        assert not x[:, 0].any() and x[:, 1].any()
    assert not out[3].any() and not d_query[3].any()


@pytest.mark.parametrize("chunk_size", [2, 3, 8])
def test_negative_maxima_are_not_lifted_to_zero(chunk_size):
    """Neither the filling of uneven chunks nor hidden positions count as logits of zero."""
    query, key = jnp.ones((1, 5, 2, 4)), -jnp.ones((1, 5, 2, 4))
    _, max_logits = dot_product_attention(
        query, key, key, is_causal=True, chunk_size=chunk_size, soft_cap=0.5
    )
    np.testing.assert_array_equal(max_logits, [-2.0, -2.0])


def test_maxima_are_taken_before_bias_and_cap():
    x = jnp.full((1, 3, 1, 4), 10.0)
    bias = jnp.full((3, 3), 7.0)
    _, max_logits = dot_product_attention(x, x, x, bias, soft_cap=5.0)
    np.testing.assert_array_equal(max_logits, [200.0])  # 10 · 10 · 4 / sqrt(4)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_non_finite_logits_are_visible_and_hidden_ones_are_not(bad):
    x = jnp.ones((1, 5, 2, 4))
    last_key = x.at[0, 4, 1, 0].set(bad)  # of head 1
    _, seen = dot_product_attention(x, last_key, x, chunk_size=2)
    np.testing.assert_array_equal(seen, [2.0, bad])
    _, hidden = dot_product_attention(x, last_key, x, mask=jnp.arange(5) < 4, chunk_size=2)
    np.testing.assert_array_equal(hidden, [2.0, 2.0])


@pytest.mark.parametrize(
    ("length", "causal"), [(6, False), (33, True), (64, False), (300, True)]
)  # XLA's vectors differ with the length
def test_a_nan_is_seen_in_rows_of_any_length(length, causal):
    """A vectorized maximum may drop it, as XLA's on CPU does."""
    rng = np.random.default_rng(0)
    query, key = (normal(rng, 2, length, 3, 16, dtype=np.float32) for _ in range(2))
    attend = functools.partial(dot_product_attention, is_causal=causal)
    _, clean = attend(query, key, key)
    _, one = attend(query, jnp.asarray(key).at[1, 2, 1, 5].set(jnp.nan), key)
    np.testing.assert_array_equal(jnp.isnan(one), [False, True, False])
    np.testing.assert_array_equal(one[::2], clean[::2])
    _, every = attend(query, key * np.nan, key)
    assert jnp.isnan(every).all()


def test_maxima_carry_no_gradient():
    x = normal(np.random.default_rng(0), 5, 2, 3, dtype=np.float32)
    grads = jax.grad(lambda *qkv: dot_product_attention(*qkv)[1].sum(), (0, 1, 2))(x, x, x)
    chex.assert_trees_all_equal(grads, (jnp.zeros_like(x),) * 3)


def test_probabilities_of_huge_logits_sum_to_one_in_both_passes():
    """Logits of order 1e4, which float32 resolves to 1e-3 only."""
    rng = np.random.default_rng(0)
    query, key = (normal(rng, 9, 1, 4, dtype=np.float32) * 200 for _ in range(2))
    ones = jnp.ones((9, 1, 1))
    out, max_logits, (_, _, d_value) = value_and_grads([query, key, ones], ones, chunk_size=4)
    assert max_logits[0] > 1e4
    # The sum of nine float32 numbers, divided by itself.
    chex.assert_trees_all_close(out, ones, rtol=1e-6)
    np.testing.assert_allclose(d_value.sum(), 9.0, rtol=1e-6)


# ---- dropout ----


def dropout_factors(rng, broadcast_dropout, heads=2, length=6):
    """The factors that dropout put on uniform probabilities, read off with one-hot values."""
    zeros = jnp.zeros((1, length, heads, 1))
    one_hot = jnp.broadcast_to(jnp.eye(length)[None, :, None], (1, length, heads, length))
    out, _ = dot_product_attention(
        zeros,
        zeros,
        one_hot,
        dropout_rng=rng,
        dropout_rate=0.25,
        broadcast_dropout=broadcast_dropout,
        chunk_size=4,
    )
    return np.moveaxis(np.asarray(out), -2, -3) * length  # [1, heads, T, S]


@pytest.mark.parametrize("broadcast_dropout", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_dropout_is_the_same_in_both_passes(broadcast_dropout):
    rng, key = np.random.default_rng(0), jax.random.key(3)
    operands = [normal(rng, 1, 6, 2, 3, dtype=np.float32) for _ in range(3)]
    d_out = normal(rng, 1, 6, 2, 3, dtype=np.float32)
    factors = dropout_factors(key, broadcast_dropout)
    found = value_and_grads(
        operands,
        d_out,
        dropout_rng=key,
        dropout_rate=0.25,
        broadcast_dropout=broadcast_dropout,
        chunk_size=4,
    )
    expected = reference(*operands, d_out=d_out, dropout=factors)
    # Float32 sums of six terms of order one.
    chex.assert_trees_all_close(found, expected, atol=1e-5)


def test_dropout_rate_and_broadcast():
    separate = dropout_factors(jax.random.key(0), False, heads=8, length=30)
    shared = dropout_factors(jax.random.key(0), True, heads=8, length=30)
    # Kept probabilities are divided by 0.75; float32 averages.
    for factors in (separate, shared):
        np.testing.assert_allclose(factors[factors > 0.1], 1 / 0.75, rtol=1e-5)
    # 7200 draws: the standard deviation of the kept fraction is 0.005.
    assert abs((separate > 0.1).mean() - 0.75) < 0.025
    assert (shared == shared[:, :1]).all()
    assert (separate != separate[:, :1]).any()
    tiles = shared[0, 0, :28, :28].reshape(7, 4, 7, 4).swapaxes(1, 2).reshape(49, 16)
    assert len(np.unique(tiles > 0.1, axis=0)) > 40, "every tile has its own pattern"


# ---- transformations ----


class Transformations(chex.TestCase):
    def setUp(self):
        super().setUp()
        self.x = normal(np.random.default_rng(0), 3, 2, 5, 2, 4, dtype=np.float32)

    def attend(self, x):
        return dot_product_attention(x, x, x, is_causal=True, chunk_size=2)

    @chex.variants(with_jit=True, without_jit=True)
    def test_vmap_gives_maxima_per_entry(self):
        out, max_logits = self.variant(jax.vmap(self.attend))(self.x)
        one_by_one = [self.attend(x) for x in self.x]
        # The same sums, perhaps in another order.
        chex.assert_trees_all_close(
            (out, max_logits), jax.tree.map(lambda *x: jnp.stack(x), *one_by_one), rtol=1e-5
        )
        chex.assert_shape(max_logits, (3, 2))

    @chex.variants(with_jit=True, without_jit=True)
    def test_leading_axes_are_one_batch(self):
        out, max_logits = self.variant(self.attend)(self.x)
        flat_out, flat_max = self.attend(self.x.reshape(6, 5, 2, 4))
        chex.assert_trees_all_close(out.reshape(flat_out.shape), flat_out, rtol=1e-5)
        chex.assert_trees_all_close(max_logits, flat_max, rtol=1e-6)

    @pytest.mark.slow
    def test_gradient_through_remat_scan_and_vmap(self):
        def loss(x):
            return jnp.sum(self.attend(x)[0] ** 2)

        def wrapped(x):
            layer = jax.checkpoint(jax.vmap(loss))
            return jax.lax.scan(lambda total, x: (total + layer(x).sum(), None), 0.0, x[None])[0]

        found = jax.jit(jax.grad(wrapped))(self.x)
        # The same sums, perhaps in another order.
        chex.assert_trees_all_close(found, jax.grad(loss)(self.x), rtol=1e-4, atol=1e-5)

    def test_one_trace_for_equal_calls(self):
        chex.clear_trace_counter()
        traced = jax.jit(chex.assert_max_traces(self.attend, 1))
        for scale in (1, 2):
            traced(self.x * scale)

    def test_forward_mode_raises(self):
        with self.assertRaisesRegex(TypeError, "custom_vjp"):
            jax.jvp(self.attend, (self.x,), (self.x,))


@pytest.mark.parametrize(
    "axis_type", [pytest.param(AxisType.Auto, marks=pytest.mark.slow), AxisType.Explicit]
)
def test_sharded_batch_and_heads(axis_type):
    """On however many devices there are; an Explicit mesh checks its types on one as well."""
    devices = jax.device_count()
    mesh = jax.make_mesh((devices, 1), ("data", "heads"), axis_types=(axis_type,) * 2)
    rng = np.random.default_rng(0)
    operands = [normal(rng, devices, 5, heads, 4, dtype=np.float32) for heads in (4, 2, 2)]
    d_out = normal(rng, devices, 5, 4, 4, dtype=np.float32)
    expected = value_and_grads(operands, d_out, chunk_size=2)
    with jax.set_mesh(mesh):
        sharding = NamedSharding(mesh, P("data", None, "heads"))
        sharded = jax.device_put((operands, d_out), sharding)
        found = value_and_grads(*sharded, chunk_size=2)
    # Maxima are exact whatever the order; sums of float32 numbers of order one are not.
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), atol=1e-5)


# ---- memory ----


def both_passes_compiled(length, dtype=jnp.float32, **arrays):
    """Causal attention of two heads and its gradients; `arrays` are options, by shape."""

    def loss(query, key, value, arrays):
        out, max_logits = dot_product_attention(query, key, value, is_causal=True, **arrays)
        return jnp.sum(out.astype(jnp.float32) ** 2), max_logits

    def operand(heads):
        return jax.ShapeDtypeStruct((1, length, heads, 16), dtype)

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return step.lower(operand(2), operand(1), operand(1), arrays).compile()


def temporaries(*args, **arrays):
    """Bytes the compiler sets aside, beyond arguments and results, for both passes."""
    return both_passes_compiled(*args, **arrays).memory_analysis().temp_size_in_bytes


both_precisions = pytest.mark.parametrize(
    "dtype", [pytest.param(jnp.float32, marks=pytest.mark.slow), jnp.bfloat16]
)


@both_precisions
def test_memory_is_linear_in_the_length(dtype):
    half, full = (temporaries(length, dtype) for length in (8192, 16384))
    one_buffer = 16384 * 16384 * 4
    assert full < one_buffer / 50
    assert full / half < 2.2  # a tile's own temporaries do not grow with the length


@pytest.mark.slow
@both_precisions
def test_the_maxima_are_a_by_product(dtype):
    """The compiled program has the same work without them."""

    def both_passes(operands, d_out, attend):
        _, pull, max_logits = jax.vjp(attend, operands, has_aux=True)
        return pull(d_out), max_logits

    def with_maxima(operands):
        return dot_product_attention(*operands, is_causal=True)

    def without(operands):
        return with_maxima(operands)[0], None

    x = jax.ShapeDtypeStruct((1, 1024, 2, 16), dtype)
    costs = []
    for attend in (with_maxima, without):
        compiled = jax.jit(both_passes, static_argnums=2).lower([x] * 3, x, attend).compile()
        cost = compiled.cost_analysis()
        costs.append((cost["flops"], cost["bytes accessed"], cost["transcendentals"]))
    # The maxima are reduced from one number a row, next to tens of numbers a row and tile.
    np.testing.assert_allclose(*costs, rtol=3e-3)


@pytest.mark.slow
def test_a_callers_mask_and_bias_are_not_copied():
    length = 10_000  # not a multiple of the chunk
    shape = (1, 1, length, length)
    plain = temporaries(length)
    mask, bias = jax.ShapeDtypeStruct(shape, bool), jax.ShapeDtypeStruct(shape, jnp.float32)
    # Beside one tile of each, nothing is added; a copy of the mask would be 100 MB.
    assert temporaries(length, mask=mask, bias=bias) < plain + 2**21


# ---- wrong calls ----


def attend(query=(1, 3, 4, 2), key=(1, 3, 4, 2), value=(1, 3, 4, 2), **options):
    arrays = (x if isinstance(x, jax.Array) else jnp.ones(x) for x in (query, key, value))
    return dot_product_attention(*arrays, **options)


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (TypeError, {"query": jnp.ones((3, 4, 2), int)}, ["query", "int32"]),
        (TypeError, {"value": jnp.ones((3, 4, 2), complex)}, ["value", "complex64"]),
        (ValueError, {"query": (4, 2)}, ["[..., T, N, H]", "query (4, 2)"]),
        (ValueError, {"query": (3, 4, 2)}, ["same number of axes", "(3, 4, 2)"]),
        (ValueError, {"query": (2, 3, 4, 2)}, ["batch axes", "query (2, 3, 4, 2)"]),
        (ValueError, {"value": (1, 5, 4, 2)}, ["same length", "value (1, 5, 4, 2)"]),
        (ValueError, {"value": (1, 3, 2, 2)}, ["heads", "value (1, 3, 2, 2)"]),
        (ValueError, {"query": (1, 3, 4, 6)}, ["head sizes", "query (1, 3, 4, 6)"]),
        (ValueError, {"query": (1, 3, 6, 2)}, ["6 query heads", "4 key/value", "axis -2"]),
        (ValueError, {"query": (1, 0, 4, 2)}, ["at least one position", "(1, 0, 4, 2)"]),
        (TypeError, {"mask": jnp.ones((3, 3))}, ["mask", "boolean", "float32", "`bias`"]),
        (ValueError, {"mask": jnp.ones((2, 3), bool)}, ["mask (2, 3)", "[:, None, None, :]"]),
        (ValueError, {"mask": jnp.ones((1,) * 5, bool)}, ["mask (1, 1, 1, 1, 1)"]),
        (TypeError, {"bias": jnp.ones((3, 3), bool)}, ["bias", "bool", "`mask`"]),
        (ValueError, {"bias": jnp.ones((4, 3))}, ["bias (4, 3)", "(1, 4, 3, 3)"]),
        (ValueError, {"chunk_size": 0}, ["chunk_size", "at least 1", "0"]),
        (TypeError, {"chunk_size": 2.0}, ["chunk_size", "int", "2.0"]),
        (ValueError, {"soft_cap": 0.0}, ["soft_cap", "above 0", "0.0"]),
        (ValueError, {"soft_cap": float("inf")}, ["soft_cap", "finite", "inf"]),
        (ValueError, {"scale": float("nan")}, ["scale", "finite", "nan"]),
        (TypeError, {"scale": jnp.ones(())}, ["scale", "Python number"]),
        (ValueError, {"local_window_size": -1}, ["local_window_size", "-1"]),
        (ValueError, {"local_window_size": (1, 2, 3)}, ["local_window_size", "(left, right)"]),
        (TypeError, {"local_window_size": 1.5}, ["local_window_size", "1.5"]),
        (ValueError, {"dropout_rate": 0.1}, ["dropout_rng", "0.1", "deterministic=True"]),
        (ValueError, {"dropout_rate": 1.0}, ["dropout_rate", "[0, 1)", "1.0"]),
        (TypeError, {"dtype": int}, ["dtype", "int"]),
        (TypeError, {"segment_ids": jnp.ones((1, 3))}, ["segment_ids", "int32", "float32"]),
        (TypeError, {"segment_ids": jnp.ones((1, 3), bool)}, ["segment_ids", "bool", "`mask`"]),
        (
            ValueError,
            {"segment_ids": jnp.ones((2, 3), int)},
            ["segment_ids of the queries (2, 3)", "[..., T] = (1, 3)", "(the queries', the keys')"],
        ),
        (
            ValueError,
            {"segment_ids": (jnp.ones(3, int), jnp.ones(4, int))},
            ["segment_ids of the keys (4,)", "[..., S] = (1, 3)"],
        ),
        (ValueError, {"segment_ids": (jnp.ones(3, int),) * 3}, ["segment_ids", "a tuple of 3"]),
        (
            ValueError,
            {"query_seq_lengths": jnp.ones(3, int)},
            ["query_seq_lengths (3,)", "batch axes (1,)", "one length for each entry"],
        ),
        (
            ValueError,
            {"key_value_seq_lengths": jnp.ones((1, 1), int)},
            ["key_value_seq_lengths (1, 1)", "batch axes (1,)"],
        ),
        (TypeError, {"query_seq_lengths": jnp.ones(1)}, ["query_seq_lengths", "float32"]),
        (TypeError, {"sinks": jnp.ones(4, int)}, ["sinks", "floating point", "int32"]),
        (ValueError, {"sinks": jnp.ones(3)}, ["sinks", "[N] = (4,)", "query head", "(3,)"]),
        (ValueError, {"sinks": jnp.ones((1, 4))}, ["sinks", "(1, 4)"]),
    ],
)
def test_wrong_calls(error, arguments, words):
    with pytest.raises(error) as caught:
        attend(**arguments)
    for word in words:
        assert word in str(caught.value)


def test_the_call_that_wrong_calls_change_is_right():
    chex.assert_shape(attend()[0], (1, 3, 4, 2))
