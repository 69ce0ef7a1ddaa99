"""QK-Clip: does it hold the logits, does it cost anything, must it be per head?"""

import sys
from dataclasses import replace
from pathlib import Path

from studies.clip.report import report
from studies.common.model import ModelConfig, large
from studies.common.optimizers import Optimizer
from studies.common.study import Grid, Study, main, smoke
from studies.common.training import Plan, Setting

# Latent attention, as in Kimi K2.
MODEL = ModelConfig(attention="latent", nope=32, rope=16, v=32, latent_norm=True)


def settings(
    model: ModelConfig, *, muon: float, adam: float, thresholds: tuple[float, ...], warmup: int = 20
) -> dict[str, Setting]:
    """Muon and Adam at their learning rates: without a clip, with one per head, with one for all
    heads of a layer together, and with one per head that each head applies to the shared rope key
    too."""
    by_muon = Optimizer(learning_rate=muon, warmup=warmup)
    by_adam = Optimizer(direction="adam", learning_rate=adam, warmup=warmup)
    *_, middle, low = thresholds
    optimizers = {
        "Muon": by_muon,
        **{f"MuonClip τ={t:g}": replace(by_muon, threshold=t) for t in thresholds},
        **{
            f"MuonClip τ={t:g}, all heads": replace(by_muon, threshold=t, scope="layer")
            for t in (middle, low)
        },
        **{
            f"MuonClip τ={t:g}, rope key too": replace(
                by_muon, threshold=t, shared_keys="each_head"
            )
            for t in (middle, low)
        },
        "AdamW": by_adam,
        f"AdamClip τ={middle:g}": replace(by_adam, threshold=middle),
        "AdamW, 0.3 of the rate": replace(by_adam, learning_rate=0.3 * adam),
    }
    return {label: Setting(model, optimizer) for label, optimizer in optimizers.items()}


TINY = replace(MODEL, vocab_size=257, d_model=32, layers=2, heads=2, nope=8, rope=8, v=16, d_ff=64)
LARGE = replace(large(MODEL), nope=64, q_rank=512, kv_rank=256)


STUDY = Study(
    folder=Path(__file__).parent,
    grids={
        "smoke": smoke(
            settings(TINY, muon=2e-2, adam=1e-2, thresholds=(1.0, 0.5, 0.2)),
            "Muon",
            "MuonClip τ=0.2, all heads",
            "MuonClip τ=0.2, rope key too",
            "AdamClip τ=0.5",
        ),
        "cpu": Grid(
            Plan(), settings(MODEL, muon=2e-2, adam=1e-2, thresholds=(100.0, 30.0, 10.0)), seeds=3
        ),
        "gpu": Grid(
            Plan("installed_packages", steps=5000, batch=32, context=1024, measure_every=250),
            settings(LARGE, muon=5e-3, adam=2e-3, thresholds=(100.0, 30.0, 10.0), warmup=200),
            seeds=2,
        ),
    },
    report=report,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
