"""The study of learning rates over widths."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from studies.common import records
from studies.common.chosen import around_the_best
from studies.common.model import init_params
from studies.common.study import Grid
from studies.transfer.__main__ import RULES, STUDY, TINY, label_of, rates, settings
from studies.transfer.report import by_rule, log_best, lowest, nearest, predicted, report

SMOKE = settings(TINY, steps=20, warmup=2)


def record(rule, width, rate, seed, loss):
    return {
        "setting": label_of(rule, width, rate),
        "seed": seed,
        "model": {"d_model": width},
        "optimizer": {"learning_rate": rate},
        "measurements": [{"valid_loss": 9.0}, {"valid_loss": loss}],
    }


def bowl(rule, rate, best, seed):
    """A loss that a parabola over log2 of the rate is, lowest at `best`; seeds shift it."""
    return 3.0 + 0.1 * seed + 0.2 * np.log2(rate / best) ** 2


def a_run_of(rule, bests, seeds=2):
    """The records of a rule whose best rates over widths are these."""
    return {
        label_of(rule, width, rate): [
            record(rule, width, rate, seed, bowl(rule, rate, best, seed)) for seed in range(seeds)
        ]
        for width, best in bests.items()
        for rate in rates(rule)
    }


@pytest.mark.parametrize("best", [0.013, 0.02, 0.05])
def test_the_vertex_is_found(best):
    each = [0.005 * 2**k for k in range(6)]
    losses = [bowl("", rate, best, 0) for rate in each]
    assert 2 ** log_best(each, losses) == pytest.approx(best)
    assert log_best(each[:2], losses[:2]) == np.log2(each[1])  # an end of them
    assert log_best(each, [1.0, np.nan, *losses[2:]]) == np.log2(each[0])


def test_reported_shifts_and_costs_are_those_of_the_records(tmp_path):
    """match_adam's best rate halves from 64 to 256, as muP has it, jordan's stays."""
    runs = a_run_of("match_adam", {64: 0.02, 128: 0.014, 256: 0.01})
    runs |= a_run_of("jordan", {64: 0.04, 256: 0.04})
    rules = by_rule(runs)
    assert predicted("match_adam", rules["match_adam"]) == pytest.approx(0.5)
    assert predicted("jordan", rules["jordan"]) == predicted("hyperball", {64: {}, 256: {}}) == 1
    assert lowest(rules["match_adam"][64]) == 0.02 and nearest(rules["jordan"][64], 0.03) == 0.04
    text = report(runs, None, tmp_path)
    assert "| match_adam | 0.02 | 0.014 | 0.01 | -1.00 [-1.00, -1.00] (2 seeds) | -1.00 |" in text
    assert "| jordan | 0.04 |  | 0.04 | +0.00 [+0.00, +0.00] (2 seeds)" in text
    # One step of the grid too high costs 0.2; the ratio of mc.scaling takes it away.
    assert (
        "| match_adam | 0.02 | 0.01 | +0.200 [+0.200, +0.200] (2 seeds) | the same rate |" in text
    )
    assert (tmp_path / "rates.png").exists()


def test_the_best_of_two_seeds_gets_more(tmp_path):
    file = tmp_path / "cpu.jsonl"
    sweeps = {
        (rule, width): [label_of(rule, width, rate) for rate in rates(rule)]
        for rule in ("jordan", "none")
        for width in (64, 256)
    }
    middle = {label for labels in sweeps.values() for label in labels[1:4]}
    assert set(around_the_best(file, sweeps.values())) == middle
    for seeds in a_run_of("jordan", {64: 0.16, 256: 0.02}).values():
        for one in seeds:
            records.add(one, file)
    jordan = set(around_the_best(file, [sweeps["jordan", width] for width in (64, 256)]))
    moved = {64: (0.04, 0.08, 0.16), 256: (0.01, 0.02, 0.04)}
    assert jordan == {label_of("jordan", w, r) for w, three in moved.items() for r in three}
    none = set(around_the_best(file, [sweeps["none", width] for width in (64, 256)]))
    assert none < middle and set(around_the_best(file, sweeps.values())) == jordan | none


@pytest.mark.parametrize("rule", RULES)
def test_rules_differ_in_hidden_kernels_only(rule):
    """Gains and the embedding move alike under every rule, and heads keep their size."""
    config, optimizer = SMOKE[label_of(rule, 64, rates(rule)[2])]
    params = jax.jit(init_params, static_argnums=(0, 1))(config, 0)
    optimizer = replace(optimizer, weight_decay=0.0)
    grads = jax.tree.map(lambda p: 0.01 * jax.numpy.ones_like(p), params)
    tx = optimizer.chain(config)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    warmed = 1 / 3  # of a warm-up of two steps, the first
    np.testing.assert_allclose(updates["norm"]["scale"], -0.01 * warmed, rtol=1e-4)
    share = 64 / config.d_model
    np.testing.assert_allclose(updates["embed"]["embedding"], -0.01 * warmed * share, rtol=1e-4)
    assert config.d_model // config.heads == config.rope == config.v
    kernels = params["layers"]["mlp"]["up"]["kernel"]
    arrived = kernels + updates["layers"]["mlp"]["up"]["kernel"]
    norms = (jax.numpy.linalg.norm(x, axis=(1, 2)) for x in (arrived, kernels))
    kept = np.allclose(*norms, rtol=1e-5)
    assert kept == (rule == "hyperball")


def test_decay_falls_with_the_width_where_the_rule_says_so():
    decays = {
        (rule, width): SMOKE[label_of(rule, width, rates(rule)[0])].optimizer.weight_decay
        for rule in RULES
        for width in TINY
    }
    ratio = {rule: decays[rule, 64] / decays[rule, 32] for rule in RULES}
    assert ratio == {rule: 0.5 if rule.endswith("λ/width") else 1 for rule in RULES}


def test_a_study_of_its_own_optimizer_hashes_it():
    plain = replace(STUDY, optimizer=type(STUDY).optimizer)
    assert STUDY.code_hash() != plain.code_hash()
    assert isinstance(STUDY.grids["cpu"], Grid) and len(STUDY.grids["cpu"].runs()) == 216 + 108
