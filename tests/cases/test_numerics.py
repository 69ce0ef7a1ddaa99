"""JAX's switches and meshes under which the numerics raised."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc


@pytest.mark.parametrize(
    "spec", [P(None, "a", "b"), P("a", "b", None), P(None, ("a", "b"))], ids=str
)
@pytest.mark.parametrize("turned", [False, True])
def test_orthogonalize_on_an_explicit_mesh(spec, turned):
    mesh = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Explicit,) * 2, devices=jax.devices()[:4])
    x = jax.random.normal(jax.random.key(0), (2, 8, 12))
    on_mesh = jax.device_put(x, NamedSharding(mesh, spec))
    if turned:
        x, on_mesh = x.mT, on_mesh.mT
    out = jax.jit(mc.orthogonalize)(on_mesh)
    assert jax.typeof(out).sharding == jax.typeof(on_mesh).sharding
    expected = mc.orthogonalize(x)
    # Sums of products over devices are in another order, before they are rounded to bfloat16.
    np.testing.assert_allclose(out, expected, atol=0.03)
    error = mc.orthogonality_error(on_mesh)
    np.testing.assert_allclose(error, mc.orthogonality_error(x), rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize(
    "switch",
    [
        pytest.param(lambda: jax.numpy_dtype_promotion("strict"), id="strict promotion"),
        pytest.param(lambda: jax.numpy_rank_promotion("raise"), id="no rank promotion"),
    ],
)
def test_a_switch_of_jax_changes_nothing(switch, dtype):
    x = jax.random.normal(jax.random.key(0), (2, 4, 6)).astype(dtype)
    x = x.at[0].set(0)
    q = jax.random.normal(jax.random.key(1), (2, 6, 2, 4)).astype(dtype)

    def run():
        attend = functools.partial(mc.dot_product_attention, is_causal=True, chunk_size=4)
        grad = jax.grad(lambda q: attend(q, q, q)[0].astype(jnp.float32).sum())(q)
        of_matrices = (mc.orthogonalize(x, method=method) for method in ("standard", "gram"))
        return *of_matrices, mc.orthogonality_error(x), *attend(q, q, q), grad

    plain = run()
    with switch():
        switched = run()
    for one, other in zip(plain, switched, strict=True):
        np.testing.assert_array_equal(np.asarray(one, "f4"), np.asarray(other, "f4"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(256, 512), (2, 1100, 2560)])
def test_the_kernel_for_tpus_lowers_under_x64(shape, dtype):
    method = mc.Method("gram", kernel="pallas")
    run = jax.jit(functools.partial(mc.orthogonalize, method=method, dtype=None))
    with jax.enable_x64(True):
        lowered = run.trace(jax.ShapeDtypeStruct(shape, dtype)).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()


@pytest.mark.parametrize("scale", [65504.0, 6e-8, 1.0])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_gradients_at_the_ends_of_float16(scale, dtype):
    signs = np.sign(np.random.default_rng(0).standard_normal((3, 7)))
    x = jnp.asarray(signs * scale, jnp.float16)
    out = mc.orthogonalize(x, dtype=dtype)
    expected = mc.orthogonalize(jnp.asarray(signs, jnp.float32), dtype="float32")
    # Half an ulp of bfloat16 in each of five steps, times slopes of 4 at most.
    np.testing.assert_allclose(np.asarray(out, "f4"), expected, atol=0.03)
