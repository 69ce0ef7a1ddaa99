"""A run that an older release saved goes on with this one, with the losses that it would have had.

golden-run/ is the tiny run of conftest.py, up to step 3 of 6; its metrics are those of all 6 steps.
The release before Muon was two links, momentum and orthogonalization, wrote it.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from examples.mla import data, metrics, train
from examples.mla.metrics import column, per_head, select

GOLDEN = Path(__file__).parent / "golden-run"
# Newton–Schulz rounds to bfloat16, and sums in another order elsewhere: JAX 0.12 moves the last
# loss by 2e-4. With the momentum lost the last two losses are off by 1.5e-2 and 5e-3.
LOSSES, MAXIMA = 1e-3, 1e-2


def use_fingerprints(about, text_file):
    """Another release of the tokenizers library writes down the same vocabulary differently."""
    text = data.load_text(
        [text_file],
        installed_packages=False,
        vocab_size=data.BYTE_VOCABULARY,
        cache=text_file.parent,
    )
    about.write_text(json.dumps({**json.loads(about.read_text()), "text": text.fingerprints}))


@pytest.mark.slow
def test_a_run_of_an_older_release_goes_on(flags, text_file, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(GOLDEN, run_dir)
    use_fingerprints(run_dir / "checkpoints" / "3" / "about" / "metadata", text_file)
    assert train.main(flags(run_dir, "--resume")) == 0
    said = capsys.readouterr().out
    assert f"{run_dir}: converting the optimizer state of an older release at step 3" in said

    steps, golden = (select(metrics.read(folder), "step") for folder in (run_dir, GOLDEN))
    assert [row["step"] for row in steps] == [1, 2, 3, 4, 5, 6]
    np.testing.assert_allclose(column(steps, "loss"), column(golden, "loss"), rtol=LOSSES)
    for name in ("max_logits", "gamma"):
        found, expected = (per_head(rows, name) for rows in (steps, golden))
        assert found.keys() == expected.keys()
        for block, heads in found.items():
            np.testing.assert_allclose(heads, expected[block], rtol=MAXIMA)

    assert train.main(["--resume", "--run-dir", str(run_dir), "--steps", "7"]) == 0
    assert "older release" not in capsys.readouterr().out  # what it saved is of today's form
