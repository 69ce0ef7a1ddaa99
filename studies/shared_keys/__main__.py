"""QK-Clip with keys that query heads share: which side of the logits is to give way?"""

import sys
from dataclasses import replace
from pathlib import Path

from studies.common.model import ModelConfig, large
from studies.common.optimizers import Optimizer
from studies.common.study import Grid, Study, main, smoke
from studies.common.training import Plan, Setting
from studies.shared_keys.measures import measure
from studies.shared_keys.report import report

MODEL = ModelConfig(kv_heads=1)  # four query heads read one key


def settings(
    model: ModelConfig, *, rate: float, threshold: float, warmup: int = 20
) -> dict[str, Setting]:
    """No clip, and a clip per head with every way to treat what heads share."""
    muon = Optimizer(learning_rate=rate, warmup=warmup)
    clip = replace(muon, threshold=threshold)
    optimizers = {
        "no clip": muon,
        "untouched": clip,
        "split": replace(clip, shared_keys="split"),
        "least change": replace(clip, shared_keys="least_change"),
    }
    return {label: Setting(model, optimizer) for label, optimizer in optimizers.items()}


TINY = replace(MODEL, vocab_size=257, d_model=32, layers=2, heads=2, rope=16, v=16, d_ff=64)
LARGE = replace(large(MODEL), kv_heads=2)

STUDY = Study(
    folder=Path(__file__).parent,
    grids={
        "smoke": smoke(settings(TINY, rate=2e-2, threshold=0.1), "untouched", "least change"),
        "cpu": Grid(Plan(steps=400), settings(MODEL, rate=2e-2, threshold=4.0), seeds=3),
        "gpu": Grid(
            Plan("installed_packages", steps=5000, batch=32, context=1024, measure_every=250),
            settings(LARGE, rate=5e-3, threshold=10.0, warmup=200),
            seeds=2,
        ),
    },
    report=report,
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
