"""Weight decay against growing logits: how much, of what, and do they fall by themselves?"""

import sys
from dataclasses import replace
from pathlib import Path

from studies.common.model import ModelConfig, large, tiny
from studies.common.optimizers import Optimizer
from studies.common.study import Grid, Study, main, smoke
from studies.common.training import Plan, Setting
from studies.decay.measures import measure
from studies.decay.report import report

MODEL = ModelConfig(vocab_size=512, d_model=64, layers=2, rope=16, v=16, d_ff=256)
DECAYS = (0.01, 0.1, 0.3)


def settings(
    model: ModelConfig, *, rate: float, threshold: float, steps: int, warmup: int = 20
) -> dict[str, Setting]:
    """Muon and MuonClip with every decay, of all kernels and of queries and keys only; the rate
    falls to 0 at the last step."""
    muon = Optimizer(learning_rate=rate, weight_decay=0.0, warmup=warmup, decay_steps=steps)
    found = {}
    for name, base in {"Muon": muon, "MuonClip": replace(muon, threshold=threshold)}.items():
        found[f"{name} λ=0"] = base
        for decay in DECAYS:
            every = replace(base, weight_decay=decay)
            found[f"{name} λ={decay:g}"] = every
            found[f"{name} λ={decay:g}, Q and K"] = replace(every, decay_of="queries_and_keys")
    return {label: Setting(model, optimizer) for label, optimizer in found.items()}


CHOSEN = ("Muon λ=0", "Muon λ=0.1", "Muon λ=0.3", "Muon λ=0.3, Q and K", "MuonClip λ=0.1")
SMOKE = ("Muon λ=0", "Muon λ=0.3", "Muon λ=0.3, Q and K", "MuonClip λ=0.3")

STUDY = Study(
    folder=Path(__file__).parent,
    grids={
        "smoke": smoke(settings(tiny(MODEL), rate=5e-2, threshold=0.5, steps=20, warmup=2), *SMOKE),
        "cpu": Grid(
            Plan(steps=700, context=64, measure_every=100),
            settings(MODEL, rate=2e-2, threshold=30.0, steps=700),
            seeds=2,
            chosen=CHOSEN,
        ),
        # η summed over the run is 20, so that λ = 0.1 and 0.3 shrink weights by e⁻² and e⁻⁶.
        "gpu": Grid(
            Plan("installed_packages", steps=8000, batch=32, context=1024, measure_every=500),
            settings(large(MODEL), rate=5e-3, threshold=100.0, steps=8000, warmup=200),
            seeds=1,
            chosen=CHOSEN,
            chosen_seeds=2,
        ),
    },
    report=report,
    measure=measure,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
