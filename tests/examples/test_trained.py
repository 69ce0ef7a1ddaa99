"""What is done with a run's newest checkpoint: sampling and evaluation."""

import math
import re
import shutil

import jax
import numpy as np
import pytest

from examples.mla import data, evaluate, metrics, sample, trained
from examples.mla.metrics import select

from .test_train import one_line


def test_the_sample_of_the_report_is_drawn_again_from_the_folder_alone(finished, tmp_path, capsys):
    run_dir = shutil.copytree(finished, tmp_path / "moved")
    assert sample.main([str(run_dir)]) == 0
    (end,) = select(metrics.read(finished), "end")
    assert capsys.readouterr().out == end["prompt"] + end["sample"] + "\n"


def test_what_is_given_is_taken(finished, capsys):
    def drawn(*args):
        assert sample.main([str(finished), "--prompt", "x = ", *args]) == 0
        return capsys.readouterr().out.removeprefix("x = ")

    likeliest = drawn("--temperature", "0", "--sample-tokens", "3")
    assert drawn("--temperature", "0", "--sample-tokens", "3", "--seed", "7") == likeliest
    assert len({drawn("--temperature", "5", "--seed", seed) for seed in "1234"}) > 1


def shown(capsys):
    """The numbers of the table, by label."""
    lines = re.findall(r"│ (.+?) +│ +(\S+)", capsys.readouterr().out)
    return {label: float(value.replace(",", "")) for label, value in lines}


def test_the_held_out_text_is_measured_whole(finished, capsys):
    assert evaluate.main([str(finished)]) == 0
    found = shown(capsys)
    run = trained.load(finished)
    text = evaluate.unseen_text(run, ())
    windows = data.windows(text.valid, 8)
    assert len(windows) % 2 == 0  # batches of two leave nothing out
    rows, columns = np.ogrid[: len(windows), :8]
    loss = float(
        -jax.nn.log_softmax(run.model(windows[:, :-1]))[rows, columns, windows[:, 1:]].mean()
    )
    assert found["checkpoint, step"] == 6 and found["tokens"] == windows[:, 1:].size
    assert found["validation loss (nats per token)"] == pytest.approx(loss, abs=6e-4)  # 3 digits
    assert found["validation perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)


def test_other_text_is_measured_all_of_it(finished, tmp_path, capsys):
    (tmp_path / "other.txt").write_text("zyx wvu\n" * 100)
    args = ["--data", str(tmp_path), "--batch-size", "4", "--context-length", "16"]
    assert evaluate.main([str(finished), *args]) == 0
    found = shown(capsys)
    assert 800 - 64 < found["tokens"] <= 800
    assert found["validation loss (nats per token)"] > 3


def replaced(name, change):
    def fault(run_dir):
        path = run_dir / name
        path.write_bytes(change(path.read_bytes()))

    return fault


WRONG_FOLDERS = {
    "no run": (lambda d: shutil.rmtree(d), "run: no complete checkpoint there; give the folder of"),
    "no checkpoint": (lambda d: shutil.rmtree(d / "checkpoints"), "no complete checkpoint there"),
    "no tokenizer": (
        lambda d: (d / trained.TOKENIZER).unlink(),
        "tokenizer.json: no such file; a run of an older release gets it with --resume",
    ),
    "another tokenizer": (
        replaced(trained.TOKENIZER, lambda c: c.replace(b"Byte", b"Eyte")),
        "tokenizer.json: not the tokenizer of this run's checkpoint",
    ),
    "no text": (replaced(trained.TOKENIZER, lambda c: b"\xff" + c), "not the tokenizer of this"),
}


@pytest.mark.parametrize("program", [sample, evaluate])
@pytest.mark.parametrize(("fault", "message"), WRONG_FOLDERS.values(), ids=WRONG_FOLDERS)
def test_a_wrong_folder_gets_one_line(finished, tmp_path, capsys, program, fault, message):
    run_dir = shutil.copytree(finished, tmp_path / "run")
    fault(run_dir)
    assert program.main([str(run_dir)]) == 2
    assert message in one_line(capsys)


WRONG_FLAGS = {
    "a long prompt": (sample, ["--prompt", "x" * 20], "--prompt is 21 tokens long and leaves"),
    "no prompt": (sample, ["--prompt", ""], "--prompt must not be empty"),
    "no tokens": (sample, ["--sample-tokens", "0"], "--sample-tokens must be at least 1, got 0"),
    "no flag": (sample, ["--temprature", "1"], "did you mean --temperature?"),
    "a long context": (evaluate, ["--context-length", "99"], "--context-length 99 is more than"),
    "little text": (evaluate, ["--batch-size", "500"], "too little validation text"),
    "no text": (evaluate, ["--data", "/nowhere"], "/nowhere: no such file or folder"),
}


@pytest.mark.parametrize(("program", "more", "message"), WRONG_FLAGS.values(), ids=WRONG_FLAGS)
def test_wrong_flags_get_one_line(finished, capsys, program, more, message):
    assert program.main([str(finished), *more]) == 2
    assert message in one_line(capsys)


def test_text_that_has_changed_since_the_run_is_not_taken_for_held_out(
    finished, tmp_path, monkeypatch, capsys
):
    run = trained.load(finished)
    monkeypatch.setattr(
        trained,
        "load",
        lambda _: type(run)(
            run.settings, run.tokenizer, {**run.fingerprints, "text": "other"}, run.model, run.step
        ),
    )
    assert evaluate.main([str(finished)]) == 2
    assert "what it held out is not known; give other text with --data" in one_line(capsys)
