"""A train step with QuacK and QK-Clip next to one without, at a tiny size."""

import json

import pytest

from benchmarks import train_step
from benchmarks.train_step import BASE, BOTH, OPTIMIZERS, Options, main
from examples.mla.model import ModelConfig

TINY = ModelConfig(
    vocab_size=16,
    d_model=8,
    layers=1,
    heads=2,
    nope=4,
    rope=2,
    v=4,
    q_rank=4,
    kv_rank=4,
    d_ff=8,
    max_length=8,
)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_every_optimizer_has_a_row_and_learns(tmp_path, monkeypatch, capsys):
    two = {name: OPTIMIZERS[name] for name in (BASE, BOTH)}  # the other two compile as long again
    monkeypatch.setattr(train_step, "OPTIMIZERS", two)
    losses = {}
    make_step = train_step.make_step

    def recording(optimizer, options):
        step = make_step(optimizer, options)

        def run():
            metrics = step()
            losses.setdefault(optimizer, []).append(float(metrics["loss"]))
            return metrics

        return run

    monkeypatch.setattr(train_step, "make_step", recording)
    file, picture = tmp_path / "record.json", tmp_path / "picture.png"
    options = Options(
        model=TINY, batch_size=2, context_length=4, repeats=2, json=file, picture=picture
    )
    record = main(options)
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert picture.stat().st_size > 0
    assert record["options"]["model"]["d_model"] == 8
    rows = record["rows"]
    assert [row["optimizer"] for row in rows] == ["muon", "muon, QuacK, QK-Clip"]
    for row in rows:
        assert row["steps"] == 2
        low, high = row["seconds_quartiles"]
        assert 0 < low <= row["seconds_median"] <= high
        over = row["seconds_median"] / rows[0]["seconds_median"]
        assert row["seconds_median_over_muon"] == over
    assert rows[0]["quartiles_over_muon"] == (1, 1)
    assert [t["measured"] for t in record["targets"]] == [rows[-1]["seconds_median_over_muon"]]
    assert "QuacK" in capsys.readouterr().out
    # A step for warm-up and for both turns, from the same parameters, which it changes.
    assert losses.keys() == {"muon", "quackclip"}
    assert all(len(set(each)) == 3 for each in losses.values())
    assert len({each[0] for each in losses.values()}) == 1
