"""QK-norm in MLA, which decoding can absorb, against QK-Clip, QuacK, and both of these."""

import sys
from dataclasses import replace
from pathlib import Path

from studies.common.model import ModelConfig, large
from studies.common.optimizers import Optimizer
from studies.common.study import Grid, Study, main, smoke
from studies.common.training import Plan, Setting
from studies.mla_norm.report import METHODS, report

# With norms on the latents, as DeepSeek and Kimi have them; `quack` is without.
MLA = ModelConfig(
    d_model=64,
    layers=2,
    heads=4,
    kv_heads=4,
    nope=16,
    rope=8,
    v=16,
    q_rank=32,
    kv_rank=32,
    d_ff=192,
    attention="latent",
    latent_norm=True,
    mlp="swiglu",
    init_std=0.06,
)


def settings(model: ModelConfig, rates: tuple[float, ...], warmup: int) -> dict[str, Setting]:
    """Every method at every learning rate."""
    muon = Optimizer(warmup=warmup)
    quack = replace(muon, quack="latent_norm")
    methods = (
        Setting(model, muon),
        Setting(replace(model, qk_norm=True), muon),
        Setting(model, replace(muon, threshold=30.0)),
        Setting(model, replace(muon, threshold=10.0)),
        Setting(model, quack),
        Setting(model, replace(quack, threshold=10.0)),
    )
    return {
        f"{method}, {rate:g}": Setting(m, replace(optimizer, learning_rate=rate))
        for method, (m, optimizer) in zip(METHODS, methods, strict=True)
        for rate in rates
    }


TINY = replace(MLA, vocab_size=257, d_model=32, heads=2, kv_heads=2, d_ff=64)
LARGE = replace(large(MLA), nope=64, rope=32, v=64, q_rank=512, kv_rank=256, attention="latent")

STUDY = Study(
    folder=Path(__file__).parent,
    grids={
        "smoke": smoke(
            settings(TINY, (0.01, 0.1), warmup=5),
            *(f"{method}, 0.1" for method in ("none", "QK-norm", METHODS[-1])),
            "QK-norm, 0.01",
        ),
        "cpu": Grid(
            Plan(steps=450, context=64, measure_every=150),
            settings(MLA, (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1), warmup=20),
            seeds=2,
            # Where losses are best, and the first two at which logits explode without a bound.
            chosen=[
                f"{method}, {rate:g}" for method in METHODS for rate in (3e-3, 1e-2, 3e-2, 1e-1)
            ],
        ),
        "gpu": Grid(
            Plan("installed_packages", steps=5000, batch=32, context=1024, measure_every=500),
            settings(LARGE, (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), warmup=200),
            seeds=2,
        ),
    },
    report=report,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
