"""What the compiler says QuacK and QK-Clip cost."""

import json

import pytest

from benchmarks.overhead import Options, main


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_quack_and_qk_clip_together_add_at_most_two_percent(attention, tmp_path, capsys):
    """A twelfth of the model of 12 layers: one, at full width, and as much of the embedding."""
    file = tmp_path / "record.json"
    record = main(Options(layers=1, vocab_size=50304 // 12, attention=attention, json=file))
    added = record["added"]["muon, QuacK, QK-Clip"]
    assert 0 < added["flops"] <= 0.02
    assert 0 < added["bytes"] <= 0.02
    assert json.loads(file.read_text()) == record
    assert "QuacK, QK-Clip" in capsys.readouterr().out
