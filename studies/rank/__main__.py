"""QK-norm and Muon: do the keys collapse, where, and does anything else that tames logits do it?"""

import sys
from dataclasses import replace
from pathlib import Path

from studies.common.model import ModelConfig
from studies.common.optimizers import Optimizer
from studies.common.study import Grid, Study, main, smoke
from studies.common.training import Plan, Setting
from studies.rank.measures import measure
from studies.rank.report import report

# The source's model, smaller: grouped queries, squared ReLU, tied embeddings.
MODEL = ModelConfig(layers=6, heads=4, kv_heads=2)
REST = 0.006  # the learning rate of all that is not Muon's
LONG = "Muon, QK-norm", "Muon"  # what the longer run on a CPU compares


def settings(model: ModelConfig, rate: float, threshold: float) -> dict[str, Setting]:
    """Each optimizer with QK-norm and without, and Muon with what else tames logits."""
    fused, normed = replace(model, attention="fused"), replace(model, qk_norm=True)
    muon = Optimizer(
        learning_rate=rate,
        update_rms="jordan",
        other_rate=REST / rate,
        weight_decay=0.0,
        warmup=0,
    )
    by_head = replace(muon, direction="per_head_muon")
    adam = replace(muon, direction="adam", learning_rate=REST, weight_decay=0.2)
    return {
        "Muon, QK-norm": Setting(normed, muon),
        "Muon": Setting(model, muon),
        "fused Muon, QK-norm": Setting(replace(fused, qk_norm=True), muon),
        "fused Muon": Setting(fused, muon),
        "per-head Muon, QK-norm": Setting(normed, by_head),
        "per-head Muon": Setting(model, by_head),
        "AdamW, QK-norm": Setting(normed, adam),
        "AdamW": Setting(model, adam),
        f"MuonClip τ={threshold:g}": Setting(model, replace(muon, threshold=threshold)),
        "Muon, QuacK": Setting(model, replace(muon, quack="paper")),
    }


TINY = replace(MODEL, vocab_size=257, d_model=32, layers=2, rope=8, v=8, d_ff=64)
LARGE = replace(
    MODEL,
    vocab_size=49152,
    d_model=512,
    layers=22,
    heads=8,
    kv_heads=4,
    rope=64,
    v=64,
    d_ff=2048,
    init_std=0.02,
    dtype="bfloat16",
)

STUDY = Study(
    folder=Path(__file__).parent,
    grids={
        "smoke": smoke(
            settings(TINY, rate=0.012, threshold=1), "Muon, QK-norm", "Muon", "fused Muon"
        ),
        "cpu": Grid(Plan(measure_every=100), settings(MODEL, rate=0.012, threshold=10), seeds=3),
        # The source's question: does the higher rank pay in the end?
        "cpu_long": Grid(
            Plan(steps=1200, measure_every=200),
            {name: settings(MODEL, rate=0.012, threshold=10)[name] for name in LONG},
            seeds=3,
        ),
        # The source's two runs, of 16M and 25M tokens.
        "gpu": Grid(
            Plan("installed_packages", steps=1950, batch=4, context=2048, measure_every=150),
            settings(LARGE, rate=0.012, threshold=30),
            seeds=3,
        ),
        "gpu_long": Grid(
            Plan("installed_packages", steps=6100, batch=2, context=2048, measure_every=305),
            settings(LARGE, rate=0.024, threshold=30),
            seeds=3,
        ),
    },
    report=report,
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
