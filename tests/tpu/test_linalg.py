"""The functions of a matrix as programs for TPUs: products alone where they say so."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import dots, flops
from muonclip_jax import linalg

N = 256
PRODUCT = 2 * N**3  # FLOPs
# Products of each step, at 14 to 15 steps; those of "polar" and "squared" twice, and two more.
FUNCTIONS = {
    "msign": (linalg.msign, 3 * 15),
    "mclip": (linalg.mclip, 6 * 15 + 3),
    "matrix_sqrt": (linalg.matrix_sqrt, 4 * 11),
    "mcsgn": (functools.partial(linalg.mcsgn, by="newton_schulz"), 3 * 15 + 2),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_products(tpu_mesh, name):
    function, most = FUNCTIONS[name]
    replicated = NamedSharding(tpu_mesh("v5e:2x2", data=4), P())
    x = jax.ShapeDtypeStruct((N, N), jnp.float32, sharding=replicated)
    compiled = jax.jit(function, out_shardings=replicated).lower(x).compile()
    assert 0.8 * most * PRODUCT <= flops(dots(compiled)) <= most * PRODUCT
    # A few matrices of float32, whatever the number of steps.
    assert compiled.memory_analysis().temp_size_in_bytes <= 12 * 4 * N**2


@pytest.mark.parametrize(
    "function",
    [
        linalg.msign,
        functools.partial(linalg.inverse_root, p=4),
        linalg.mcsgn,
        lambda x: linalg.solve_sylvester(x, x, x),
    ],
)
def test_derivatives_compile(tpu_mesh, function):
    """Eigenvalues and inverses are there on TPU too."""
    replicated = NamedSharding(tpu_mesh("v5e:2x2", data=4), P())
    x = jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=replicated)
    gradient = jax.grad(lambda x: function(x).sum())
    assert jax.jit(gradient, out_shardings=replicated).lower(x).compile()
