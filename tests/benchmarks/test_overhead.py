"""What the compiler says QuacK and QK-Clip cost."""

import json

import pytest

from benchmarks.overhead import Options, main


@pytest.mark.parametrize("attention", ["mha", "mla"])
def test_quack_and_qk_clip_together_add_at_most_two_percent(attention, tmp_path, capsys):
    """Full width, as the shares depend on it, of one layer; the embedding would only dilute."""
    file = tmp_path / "record.json"
    record = main(Options(layers=1, vocab_size=8, attention=attention, json=file))
    added = record["added"]["muon, QuacK, QK-Clip"]
    assert 0 < added["flops"] <= 0.02
    assert 0 < added["bytes"] <= 0.02
    assert json.loads(file.read_text()) == record
    assert "QuacK, QK-Clip" in capsys.readouterr().out
