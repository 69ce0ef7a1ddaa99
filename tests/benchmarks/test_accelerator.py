"""`make accelerator`, as far as it goes without one."""

import importlib
import json
import subprocess
import sys
from typing import get_args

import pytest
import tyro

from benchmarks import accelerator, numerics


def test_numerics_hold_on_the_cpu(tmp_path, capsys):
    file = tmp_path / "record.json"
    record = numerics.main(numerics.Options(json=file))
    assert json.loads(file.read_text()) == record
    assert {row["dtype"] for row in record["rows"]} == set(numerics.DTYPES)
    assert "MuonClip's step, query" in capsys.readouterr().out


def test_a_wrong_result_ends_the_run(monkeypatch):
    bad = numerics.row("x", "float32", [1.0, 2.0], [1.0, 2.1], 20)
    assert bad["error"] == pytest.approx(0.1 / 2.1)
    for part in ("orthogonalized", "attended", "stepped"):
        monkeypatch.setattr(numerics, part, lambda: iter([bad]))
    with pytest.raises(SystemExit, match="3 of 3 errors are larger than allowed"):
        numerics.main(numerics.Options())
    nothing = numerics.row("x", "float32", [float("nan")], [1.0], 20)
    monkeypatch.setattr(numerics, "stepped", lambda: iter([nothing]))
    with pytest.raises(SystemExit, match="3 of 3"):
        numerics.main(numerics.Options())


def test_a_machine_without_one_is_told_so():
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.accelerator"], capture_output=True, text=True
    )
    assert found.returncode == 2
    assert found.stdout == "There is no accelerator here: JAX sees no GPU and no TPU.\n"


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A device that is not there; of each part its command line alone."""
    monkeypatch.setattr(accelerator, "find_device", lambda: "NVIDIA H100 80GB HBM3")
    commands = []

    def run(command, timeout):
        commands.append(command)
        if "benchmarks.attention" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, int("benchmarks.train_step" in command))

    monkeypatch.setattr(accelerator.subprocess, "run", run)
    return commands, accelerator.Options(records=tmp_path / "records")


def test_all_parts_run_and_what_fails_is_said(pretended, capsys):
    commands, options = pretended
    assert accelerator.main(options) == 1
    assert [command[2] for command in commands] == [
        f"benchmarks.{part}" for part in get_args(accelerator.Part)
    ]
    assert "-nvidia-h100-80gb-hbm3-numerics.json" in commands[0][4]
    said = capsys.readouterr().out
    assert "attention took more than 90 s\ntrain_step ended with status 1\n" in said


def test_the_limits_add_up_to_ten_minutes():
    assert sum(limit for _, limit in accelerator.LIMITS.values()) <= 600


@pytest.mark.parametrize("part", get_args(accelerator.Part))
def test_parts_know_their_options(part):
    options = importlib.import_module(f"benchmarks.{part}").Options
    arguments, _ = accelerator.LIMITS[part]
    assert tyro.cli(options, args=list(arguments)) != options() or not arguments
