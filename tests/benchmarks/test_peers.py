"""Which peers there are rows of."""

import types

import pytest

from benchmarks import peers


@pytest.mark.parametrize("times", [0.5, 1.9, 400])
def test_pytorch_has_no_rows_where_its_bfloat16_would_take_hours(monkeypatch, times):
    torch = types.SimpleNamespace(bfloat16="bfloat16", float32="float32")
    seconds = {torch.bfloat16: times, torch.float32: 1}
    monkeypatch.setattr(peers, "torch", torch)
    monkeypatch.setattr(peers, "_seconds_of_product", seconds.get)
    monkeypatch.setattr(peers, "_too_slow", peers._too_slow.__wrapped__)  # keeps no answer
    why = peers.torch_missing()
    assert peers.missing(["torch"]) == ([why] if why else [])
    assert (why is None) == (times < 2) and (why is None or "400 times slower than float32" in why)
