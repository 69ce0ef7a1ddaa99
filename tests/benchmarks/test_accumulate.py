"""What accumulation costs, at a tiny size."""

import json

import pytest

from benchmarks.accumulate import Options, main


@pytest.mark.slow
def test_accumulate_executes_one_update_and_sees_all_maxima(tmp_path, capsys):
    file = tmp_path / "record.json"
    options = Options(
        layers=1, width=16, heads=2, vocab_size=8, every=(3,), repeats=1, dtype="float32", json=file
    )
    record = main(options)
    ours, theirs = record["rows"]
    assert (ours["name"], theirs["name"]) == ("accumulate", "MultiSteps")
    assert theirs["flops_per_real_step"] == 3 * ours["flops_per_real_step"] > 0
    assert (ours["heads_clipped"], theirs["heads_clipped"]) == (2, 0)
    assert all(row["seconds_per_micro_step"] > 0 for row in record["rows"])
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert "2 of 2" in capsys.readouterr().out
