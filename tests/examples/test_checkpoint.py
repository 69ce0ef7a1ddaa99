"""Checkpoints of the example: whole or not at all, and everything in them."""

import gc
import os
import shutil
import signal

import chex
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from examples.mla.checkpoint import Checkpoints, StopSignal
from examples.mla.cli import InputError

ABOUT = {"settings": {"steps": 3}, "text": {"text": "abc"}}


def make(seed=0, features=3, dtype=jnp.float32):
    model = nnx.Linear(4, features, param_dtype=dtype, rngs=nnx.Rngs(seed))
    return model, nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


def advance(model, optimizer, steps=1):
    for _ in range(steps):
        grads = nnx.grad(lambda m: (m(jnp.ones((2, 4))) ** 2).sum())(model)
        optimizer.update(model, grads)


def save(checkpoints, step, model, optimizer):
    checkpoints.save(step, model, optimizer, position={"next_index": step}, about=ABOUT)


# Where one read fails, Orbax leaves its others unawaited; Python complains when it frees them.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited"),
]


@pytest.fixture
def free():
    yield
    gc.collect()


@pytest.fixture
def saved(tmp_path):
    """A run folder with checkpoints of steps 3 and 6, and the state of step 6."""
    model, optimizer = make()
    checkpoints = Checkpoints(tmp_path)
    for step in (3, 6):
        advance(model, optimizer, 3)
        save(checkpoints, step, model, optimizer)
    return tmp_path, nnx.state((model, optimizer))


def test_everything_comes_back_bit_for_bit(saved):
    run_dir, state = saved
    model, optimizer = make(seed=1)
    checkpoints = Checkpoints.existing(run_dir)
    assert checkpoints.about() == ABOUT
    assert checkpoints.restore(model, optimizer) == {"next_index": 6}
    chex.assert_trees_all_equal(nnx.state((model, optimizer)), state)
    assert optimizer.step[...] == 6


def test_only_the_newest_two_are_kept(saved):
    run_dir, _ = saved
    save(Checkpoints(run_dir), 9, *make())
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["6", "9"]


def test_what_an_interrupted_save_leaves_is_never_picked(saved):
    """Orbax writes into `<step>.orbax-checkpoint-tmp` and renames it when all is there."""
    run_dir, state = saved
    folder = run_dir / "checkpoints"
    partial = folder / "9.orbax-checkpoint-tmp"
    shutil.copytree(folder / "6", partial)
    (partial / "state").rename(partial / "state.orbax-checkpoint-tmp")
    (partial / "about" / "metadata").write_text('{"settings"')

    assert Checkpoints.existing(run_dir).latest == 6
    checkpoints = Checkpoints(run_dir)
    model, optimizer = make(seed=1)
    checkpoints.restore(model, optimizer)
    chex.assert_trees_all_equal(nnx.state((model, optimizer)), state)
    save(checkpoints, 9, model, optimizer)  # nor is it in the way
    assert Checkpoints.existing(run_dir).latest == 9


def test_a_save_that_fails_leaves_the_one_before(saved, monkeypatch):
    run_dir, _ = saved
    model, optimizer = make()

    def full_disk(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "rename", full_disk)
    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(
        InputError, match=r"step 9 could not be saved; .* \(No space left on device\)"
    ):
        save(Checkpoints(run_dir), 9, model, optimizer)
    monkeypatch.undo()
    assert Checkpoints.existing(run_dir).latest == 6


def lose_an_item(checkpoint):
    shutil.rmtree(checkpoint / "state")


def cut_arrays_short(checkpoint):
    for path in (checkpoint / "state").rglob("d/*"):
        os.truncate(path, 10)


@pytest.mark.usefixtures("free")
@pytest.mark.parametrize("damage", [lose_an_item, cut_arrays_short])
def test_a_damaged_checkpoint_is_named_with_the_fix(saved, damage):
    run_dir, _ = saved
    damage(run_dir / "checkpoints" / "6")
    with pytest.raises(InputError, match=r"checkpoints/6: damaged, or not .* move it away to resu"):
        Checkpoints.existing(run_dir).restore(*make())
    (run_dir / "checkpoints" / "6").rename(run_dir / "away")
    assert Checkpoints.existing(run_dir).restore(*make()) == {"next_index": 3}


@pytest.mark.usefixtures("free")
def test_another_models_checkpoint_is_refused_and_kept(saved):
    run_dir, _ = saved
    with pytest.raises(InputError, match=r"checkpoints/6: damaged, or not a checkpoint of this mo"):
        Checkpoints.existing(run_dir).restore(*make(features=5))
    assert Checkpoints.existing(run_dir).latest == 6


def test_no_checkpoint_to_resume(tmp_path):
    missing, empty = tmp_path / "missing", tmp_path / "empty"
    (empty / "checkpoints").mkdir(parents=True)
    for run_dir in (missing, empty):
        with pytest.raises(
            InputError, match=rf"{run_dir.name}: no complete checkpoint there; give"
        ):
            Checkpoints.existing(run_dir)
    assert not missing.exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_acts(number):
    acted = []
    before = signal.signal(number, lambda *_: acted.append(number))
    try:
        with StopSignal() as stop:
            assert stop.number is None
            os.kill(os.getpid(), number)
            assert stop.number == number and not acted
            os.kill(os.getpid(), number)
            assert acted == [number]
    finally:
        signal.signal(number, before)


def test_handlers_are_put_back():
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal():
        pass
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_half_precision_stays_half_precision(tmp_path):
    saved, restored = (make(seed, dtype=jnp.bfloat16) for seed in (0, 1))
    save(Checkpoints(tmp_path), 1, *saved)
    Checkpoints(tmp_path).restore(*restored)
    assert restored[0].kernel[...].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(nnx.state(restored), nnx.state(saved))
