"""The best learning rate over widths, under each rule that scales Muon's updates."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from studies.common.chosen import around_the_best
from studies.common.model import ModelConfig
from studies.common.study import Grid, Study, main, smoke
from studies.common.training import Plan, Setting
from studies.transfer.optimizers import Scaled
from studies.transfer.report import report

FOLDER = Path(__file__).parent
BASE = 64  # the width that everything but the rules is set at
FIRST_RATES = {"match_adam": 0.0025}  # the lowest of a grid; of the others below
RATES_OF_A_GRID = 6

RULES = {
    "none": Scaled(update_rms="none"),
    "jordan": Scaled(update_rms="jordan"),
    "unit_rms_norm": Scaled(update_rms="unit_rms_norm"),
    "unit_rms_norm, λ/width": Scaled(update_rms="unit_rms_norm"),
    "match_adam": Scaled(update_rms="match_adam"),
    "hyperball": Scaled(update_rms="none", sphere=True),
}


def model(width: int, *, features: int = 32) -> ModelConfig:
    """A decoder of a width, with heads of one size and first weights as muP has them."""
    heads = width // features
    return ModelConfig(
        vocab_size=512,
        d_model=width,
        layers=2,
        heads=heads,
        kv_heads=heads,
        rope=features,
        v=features,
        d_ff=2 * width,
        init_std=0.08 * (BASE / width) ** 0.5,
    )


def settings(
    models: Mapping[int, ModelConfig], *, steps: int, warmup: int, decay: float = 0.3
) -> dict[str, Setting]:
    """Every rule at every width and rate; rates are two to one apart, and fall to 0 at the end."""
    found = {}
    for rule, optimizer in RULES.items():
        for width, config in models.items():
            base = replace(
                optimizer,
                weight_decay=decay * BASE / width if rule.endswith("λ/width") else decay,
                embedding_rate=optimizer.gain_rate * BASE / width,
                warmup=warmup,
                decay_steps=steps,
            )
            found |= {
                label_of(rule, width, rate): Setting(config, replace(base, learning_rate=rate))
                for rate in rates(rule)
            }
    return found


def rates(rule: str) -> list[float]:
    """The learning rates of a rule's grid, the same at every width."""
    return [FIRST_RATES.get(rule, 0.005) * 2**power for power in range(RATES_OF_A_GRID)]


def grid(plan: Plan, widths: Sequence[int], warmup: int, size: str) -> Grid:
    """Two seeds of every setting, five of those around the best rate of the outer widths."""
    every = settings({width: model(width) for width in widths}, steps=plan.steps, warmup=warmup)
    sweeps = [
        [label_of(rule, width, rate) for rate in rates(rule)]
        for rule in RULES
        for width in (widths[0], widths[-1])  # which a verdict compares
    ]
    chosen = around_the_best(FOLDER / "results" / f"{size}.jsonl", sweeps)
    return Grid(plan, every, seeds=2, chosen=chosen)


def label_of(rule: str, width: int, rate: float) -> str:
    """A setting's label."""
    return f"{rule}, width {width}, {rate:g}"


TINY = {
    width: replace(model(width, features=16), vocab_size=257, init_std=0.04) for width in (32, 64)
}

STUDY = Study(
    folder=FOLDER,
    grids={
        "smoke": smoke(
            settings(TINY, steps=20, warmup=2),
            *(
                label_of(rule, width, rate)
                for rule in ("match_adam", "hyperball")
                for width in TINY
                for rate in (0.01, 0.02, 0.04)
            ),
        ),
        "cpu": grid(
            Plan(steps=200, context=64, measure_every=200), (64, 128, 256), warmup=20, size="cpu"
        ),
        "gpu": grid(
            Plan("installed_packages", steps=4000, batch=64, context=512, measure_every=1000),
            (256, 512, 1024),
            warmup=200,
            size="gpu",
        ),
    },
    report=report,
    optimizer=Scaled,
)

if __name__ == "__main__":
    sys.exit(main(STUDY))
