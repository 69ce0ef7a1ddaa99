"""Short runs of every setting: the numbers by which `rehash` tells whether code still computes the
same. It is a script for two trees: each runs it with its own `studies` package.

    python - STUDY... < studies/common/probe.py      # from a tree's root; JSON on standard output
"""

import json
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

SIZE = "cpu"
STEPS, BATCH, CONTEXT = 8, 2, 64


def numbers_of(study, training) -> dict[str, dict]:
    """Label → curves and measurements of a short run, every digit of them.

    Settings that differ in numbers only, such as learning rates, are one program; one of them runs.
    """
    grid = study.grids[SIZE]
    context = min(CONTEXT, grid.plan.context)  # synthetic tokens are as many as the context tells
    short = {"steps": STEPS, "batch": BATCH, "context": context, "measure_every": 4}
    if getattr(grid.plan, "pretrain_steps", 0):  # older trees have none
        short["pretrain_steps"] = STEPS
    plan = replace(grid.plan, **short, valid_batches=1)
    by_program, found = {}, {}
    for label, (model, optimizer) in grid.settings.items():
        program = model, jax.tree.structure(optimizer)
        if program not in by_program:
            clip = (
                {} if optimizer.threshold is None else {"threshold": 0.2}
            )  # some heads are clipped
            setting = training.Setting(model, replace(optimizer, **clip))
            text = tokens(model.vocab_size, training.data, training.CACHE)
            result = training.train(setting, plan, text, seed=1, measure=study.measure)
            by_program[program] = jax.tree.map(lambda x: np.asarray(x).tolist(), result)
            print(f"{study.folder.name}: {label}", file=sys.stderr, flush=True)
        found[label] = by_program[program]
    return found


def tokens(vocab_size: int, data, cache: Path) -> SimpleNamespace:
    """Numbers that stand for a text: no tree has a text of its own."""
    rng = np.random.default_rng(0)
    train, valid = (
        (vocab_size * rng.random(n) ** 3).astype(np.int32)
        for n in (STEPS * BATCH * (CONTEXT + 1) * 2, 4 * BATCH * (CONTEXT + 1))
    )
    tokenizer = data.load_tokenizer(("",), data.BYTE_VOCABULARY, cache)  # for other texts
    text = SimpleNamespace(train=train, valid=valid, tokenizer=tokenizer)
    text.first = text  # of what comes before, where something does
    return text


def probe(names: list[str]) -> dict[str, dict]:
    """Study → the runs that its records hold for the code of this tree, and the numbers."""
    training = import_module("studies.common.training")
    jax.config.update("jax_compilation_cache_dir", str(Path(training.CACHE).resolve() / "xla"))
    found = {}
    for name in names:
        study = import_module(f"studies.{name}.__main__").STUDY
        found[name] = {"current": study.current(SIZE), "numbers": numbers_of(study, training)}
    return found


if __name__ == "__main__":
    json.dump(probe(sys.argv[1:]), sys.stdout)
