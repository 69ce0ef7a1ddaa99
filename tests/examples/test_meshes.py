"""The example on meshes: the same numbers, its arrays in parts, checkpoints that fit any mesh."""

import contextlib
import functools
import math
import re
import shutil
from dataclasses import replace
from typing import NamedTuple

import chex
import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from examples.mla import metrics, partition, steps, train
from examples.mla.checkpoint import Checkpoints
from examples.mla.cli import InputError
from examples.mla.devices import Devices
from examples.mla.mesh import make_mesh, spread
from examples.mla.metrics import select
from examples.mla.model import Decoder, ModelConfig
from examples.mla.settings import Settings

SMALL = {"vocab_size": 64, "d_model": 16, "layers": 1, "nope": 4, "rope": 2, "v": 4, "d_ff": 16}
CONFIG = ModelConfig(q_rank=8, kv_rank=8, **SMALL)
SETTINGS = Settings(steps=4, batch_size=8, learning_rate=0.05, threshold=0.3, model=CONFIG)

# What a mesh changes is the order of sums: a few float32 roundings, 1e-7 of a number each, of which
# clipping, Newton–Schulz and Adam's division by small roots make more from step to step.
close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)


class Trained(NamedTuple):
    """A model after three steps."""

    model: Decoder
    optimizer: nnx.Optimizer
    numbers: list
    values: list


@functools.cache
def trained(**axes):
    """Three steps on a mesh of these axes; made once, as a model's first step takes seconds."""
    with pytest.MonkeyPatch.context() as patch, on(axes):
        # bfloat16's rounding, 4e-3, would hide all but gross errors.
        patch.setattr(
            mc, "muon", functools.partial(mc.muon, newton_schulz=mc.NewtonSchulz(dtype="float32"))
        )
        model, optimizer = steps.create(SETTINGS, CONFIG)
        numbers = advance(model, optimizer, 1, 2, 3)
        return Trained(model, optimizer, numbers, values(model, optimizer))


def on(axes):
    """The context of a mesh of the first devices; of none without axes."""
    devices = jax.devices()[: math.prod(axes.values())]
    return jax.set_mesh(make_mesh(axes, devices)) if axes else contextlib.nullcontext()


def advance(model, optimizer, *which):
    """Takes these steps; returns their numbers."""
    batches = [np.random.default_rng(step).integers(0, 64, (8, 9), np.int32) for step in which]
    return jax.device_get(
        [steps.train_step(model, optimizer, spread(batch), clips=True) for batch in batches]
    )


def values(*modules):
    return jax.device_get(jax.tree.leaves(nnx.state(modules)))


MESHES = [
    {"fsdp": 4, "tp": 2},
    *(pytest.param(axes, marks=pytest.mark.slow) for axes in ({"fsdp": 8}, {"data": 2, "tp": 2})),
]


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=lambda axes: "-".join(axes))
def test_a_mesh_changes_no_number(axes):
    here, alone = trained(**axes), trained()
    assert any(row["heads_clipped"] for row in alone.numbers)
    close(here.numbers, alone.numbers)
    close(here.values, alone.values)


@pytest.mark.slow
@pytest.mark.parametrize("axes", MESHES, ids=lambda axes: "-".join(axes))
def test_every_matrix_and_its_optimizer_state_stay_in_parts(axes):
    state = nnx.state((trained(**axes).model, trained(**axes).optimizer))
    with on(axes):
        mesh, wanted = jax.sharding.get_mesh(), partition.shardings(state, CONFIG)
    split = 0
    for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, sharding.spec), x.ndim)
        parts = math.prod(axes[name] for name in sharding.spec if name is not None)
        assert {shard.data.size for shard in x.addressable_shards} == {x.size // parts}
        split += parts > 1
    # Ten matrices, the momentum of eight, two moments of two; tp alone does not split the two
    # kernels into latents, nor their momentum.
    assert split == (22 if "fsdp" in axes else 18)


@pytest.mark.slow
def test_activations_never_move_over_fsdp():
    """Weights are gathered and gradients summed: no all-to-all, and no gather of a batch. With few
    tokens for its width, as here, the compiler would rather move those, were it not told."""
    config = replace(CONFIG, d_model=64, d_ff=128)
    with on({"fsdp": 8}):
        model, _ = steps.create(replace(SETTINGS, optimizer="adamw", model=config), config)
        batch = spread(np.zeros((8, 3), np.int32))
        gradient = nnx.jit(lambda model, batch: nnx.grad(steps.cross_entropy)(model, batch))
        program = gradient.lower(model, batch).compile().as_text()
    gathered = re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", program)
    matrices = {",".join(map(str, x.shape)) for x in jax.tree.leaves(nnx.state(model))}
    assert len(gathered) >= 10 and matrices.issuperset(gathered)
    assert "all-to-all" not in program and "collective-permute" not in program


KERNELS = {
    "embed/embedding": P("tp", "fsdp"),
    "layers/0/attn/wq_a/kernel": P("fsdp", None),
    "layers/0/attn/wq_b/kernel": P("fsdp", "tp"),
    "layers/0/attn/wkv_a/kernel": P("fsdp", None),
    "layers/0/attn/wkv_b/kernel": P("fsdp", "tp"),
    "layers/0/attn/wo/kernel": P("tp", "fsdp"),
    "layers/0/mlp/gate/kernel": P("fsdp", "tp"),
    "layers/0/mlp/up/kernel": P("fsdp", "tp"),
    "layers/0/mlp/down/kernel": P("tp", "fsdp"),
    "lm_head/kernel": P("fsdp", "tp"),
}


def specs(config, axes):
    """Path → PartitionSpec, of the matrices."""
    with on(axes):
        params = nnx.state(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
        found = nnx.to_flat_state(partition.shardings(params, config))
    shapes = dict(nnx.to_flat_state(params))
    return {
        "/".join(map(str, path)): variable.get_value().spec
        for path, variable in found
        if len(shapes[path].shape) == 2
    }


def test_heads_and_mlp_features_are_on_tp_and_the_width_on_fsdp():
    assert specs(CONFIG, {"fsdp": 4, "tp": 2}) == KERNELS


@pytest.mark.parametrize("attention", ["mla", "mha", "gqa"])
def test_every_attention_has_rules(attention):
    config = ModelConfig(q_rank=0, kv_rank=8, kv_heads=2, attention=attention, **SMALL)
    found = specs(config, {"fsdp": 4, "tp": 2})
    assert len(found) == 9
    assert found["layers/0/attn/wq/kernel"] == P("fsdp", "tp")


def test_what_an_axis_does_not_divide_stays_whole():
    config = ModelConfig(
        q_rank=8, kv_rank=6, heads=4, kv_heads=2, attention="gqa", **{**SMALL, "vocab_size": 65}
    )
    found = specs(config, {"fsdp": 2, "tp": 4})
    assert found["embed/embedding"] == P(None, "fsdp")
    assert found["layers/0/attn/wq/kernel"] == P("fsdp", "tp")
    # Its 12 columns would divide, but in the middle of a head.
    assert found["layers/0/attn/wk/kernel"] == P("fsdp", None)


@pytest.mark.slow
def test_a_checkpoint_goes_from_4_devices_to_8_to_1(tmp_path):
    """With the same next step everywhere, and bit for bit on the mesh that it is of."""

    def save(step, run):
        about = {"settings": {}, "text": ""}
        Checkpoints(tmp_path).save(
            step, run.model, run.optimizer, position={"next_index": 0}, about=about
        )
        return values(run.model, run.optimizer)

    def restore_and_step(run, saved, step):
        Checkpoints.existing(tmp_path).restore(run.model, run.optimizer)
        chex.assert_trees_all_equal(values(run.model, run.optimizer), saved)
        numbers = advance(run.model, run.optimizer, step)
        return numbers, values(run.model, run.optimizer)

    on_4, on_8, on_1 = trained(data=2, tp=2), trained(fsdp=8), trained()
    with on({"data": 2, "tp": 2}):
        after_3 = save(3, on_4)
        fourth = advance(on_4.model, on_4.optimizer, 4), values(on_4.model, on_4.optimizer)
        fifth = advance(on_4.model, on_4.optimizer, 5), values(on_4.model, on_4.optimizer)
        chex.assert_trees_all_equal(restore_and_step(on_4, after_3, 4), fourth)
    with on({"fsdp": 8}):
        close(restore_and_step(on_8, after_3, 4), fourth)
        after_4 = save(4, on_8)
    close(restore_and_step(on_1, after_4, 5), fifth)
    assert {len(x.sharding.device_set) for x in jax.tree.leaves(nnx.state(on_1.model))} == {1}


@pytest.fixture(scope="module")
def on_a_mesh(flags, tmp_path_factory):
    """The folder of the run that `finished` is, on eight devices."""
    run_dir = tmp_path_factory.mktemp("runs") / "mesh"
    assert train.main(flags(run_dir, mesh="fsdp=2,tp=4")) == 0
    return run_dir


def losses(run_dir):
    return [row["loss"] for row in metrics.read(run_dir) if row["event"] in ("step", "eval")]


# A run's Newton–Schulz rounds to bfloat16, 4e-3 of an entry, and an update moves the loss by up to
# half of itself here.
close_in_bfloat16 = functools.partial(np.testing.assert_allclose, rtol=1e-2)


@pytest.mark.slow
def test_a_run_on_a_mesh_learns_the_same_and_tells_where_it_was(on_a_mesh, finished):
    here, alone = losses(on_a_mesh), losses(finished)
    close_in_bfloat16(here, alone)
    close(here[:2], alone[:2])  # before the first update
    start, *_, end = metrics.read(on_a_mesh)
    assert start["facts"]["device"] == "8 × cpu, mesh fsdp=2,tp=4"
    assert metrics.read(finished)[0]["facts"]["device"] == "cpu"
    assert "mesh fsdp=2,tp=4" in (on_a_mesh / "report.html").read_text()
    assert len(end["sample"]) > 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_run_resumes_without_its_mesh(on_a_mesh, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(on_a_mesh, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "6")
    assert train.main(["--resume", "--run-dir", str(run_dir)]) == 0
    close_in_bfloat16(losses(run_dir), losses(on_a_mesh))
    assert select(metrics.read(run_dir), "start")[-1]["facts"]["device"] == "cpu"


MEETING = ["--coordinator", "localhost:1234", "--processes", "2", "--process", "0"]
WRONG = {
    "unknown axis": (["--mesh", "pp=8"], "--mesh pp=8: 'pp=8' is not one of fsdp, tp, data with"),
    "no size": (["--mesh", "fsdp"], "--mesh fsdp: 'fsdp' is not one of fsdp, tp, data with its"),
    "size": (["--mesh", "fsdp=0,tp=8"], "--mesh fsdp=0,tp=8: 'fsdp=0' is not one of fsdp, tp, d"),
    "negative size": (["--mesh", "tp=-8"], "--mesh tp=-8: 'tp=-8' is not one of"),
    "twice": (["--mesh", "tp=2,tp=4"], "--mesh tp=2,tp=4: 'tp=4' is not one of fsdp, tp, data wi"),
    "empty": (["--mesh", ""], "--mesh : '' is not one of fsdp, tp, data with its size, each given"),
    "devices": (["--mesh", "tp=2"], "--mesh tp=2 takes 2 devices, found 8; its sizes multiply to"),
    "batch": (
        ["--mesh", "fsdp=4,data=2", "--batch-size", "12"],
        "--batch-size 12 does not spread over the fsdp and data axes of --mesh fsdp=4,data=2; it "
        "must be a multiple of 8",
    ),
    "no devices": (["--simulate-devices", "0"], "--simulate-devices must be at least 1, got 0"),
    "too late": (["--simulate-devices", "4"], "--simulate-devices 4 comes too late, JAX has star"),
    "not all": (
        MEETING[:2],
        "--coordinator, --processes and --process go with one another; give all three",
    ),
    "no address": (["--coordinator", "here", *MEETING[2:]], "--coordinator here: not HOST:PORT"),
    "count": ([*MEETING, "--process", "2"], "--process 2 of --processes 2: they count from 0"),
    "both": (
        [*MEETING, "--distributed"],
        "--distributed finds the coordinator by itself; leave one of them out",
    ),
    "no mesh": (["--distributed"], "say which with --mesh, such as --mesh fsdp=8"),
    "JAX started": (
        [*MEETING, "--mesh", "fsdp=8"],
        "the processes did not meet: jax.distributed.initialize() must be called before",
    ),
}


@pytest.mark.parametrize(("more", "message"), WRONG.values(), ids=WRONG)
def test_wrong_devices_get_one_line_and_write_nothing(flags, tmp_path, capsys, more, message):
    assert train.main([*flags(tmp_path / "run"), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_several_processes_need_a_folder():
    with pytest.raises(ValueError, match="several processes need a --run-dir, in a place that all"):
        Settings(devices=Devices(mesh="fsdp=2", distributed=True))


def test_devices_are_simulated_on_cpus_only(monkeypatch):
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(InputError, match="makes CPU devices, and JAX runs on gpu; leave it"):
        Devices(simulate_devices=8).start()
