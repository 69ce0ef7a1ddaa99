"""Compiled programs cost what the record says; and the comparison tells when they do not."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import budgets
from benchmarks.budgets import PROGRAMS, RECORD, Options, Program, array, cost, main, off, place
from benchmarks.hlo import parse

# To compile.
LONG = (
    "scale_by_muon",
    "muonclip",
    "muonclip, eight devices",
    "quack",
    "accumulate",
    "attention_report",
)
RECORDED = json.loads(RECORD.read_text()).get(place(), {}).get("programs")


@pytest.mark.skipif(RECORDED is None, reason=f"{RECORD.name} has no figures for {place()}")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in PROGRAMS]
)
def test_a_program_costs_what_is_recorded(name):
    """After a change that is wanted: `python -m benchmarks.budgets --write`."""
    assert off(cost(PROGRAMS[name]()), RECORDED[name]) == {}


def test_every_record_is_of_all_programs():
    for each in json.loads(RECORD.read_text()).values():
        assert each.keys() == {"date", "programs"} and each["programs"].keys() == PROGRAMS.keys()


def test_operations_are_those_that_are_dispatched():
    def loop(x):
        return jax.lax.fori_loop(0, x.shape[0], lambda i, y: jnp.sin(y) @ y, x)

    text = jax.jit(loop).lower(array(8, 8)).compile().as_text()
    found = list(budgets.operations(parse(text)))
    assert found.count("while") == 1
    # The body's product and sine, which are fusions or not, count once; all else is little.
    assert 3 <= len(found) < 15 and not set(found) & set(budgets.FREE)


def test_a_figure_that_is_off_is_shown_and_is_an_error(tmp_path, monkeypatch, capsys):
    sizes = {"one": 100}
    program = lambda: Program(jnp.sin, (array(sizes["one"]),))  # noqa: E731
    monkeypatch.setattr(budgets, "PROGRAMS", {"one": program})
    options = Options(file=tmp_path / "budgets.json")
    assert main(options) == 0
    assert f"budgets.json has no figures for {place()}" in capsys.readouterr().out
    assert main(Options(write=True, file=options.file)) == 0
    assert main(options) == 0
    sizes["one"] = 101
    assert main(options) == 0  # within 2%
    sizes["one"] = 103
    assert main(options) == 1
    assert "(+3.0%)" in capsys.readouterr().out


def test_off():
    assert off({"a": 0, "b": 101}, {"a": 0, "b": 100}) == {}
    assert off({"a": 1, "b": 97}, {"a": 0, "b": 100}) == {
        "a": float("inf"),
        "b": pytest.approx(-0.03),
    }
    assert off({"a": 1}, None) == {"a": float("inf")}
