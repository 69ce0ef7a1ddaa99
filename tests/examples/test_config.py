"""Flags: from a file, of a run to resume, and those that do not exist."""

import os
import shutil
from pathlib import Path

import pytest

import muonclip_jax as mc
from examples.mla import cli, compare, config, folder, metrics, train
from examples.mla.cli import InputError
from examples.mla.model import ModelConfig
from examples.mla.settings import Settings

from .test_train import numbers, one_line


def write(tmp_path, text):
    path = tmp_path / "flags.toml"
    path.write_text(text)
    return path


def test_the_keys_of_a_file_are_flags_and_the_command_line_wins(tmp_path):
    file = write(
        tmp_path,
        "steps = 7\nlearning-rate = 2e-3\nper_head = true\nheads = 2\n"
        'prompt = "a \\"b\\" --steps=3"\ndata = ["a.txt", "-b.txt"]\nsimulate_devices = 4\n'
        "[rates]\nfloat32 = 3.0\n",
    )
    args = config.expanded(["--config", str(file), "--steps", "9", "--no-per-head"])
    settings = cli.parse(Settings, args, prog="train")
    assert (settings.steps, settings.learning_rate, settings.per_head) == (9, 2e-3, False)
    assert settings.prompt == 'a "b" --steps=3' and settings.model.heads == 2
    assert settings.data == (Path("a.txt"), Path("-b.txt"))
    assert settings.devices.simulate_devices == 4 and settings.rates.float32 == 3


@pytest.mark.parametrize("program", [train, compare])
def test_every_program_that_trains_reads_a_file(program, tmp_path):
    args = ["--config", str(write(tmp_path, "steps = 7")), "--run-dir", str(tmp_path / "run")]
    assert program.read_settings(args).steps == 7


def test_what_a_run_was_is_written_down_and_read_again(tmp_path):
    settings = Settings(
        prompt='a "b" \\ \n \x7f [/b]',
        per_head=True,
        data=(Path("-x"), Path(os.fsdecode(b"\xff")), Path("/y")),
        weight_decay=1e-7,
        rates=mc.Rates(bfloat16=3.0, float32=1e-5),
        run_dir=tmp_path,
        model=ModelConfig(soft_cap=30.0),
    )
    config.write(settings)
    args = config.expanded(["--config", str(tmp_path / config.FILE)])
    again = cli.parse(Settings, args, prog="train")
    assert again.to_json() == settings.to_json()
    assert again.run_dir is None  # another run is elsewhere


def test_the_settings_of_a_run_start_the_same_run(finished, flags, tmp_path):
    given = train.read_settings(flags(tmp_path / "one"))
    args = ["--config", str(finished / config.FILE), "--run-dir", str(tmp_path / "two")]
    assert train.read_settings(args).to_json() == given.to_json()


WRONG_FILES = {
    "no TOML": ("steps 7", "no TOML (Expected '=' after a key"),
    "a key that is no flag": ("stepz = 7", "stepz is no flag that a file can give; did you mean"),
    "nothing near": ("xyzzy = 7", "xyzzy is no flag that a file can give (see --help)"),
    "a table": ("[model]\nheads = 2", "model.heads is no flag that a file can give; did you mean"),
    "a table in a flag": ("heads = {a = 1}", "heads.a is no flag"),
    "a table in a table": (
        "rates.float32 = {a = 1}",
        "rates.float32 is neither text, nor a number,",
    ),
    "a date": ("steps = 2020-01-01", "steps is neither text"),
    "several values": ("steps = [1, 2]", "steps takes one value"),
    "another file": ('config = "x"', "config is no flag that a file can give"),
    "a word for a number": ('steps = "many"', "Error parsing --steps: invalid literal for int()"),
    "no value": ("steps = true", "--steps"),
    "a value that does not fit": ("steps = 0", "--steps must be at least 1, got 0"),
}


@pytest.mark.parametrize(("text", "message"), WRONG_FILES.values(), ids=WRONG_FILES)
def test_a_wrong_file_gets_one_line(tmp_path, capsys, text, message):
    run_dir = tmp_path / "run"
    file = str(write(tmp_path, text))
    assert train.main(["--config", file, "--run-dir", str(run_dir)]) == 2
    assert message in one_line(capsys)
    assert not run_dir.exists()


def test_a_file_that_is_not_there_gets_one_line(tmp_path, capsys):
    assert train.main(["--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: No such file or directory" in one_line(capsys)


NEAREST = {
    "one": (["--stepz", "3"], "Unrecognized options: --stepz, 3; did you mean --steps?"),
    "no hyphen": (["--learningrate=3"], "did you mean --learning-rate?"),
    "two": (["--stepz", "3", "--dmodel", "4"], "did you mean --d-model, --steps?"),
    "of the devices": (["--simulated-devices", "4"], "did you mean --simulate-devices?"),
    "nothing near": (["--xyzzy"], "Unrecognized options: --xyzzy (see --help)"),
    "no flag at all": (["runs"], "Unrecognized options: runs (see --help)"),
}


@pytest.mark.parametrize(("args", "message"), NEAREST.values(), ids=NEAREST)
def test_flags_that_do_not_exist_get_the_nearest_one(args, message):
    with pytest.raises(InputError) as error:
        cli.parse(Settings, args, prog="train")
    assert message in str(error.value)


def test_resume_takes_a_folder_or_the_run_dir_or_the_newest(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "newest" / "checkpoints").mkdir(parents=True)

    def found(*args):
        settings = cli.parse(Settings, args, prog="train")
        return settings.resume and folder.run_dir_to_resume(settings.resume, settings.run_dir)

    assert found() is False
    assert found("--resume", "--steps", "3") == Path("runs/newest")
    assert found("--resume", "a") == found("--resume=a") == Path("a")
    assert found("--resume", "--run-dir", "b") == Path("b")
    assert found("--run-dir", "a", "--resume", "a") == Path("a")
    with pytest.raises(InputError, match="--resume a and --run-dir b are two folders"):
        found("--resume", "a", "--run-dir", "b")
    with pytest.raises(InputError, match="takes one folder or none, got a b"):
        found("--resume", "a", "b")


@pytest.mark.slow
@pytest.mark.usefixtures("no_pictures")
def test_a_folder_is_resumed_bit_for_bit(finished, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "6")
    assert train.main(["--resume", str(run_dir)]) == 0
    assert numbers(run_dir) == numbers(finished)
    assert [row["step"] for row in metrics.select(metrics.read(run_dir), "start")] == [0, 3]
