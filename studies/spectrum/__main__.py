"""Why Muon would make logits explode: full-rank updates that meet the weights' singular vectors."""

import sys
from dataclasses import replace
from pathlib import Path

from studies.common.model import ModelConfig, large, tiny
from studies.common.optimizers import Optimizer
from studies.common.study import Grid, Study, main, smoke
from studies.common.training import Plan, Setting
from studies.spectrum.measures import measure
from studies.spectrum.report import report

MODEL = ModelConfig()


def settings(model: ModelConfig, rate: float, warmup: int = 20) -> dict[str, Setting]:
    """Muon and Adam with updates of the same RMS, so with the same learning rate and decay."""
    muon = Optimizer(learning_rate=rate, warmup=warmup)
    adam = replace(muon, direction="adam")
    optimizers = {
        "Muon": muon,
        "per-head Muon": replace(muon, direction="per_head_muon"),
        "AdamW": adam,
        "AdamW, 0.3 of the rate": replace(adam, learning_rate=0.3 * rate),
    }
    return {label: Setting(model, optimizer) for label, optimizer in optimizers.items()}


STUDY = Study(
    folder=Path(__file__).parent,
    grids={
        "smoke": smoke(settings(tiny(MODEL), rate=1e-2), "Muon", "AdamW"),
        "cpu": Grid(Plan(steps=400), settings(MODEL, rate=1e-2), seeds=3),
        "gpu": Grid(
            Plan("installed_packages", steps=5000, batch=32, context=1024, measure_every=500),
            settings(large(MODEL), rate=2e-3, warmup=200),
            seeds=2,
        ),
    },
    report=report,
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
