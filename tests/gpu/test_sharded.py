"""Muon's update of a decoder like GPT-2 small, sharded over several GPUs."""

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks import optimizer_step, roofline
from benchmarks.compiled import collectives, dots, flops, totals

SHAPES = optimizer_step.decoder(**roofline.GPT2)
SPECS = {"kernel": P("fsdp", "tp"), "embedding": P("fsdp", "tp"), "scale": P()}


@pytest.mark.parametrize(
    ("topology", "axes"),
    [("h100:1x1x8", {"fsdp": 4, "tp": 2}), ("b200:1x2x8", {"fsdp": 8, "tp": 2})],
)
def test_sharded(gpu_mesh, topology, axes):
    """Each device orthogonalizes its share, and sends and gets its shard once, in bfloat16."""
    mesh = gpu_mesh(topology, **axes)
    shardings = jax.tree_util.tree_map_with_path(
        lambda path, _: NamedSharding(mesh, SPECS[path[-1].key]), SHAPES
    )
    gradients = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where), SHAPES, shardings
    )
    kernels = {"layers": gradients["layers"]}
    kernels = jax.tree_util.tree_map_with_path(
        lambda path, x: x if path[-1].key == "kernel" else None, kernels
    )
    tx = mc.scale_by_muon(shardings=jax.tree.map(lambda x: x.sharding, kernels))
    state = jax.eval_shape(tx.init, kernels)
    compiled = jax.jit(tx.update).lower(kernels, state).compile()
    assert {each.dtypes for each in dots(compiled)} == {("bf16", "bf16")}
    assert flops(dots(compiled)) <= 1.1 * roofline.standard_flops("step") / mesh.size
    entries = sum(x.size for x in jax.tree.leaves(kernels))
    moved = totals(collectives(compiled))
    assert moved.keys() == {"all-to-all", "all-reduce"}
    assert moved["all-reduce"].bytes < 1000  # largest entries
    # There and back. Of each of two shapes there are 12, which eight devices take as 16.
    assert moved["all-to-all"].bytes <= 2.5 * 2 * entries / mesh.size
