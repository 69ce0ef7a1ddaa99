"""The example's training step, compiled for TPUs: a decoder with MLA, QuacK and QK-Clip."""

import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from benchmarks.compiled import collectives, dots, flops, totals
from examples.mla import partition
from examples.mla.mesh import batch_spec
from examples.mla.model import Decoder, ModelConfig
from examples.mla.settings import Settings
from examples.mla.steps import make_optimizer, train_step

CONFIG = ModelConfig(layers=2, dtype="bfloat16")
SETTINGS = Settings(optimizer="quackclip", context_length=128, batch_size=16, model=CONFIG)


def shardings(mesh, state):
    with jax.set_mesh(mesh):
        wanted = partition.shardings(state, CONFIG)
    return jax.tree.map(lambda each: NamedSharding(mesh, each.spec), wanted)


def abstract_arguments(mesh):
    """What `train_step` takes, as shapes with shardings."""
    parameters = nnx.state(nnx.eval_shape(lambda: Decoder(CONFIG, rngs=nnx.Rngs(0))), nnx.Param)
    tx = make_optimizer(SETTINGS, CONFIG, shardings(mesh, parameters))

    def create():
        model = Decoder(CONFIG, rngs=nnx.Rngs(0))
        return model, nnx.Optimizer(model, tx, wrt=nnx.Param)

    model, optimizer = nnx.eval_shape(create)
    state = nnx.state((model, optimizer))
    placed = jax.tree.map(
        lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
        state,
        shardings(mesh, state),
    )
    nnx.update((model, optimizer), placed)
    tokens = jax.ShapeDtypeStruct(
        (SETTINGS.batch_size, SETTINGS.context_length + 1),
        jnp.int32,
        sharding=NamedSharding(mesh, batch_spec(mesh.shape)),
    )
    return model, optimizer, tokens


def compile_step(mesh):
    model, optimizer, tokens = abstract_arguments(mesh)
    parameters = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    with jax.set_mesh(mesh):
        compiled = train_step.lower(model, optimizer, tokens, clips=True).compile()
    return compiled.compiled, parameters


def check_arithmetic(compiled, parameters, mesh):
    """All in bfloat16, most of it forward and backward, shared evenly."""
    products = dots(compiled)
    assert {each.dtypes for each in products} == {("bf16", "bf16")}
    tokens = SETTINGS.batch_size * SETTINGS.context_length
    # Six for each parameter and token. Muon's come on top, on 16 devices as many again if each
    # orthogonalized everything.
    assert flops(products) <= 1.5 * 6 * parameters * tokens / mesh.size


def check_exchange_and_memory(compiled, parameters, most_collectives):
    """Of a step that is split over a mesh."""
    moved = collectives(compiled)
    assert max(each.bytes for each in moved) < 2 * parameters  # all of them in bfloat16
    assert sum(each.times for each in moved) <= most_collectives
    # As much as the logits and their gradient alone would take if they were not split.
    logits = 4 * SETTINGS.batch_size * SETTINGS.context_length * CONFIG.vocab_size
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * logits


@pytest.mark.parametrize(
    ("topology", "fsdp", "tp"), [("v5e:4x4", 4, 4), ("v5p:2x2x2", 4, 2), ("v6e:2x2", 2, 2)]
)
def test_fsdp_and_tp(tpu_mesh, topology, fsdp, tp):
    mesh = tpu_mesh(topology, fsdp=fsdp, tp=tp)
    compiled, parameters = compile_step(mesh)
    check_arithmetic(compiled, parameters, mesh)
    # Some 100; when the compiler spreads Muon's matrices by itself, 400.
    check_exchange_and_memory(compiled, parameters, most_collectives=150)


def test_data_parallel(tpu_mesh):
    """Devices tell each other their gradients, in bfloat16, and nothing else of size."""
    mesh = tpu_mesh("v5p:2x2x1", data=4)
    compiled, parameters = compile_step(mesh)
    check_arithmetic(compiled, parameters, mesh)
    moved = totals(collectives(compiled))
    assert moved.keys() == {"all-reduce"}
    assert moved["all-reduce"].bytes <= 1.01 * 2 * parameters
