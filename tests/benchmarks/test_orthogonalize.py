"""`mc.orthogonalize` next to its peers, at a tiny size."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import orthogonalize, peers, timing
from benchmarks.compiled import dots, flops
from benchmarks.orthogonalize import Options, main

SHAPES = ((16, 48),)
DTYPES, METHODS = ("bfloat16", "float32"), ("auto",)


@pytest.fixture(autouse=True)
def small_products(monkeypatch):
    monkeypatch.setitem(timing.SIZES, "cpu", ((64, 64, 64),))


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_every_row_has_all_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "torch", None)
    file, picture = tmp_path / "record.json", tmp_path / "picture.png"
    record = main(Options(shapes=SHAPES, methods=METHODS, repeats=1, json=file, picture=picture))
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert picture.stat().st_size > 0
    assert record["missing"] == [peers.torch_missing()]
    assert record["missing"][0] in " ".join(capsys.readouterr().out.split())

    rows = record["rows"]
    entries = [(method, dtype) for dtype in DTYPES for method in METHODS]
    entries += [("optax", "float32"), ("optax", "bfloat16")]
    assert [(r["shape"], r["method"], r["dtype"]) for r in rows] == [
        (shape, *entry) for shape in SHAPES for entry in entries
    ]
    for row in rows:
        assert row["ratio_vs_torch"] is row["ratio_vs_torch_compiled"] is None
        figures = {k: v for k, v in row.items() if isinstance(v, float)}
        assert all(math.isfinite(v) and v > 0 for v in figures.values())
        assert figures.keys() >= {
            *("seconds_median", "ratio_vs_optax", "ratio_vs_optax_bf16", "fraction_of_matmul_peak"),
            *("orthogonality_error", "optax_orthogonality_error", "hard_largest_singular_value"),
        }
        # All five-step schedules: a Gaussian's error is some 0.2 to 0.4, and nothing blows up.
        assert row["orthogonality_error"] < 0.5
        assert row["hard_largest_singular_value"] < 1.3
        optax = next(r for r in rows if (*r.values(),)[:3] == (row["shape"], "float32", "optax"))
        assert row["ratio_vs_optax"] == optax["seconds_median"] / row["seconds_median"]
        assert row["optax_orthogonality_error"] == optax["orthogonality_error"]
        rate = orthogonalize.standard_flops(*row["shape"], steps=5) / row["seconds_median"]
        peak = row["matmul_peak_flops_per_second"]
        assert row["fraction_of_matmul_peak"] == pytest.approx(rate / peak)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_standard_flops_are_those_that_optax_executes(shape):
    compiled = peers.optax_orthogonalize.lower(jnp.ones(shape)).compile()
    assert orthogonalize.standard_flops(*shape, steps=5) == flops(dots(compiled))


def test_optax_is_the_same_iteration_as_in_its_optimizer():
    x = jax.random.normal(jax.random.key(0), (8, 24))
    u, _, vt = jnp.linalg.svd(x, full_matrices=False)
    result = peers.optax_orthogonalize(x)
    # Its singular values are within 0.3 of 1 on [0.01, 1], its singular vectors those of x.
    assert jnp.abs(jnp.diag(u.T @ result @ vt.T) - 1).max() < 0.33


def test_flops_are_of_the_steps_that_run():
    entries = orthogonalize.entries(Options(schedule="polar_express_4", torch=()))
    assert {entry.method: entry.steps for entry in entries.values()} == {
        **dict.fromkeys(("auto", "standard", "gram"), 4),
        "optax": 5,
    }


def test_targets_are_asked_of_method_auto_only(monkeypatch):
    monkeypatch.setattr(timing, "kind", lambda: "cpu with AMX")
    row = {
        "shape": (1024, 1024),
        "dtype": "float32",
        "method": "auto",
        "ratio_vs_optax": 1.5,
        "orthogonality_error": 0.2,
        "optax_orthogonality_error": 0.3,
    }
    found = orthogonalize.asked([row, {**row, "method": "gram"}, {**row, "shape": (8, 8)}])
    assert [(t.measured, t.relation, t.asked) for t in found] == [
        (1.5, ">=", 1.4),
        (0.2, "<=", 0.3),
    ]
    absent = {**row, "dtype": "bfloat16", "ratio_vs_optax_bf16": 2.0, "ratio_vs_torch": None}
    assert not any("torch" in t.what for t in orthogonalize.asked([absent]))
    # Where float32 is what comes, it is asked for, and bfloat16 is not.
    monkeypatch.setattr(timing, "kind", lambda: "cpu without AMX")
    assert [t.asked for t in orthogonalize.asked([row])] == [1.7, 0.3]
    assert orthogonalize.asked([absent]) == []


def test_the_graded_matrix_is_harder():
    sigma = jnp.linalg.svd(orthogonalize.graded(16, 48), compute_uv=False)
    assert sigma[-1] / sigma[0] < 1e-6
    sigma = jnp.linalg.svd(orthogonalize.gaussian(16, 48), compute_uv=False)
    assert sigma[-1] / sigma[0] > 0.1


def test_torch_computes_what_optax_computes():
    pytest.importorskip("torch")
    x = orthogonalize.gaussian(16, 48)
    result = peers.as_array(peers.torch_iterations(["torch"])["torch"](x)())
    expected = peers.optax_orthogonalize(x)
    # In bfloat16, whose eps is 0.008; it adds up over five steps to some 0.015.
    assert jnp.linalg.norm(result - expected) < 0.05 * jnp.linalg.norm(expected)
