"""Turns, rates of matrix products, records and targets."""

import dataclasses
import json
from pathlib import Path

import jax.numpy as jnp
import pytest

from benchmarks import peers, targets, timing
from benchmarks.targets import Target


@pytest.mark.parametrize("warm_up", [True, False])
def test_functions_take_turns_every_other_one_reversed(warm_up):
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = timing.interleaved(functions, repeats=3, warm_up=warm_up)
    assert "".join(calls) == ("abc" if warm_up else "") + "abc" + "cba" + "abc"
    assert {name: len(each) for name, each in seconds.items()} == {"a": 3, "b": 3, "c": 3}


def test_turns_end_whole_when_time_is_up():
    calls = []
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    seconds = timing.interleaved(functions, repeats=5, seconds_at_most=0.0, warm_up=False)
    assert calls == ["a", "b"]
    assert [len(each) for each in seconds.values()] == [1, 1]


def test_medians_are_of_each_by_itself():
    assert timing.medians({"a": [3.0, 1.0, 2.0], "b": [5.0]}) == {"a": 2.0, "b": 5.0}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_every_way_of_a_product_computes_it(dtype, monkeypatch):
    monkeypatch.setitem(timing.SIZES, "cpu", ((4, 16, 8), (16, 16, 16)))
    products = timing.matmuls(dtype)
    assert {product.flops for product in products} == {2 * 4 * 16 * 8, 2 * 16 * 16 * 16}
    by_size = {}
    for product in products:
        by_size.setdefault(product.flops, []).append(peers.as_array(product.run()))
    for results in by_size.values():
        for result in results[1:]:  # of some 4 in size, rounded to bfloat16 or not
            assert jnp.allclose(result, results[0], atol=0.1)
    rates = timing.matmul_rates(products, repeats=1)
    assert rates.keys() == {product.label for product in products}
    assert all(rate > 0 for rate in rates.values())
    fastest = timing.fastest_matmuls(dtype, count=1, repeats=1)
    assert len(fastest) == 1 and fastest[0].label in rates


@pytest.mark.parametrize(
    ("flags", "kind"),
    [({"amx_tile", "amx_bf16"}, "cpu with AMX"), ({"avx512_bf16"}, "cpu without AMX")],
)
def test_the_kind_is_that_of_the_processor(flags, kind, monkeypatch):
    monkeypatch.setattr(timing, "processor_flags", lambda: frozenset(flags))
    assert timing.kind() == kind
    assert timing.processor()["flags"] == [f for f in timing._MULTIPLIES if f in flags]


def test_a_record_tells_what_its_rows_depend_on(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class Options:
        size: int = 3
        json: Path | None = tmp_path / "record.json"
        picture: Path | None = None

    record = timing.record(Options(), [{"seconds_median": 0.5}], missing=["torch"])
    assert record["options"] == {"size": 3}
    assert record["rows"] == [{"seconds_median": 0.5}]
    assert record["missing"] == ["torch"]
    assert record["processor"].keys() == {"flags", "declared_gflops", "measured_gflops"}
    assert all(rate > 0 for rate in record["processor"]["measured_gflops"].values())
    assert record["versions"].keys() >= {"python", "jax", "jaxlib", "optax", "flax"}
    timing.write(record, Options.json)
    assert json.loads(Options.json.read_text()) == record
    timing.write(record, None)  # nowhere


def test_targets_hold_up_to_their_bounds(capsys):
    found = [
        Target("speed", 2.0, ">=", 2.0),
        Target("cost", 1.0, "<=", 1.0),
        Target("slow", 1.9, ">=", 2.0),
        Target("dear", 1.1, "<=", 1.0),
        Target("broken", float("nan"), "<=", 1.0),
    ]
    assert [row["holds"] for row in targets.as_rows(found)] == [True, True, False, False, False]
    targets.show(found)
    assert capsys.readouterr().out.count("no") == 3
    targets.show([])
    assert capsys.readouterr().out == ""
