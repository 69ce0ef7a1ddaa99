"""Packed sequences, padding and sinks: what they hide, what they cost, and where they are given."""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from tests.attention.test_attention import both_passes_compiled, normal, reference, value_and_grads

LONG = 16_384


def operands_of(length=7, heads=4, kv_heads=2, size=3, batch=(2,), dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = [(*batch, length, n, size) for n in (heads, kv_heads, kv_heads)]
    return [normal(rng, *shape, dtype=dtype) for shape in shapes]


def documents(length, count):
    """Where the documents of one packed row end, and the number of each position's document."""
    rng = np.random.default_rng(1)
    ends = np.sort(rng.choice(np.arange(1, length), count - 1, replace=False))
    ids = np.searchsorted(ends, np.arange(length), side="right")
    return [0, *map(int, ends), length], ids.astype(np.int32)


# ---- at full length ----


def packed_arrays(length):
    shaped = jax.ShapeDtypeStruct
    return {
        "segment_ids": shaped((1, length), jnp.int32),
        "query_seq_lengths": shaped((1,), jnp.int32),
        "key_value_seq_lengths": shaped((1,), jnp.int32),
        "sinks": shaped((2,), jnp.float32),
    }


def test_packed_attention_holds_no_square():
    """Both passes of 16,384 positions, by the compiler's own account."""
    compiled = both_passes_compiled(LONG, jnp.bfloat16, **packed_arrays(LONG))
    plain = both_passes_compiled(LONG, jnp.bfloat16)
    assert f"{LONG},{LONG}" not in compiled.as_text()
    needed, without = (c.memory_analysis().temp_size_in_bytes for c in (compiled, plain))
    # Beside the same without options, one tile's mask and the sinks' row statistics.
    assert needed < without + 2**21
    assert needed < LONG * LONG / 10  # of a boolean mask


def test_packed_maxima_at_full_length_equal_each_documents_own():
    ends, ids = documents(LONG, count=24)
    query, key, value = operands_of(LONG, heads=1, kv_heads=1, size=4, batch=(1,))
    # Across the documents there are logits 40 times as large as within one.
    query = query.at[:, ends[-2] :].multiply(40)
    key = key.at[:, : ends[1]].multiply(40)
    attend = functools.partial(mc.dot_product_attention, is_causal=True, segment_ids=ids)
    out, maxima = jax.jit(attend)(query, key, value)
    each = []
    for start, end in itertools.pairwise(ends):
        part = [np.asarray(x[:, start:end], np.float64) for x in (query, key, value)]
        found = reference(*part, d_out=np.zeros_like(part[0]), is_causal=True)
        # Averages of numbers of order one, whose float32 logits of some 200 are rounded by 1e-5.
        np.testing.assert_allclose(out[:, start:end], found[0], atol=1e-4)
        each.append(found[1])
    # Sums of four float32 products.
    np.testing.assert_allclose(maxima, np.max(each, 0), rtol=1e-6)


@pytest.mark.parametrize("chunk_size", [5, 64])
def test_a_packed_row_is_its_documents_apart(chunk_size):
    """Output, maxima and gradients: none of one document depends on another."""
    with jax.enable_x64(True):
        ends, ids = documents(37, count=4)
        operands = operands_of(37, batch=(1,), dtype=jnp.float64)
        d_out = jnp.cos(operands[0])
        sinks = jnp.linspace(-2.0, 3.0, 4)
        options = {"is_causal": True, "local_window_size": (6, 0), "soft_cap": 3.0, "sinks": sinks}
        out, maxima, grads = value_and_grads(
            operands, d_out, segment_ids=ids, chunk_size=chunk_size, **options
        )
        parts = [
            reference(*(x[:, a:b] for x in operands), d_out=d_out[:, a:b], **options)
            for a, b in itertools.pairwise(ends)
        ]
        close = functools.partial(np.testing.assert_allclose, rtol=1e-11, atol=1e-11)
        close(out, np.concatenate([part[0] for part in parts], 1))
        close(maxima, np.max([part[1] for part in parts], 0))
        for i in range(3):
            close(grads[i], np.concatenate([part[2][i] for part in parts], 1))
        close(grads[3], sum(part[2][3] for part in parts))


# ---- what is hidden ----


def test_lengths_mean_what_they_mean_in_jax():
    operands = operands_of()
    options = {
        "query_seq_lengths": jnp.array([7, 4], jnp.int32),
        "key_value_seq_lengths": jnp.array([3, 6], jnp.int32),
        "is_causal": True,
    }
    theirs = jax.nn.dot_product_attention(*operands, **options)
    for implementation in ("chunked", "logsumexp"):
        ours, _ = mc.dot_product_attention(*operands, implementation=implementation, **options)
        # Averages of numbers of order one, in float32 on both sides.
        np.testing.assert_allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"query_seq_lengths": np.array([7, 0])},
        {"key_value_seq_lengths": np.array([7, 0])},
        {"query_seq_lengths": np.array([9, -1])},
        {"segment_ids": (np.zeros(7, int), np.arange(2)[:, None] * np.ones(7, int))},
        {"segment_ids": np.zeros(7, int), "mask": np.array([True, False])[:, None, None, None]},
    ],
    ids=["no query", "no key", "beyond the ends", "no segment in common", "mask"],
)
@pytest.mark.parametrize("sinks", [None, np.full(4, 2.0, np.float32)], ids=["", "sinks"])
def test_an_entry_that_sees_nothing(options, sinks):
    """Zeros, with or without sinks, and no part in the maxima."""
    operands = operands_of()
    found = value_and_grads(operands, jnp.ones((2, 7, 4, 3)), sinks=sinks, **options)
    out, maxima, grads = found
    chex.assert_tree_all_finite(found)
    assert out[0].any() and not out[1].any()
    for gradient in grads[:3]:
        assert gradient[0].any() and not gradient[1].any()
    first = [x[:1] for x in operands]
    np.testing.assert_allclose(maxima, mc.dot_product_attention(*first)[1], rtol=1e-6)


def test_hidden_everywhere_clips_nothing():
    params = {"attn": {name: {"kernel": jnp.ones((3, 4, 2))} for name in ("query", "key")}}
    _, maxima = mc.dot_product_attention(*operands_of(), query_seq_lengths=0, sinks=jnp.ones(4))
    np.testing.assert_array_equal(maxima, np.full(4, -np.inf))
    layout = mc.layouts.mha(value=None, out=None)
    after = mc.apply_qk_clip(params, {("attn",): maxima}, layout, threshold=1e-3)
    chex.assert_trees_all_equal(after, params)


def test_padding_with_a_number_counts_unless_it_is_masked():
    """MaxText's padding is segment 0, Levanter's −1: equal numbers, like any other."""
    query = jnp.ones((1, 6, 1, 1)).at[0, 4:].set(9.0)
    ids = jnp.array([[1, 1, 2, 2, 0, 0]])
    attend = functools.partial(mc.dot_product_attention, query, query, query, segment_ids=ids)
    assert attend()[1] == 81
    assert attend(mask=(ids > 0)[:, None, None, :])[1] == 1
    assert attend(key_value_seq_lengths=jnp.array([4]))[1] == 1


def test_a_nan_is_seen_by_its_own_segment_alone():
    query, key, value = operands_of(6, batch=(1,), heads=2)
    key = key.at[0, 5, 0, 0].set(jnp.nan)
    ids = jnp.array([0, 0, 0, 1, 1, 1])
    attend = functools.partial(mc.dot_product_attention, query, key, value, segment_ids=ids)
    out, maxima = attend(chunk_size=4)
    np.testing.assert_array_equal(jnp.isnan(maxima), [True, False])
    assert jnp.isfinite(out[0, :3]).all() and jnp.isnan(out[0, 3:, 0]).all()
    assert jnp.isfinite(attend(key_value_seq_lengths=5)[1]).all()


# ---- sinks ----


def test_sinks_are_one_more_key_without_value():
    """A key of zeros whose bias is the sink, of each head: the way without the option."""
    query, key, value = operands_of()
    sinks = jnp.array([0.0, 2.0, -1.0, 40.0])
    extra = functools.partial(jnp.pad, pad_width=((0, 0), (0, 1), (0, 0), (0, 0)))
    bias = jnp.zeros((4, 7, 8)).at[:, :, 7].set(sinks[:, None])
    expected, _ = mc.dot_product_attention(query, extra(key), extra(value), bias)
    found, maxima = mc.dot_product_attention(query, key, value, sinks=sinks)
    np.testing.assert_allclose(found, expected, atol=1e-6)  # float32 averages of order one
    np.testing.assert_array_equal(maxima, mc.dot_product_attention(query, key, value)[1])


@pytest.mark.parametrize("sink", [-jnp.inf, -1e30, 1e4, 1e30, jnp.nan])
@pytest.mark.parametrize("options", [{}, {"soft_cap": 5.0}], ids=["", "cap"])
def test_sinks_never_count_in_the_maxima(sink, options):
    """QK-Clip scales q and k, which leaves a sink as it is: seen, it would clip for ever."""
    operands, sinks = operands_of(), jnp.full(4, sink)
    plain, expected = mc.dot_product_attention(*operands, **options)
    out, maxima = mc.dot_product_attention(*operands, sinks=sinks, **options)
    np.testing.assert_array_equal(maxima, expected)
    if sink < 0:
        np.testing.assert_array_equal(out, plain)
    elif sink > 0:
        np.testing.assert_array_equal(out, 0)
    else:
        assert jnp.isnan(out).all()


def test_sinks_keep_their_dtype_and_that_of_the_output():
    operands = operands_of(dtype=jnp.bfloat16)
    sinks = jnp.linspace(-1, 1, 4).astype(jnp.float16)
    d_out = jnp.ones((2, 7, 4, 3), jnp.bfloat16)
    out, maxima, grads = value_and_grads(operands, d_out, sinks=sinks)
    chex.assert_type([out, *grads[:3]], jnp.bfloat16)
    chex.assert_type([maxima, grads[3]], [jnp.float32, jnp.float16])
    expected = reference(*operands, d_out=d_out, sinks=sinks)[2][3]
    # 14 rows of weights and outputs that bfloat16 rounds by 2⁻⁹ each.
    np.testing.assert_allclose(grads[3], expected, atol=14 * 2**-8)


# ---- transformations and devices ----


def everything(query, key, value, ids, lengths, sinks):
    out, maxima = mc.dot_product_attention(
        query,
        key,
        value,
        is_causal=True,
        segment_ids=ids,
        query_seq_lengths=lengths,
        key_value_seq_lengths=lengths,
        sinks=sinks,
        chunk_size=4,
    )
    return jnp.square(out).sum(), maxima


gradients = jax.value_and_grad(everything, argnums=(0, 1, 2, 5), has_aux=True)


def packed_operands():
    ids = jnp.array([[0, 0, 0, 1, 1, 2, 2], [5, 5, 5, 5, 5, 5, -1]])
    sinks = jnp.array([0.5, -jnp.inf, 3.0, -1.0])
    return *operands_of(), ids, jnp.array([6, 0]), sinks


def test_no_nan_on_the_way_and_the_same_without_jit():
    arrays = packed_operands()
    expected = jax.jit(gradients)(*arrays)
    with jax.debug_nans(True):
        chex.assert_trees_all_equal(jax.jit(gradients)(*arrays), expected)
    with jax.disable_jit():
        found = everything(*arrays)
    # Sums of a few float32 numbers of order one.
    chex.assert_trees_all_close(found, expected[0], rtol=1e-5, atol=1e-5)


def test_vmap_over_entries_with_their_own_segments():
    *operands, ids, lengths, sinks = packed_operands()
    found = jax.vmap(everything, (0, 0, 0, 0, 0, None))(*operands, ids, lengths, sinks)[1]
    one = [everything(*(x[i] for x in operands), ids[i], lengths[i], sinks)[1] for i in (0, 1)]
    np.testing.assert_allclose(found, one, rtol=1e-6)  # the same products, perhaps reordered


def test_on_a_mesh_of_explicit_axes():
    devices = jax.device_count()
    mesh = jax.make_mesh((devices, 1), ("data", "heads"), axis_types=(AxisType.Explicit,) * 2)
    *operands, ids, lengths, sinks = packed_operands()
    repeat = functools.partial(jnp.tile, reps=(devices, 1, 1, 1))
    operands, ids, lengths = map(repeat, operands), jnp.tile(ids, (devices, 1)), lengths
    arrays = [*operands, ids, jnp.tile(lengths, devices), sinks]
    expected = jax.jit(gradients)(*arrays)
    specs = [P("data", None, "heads")] * 3 + [P("data"), P("data"), P("heads")]
    with jax.set_mesh(mesh):
        shardings = [NamedSharding(mesh, spec) for spec in specs]
        found = jax.jit(gradients)(*map(jax.device_put, arrays, shardings))
    # The same sums of float32 numbers of order one, perhaps in another order.
    chex.assert_trees_all_close(jax.device_get(found), jax.device_get(expected), atol=1e-5)


# ---- within Flax's modules ----


class Linen(nn.Module):
    @nn.compact
    def __call__(self, x, ids):
        attention_fn = functools.partial(mc.attention_fn, is_causal=True, segment_ids=ids)
        attention = nn.MultiHeadDotProductAttention(2, attention_fn=attention_fn, name="attn")
        return attention(x, sow_weights=True)


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(
            2, 8, decode=False, attention_fn=mc.attention_fn, rngs=rngs
        )

    def __call__(self, x, ids):
        self.attn.attention_fn = functools.partial(mc.attention_fn, segment_ids=ids)
        out = self.attn(x, is_causal=True, sow_weights=True)
        self.attn.attention_fn = mc.attention_fn  # no array of this call stays behind
        return out


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_flax_modules_take_segments_by_the_call(flavour):
    x = jax.random.normal(jax.random.key(0), (2, 6, 8))
    ids = jnp.array([[0, 0, 1, 1, 1, 1], [0, 0, 0, 0, 2, 2]])
    if flavour == "linen":
        params = Linen().init(jax.random.key(1), x, ids)["params"]
        run = jax.jit(
            lambda x, ids: Linen().apply({"params": params}, x, ids, mutable=["intermediates"])
        )
    else:
        model = NNX(nnx.Rngs(0))
        jitted = nnx.jit(lambda model, x, ids: nnx.capture(model, nnx.Intermediate)(x, ids))
        run = functools.partial(jitted, model)
    (packed, sown), (whole, sown_whole) = run(x, ids), run(x, jnp.zeros_like(ids))
    np.testing.assert_allclose(packed[0, :2], whole[0, :2], rtol=1e-5, atol=1e-6)
    assert (jnp.abs(packed - whole)[0, 2:] > 1e-6).any(-1).all()
    maxima, largest = (mc.read_max_logits(s)[("attn",)] for s in (sown, sown_whole))
    assert (maxima <= largest + 1e-6).all() and maxima.shape == (2,)
