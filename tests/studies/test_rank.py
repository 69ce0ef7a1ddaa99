"""What `rank` measures beside the runs, against NumPy and against the optimizer's own updates."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from studies.common.model import ModelConfig, init_params, queries_and_keys
from studies.common.optimizers import Optimizer
from studies.common.training import loss_and_sown
from studies.rank import measures, report

MODEL = ModelConfig(
    vocab_size=17, d_model=16, layers=2, heads=4, kv_heads=2, rope=8, v=4, d_ff=24, init_std=0.3
)
BATCH = jax.random.randint(jax.random.key(1), (4, 13), 0, 17)
JORDAN = Optimizer(learning_rate=0.012, update_rms="jordan", weight_decay=0.2, warmup=0)


@pytest.fixture(scope="module")
def start():
    """Parameters, gradients, and what was sown."""

    @jax.jit
    def make():
        params = init_params(MODEL, 0)
        return params, *jax.grad(loss_and_sown, has_aux=True)(params, MODEL, BATCH)

    return make()


def test_query_ratios_are_those_of_the_queries_of_a_head(start):
    found = measures.query_ratio(start[0], MODEL, BATCH)
    _, queries, _ = jax.jit(queries_and_keys, static_argnums=1)(start[0], MODEL, BATCH[:, :-1])
    rows = np.asarray(queries, np.float64).transpose(0, 3, 1, 2, 4).reshape(2, 4, 48, 8)
    values = np.linalg.svd(rows, compute_uv=False)
    # float32 queries and singular values.
    np.testing.assert_allclose(found, values.sum(-1) ** 2 / (values**2).sum(-1), rtol=1e-4)


@pytest.mark.parametrize("optimizer", [JORDAN, replace(JORDAN, threshold=0.01)])
def test_muons_rms_is_of_its_update_before_rate_decay_and_clip(optimizer, start):
    params, grads, sown = start
    tx = replace(JORDAN, weight_decay=0.0).chain(MODEL)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params, max_logits=sown)
    state = optimizer.chain(MODEL).init(params)
    found = measures.update_rms(MODEL, optimizer, params, state, BATCH)
    for name, (block, kernel) in {"attn/wq": ("attn", "wq"), "mlp/up": ("mlp", "up")}.items():
        update = np.float64(updates["layers"][block][kernel]["kernel"])
        ins, outs = update.shape[-2:]
        rms = np.sqrt(np.square(update).mean(axis=(1, 2))) / 0.012
        scale = 0.2 * np.sqrt(max(ins, outs)) / np.sqrt(max(1, outs / ins))
        # Newton–Schulz in bfloat16 rounds otherwise in another program, by up to 1%.
        np.testing.assert_allclose(found[name], rms * scale, rtol=0.02, err_msg=name)
        # Flat spectra: msign has an RMS of 1/√max(n, m), the five steps are within 20% of it.
        np.testing.assert_allclose(found[name], 0.2, rtol=0.2, err_msg=name)


def test_adams_first_update_has_an_rms_of_one(start):
    params, _, _ = start
    optimizer = replace(JORDAN, direction="adam")
    state = optimizer.chain(MODEL).init(params)
    found = measures.update_rms(MODEL, optimizer, params, state, BATCH)
    assert found.keys() == {
        *(f"attn/{name}" for name in ("wq", "wk", "wv", "wo")),
        *("mlp/up", "mlp/down"),
    }
    for name, rms in found.items():
        # g / (|g| + 1e-8): all gradients are far larger, but for those of units that no token
        # switches on.
        assert rms.shape == (2,) and (rms <= 1 + 1e-4).all(), name
        if "mlp" not in name:
            np.testing.assert_allclose(rms, 1, rtol=1e-3, err_msg=name)


def record(seed, loss, keys, queries):
    """Two layers, one head, a measurement before and one after."""
    rows = [
        {"step": step, "valid_loss": nats, "key_ratio": k, "query_ratio": q}
        for step, nats, k, q in zip((0, 10), loss, keys, queries, strict=True)
    ]
    rows[-1]["update_rms"] = {"attn/wq": [3.0, 4.0]}
    return {"seed": seed, "measurements": rows, "plan": {"batch": 2, "context": 5}}


def test_gaps_are_of_the_same_seed_at_each_measurement():
    flat = [[[5.0], [5.0]], [[4.0], [6.0]]]
    lower = [[[5.0], [5.0]], [[2.0], [4.0]]]
    runs = {
        "Muon": [record(seed, (5.0, 4.0 + seed), flat, flat) for seed in range(3)],
        "Muon, QK-norm": [record(seed, (5.0, 3.5 + seed), lower, flat) for seed in range(3)],
        "MuonClip": [record(0, (5.0, 4.0), flat, flat)],
    }
    text = report.gaps(runs)
    assert "after tokens | 100 |" in text and "MuonClip" not in text
    assert "| Muon, validation loss | -0.500 [-0.500, -0.500] (3 seeds) |" in text
    assert "| Muon, ratio of the keys | -2.0 [-2.0, -2.0] (3 seeds) |" in text
    assert "| Muon, ratio of the queries | +0.0 [+0.0, +0.0] (3 seeds): no diff" in text
    assert report.gaps({"Muon": runs["Muon"]}) == ""


def test_update_sizes_are_over_layers():
    sizes = report.sizes(record(0, (5.0, 4.0), [[[1.0]]] * 2, [[[1.0]]] * 2))
    assert sizes == {"attn/wq": pytest.approx(np.sqrt(12.5))}  # of 3 and 4
