"""What the compiler says QuacK and QK-Clip cost."""

import json

import pytest

from benchmarks import overhead
from benchmarks.overhead import Options, main

BOTH = "muon, QuacK, QK-Clip"


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_quack_and_qk_clip_together_add_at_most_two_percent(
    attention, tmp_path, capsys, monkeypatch
):
    """A twelfth of the model of 12 layers: one, at full width, and as much of the embedding."""
    chains = overhead.chains
    ends = lambda options: {name: chains(options)[name] for name in ("muon", BOTH)}  # noqa: E731
    monkeypatch.setattr(overhead, "chains", ends)  # the two between compile as long again
    file = tmp_path / "record.json"
    record = main(Options(layers=1, vocab_size=50304 // 12, attention=attention, json=file))
    added = record["added"][BOTH]
    assert 0 < added["flops"] <= 0.02
    assert 0 < added["bytes"] <= 0.02
    assert json.loads(file.read_text()) == record
    assert "QuacK, QK-Clip" in capsys.readouterr().out
