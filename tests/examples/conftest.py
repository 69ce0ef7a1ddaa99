"""A run of the example that is as small as it can be, made once."""

import fcntl
import pathlib

import pytest
from matplotlib import figure

from examples.mla import train

TINY = {
    "--tokenizer": "bytes",
    "--d-model": "16",
    "--layers": "1",
    "--heads": "2",
    "--nope": "4",
    "--rope": "2",
    "--v": "4",
    "--q-rank": "8",
    "--kv-rank": "8",
    "--d-ff": "16",
    "--max-length": "16",
    "--context-length": "8",
    "--batch-size": "2",
    "--steps": "6",
    "--save-every": "3",
    "--eval-every": "3",
    "--eval-batches": "2",
    "--threshold": "0.5",
    "--learning-rate": "0.1",
    "--warmup": "2",
    "--sample-tokens": "5",
}


def made_once(folder, make):
    """`folder`, made by whichever worker comes first; the others wait for it."""
    with open(f"{folder}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (done := pathlib.Path(f"{folder}.done")).exists():
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def text_file(shared_folder):
    def write(folder):
        folder.mkdir()
        lines = (f"def f{i}(x):\n    return x + {i}\n" for i in range(300))
        (folder / "text.txt").write_text("".join(lines))

    return made_once(shared_folder / "text", write) / "text.txt"


@pytest.fixture(scope="session")
def flags(text_file):
    """Arguments of a tiny run in `run_dir`, with changes: `flags(run_dir, steps=3)`."""

    def make(run_dir, *more, **changed):
        renamed = {"--" + name.replace("_", "-"): str(value) for name, value in changed.items()}
        given = {
            **TINY,
            "--data": str(text_file),
            "--cache-dir": str(text_file.parent / "cache"),
            "--run-dir": str(run_dir),
            **renamed,
        }
        return [word for pair in given.items() for word in pair] + list(more)

    return make


@pytest.fixture(scope="session")
def finished(flags, shared_folder):
    """The folder of a finished run."""

    def run(run_dir):
        assert train.main(flags(run_dir)) == 0

    return made_once(shared_folder / "finished", run)


@pytest.fixture
def no_pictures(monkeypatch):
    """For runs whose report is not looked at: drawing it takes longer than a tiny run."""
    monkeypatch.setattr(figure.Figure, "savefig", lambda *_, **__: None)
