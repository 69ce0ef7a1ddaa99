"""A run of the example that is as small as it can be, made once."""

import jax
import pytest

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


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """Every run compiles the same programs: keep them."""
    jax.config.update("jax_compilation_cache_dir", str(tmp_path_factory.mktemp("xla")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("".join(f"def f{i}(x):\n    return x + {i}\n" for i in range(300)))
    return path


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
def finished(flags, tmp_path_factory):
    """The folder of a finished run."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    assert train.main(flags(run_dir)) == 0
    return run_dir
