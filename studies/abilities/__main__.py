"""What a better loss may hide: copying, recall, long contexts, other text."""

import sys
from dataclasses import replace
from pathlib import Path

from studies.abilities.measures import measure
from studies.abilities.report import report
from studies.common.model import ModelConfig, large
from studies.common.optimizers import Optimizer
from studies.common.study import Grid, Study, main, smoke
from studies.common.training import Plan, Setting

# Bytes are tokens, so that most of so small a model is attention.
MHA = ModelConfig(
    vocab_size=257, d_model=64, layers=2, heads=4, rope=16, v=16, d_ff=128, init_std=0.06
)
MLA = replace(MHA, attention="latent", nope=8, rope=8, q_rank=32, kv_rank=32)


def settings(mha: ModelConfig, mla: ModelConfig, muon: Optimizer, low: float) -> dict[str, Setting]:
    """Every way to tame logits with MLA, and what the articles compare with MHA too; `low` is the
    threshold and the cap."""
    return {
        "MLA, none": Setting(mla, muon),
        "MLA, QK-norm": Setting(replace(mla, qk_norm=True), muon),
        "MLA, partial QK-norm": Setting(replace(mla, partial_qk_norm=True), muon),
        f"MLA, QK-Clip τ={low:g}": Setting(mla, replace(muon, threshold=low)),
        "MLA, QuacK": Setting(mla, replace(muon, quack="paper")),
        f"MLA, soft cap {low:g}": Setting(replace(mla, soft_cap=low), muon),
        "MHA, none": Setting(mha, muon),
        "MHA, QK-norm": Setting(replace(mha, qk_norm=True), muon),
    }


TINY, TINY_MLA = (replace(model, d_model=32, heads=2, kv_heads=2, d_ff=64) for model in (MHA, MLA))
LARGE = large(MHA)
LARGE_MLA = replace(LARGE, attention="latent", nope=64, q_rank=512, kv_rank=256)

SMOKE = smoke(
    settings(TINY, TINY_MLA, Optimizer(), low=1),
    *("MLA, none", "MLA, partial QK-norm", "MHA, none"),
)

# Two cores have no time for MHA: after 1200 steps nothing had learned to copy.
CPU = settings(MHA, MLA, Optimizer(learning_rate=2e-2, other_rate=0.2), low=10)

STUDY = Study(
    folder=Path(__file__).parent,
    grids={
        "smoke": replace(SMOKE, plan=replace(SMOKE.plan, synthetic=0.5)),
        "cpu": Grid(
            Plan(steps=2000, batch=32, context=32, measure_every=500, synthetic=0.75),
            {label: each for label, each in CPU.items() if label.startswith("MLA")},
            seeds=3,
        ),
        "gpu": Grid(
            Plan(
                "installed_packages",
                steps=5000,
                batch=32,
                context=1024,
                measure_every=1000,
                synthetic=0.1,
            ),
            settings(LARGE, LARGE_MLA, Optimizer(learning_rate=2e-3, warmup=200), low=30),
            seeds=3,
        ),
    },
    report=report,
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
