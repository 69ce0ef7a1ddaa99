"""Attention with max logits, both passes: our chunked form, and tokamax's kernel."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc

BATCH, LENGTH, HEADS, KV_HEADS, SIZE = 4, 2048, 8, 2, 64


def compile_both_passes(mesh, implementation, length=LENGTH):
    """On four chips, an example on each."""

    def attend(query, key, value):
        out, max_logits = mc.dot_product_attention(
            query, key, value, is_causal=True, implementation=implementation
        )
        return out, max_logits[None]

    def loss(*operands):
        out, max_logits = jax.shard_map(
            attend, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
        )(*operands)
        return jnp.sum(out.astype(jnp.float32) ** 2), max_logits.max(0)

    operands = [
        jax.ShapeDtypeStruct(
            (BATCH, length, heads, SIZE), jnp.bfloat16, sharding=NamedSharding(mesh, P("data"))
        )
        for heads in (HEADS, KV_HEADS, KV_HEADS)
    ]
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))
    return step.lower(*operands).compile()


GENERATIONS = ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"]


def temp_bytes(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("topology", GENERATIONS)
def test_chunked_compiles_without_a_buffer_of_all_logits(tpu_mesh, topology):
    compiled = compile_both_passes(tpu_mesh(topology, data=4), "chunked")
    assert temp_bytes(compiled) < 4 * HEADS * LENGTH**2 / 2


@pytest.mark.parametrize("topology", GENERATIONS)
def test_tokamaxs_kernel_compiles(tpu_mesh, topology, monkeypatch):
    pytest.importorskip("tokamax.ops.tpu", reason="tokamax>=0.0.17 is not installed")
    from tokamax import config

    mesh = tpu_mesh(topology, data=4)
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    with config.cross_compile(True):
        compiled = compile_both_passes(mesh, "tokamax")
    assert compiled.as_text().count('custom_call_target="tpu_custom_call"') == 2
    # Its own choice of blocks would take as much as the logits.
    assert temp_bytes(compiled) < 4 * HEADS * LENGTH**2 / 4


def held_bytes(compiled):
    """With what goes in and comes out: the compiler may find room for all temporaries there, or in
    VMEM, which it does not count."""
    memory = compiled.memory_analysis()
    return memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes


def test_chunked_memory_is_linear_in_the_length(tpu_mesh):
    compile_length = functools.partial(compile_both_passes, tpu_mesh("v5e:2x2", data=4), "chunked")
    half, full = (held_bytes(compile_length(length)) for length in (8192, 16384))
    assert full / half < 2.2  # a tile's own temporaries do not grow with the length
