"""The kernel, on one TPU of each generation and spread over several that hold copies."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives, dots, flops, totals

STEPS, N, M = 5, 512, 2048
STANDARD = STEPS * (4 * N**2 * M + 2 * N**3)  # FLOPs for one matrix
RESTARTS = 3  # of the Gram iteration: 2, 2 and 1 steps
GRAM = STEPS * 8 * N**3 + RESTARTS * (4 * N**2 * M - 6 * N**3)


@pytest.mark.parametrize(
    ("topology", "method", "expected", "stacks"),
    [
        ("v5e:2x2", "auto", GRAM, 2),
        ("v5p:2x2x1", "auto", GRAM, 2.2),  # 2.13 by libtpu of JAX 0.12
        ("v6e:2x2", "auto", GRAM, 2),
        ("v5p:2x2x1", "standard", STANDARD, 2),
    ],
)
def test_one_device(tpu_mesh, topology, method, expected, stacks):
    """No more products than the iteration has, and those in bfloat16."""
    replicated = NamedSharding(tpu_mesh(topology, data=4), P())
    x = jax.ShapeDtypeStruct((3, N, M), jnp.float32, sharding=replicated)
    orthogonalize = functools.partial(mc.orthogonalize, method=method)
    compiled = jax.jit(orthogonalize, out_shardings=replicated).lower(x).compile()
    products = dots(compiled)
    assert flops(products) == 3 * expected
    assert {each.dtypes for each in products} == {("bf16", "bf16")}
    assert collectives(compiled) == []
    # The stack in float32 twice over: a few matrices in bfloat16, their Gram matrices in float32.
    assert compiled.memory_analysis().temp_size_in_bytes <= stacks * 4 * 3 * N * M


@pytest.mark.parametrize("topology", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_with_the_pallas_kernel(tpu_mesh, topology):
    """What is symmetric is left to the kernel: nothing but QX to XLA, at each look."""
    everywhere = NamedSharding(tpu_mesh(topology, data=4), P("data"))
    x = jax.ShapeDtypeStruct((4, N, M), jnp.float32, sharding=everywhere)
    method = mc.Method("gram", kernel="pallas")
    orthogonalize = functools.partial(mc.orthogonalize, method=method)
    on_each = jax.shard_map(
        orthogonalize,
        mesh=everywhere.mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=False,
    )
    program = jax.jit(on_each).lower(x).compile().as_text()
    assert "tpu_custom_call" in program
    wide = [line for line in program.splitlines() if " convolution(" in line or " dot(" in line]
    assert wide and all(f",{M}]" in line for line in wide)


def test_data_parallel(tpu_mesh):
    """Where all devices have all parameters, each orthogonalizes its share, and they exchange the
    results once, in bfloat16."""
    replicated = NamedSharding(tpu_mesh("v5p:2x2x1", data=4), P())
    grads = {
        f"layer_{i}": jax.ShapeDtypeStruct((N, M), jnp.float32, sharding=replicated)
        for i in range(8)
    }
    tx = mc.scale_by_muon(shardings=replicated)
    state = jax.eval_shape(tx.init, grads)
    compiled = jax.jit(tx.update, out_shardings=replicated).lower(grads, state).compile()
    assert flops(dots(compiled)) == 2 * GRAM
    assert totals(collectives(compiled)) == {"all-gather": (1, 8 * 2 * N * M)}
