"""`mla_norm`: its QK-norm is the one that the example's decoding absorbs; its tables."""

import dataclasses
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import muonclip_jax as mc
from examples.mla.model import LatentAttention
from examples.mla.model import ModelConfig as ExampleConfig
from studies.common import sweeps
from studies.common.model import ATTENTION, attention_layout, init_params
from studies.common.tables import paired
from studies.mla_norm import report
from studies.mla_norm.__main__ import MLA, TINY


def test_its_qk_norm_is_what_the_example_decodes_with():
    """One attention with the same weights in both: `tests/examples/test_model.py` holds the
    example's decoding to its training, and this holds the study's training to the example's."""
    config = replace(TINY, qk_norm=True)
    sizes = {
        field.name: getattr(config, field.name)
        for field in dataclasses.fields(ExampleConfig)
        if field.name in ("d_model", "heads", "nope", "rope", "v", "q_rank", "kv_rank")
    }
    example = LatentAttention(ExampleConfig(qk_norm="full", **sizes), nnx.Rngs(0))
    # Gains that are not all 1: they tell where the norm stands.
    params = jax.tree.map(
        lambda p: p * (4 if p.ndim == 2 else 1 + 0.5 * jnp.sin(1 + jnp.arange(p.size))),
        jax.tree.map(lambda p: p[0], init_params(config, 0)["layers"]["attn"]),
    )
    names = {
        "q_norm": "q_head_norm",
        "k_norm": "k_head_norm",
        "q_latent_norm": "q_norm",
        "kv_latent_norm": "kv_norm",
    }
    nnx.update(example, {names.get(module, module): each for module, each in params.items()})
    x = jax.random.normal(jax.random.key(1), (2, 7, config.d_model))
    found, sown = ATTENTION["latent"](config).apply(
        {"params": params}, x, mutable=["intermediates"]
    )
    expected, also_sown = nnx.capture(example, nnx.Intermediate)(x)
    scale = float(jnp.abs(expected).max())
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)  # float32, other order
    maxima = [mc.read_max_logits(each)[()] for each in (sown, also_sown)]
    np.testing.assert_allclose(*maxima, rtol=1e-5)


@pytest.mark.parametrize("make", [mc.qk_clip, mc.scale_by_quack])
def test_clips_and_quack_refuse_its_qk_norm(make):
    params = jax.eval_shape(lambda: init_params(replace(MLA, qk_norm=True), 0))
    with pytest.raises(ValueError, match=r"attn/(q|k)_norm/scale .* normalises queries or keys"):
        jax.eval_shape(make(attention_layout(MLA)).init, params)


def runs(method, rate, losses):
    """Runs of a setting, one a seed."""
    return {
        f"{method}, {rate:g}": [
            {
                "seed": seed,
                "optimizer": {"learning_rate": rate, "threshold": None, "warmup": 0},
                "curves": {"max_logits": [[[1.0]]], "logit_change": [[0.5]]},
                "measurements": [{"valid_loss": 10.0}, {"valid_loss": loss}],
            }
            for seed, loss in enumerate(losses)
        ]
    }


def test_each_method_is_compared_at_its_best_rate():
    """The rate is chosen by the two seeds that all have; one that is not finite is never best."""
    sweep = sweeps.by_method(
        runs("none", 0.1, [3.0, 3.2, 9.0])
        | runs("none", 0.2, [3.5, 3.5])
        | runs("QK-norm", 0.1, [1.0, None])
        | runs("QK-norm", 0.2, [2.9, 3.1, 3.0])
    )
    lines = sweeps.at_best_rates("best", sweep, "QK-norm").splitlines()
    assert lines[0] == "| best | η | validation loss | less that of QK-norm |"
    none, norm = (line.strip("| ").split(" | ") for line in lines[2:])
    assert norm[:3] == ["QK-norm", "0.2", "3.000 ± 0.100"]
    assert none[:3] == ["none", "0.1", "5.067 ± 3.408"]
    losses = (dict(enumerate(each)) for each in ([3.0, 3.2, 9.0], [2.9, 3.1, 3.0]))
    assert none[3] == paired(*losses)


def test_verdicts_compare_methods_that_there_are():
    assert {method for pair in report.VERDICTS for method in pair} == set(report.METHODS)
    both = runs("QK-norm", 0.1, [3.0, 3.1]) | runs("QuacK", 0.1, [3.2, 3.3])
    text = sweeps.differences("loss", sweeps.by_method(both), report.VERDICTS)
    assert text.splitlines()[0] == "| loss | QK-norm less QuacK |"
    assert "-0.200 [-0.200, -0.200] (2 seeds)" in text
