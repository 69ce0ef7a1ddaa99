"""Training runs of the example, as a user starts them."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from rich.console import Console

from examples.mla import folder, metrics, recorder, settings, train
from examples.mla.metrics import select


def numbers(run_dir):
    """What was measured, without what the clock says."""
    rows = [row for row in metrics.read(run_dir) if row["event"] != "start"]
    return [{k: v for k, v in row.items() if k not in ("seconds", "compiled")} for row in rows]


def state(run_dir, step):
    manager = ocp.CheckpointManager(run_dir / "checkpoints")
    return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore()))["state"]


def test_a_run_leaves_metrics_checkpoints_and_a_report(finished):
    rows = metrics.read(finished)
    assert [row["event"] for row in rows] == [
        *("start", "eval"),
        *("step", "step", "step", "eval"),
        *("step", "step", "step", "eval"),
        "end",
    ]
    assert sorted(os.listdir(finished / "checkpoints")) == ["3", "6"]
    assert (finished / "report.html").exists()
    assert rows[-1]["prompt"] == "def " and len(rows[-1]["sample"]) > 0


def test_a_step_row_has_every_heads_maximum_and_factor(finished):
    for row in select(metrics.read(finished), "step"):
        (heads,), (gamma,) = row["max_logits"].values(), row["gamma"].values()
        assert len(heads) == len(gamma) == 2
        expected = [min(1.0, 0.5 / heads[h]) if heads[h] > 0.5 else 1.0 for h in range(2)]
        np.testing.assert_allclose(gamma, expected, rtol=1e-6)  # float32 division
        assert row["heads_clipped"] == sum(g < 1 for g in gamma)
        assert row["tokens"] == 16 and row["seconds"] > 0


def test_the_tiny_run_clips_and_learns(finished):
    rows = metrics.read(finished)
    assert any(row["heads_clipped"] for row in select(rows, "step"))
    first, *_, last = metrics.column(select(rows, "eval"), "loss")
    assert last < first


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_resuming_continues_bit_for_bit(finished, flags, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "6")
    assert train.main(["--resume", "--run-dir", str(run_dir)]) == 0
    assert numbers(run_dir) == numbers(finished)
    assert [row["step"] for row in select(metrics.read(run_dir), "start")] == [0, 3]
    chex.assert_trees_all_equal(state(run_dir, 6), state(finished, 6))


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_half_written_checkpoint_is_not_resumed(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    (run_dir / "checkpoints" / "6").rename(run_dir / "checkpoints" / "6.orbax-checkpoint-tmp")
    assert train.main(["--resume", "--run-dir", str(run_dir)]) == 0
    assert numbers(run_dir) == numbers(finished)


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_finished_run_goes_on_with_more_steps(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    for steps in (7, 8):
        assert train.main(["--resume", "--run-dir", str(run_dir), "--steps", str(steps)]) == 0
    rows = metrics.read(run_dir)
    assert [row["settings"]["steps"] for row in select(rows, "start")] == [6, 7, 8]
    assert [row["step"] for row in select(rows, "step")] == list(range(1, 9))
    assert len(select(rows, "end")) == 1


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_the_flags_of_a_run_may_be_given_again_to_resume_it(flags, tmp_path):
    def run(steps, *more):
        return train.main([*flags(tmp_path / "run", steps=steps), "--per-head", *more])

    assert run(3) == 0
    assert run(4, "--resume") == 0
    assert run(5, "--resume") == 0


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_goes_on_bit_for_bit(
    finished, flags, tmp_path, number, monkeypatch, capsys
):
    run_dir, step = tmp_path / "run", recorder.Recorder.step

    def stop_at_4(self, n, values):
        step(self, n, values)
        if n == 4:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(recorder.Recorder, "step", stop_at_4)
    assert train.main(flags(run_dir)) == 128 + number
    assert f"saved step 4; to go on: --resume {run_dir}" in capsys.readouterr().out
    assert select(metrics.read(run_dir), "step")[-1]["step"] == 4

    monkeypatch.undo()
    assert train.main(["--resume", "--run-dir", str(run_dir)]) == 0
    assert numbers(run_dir) == numbers(finished)
    chex.assert_trees_all_equal(state(run_dir, 6), state(finished, 6))


@pytest.mark.slow
def test_sigterm_from_outside(flags, tmp_path):
    run_dir = tmp_path / "run"
    arguments = flags(run_dir, steps=10**6, optimizer="adamw")
    command = [sys.executable, "-m", "examples.mla.train", *arguments]
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    with subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE) as process:
        while not (run_dir / "checkpoints" / "3").exists():
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        said, _ = process.communicate(timeout=60)
    assert process.returncode == 143
    steps = select(metrics.read(run_dir), "step")
    last = steps[-1]["step"]
    assert not metrics.clips(steps) and np.isfinite(metrics.peak(steps)).all()
    assert f"SIGTERM: saved step {last}; to go on:" in said
    assert (run_dir / "checkpoints" / str(last)).is_dir()


def test_a_fresh_run_never_touches_a_run_that_is_there(finished, flags, capsys):
    before = (finished / "metrics.jsonl").read_bytes()
    assert train.main(flags(finished)) == 2
    said = one_line(capsys)
    assert f"is in use already; continue the run there with --resume {finished}, or" in said
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_without_a_folder_each_run_gets_a_new_one_and_resume_takes_the_newest(
    finished, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    first = folder.new_run_dir(None)
    assert first.parent == Path("runs") and not first.exists()
    for age, name in enumerate(["newest", "old"]):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        os.utime(tmp_path / "runs" / name / "checkpoints", (10**9 - age, 10**9 - age))
    assert folder.newest_run_dir() == Path("runs/newest")


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_adamclip_and_gqa(flags, tmp_path):
    changed = {"optimizer": "adamclip", "attention": "gqa", "kv_heads": 1}
    assert train.main(flags(tmp_path / "run", steps=2, **changed)) == 0
    rows = select(metrics.read(tmp_path / "run"), "step")
    assert metrics.clips(rows) and np.isfinite(metrics.peak(rows)).all()


def test_a_step_is_recorded_when_the_next_one_is_under_way(finished):
    run = settings.Settings(steps=3)
    file = io.StringIO()
    record = recorder.Recorder(
        partial(metrics.write, file), run, done=0, console=Console(quiet=True)
    )
    values = {"loss": np.float32(1), "max_logits": {"attn": np.ones(2)}}
    record.step(1, values)
    assert not file.getvalue()
    record.step(2, values)
    assert json.loads(file.getvalue())["step"] == 1
    record.catch_up()
    record.catch_up()
    assert [json.loads(line)["step"] for line in file.getvalue().splitlines()] == [1, 2]


WRONG_FLAGS = {
    "steps": ({"steps": 0}, "--steps must be at least 1, got 0"),
    "negative steps": ({"steps": -5}, "--steps must be at least 1, got -5"),
    "batch": ({"batch_size": 0}, "--batch-size must be at least 1, got 0"),
    "threshold": ({"threshold": 0}, "--threshold must be above 0 and finite, got 0"),
    "negative threshold": ({"threshold": -1}, "--threshold must be above 0 and finite, got -1"),
    "NaN threshold": ({"threshold": "nan"}, "--threshold must be above 0 and finite, got nan"),
    "learning rate": ({"learning_rate": 0}, "--learning-rate must be above 0 and finite, got 0"),
    "decay": ({"weight_decay": -0.1}, "--weight-decay must be 0 or more, and finite, got -0.1"),
    "warm-up": ({"warmup": -1}, "--warmup must be 0 or more, and finite, got -1"),
    "context": (
        {"context_length": 32},
        "--context-length 32 is more than the model's --max-length",
    ),
    "batch beyond the text": ({"batch_size": 500}, "too little validation text"),
    "rope": ({"rope": 3}, "3 rotary features is odd"),
    "heads": ({"heads": 0}, "heads must be at least 1, got 0"),
    "one expert": ({"experts": 1, "d_ff": 24}, "experts must be 0 or at least 2, got 1, and 3 "),
    "width of experts": ({"experts": 4}, "at least 2, got 4, and 3 must divide d_ff, got 16"),
    "QK-norm": (
        {"attention": "mha", "qk_norm": "partial", "optimizer": "muon"},
        "qk_norm=partial is for attention=mla",
    ),
    "QK-norm and QuacK": (
        {"qk_norm": "full", "optimizer": "quack"},
        "--qk-norm full takes the norms that QuacK controls out of the logits",
    ),
    "QK-norm and clip": (
        {"qk_norm": "full"},
        "--qk-norm full undoes what QK-Clip does to the kernels before it; take --qk-norm none, or "
        "--optimizer muon",
    ),
    "soft cap": ({"soft_cap": 0}, "soft_cap must be above 0, got 0"),
    "vocabulary": ({"tokenizer": "bpe", "vocab_size": 100}, "--vocab-size 100 is too small: 257"),
    "no number": ({"steps": "many"}, "Error parsing --steps: invalid literal for int()"),
    "no choice": ({"optimizer": "sgd"}, "invalid choice 'sgd' for argument '--optimizer'"),
    "no flag": ({"stepz": 3}, "Unrecognized options: --stepz"),
    "missing data": ({"data": "/nowhere/at/all"}, "/nowhere/at/all: no such file or folder"),
    "empty prompt": ({"prompt": ""}, "--prompt must not be empty"),
    "long prompt": ({"prompt": "x" * 20}, "--prompt is 21 tokens long and leaves nothing of"),
}


def one_line(capsys):
    """What stderr has, which must be one line of an error."""
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1
    return said


@pytest.mark.parametrize(("changed", "message"), WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_wrong_flags_get_one_line_and_write_nothing(flags, tmp_path, capsys, changed, message):
    assert train.main(flags(tmp_path / "run", **changed)) == 2
    assert message in one_line(capsys)
    assert not (tmp_path / "run").exists()


WRONG_RESUMES = {
    "width": (
        ["--d-model", "32"],
        "is of another model or run: --d-model 32 (checkpoint: 16); leave",
    ),
    "vocabulary": (
        ["--tokenizer", "bpe", "--vocab-size", "300"],
        "--tokenizer bpe (checkpoint: bytes)",
    ),
    "optimizer": (["--optimizer", "muon"], "--optimizer muon (checkpoint: muonclip)"),
    "fewer steps": (["--steps", "5"], "is at step 6 already, beyond --steps; raise --steps"),
    "steps": (["--steps", "0"], "--steps must be at least 1"),
    "text": (["--data", __file__], "its text is not the one that"),
    "missing data": (["--data", "/nowhere"], "/nowhere: no such file or folder"),
}


@pytest.mark.parametrize(("more", "message"), WRONG_RESUMES.values(), ids=WRONG_RESUMES)
def test_wrong_resumes_get_one_line_and_lose_nothing(finished, capsys, more, message):
    files = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    assert train.main(["--resume", "--run-dir", str(finished), *more]) == 2
    assert message in one_line(capsys)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == files


def test_an_interrupt_before_the_first_step_and_a_folder_that_cannot_be(
    flags, tmp_path, text_file, monkeypatch, capsys
):
    assert train.main(flags(text_file / "run")) == 2
    assert "Not a directory" in one_line(capsys)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load_text", interrupted)
    assert train.main(flags(tmp_path / "run")) == 130
    assert "interrupted outside of training; what was saved" in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_nothing_to_resume(tmp_path, monkeypatch, capsys):
    assert train.main(["--resume", "--run-dir", str(tmp_path / "none")]) == 2
    assert "none: no complete checkpoint there; give the folder of a run" in one_line(capsys)
    monkeypatch.chdir(tmp_path)
    assert train.main(["--resume"]) == 2
    assert "no checkpoint to resume in runs/; start a run without --resume" in one_line(capsys)
    assert not list(tmp_path.iterdir())


def test_the_command_ends_with_the_status(tmp_path):
    command = [sys.executable, "-m", "examples.mla.train", "--data", str(tmp_path / "nowhere")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "nowhere: no such file" in done.stderr
    assert "Traceback" not in done.stdout + done.stderr
