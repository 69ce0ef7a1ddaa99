"""Max logits of other kernels than our own: what they report, and which one is taken."""

import functools
import math
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from muonclip_jax._attention import tokamax
from muonclip_jax._attention.attention import dot_product_attention
from muonclip_jax._attention.call import Call
from muonclip_jax._attention.residuals import max_logits_bound, max_logits_from_residuals
from tests.attention.test_attention import visibility

LOWEST = float(jnp.finfo(jnp.float32).min)


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def operands_of(length=7, heads=4, kv_heads=2, size=8, batch=(2,), dtype=jnp.float32, seed=0):
    shapes = [(*batch, length, n, size) for n in (heads, kv_heads, kv_heads)]
    return [normal(seed + i, *shape, dtype=dtype) for i, shape in enumerate(shapes)]


def value_and_grads(operands, **options):
    """`(out, max_logits, grads)`, the maxima's cotangent being ones."""

    @jax.jit
    def run(operands):
        (out, max_logits), pull = jax.vjp(
            lambda operands: dot_product_attention(*operands, **options), operands
        )
        return out, max_logits, pull((jnp.cos(out), jnp.ones_like(max_logits)))[0]

    return run(operands)


def chunked(operands, **options):
    return value_and_grads(operands, implementation="chunked", **options)


# ---- an op of tokamax ----


def stand_in(
    query, key, value, *, mask, is_causal, logits_scale, logits_dtype, precision, return_residuals
):
    """What tokamax's ops promise and how they treat rows without keys, as far as we rely on it."""
    assert return_residuals and precision is None
    group = query.shape[-2] // key.shape[-2]
    key, value = (jnp.repeat(x, group, axis=-2) for x in (key, value))
    logits = logits_scale * jnp.einsum("...tnh,...snh->...nts", query, key).astype(logits_dtype)
    hidden = jnp.zeros(logits.shape, bool)
    if is_causal:
        hidden |= ~jnp.tri(*logits.shape[-2:], dtype=bool)
    if mask is not None:
        hidden |= ~mask
    logits = jnp.where(hidden, LOWEST, logits)
    row_max = jax.lax.stop_gradient(logits.max(-1, keepdims=True))
    weights = jnp.exp(logits - row_max)
    row_sum = weights.sum(-1, keepdims=True)
    out = jnp.einsum("...nts,...snv->...tnv", weights / row_sum, value)
    return out, (row_max[..., 0], row_sum[..., 0])


def xla_op():
    """tokamax's own op in plain XLA."""
    tpu = pytest.importorskip("tokamax.ops.tpu", reason="tokamax>=0.0.17 is not installed")
    (plain,) = tpu.FlashAttention.__bases__
    return plain()


@pytest.fixture(params=["stand-in", "tokamax"])
def op(request):
    return stand_in if request.param == "stand-in" else xla_op()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True, "scale": 0.3},
        {"mask": np.random.default_rng(5).random((2, 1, 7, 7)) < 0.5, "is_causal": True},
        {"mask": np.arange(7) < 3},
    ],
    ids=["plain", "causal", "mask", "keys"],
)
def test_an_op_gives_what_the_chunked_form_gives(op, options):
    operands = operands_of()
    found = value_and_grads(operands, implementation=op, **options)
    # Float32 sums of a few dozen terms of order one.
    chex.assert_trees_all_close(found, chunked(operands, **options), atol=2e-5)


def test_an_ops_empty_rows_heads_and_nans(op):
    operands = operands_of()
    mask = np.ones((2, 4, 7, 7), bool)
    mask[:, 0] = False  # a whole head
    mask[0, 1, 3] = False  # a query of another
    operands[1] = operands[1].at[1, 2, 1, 0].set(jnp.nan)  # seen by the heads 2 and 3
    out, max_logits, _ = value_and_grads(operands, implementation=op, mask=mask)
    np.testing.assert_array_equal(out[..., 0, :], 0)
    np.testing.assert_array_equal(out[0, 3, 1], 0)
    assert max_logits[0] == -jnp.inf and np.isfinite(max_logits[1])
    assert np.isnan(max_logits[2:]).all()


def test_an_ops_negative_maxima(op):
    query, key = jnp.ones((1, 5, 2, 4)), -jnp.ones((1, 5, 2, 4))
    _, max_logits = dot_product_attention(query, key, key, is_causal=True, implementation=op)
    np.testing.assert_array_equal(max_logits, [-2.0, -2.0])


def test_tokamaxs_tpu_kernel_interpreted():
    """Its maxima are in the natural base though it computes in base 2."""
    tpu = pytest.importorskip("tokamax.ops.tpu", reason="tokamax>=0.0.17 is not installed")
    from jax.experimental.pallas import tpu as pallas

    operands = operands_of(length=256, heads=2, kv_heads=1, size=64, batch=(1,))
    kernel = tpu.FlashAttention(bypass_device_check=True)
    with pallas.force_tpu_interpret_mode():
        out, max_logits = dot_product_attention(*operands, is_causal=True, implementation=kernel)
    expected_out, expected_maxima, _ = chunked(operands, is_causal=True)
    # Averages and maxima of float32 products of 64 terms.
    chex.assert_trees_all_close(out, expected_out, atol=1e-5)
    chex.assert_trees_all_close(max_logits, expected_maxima, rtol=1e-5)


@pytest.mark.parametrize(("length", "block"), [(2048, 1024), (1536, 512), (384, 128)])
def test_tpu_blocks_are_as_long_as_the_lengths_allow(length, block):
    tpu = pytest.importorskip("tokamax.ops.tpu", reason="tokamax>=0.0.17 is not installed")
    query, key, value = operands_of(length=length, size=2, heads=2, batch=())
    kernel = tokamax.tpu_blocks(tpu.FlashAttention(), Call(query, key, value, scale=1.0))
    assert (kernel.config.block_q, kernel.config.block_kv) == (block, block)
    assert kernel.vjp.config.block_kv_dkv == block


def test_tokamaxs_gpu_kernel_lowers():
    """Both passes, for a GPU that is not there."""
    gpu = pytest.importorskip("tokamax.ops.gpu", reason="tokamax[cuda]>=0.0.17 is not installed")
    from tokamax import config

    h100 = jax.sharding.AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=h100)

    def loss(operands):
        out, max_logits = dot_product_attention(
            *operands, is_causal=True, implementation=gpu.PallasTritonFlashAttention()
        )
        return out.astype(jnp.float32).sum(), max_logits

    operands = [jax.ShapeDtypeStruct((2, 256, heads, 64), jnp.bfloat16) for heads in (4, 2, 2)]
    with config.cross_compile(True), jax.sharding.use_abstract_mesh(mesh):
        traced = jax.jit(jax.value_and_grad(loss, has_aux=True)).trace(operands)
        assert "triton" in traced.lower(lowering_platforms=("cuda",)).as_text()


# ---- the bound ----


def visible_pairs(operands, scale=None, **options):
    del scale
    *batch, length, heads, _ = operands[0].shape
    return visibility((*batch, heads, length, operands[1].shape[-3]), **options)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "options"),  # XLA on CPU has no float16
    [
        ("float32", {"is_causal": True}),
        ("bfloat16", {"local_window_size": (2, 1)}),
        ("float32", {"mask": np.random.default_rng(5).random((2, 3, 1, 7, 7)) < 0.5}),
        ("bfloat16", {"mask": np.arange(7) < 3, "scale": -2.0}),
        (
            "float32",
            {
                "query_seq_lengths": np.array([[7, 5, 2], [0, 7, 9]]),
                "key_value_seq_lengths": np.array([7, 4, 3]),
            },
        ),
    ],
    ids=["causal", "window", "mask", "keys", "lengths"],
)
def test_the_bound_holds_and_is_as_tight_as_stated(options, dtype):
    operands = operands_of(batch=(2, 3), dtype=dtype)
    out, bound, grads = value_and_grads(operands, implementation="logsumexp", **options)
    expected_out, max_logits, expected_grads = chunked(operands, **options)
    seen = visible_pairs(operands, **options).sum(-1).max()
    assert (max_logits <= bound).all()
    eps = float(jnp.finfo(dtype).eps)
    logsumexp = np.abs(max_logits) + math.log(seen)
    # The logsumexp rounded up by at most half an epsilon, and then one is added.
    assert (bound <= max_logits + math.log(seen) + 2 * eps * logsumexp).all()
    assert bound.dtype == jnp.float32
    # Averages, and gradients of sums of a few dozen terms of order one, in the dtype.
    wide = functools.partial(jax.tree.map, lambda x: np.asarray(x, np.float32))
    tolerance = {"atol": 32 * eps, "rtol": 8 * eps}
    chex.assert_trees_all_close(wide(out), wide(expected_out), **tolerance)
    chex.assert_trees_all_close(wide(grads), wide(expected_grads), **tolerance)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_the_bound_is_the_maximum_where_one_logit_dominates(dtype):
    """Half precision too: cuDNN is for GPUs alone, here XLA computes it."""
    x = 20 * jnp.eye(8, dtype=dtype)[None, :, None]
    _, bound = dot_product_attention(x, x, x, implementation="logsumexp")
    # 20 · 20 / sqrt(8), rounded to its dtype, and up.
    np.testing.assert_allclose(bound, 400 / 8**0.5, rtol=3 * float(jnp.finfo(dtype).eps))


def test_rounding_to_half_precision_never_undercuts_the_maximum():
    """Logits of about 100 whose row has no other: the logsumexp is the maximum, rounded."""
    exact = jnp.linspace(90, 110, 1001)
    for dtype in (jnp.bfloat16, jnp.float16):
        rounded = exact.astype(dtype)[:, None, None]
        assert (rounded.astype(jnp.float32) < exact[:, None, None]).any()
        assert (jax.vmap(max_logits_bound)(rounded)[:, 0] >= exact).all()


def test_the_bounds_empty_rows_heads_and_nans():
    operands = operands_of()
    mask = np.ones((2, 4, 7, 7), bool)
    mask[:, 0] = False
    mask[0, 1, 3] = False
    operands[1] = operands[1].at[1, 2, 1, 0].set(jnp.nan)
    out, bound, _ = value_and_grads(operands, implementation="logsumexp", mask=mask)
    np.testing.assert_array_equal(out[..., 0, :], 0)
    np.testing.assert_array_equal(out[0, 3, 1], 0)
    assert bound[0] == -jnp.inf and np.isfinite(bound[1]) and np.isnan(bound[2:]).all()


# ---- residuals at hand ----


def test_residuals_by_head():
    row_max = jnp.array([[[1.0, 5.0], [-3.0, -2.0], [LOWEST, LOWEST]]] * 2)
    row_sum = jnp.ones_like(row_max)
    expected = [5.0, -2.0, -jnp.inf]
    np.testing.assert_array_equal(max_logits_from_residuals(row_max, row_sum), expected)
    heads_last = max_logits_from_residuals(row_max.mT, row_sum.mT, heads_axis=-1)
    np.testing.assert_array_equal(heads_last, expected)
    lost = row_sum.at[1, 1, 0].set(jnp.nan)
    np.testing.assert_array_equal(max_logits_from_residuals(row_max, lost), [5.0, np.nan, -jnp.inf])
    overflow = row_max.at[1, 1, 0].set(jnp.inf)  # exp(inf - inf) is NaN in a kernel's sum
    np.testing.assert_array_equal(
        max_logits_from_residuals(overflow, lost), [5.0, np.inf, -jnp.inf]
    )
    # A splash kernel masks in base 2 and converts to the natural one.
    in_base_2 = jnp.where(row_max == LOWEST, LOWEST * math.log(2), row_max)
    np.testing.assert_array_equal(max_logits_from_residuals(in_base_2, row_sum), expected)


def test_residuals_carry_no_gradient():
    x = normal(0, 2, 3, 4)
    for reduce in (lambda x: max_logits_from_residuals(x, x), max_logits_bound):
        gradient = jax.grad(lambda x, reduce=reduce: reduce(x).sum())(x)
        np.testing.assert_array_equal(gradient, jnp.zeros_like(x))
    chex.assert_type(max_logits_from_residuals(x.astype(jnp.bfloat16), x), jnp.float32)


@pytest.mark.parametrize(
    ("error", "arguments", "words"),
    [
        (TypeError, (jnp.ones((3, 4), int), jnp.ones((3, 4))), ["row_max", "int32"]),
        (TypeError, (jnp.ones((3, 4)), jnp.ones((3, 4), bool)), ["row_sum", "bool"]),
        (ValueError, (jnp.ones((3, 4)), jnp.ones((4, 3))), ["(3, 4)", "(4, 3)"]),
        (ValueError, (jnp.ones(3), jnp.ones(3)), ["[..., heads, rows]", "(3,)"]),
        (TypeError, (jnp.ones((3, 4), int),), ["logsumexp", "int32"]),
        (ValueError, (jnp.ones(3),), ["[..., rows, heads]", "(3,)"]),
    ],
)
def test_wrong_residuals(error, arguments, words):
    reduce = max_logits_bound if len(arguments) == 1 else max_logits_from_residuals
    with pytest.raises(error) as caught:
        reduce(*arguments)
    for word in words:
        assert word in str(caught.value)


# ---- which one is taken ----


@pytest.mark.parametrize("implementation", ["tokamax", "logsumexp"])
@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"bias": jnp.zeros((7, 7))}, "bias"),
        ({"soft_cap": 5.0}, "soft_cap"),
        ({"chunk_size": 4}, "chunk_size"),
        ({"dropout_rate": 0.5, "dropout_rng": jax.random.key(0)}, "dropout"),
        ({"segment_ids": jnp.zeros((2, 7), int)}, "segment_ids"),
        ({"sinks": jnp.zeros(4)}, "sinks"),
    ],
    ids=["bias", "soft_cap", "chunk_size", "dropout", "segments", "sinks"],
)
def test_options_that_others_lack_or_whose_maxima_differ_are_refused(implementation, options, word):
    chosen = stand_in if implementation == "tokamax" else implementation
    with pytest.raises(ValueError, match=word) as caught:
        dot_product_attention(*operands_of(), implementation=chosen, **options)
    assert implementation in str(caught.value) and '"chunked"' in str(caught.value)


@pytest.mark.parametrize(
    ("implementation", "options", "word"),
    [
        (stand_in, {"local_window_size": 2}, "local_window_size"),
        (stand_in, {"scale": -1.0}, "scale=-1.0"),
        (stand_in, {"query_seq_lengths": jnp.array([7, 3])}, "query_seq_lengths"),
        (stand_in, {"key_value_seq_lengths": jnp.array([7, 3])}, "key_value_seq_lengths"),
        ("logsumexp", {"precision": "highest"}, "precision"),
        ("tokamax", {}, "backend 'cpu'"),
        ("splash", {}, "'splash'"),
        (None, {}, '"logsumexp"'),
    ],
)
def test_an_implementation_that_cannot_says_so(implementation, options, word):
    with pytest.raises(ValueError) as caught:
        dot_product_attention(*operands_of(), implementation=implementation, **options)
    assert word in str(caught.value)


def test_values_of_another_size_have_no_bound():
    query, key, value = operands_of()
    with pytest.raises(ValueError, match="values of size 3 with keys of size 8"):
        dot_product_attention(query, key, value[..., :3], implementation="logsumexp")


def test_float64_is_refused():
    with jax.enable_x64(True):
        x = jnp.ones((1, 3, 2, 4), jnp.float64)
        for implementation in (stand_in, "logsumexp"):
            with pytest.raises(ValueError, match="float64"):
                dot_product_attention(x, x, x, implementation=implementation)


def on_tpu(monkeypatch, *ops):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(tokamax, "_ops", lambda call: list(ops))


def marked(*args, **kwargs):
    """An op whose maxima tell that it was taken."""
    out, (row_max, row_sum) = stand_in(*args, **kwargs)
    return out, (row_max + 1000, row_sum)


def refusing(*args, **kwargs):
    raise NotImplementedError("Not supported on Fake v0.")


def test_auto_takes_the_first_op_that_can_on_one_device(monkeypatch):
    on_tpu(monkeypatch, refusing, marked)
    operands = operands_of(length=128)
    monkeypatch.setattr(jax, "device_count", lambda: 2)  # XLA could not split a kernel over them
    assert dot_product_attention(*operands)[1].max() < 100
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert dot_product_attention(*operands)[1].max() > 900


def test_an_op_in_shard_map():
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Auto,))

    def attend(*operands):
        return dot_product_attention(*operands, implementation=marked)[1][None]

    operands = operands_of(batch=(devices,))
    specs = {"mesh": mesh, "in_specs": P("data"), "out_specs": P("data"), "check_vma": False}
    found = jax.jit(jax.shard_map(attend, **specs))(*operands).max(0)
    # Float32 sums of eight products of order one, next to 1000.
    chex.assert_trees_all_close(found - 1000, dot_product_attention(*operands)[1], atol=2e-4)


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (100, {}),
        (128, {"bias": jnp.zeros((128, 128))}),
        (128, {"mask": jnp.ones(128, bool)}),
        (128, {"chunk_size": 64}),
        (128, {"segment_ids": jnp.zeros(128, int)}),
        (128, {"query_seq_lengths": jnp.array([9, 8])}),
        (128, {"key_value_seq_lengths": jnp.array([9, 8])}),
        (128, {"sinks": jnp.zeros(4)}),
    ],
    ids=["length", "bias", "mask", "chunk_size", "segments", "queries", "keys", "sinks"],
)
def test_auto_falls_back(monkeypatch, length, options):
    on_tpu(monkeypatch, marked)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    assert dot_product_attention(*operands_of(length=length), **options)[1].max() < 100
    if "bias" not in options:
        with pytest.raises(ValueError, match="tokamax attention does not support"):
            dot_product_attention(*operands_of(length=length), implementation="tokamax", **options)


def test_no_op_that_can(monkeypatch):
    on_tpu(monkeypatch, refusing, refusing)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    operands = operands_of(length=128)
    for implementation in ("tokamax", refusing):
        with pytest.raises(ValueError, match=r"refusing \(Not supported on Fake v0"):
            dot_product_attention(*operands, implementation=implementation)
    chex.assert_trees_all_equal(
        dot_product_attention(*operands), dot_product_attention(*operands, implementation="chunked")
    )


def test_without_tokamax(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    monkeypatch.setitem(sys.modules, "tokamax.ops.tpu", None)
    operands = operands_of(length=128)
    with pytest.raises(ImportError, match=r"pip install 'tokamax>=0\.0\.17'"):
        dot_product_attention(*operands, implementation="tokamax")
    assert np.isfinite(dot_product_attention(*operands)[1]).all()
