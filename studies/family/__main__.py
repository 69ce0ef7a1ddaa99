"""Muon's family, each method with its learning rate tuned over one grid."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import get_args

from studies.common.chosen import around_the_best
from studies.common.model import ModelConfig, large
from studies.common.study import Grid, Study, main, smoke
from studies.common.training import Plan, Setting
from studies.family.optimizers import Member, Method
from studies.family.report import report

FOLDER = Path(__file__).parent
METHODS: tuple[Method, ...] = get_args(Method)
RATES = (2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2, 8e-2)
MODEL = ModelConfig(
    vocab_size=512,
    d_model=64,
    layers=2,
    heads=4,
    kv_heads=4,
    rope=16,
    v=16,
    d_ff=256,
    init_std=0.08,
)


def settings(
    model: ModelConfig, rates: tuple[float, ...], *, steps: int, warmup: int
) -> dict[str, Setting]:
    """Every method at every rate; rates fall to 0 at the end."""
    base = Member(weight_decay=0.1, warmup=warmup, decay_steps=steps)
    return {
        f"{method}, {rate:g}": Setting(model, replace(base, method=method, learning_rate=rate))
        for method in METHODS
        for rate in rates
    }


def grid(plan: Plan, model: ModelConfig, rates: tuple[float, ...], warmup: int, size: str) -> Grid:
    """Two seeds of every setting, five of those around each method's best rate."""
    sweeps = [[f"{method}, {rate:g}" for rate in rates] for method in METHODS]
    return Grid(
        plan,
        settings(model, rates, steps=plan.steps, warmup=warmup),
        seeds=2,
        chosen=around_the_best(FOLDER / "results" / f"{size}.jsonl", sweeps),
    )


TINY = replace(MODEL, vocab_size=257, d_model=32, rope=8, v=8, d_ff=64)
LARGE = replace(large(MODEL), d_ff=4096, mlp="relu2")

STUDY = Study(
    folder=FOLDER,
    grids={
        "smoke": smoke(
            settings(TINY, (0.01, 0.02, 0.04), steps=20, warmup=2),
            *(f"{method}, {rate:g}" for method in ("AdamW", "NorMuon") for rate in (0.01, 0.02)),
        ),
        "cpu": grid(
            Plan(steps=400, context=64, measure_every=25), MODEL, RATES, warmup=20, size="cpu"
        ),
        "gpu": grid(
            Plan("installed_packages", steps=5000, batch=64, context=1024, measure_every=250),
            LARGE,
            tuple(rate / 10 for rate in RATES),
            warmup=200,
            size="gpu",
        ),
    },
    report=report,
    optimizer=Member,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
