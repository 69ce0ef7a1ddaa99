"""The kernel, on one GPU of each kind and spread over several that hold copies."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives, dots, flops, totals
from benchmarks.gpu import CUBLAS

GPUS = ["h100", "h200", "b200"]
PRODUCTS = {"triton": None, "cublas": CUBLAS}
STEPS, COUNT, N, M = 5, 3, 512, 2048
ENTRIES = COUNT * N * M
STANDARD = STEPS * COUNT * (4 * N**2 * M + 2 * N**3)  # FLOPs


def compile_kernel(mesh, products, **how):
    """Of a stack of wide matrices, on each device of the mesh."""
    everywhere = NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((COUNT, N, M), jnp.float32, sharding=everywhere)
    orthogonalize = functools.partial(mc.orthogonalize, **how)
    lowered = jax.jit(orthogonalize, out_shardings=everywhere).lower(x)
    return lowered.compile(PRODUCTS[products])


@pytest.mark.parametrize("method", ["auto", "standard"])
@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize("chip", GPUS)
def test_one_gpu(gpu_mesh, chip, products, method):
    """No more products than the iteration has, and those in bfloat16."""
    compiled = compile_kernel(gpu_mesh(f"{chip}:1x1x1", data=1), products, method=method)
    assert products == "triton" or "__cublas" in compiled.as_text()
    found = dots(compiled)
    assert flops(found) == STANDARD if method == "standard" else flops(found) <= STANDARD
    assert {each.dtypes for each in found} == {("bf16", "bf16")}
    assert collectives(compiled) == []
    # The stack in float32 twice over: some matrices in bfloat16, what is square in float32; and
    # cuBLAS's workspace.
    assert compiled.memory_analysis().temp_size_in_bytes <= 2 * 4 * ENTRIES + 2**22


def test_float32_is_all_of_float32(gpu_mesh):
    """Not TF32, which a GPU takes unless it is told."""
    mesh = gpu_mesh("h100:1x1x1", data=1)
    compiled = compile_kernel(mesh, "triton", dtype="float32")
    assert {(*each.dtypes, each.precision) for each in dots(compiled)} == {
        ("f32", "f32", "highest")
    }


@pytest.mark.parametrize("shape", ["1x1x8", "1x2x8"])
def test_data_parallel(gpu_mesh, shape):
    """Where all devices have all parameters, each orthogonalizes its share, and they exchange the
    results once, in bfloat16."""
    devices = 16 if shape == "1x2x8" else 8
    everywhere = NamedSharding(gpu_mesh(f"h100:{shape}", data=devices), P())
    grads = {
        f"layer_{i}": jax.ShapeDtypeStruct((N, M), jnp.float32, sharding=everywhere)
        for i in range(2 * devices)
    }
    tx = mc.scale_by_muon(shardings=everywhere)
    state = jax.eval_shape(tx.init, grads)
    compiled = jax.jit(tx.update, out_shardings=everywhere).lower(grads, state).compile()
    assert flops(dots(compiled)) <= STANDARD * 2 / COUNT
    moved = totals(collectives(compiled))
    assert moved.keys() == {"all-gather"}
    # Of 16 devices' matrices two parts are made, of which one travels while the other is worked on.
    assert moved["all-gather"].bytes == 2 * devices * 2 * N * M
