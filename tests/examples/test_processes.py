"""The example in two processes: the same run as in one, killed in a save, stopped by a signal."""

import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

from examples.mla import devices, metrics
from examples.mla.cli import InputError
from examples.mla.devices import in_every_process
from examples.mla.metrics import select

LIMIT = 300  # seconds that nothing here comes near


class TwoProcesses:
    """A run in two processes of one device each; whatever still runs at the end is killed.

    Args:
      flags: Those of both.
      second: The module that the second one runs, and arguments of its own.
    """

    def __init__(self, flags, second=("examples.mla.train",)):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            address = f"localhost:{free.getsockname()[1]}"
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir
        }
        flags = [*flags, "--mesh", "fsdp=2", "--simulate-devices", "1"]
        flags += ["--coordinator", address, "--processes", "2", "--process"]
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-m", *program, *flags, str(number)],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
            )
            for number, program in enumerate([("examples.mla.train",), second])
        ]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.communicate()

    def end(self):
        """Waits for both; returns their exit statuses and what they said."""
        said = [process.communicate(timeout=LIMIT)[0] for process in self.processes]
        return [process.returncode for process in self.processes], said


def measured(run_dir, events=("step", "eval", "end")):
    """What was measured, without what the clock says."""
    rows = [row for row in metrics.read(run_dir) if row["event"] in events]
    return [{k: v for k, v in row.items() if k not in ("seconds", "compiled")} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(flags, tmp_path_factory):
    """The folder of the run that `finished` is, in two processes, and what they said."""
    run_dir = tmp_path_factory.mktemp("runs") / "two"
    with TwoProcesses(flags(run_dir)) as two:
        statuses, said = two.end()
    assert statuses == [0, 0], said
    return run_dir, said


@pytest.mark.slow
def test_two_processes_learn_what_one_does(uninterrupted, finished):
    run_dir, _ = uninterrupted
    two, one = (
        [row["loss"] for row in measured(folder, ("step", "eval"))]
        for folder in (run_dir, finished)
    )
    # Before the first update, float32 sums in another order; after it Newton–Schulz, which rounds
    # to bfloat16 (4e-3 of an entry), of updates that move the loss by up to half of itself.
    np.testing.assert_allclose(two[:2], one[:2], rtol=1e-5)
    np.testing.assert_allclose(two, one, rtol=1e-2)
    assert metrics.read(run_dir)[0]["facts"]["device"] == "2 × cpu in 2 processes, mesh fsdp=2"


@pytest.mark.slow
def test_only_the_first_process_prints_and_reports(uninterrupted):
    run_dir, (first, second) = uninterrupted
    assert f"report: {run_dir}/report.html" in first and (run_dir / "report.html").exists()
    assert all(line.startswith("[Gloo]") for line in second.splitlines())


@pytest.mark.slow
def test_a_process_killed_in_a_save_and_then_one_stopped(uninterrupted, flags, tmp_path):
    """The run goes on from the last complete checkpoint with the exact next losses; a signal to one
    process then stops both at the same step, and what they saved is complete."""
    run_dir = tmp_path / "run"
    interrupted = "tests.examples.interrupted"
    with TwoProcesses(flags(run_dir), second=(interrupted, "killed", "6")) as two:
        assert two.processes[1].wait(LIMIT) == -signal.SIGKILL
    assert select(metrics.read(run_dir), "step")[-1]["step"] == 6
    complete, begun = sorted(os.listdir(run_dir / "checkpoints"))
    assert complete == "3" and begun.startswith("6.")

    resume = ["--resume", "--run-dir", str(run_dir)]
    with TwoProcesses(resume, second=(interrupted, "stopped", "4")) as two:
        statuses, (said, _) = two.end()
    assert statuses == [128 + signal.SIGTERM] * 2, said
    # Step 5 was under way when the second process told the first.
    assert f"SIGTERM: saved step 5; to go on: --resume {run_dir}" in said
    assert sorted(os.listdir(run_dir / "checkpoints")) == ["3", "5"]
    assert [row["step"] for row in select(metrics.read(run_dir), "start")] == [0, 3]
    same = measured(run_dir)
    assert same[-1]["step"] == 5 and same == measured(uninterrupted[0])[: len(same)]


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    def of_two(others_digest):
        monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(
            devices.multihost_utils,
            "process_allgather",
            lambda mine: np.stack([mine, mine if others_digest is None else others_digest]),
        )

    def fail():
        raise InputError("no such file")

    of_two(None)
    assert in_every_process(lambda: 3, alike=str) == 3
    of_two(np.zeros(32, np.uint8))
    with pytest.raises(InputError, match="another process cannot start; its own output says why"):
        in_every_process(lambda: 3)
    with pytest.raises(InputError, match="no such file"):
        in_every_process(fail)
    of_two(np.ones(32, np.uint8))
    with pytest.raises(InputError, match="the processes have different flags or text; give all of"):
        in_every_process(lambda: 3)
