"""What TensorBoard and Weights & Biases are told."""

import struct
import sys

import numpy as np
import pytest
import wandb
from tensorboardX.proto.event_pb2 import Event, SessionLog

from examples.mla import cli, metrics, train, watch
from examples.mla.settings import Settings

from .test_train import one_line


def test_a_row_is_a_few_numbers_with_names():
    row = {
        "event": "step",
        "step": 3,
        "tokens": 20,
        "seconds": 4.0,
        "loss": np.float32(2),
        "learning_rate": 0.5,
        "max_logits": {"a": np.array([1.0, 3.0]), "b": np.array([np.inf, 3.0])},
        "gamma": {"a": np.array([1.0, 0.5])},
        "heads_clipped": np.int32(1),
        "expert_load": {"mlp": np.array([0.1, 0.4, 0.3, 0.2])},
    }
    found = watch.scalars(row)
    assert found == {
        "train/loss": 2,
        "train/learning_rate": 0.5,
        "train/tokens_per_second": 5,
        "max_logit/a": 3,
        "max_logit/b": np.inf,
        "gamma/a": 0.5,
        "clip/heads_clipped": 1,
        "busiest_expert/mlp": 1.6,
    }
    assert {type(value) for value in found.values()} == {float}
    held_out = {"event": "eval", "step": 3, "loss": 4.0, "participation_ratio": {"a": 2.5}}
    assert watch.scalars(held_out) == {"held_out/loss": 4, "participation_ratio/a": 2.5}


def shown_by_tensorboard(run_dir):
    """Name → [(step, value)], as TensorBoard reads its files: of what was written before a restart,
    the steps from there on are gone."""
    found = {}
    for file in sorted((run_dir / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime):
        content = file.read_bytes()
        while content:  # records: length (8 bytes), checksum (4), event, checksum (4)
            (length,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.session_log.status == SessionLog.START:
                for points in found.values():
                    points[:] = [point for point in points if point[0] < event.step]
            for value in event.summary.value:
                found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return found


def evaluation(step, loss):
    return {"event": "eval", "step": step, "loss": loss, "participation_ratio": {}}


def test_tensorboard_goes_on_where_a_run_was_resumed(tmp_path):
    settings = Settings(tensorboard=True, run_dir=tmp_path)
    for done, loss, last in ((0, 1.0, 4), (2, 2.0, 5)):
        with watch.watching(settings, done) as send:
            for step in range(done + 1, last + 1):
                send(evaluation(step, loss))
    points = [(1, 1.0), (2, 1.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert shown_by_tensorboard(tmp_path) == {"held_out/loss": points}


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_tensorboard_has_what_the_metrics_have(flags, tmp_path):
    assert train.main(flags(tmp_path / "run", "--tensorboard")) == 0
    shown = shown_by_tensorboard(tmp_path / "run")
    rows = metrics.read(tmp_path / "run")
    for name, event in (("train/loss", "step"), ("held_out/loss", "eval")):
        measured = [(row["step"], row["loss"]) for row in metrics.select(rows, event)]
        assert shown[name] == measured
    peaks = [value for _, value in shown["max_logit/layers/0/attn"]]
    np.testing.assert_allclose(peaks, metrics.peak(metrics.select(rows, "step")), rtol=1e-6)


@pytest.mark.slow
def test_wandb_without_a_network_keeps_everything_in_the_run_folder(tmp_path, monkeypatch):
    wandb.teardown()  # or what it read of the environment before, in this process, would hold
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    with watch.watching(Settings(wandb=True, run_dir=tmp_path), done=0) as send:
        send(evaluation(0, 1.5))
    (record,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"held_out/loss" in record.read_bytes()


def test_wandb_gets_the_settings_the_numbers_and_their_steps(tmp_path, monkeypatch):
    started, logged = {}, []

    class Run:
        def log(self, numbers, step):
            logged.append((numbers, step))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            logged.append("finished")

    monkeypatch.setattr(wandb, "init", lambda **given: started.update(given) or Run())
    settings = Settings(wandb=True, run_dir=tmp_path / "name")
    with watch.watching(settings, done=0) as send:
        send(evaluation(3, 1.5))
    assert logged == [({"held_out/loss": 1.5}, 3), "finished"]
    assert started["group"] == "name" and started["config"] == settings.to_json()


def test_wandb_that_does_not_start_gets_one_line(tmp_path, monkeypatch, capsys):
    def init(**_):
        raise wandb.errors.UsageError("No API key\nconfigured.")

    def start():
        with watch.watching(Settings(wandb=True, run_dir=tmp_path), done=0):
            return 0

    monkeypatch.setattr(wandb, "init", init)
    assert cli.run(start) == 2
    said = one_line(capsys)
    assert "W&B does not start (No API key configured.); with WANDB_MODE=offline" in said


@pytest.mark.parametrize("name", ["tensorboardX", "wandb"])
def test_what_is_not_installed_is_said_before_anything_is_written(
    flags, tmp_path, monkeypatch, capsys, name
):
    monkeypatch.setitem(sys.modules, name, None)
    switch = f"--{name.lower().removesuffix('x')}"
    assert train.main(flags(tmp_path / "run", switch)) == 2
    expected = f"{switch}: this takes {name}, which is not installed; pip install {name}"
    assert expected in one_line(capsys)
    assert not (tmp_path / "run").exists()
