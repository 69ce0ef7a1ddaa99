"""The symmetric product's kernel, compiled for each generation of TPUs."""

import re

import jax
import pytest
from jax.sharding import PartitionSpec as P

from muonclip_jax._orthogonalize.symmetric_tpu import symmetric_product

VMEM = 64 * 2**20  # of a core of v5p, which has the least


@pytest.mark.parametrize(
    ("topology", "n", "k", "dtype"),
    [
        ("v5e:2x2", 4096, 4096, "bfloat16"),
        ("v5p:2x2x1", 4096, 4096, "bfloat16"),
        ("v6e:2x2", 4096, 4096, "bfloat16"),
        ("v5p:2x2x1", 4096, 5000, "float32"),  # most memory: a part of k at a time, and masked
        ("v6e:2x2", 300, 100, "float16"),
    ],
)
def test_compiles(tpu_mesh, topology, n, k, dtype):
    def product(left, right, add, alpha, beta):
        return symmetric_product(left, right, add=add, alpha=alpha, beta=beta, out_dtype=dtype)

    mesh = tpu_mesh(topology, data=4)
    split = P("data")
    mapped = jax.shard_map(
        product,
        mesh=mesh,
        in_specs=(split, split, split, P(), P()),
        out_specs=split,
        check_vma=False,
    )
    factor = jax.ShapeDtypeStruct((4, n, k), dtype)
    add = jax.ShapeDtypeStruct((4, n, n), dtype)
    scalar = jax.ShapeDtypeStruct((), "float32")
    compiled = jax.jit(mapped).lower(factor, factor, add, scalar, scalar).compile()
    text = compiled.as_text()
    assert text.count('custom_call_target="tpu_custom_call"') == 1
    assert not re.search(r" (dot|convolution)\(", text)
    assert max(map(int, re.findall(r'"memory_space":"1","offset":"0","size":"(\d+)"', text))) < VMEM
    if n == 4096:  # where it is for
        cost = compiled.cost_analysis()
        assert cost["flops"] <= 0.55 * 2 * n * n * k
        assert cost["optimal_seconds"] > 0
    if dtype == "bfloat16":  # and k is a multiple of 128; else v5p copies the factors
        assert compiled.memory_analysis().temp_size_in_bytes < 2**20
