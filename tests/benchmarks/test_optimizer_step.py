"""Whole optimizer steps next to the peers', at a tiny size."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from benchmarks import optimizer_step, peers, timing
from benchmarks.optimizer_step import Options, main

TINY = {"layers": 1, "width": 8, "vocab_size": 16, "repeats": 1, "compile_repeats": 1}


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_every_row_has_all_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(peers, "torch", None)
    file, picture = tmp_path / "record.json", tmp_path / "picture.png"
    options = Options(
        **TINY, compile_layers=(2,), run=("ours", "optax", "torch"), json=file, picture=picture
    )
    record = main(options)
    assert json.loads(file.read_text()) == json.loads(json.dumps(record))
    assert picture.stat().st_size > 0
    assert record["missing"] == [peers.torch_missing()]
    assert record["targets"] == []  # which are for another width
    assert "not installed" in capsys.readouterr().out

    ours, optax, *compiled_only = rows = record["rows"]
    assert [(r["layers"], r["method"]) for r in rows] == [
        *((1, "ours"), (1, "optax")),
        *((2, "ours"), (2, "optax")),
    ]
    for row in (ours, optax):
        assert row["ratio_vs_optax"] == optax["seconds_median"] / row["seconds_median"]
    for row in compiled_only:
        assert row["seconds_median"] is row["ratio_vs_optax"] is None
    for row in rows:
        assert row["ratio_vs_torch"] is None
        for name in ("compile_seconds", "compile_share_of_optax", "temp_bytes"):
            assert math.isfinite(row[name]) and row[name] > 0


def test_ours_and_optax_train_the_same_parameters_by_the_same_optimizers():
    """Of every leaf both have a momentum, and only AdamW's leaves have a second moment."""
    shapes = optimizer_step.decoder(layers=1, width=8, vocab_size=16)
    sizes = sorted(x.size for x in jax.tree.leaves(shapes))
    adamws = [8, 8, 8, 128]
    for entry in optimizer_step.entries().values():
        state = jax.eval_shape(entry.tx.init, shapes)
        like_params = sorted(x.size for x in jax.tree.leaves(state) if x.ndim and x.size > 3)
        assert like_params == sorted(sizes + adamws)


@pytest.mark.usefixtures("quick_compilation")
def test_ours_and_optax_move_parameters_alike():
    params = {
        "up": {"kernel": jax.random.normal(jax.random.key(0), (8, 32))},
        "norm": {"scale": jnp.ones(8)},
    }
    entries = optimizer_step.entries()
    moved = {}
    for label in ("ours-float32", "optax"):
        entry = entries[label]
        updates, _ = entry.tx.update(params, entry.tx.init(params), params)
        moved[label] = updates
    ours, optaxs = moved.values()
    kernels = ours["up"]["kernel"], optaxs["up"]["kernel"]
    # Polynomials with singular values 0.3 from 1 at most, both; decay is a tenth of each update.
    assert jnp.linalg.norm(kernels[0] - kernels[1]) < 0.4 * jnp.linalg.norm(kernels[1])
    assert jnp.allclose(ours["norm"]["scale"][0], -3e-4, rtol=0.2)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_a_training_goes_on_by_a_step_at_each_call():
    entry = optimizer_step.entries()["ours-float32"]
    shapes = optimizer_step.decoder(layers=1, width=8, vocab_size=16)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)
    compiled = optimizer_step.lower_step(entry, shapes).compile()
    training = optimizer_step.Training(entry, compiled, params)
    first = jax.tree.map(jnp.copy, training())
    second = training()
    for before, one, two in zip(*map(jax.tree.leaves, (params, first, second)), strict=True):
        assert (before > one).all() and (one > two).all()  # down a gradient of ones


def test_targets_are_those_of_their_decoder(monkeypatch):
    monkeypatch.setattr(timing, "kind", lambda: "cpu with AMX")
    row = {
        "layers": 48,
        "method": "ours",
        "dtype": "bfloat16",
        "compile_share_of_optax": 0.1,
    }
    (found,) = optimizer_step.asked([row, {**row, "method": "optax"}], Options())
    assert (found.measured, found.relation, found.asked) == (0.1, "<=", 0.2)
    assert optimizer_step.asked([row], Options(width=8)) == []
    monkeypatch.setattr(timing, "kind", lambda: "cpu without AMX")
    assert optimizer_step.asked([row], Options()) == []


def test_torch_makes_the_same_step(monkeypatch):
    pytest.importorskip("torch")
    make, made = peers._parameters, []
    monkeypatch.setattr(peers, "_parameters", lambda x: made.append(make(x)) or made[-1])
    kernel, scale = jax.random.normal(jax.random.key(0), (8, 32)), jnp.ones(8)
    steps = peers.torch_steps(["torch"], [kernel], [scale], learning_rate=3e-4, weight_decay=0.1)
    assert list(steps) == ["torch"]
    steps["torch"]()
    (new_kernel,), (new_scale,) = ([peers.as_array(x.detach()) for x in each] for each in made)

    entry = optimizer_step.entries()["optax"]
    params = {"up": {"kernel": kernel}}
    updates, _ = entry.tx.update(params, entry.tx.init(params), params)
    expected = updates["up"]["kernel"]
    # The same five polynomials, in PyTorch in bfloat16.
    assert jnp.linalg.norm(new_kernel - kernel - expected) < 0.1 * jnp.linalg.norm(expected)
    # Adam's first step is the learning rate; a parameter near 1 has eps of 1e-7.
    assert jnp.allclose(new_scale - scale, -3e-4 * (1 + 0.1), atol=2e-7)
