"""Fine-tuning with another optimizer than that of the pretraining: does the mismatch cost?"""

import sys
from dataclasses import replace
from pathlib import Path

from studies.common.model import ModelConfig, large, tiny
from studies.common.optimizers import Optimizer
from studies.common.study import Grid, Study, main, smoke
from studies.common.training import Plan, Setting
from studies.finetune.report import report

MODEL = ModelConfig(vocab_size=512, d_model=64, layers=2, rope=16, v=16, d_ff=256)


def settings(
    model: ModelConfig,
    plan: Plan,
    *,
    pretraining: dict[str, float],
    rates: dict[str, tuple[float, ...]],
    threshold: float,
    warmup: int = 20,
) -> dict[str, Setting]:
    """Each optimizer after each, at every rate; the rates of both phases fall to 0 at their ends.

    Args:
      model: The model.
      plan: Says how long both phases are.
      pretraining: The rates of the first phase, of Adam and Muon.
      rates: Those of the second.
      threshold: Of the clip, in the second phase.
      warmup: Of the first phase; the second's is half as long.
    """
    adam, muon = (
        Optimizer(direction=direction, warmup=warmup // 2, decay_steps=plan.steps)
        for direction in ("adam", "muon")
    )
    tuners = {
        "Adam": (adam, rates["Adam"]),
        "Muon": (muon, rates["Muon"]),
        "MuonClip": (replace(muon, threshold=threshold), rates["Muon"]),
        "per-head Muon": (replace(muon, direction="per_head_muon"), rates["Muon"]),
    }
    found = {}
    for first, rate in pretraining.items():
        base, _ = tuners[first]
        before = replace(base, learning_rate=rate, warmup=warmup, decay_steps=plan.pretrain_steps)
        for name, (tuner, tried) in tuners.items():
            for each in tried:
                optimizer = replace(tuner, learning_rate=each, pretrained=before)
                found[f"{first} → {name}, {each:g}"] = Setting(model, optimizer)
    return found


# The two rates of which one is every pair's best in a first look; the least one is far from it.
CHOSEN = [
    f"{first} → {then}, {rate:g}"
    for first in ("Adam", "Muon")
    for then in ("Adam", "Muon", "MuonClip", "per-head Muon")
    for rate in (1e-2, 3e-2)
]
CPU_PLAN = Plan(steps=120, context=64, measure_every=120, pretrain_steps=480)
GPU_PLAN = Plan(
    "installed_packages",
    steps=1000,
    batch=32,
    context=1024,
    measure_every=500,
    pretrain_steps=5000,
)
SMOKE_PLAN = replace(smoke({}).plan, pretrain_steps=20)
SMOKE = settings(
    tiny(MODEL),
    SMOKE_PLAN,
    pretraining={"Adam": 1e-2, "Muon": 2e-2},
    rates={"Adam": (1e-2,), "Muon": (2e-2,)},
    threshold=0.2,
    warmup=2,
)

STUDY = Study(
    folder=Path(__file__).parent,
    grids={
        "smoke": Grid(SMOKE_PLAN, SMOKE, seeds=1),
        "cpu": Grid(
            CPU_PLAN,
            settings(
                MODEL,
                CPU_PLAN,
                pretraining={"Adam": 1e-2, "Muon": 2e-2},
                rates=dict.fromkeys(("Adam", "Muon"), (3e-3, 1e-2, 3e-2)),
                threshold=10.0,
            ),
            seeds=2,
            chosen=CHOSEN,
        ),
        "gpu": Grid(
            GPU_PLAN,
            settings(
                large(MODEL),
                GPU_PLAN,
                pretraining={"Adam": 1e-3, "Muon": 3e-3},
                rates={"Adam": (1e-4, 3e-4, 1e-3), "Muon": (2e-4, 6e-4, 2e-3)},
                threshold=30.0,
                warmup=200,
            ),
            seeds=2,
        ),
    },
    report=report,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
