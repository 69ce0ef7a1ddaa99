"""What is measured, for TensorBoard and Weights & Biases: a few numbers a layer and step."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from examples.mla.cli import InputError, optional
from examples.mla.devices import is_first
from examples.mla.metrics import Row
from examples.mla.settings import Settings

PROJECT = "muonclip-mla"

Log = Callable[[dict[str, float], int], None]  # numbers by name, and their step


def check(settings: Settings) -> None:
    """Refuses early what is not installed.

    Raises:
      InputError: A switch is given, and its package is missing.
    """
    if settings.tensorboard:
        _tensorboardx()
    if settings.wandb:
        _wandb()


@contextmanager
def watching(settings: Settings, done: int) -> Iterator[Callable[[Row], None]]:
    """Gives what sends a row of the metrics to all that watch the run, which is at step `done`. Of
    several processes only the first sends.

    Raises:
      InputError: W&B cannot start.
    """
    with ExitStack() as until_the_end:
        logs = []
        if settings.tensorboard and is_first():
            logs.append(until_the_end.enter_context(_to_tensorboard(settings.folder, done)))
        if settings.wandb and is_first():
            logs.append(until_the_end.enter_context(_to_wandb(settings)))

        def send(row: Row) -> None:
            for log in logs:
                log(scalars(row), row["step"])

        yield send


def scalars(row: Row) -> dict[str, float]:
    """A row of a step or a validation in a few numbers, each with its name."""
    if row["event"] == "eval":
        ratios = row["participation_ratio"].items()
        found = {"held_out/loss": row["loss"]}
        found |= {f"participation_ratio/{block}": ratio for block, ratio in ratios}
    else:
        found = {
            "train/loss": row["loss"],
            "train/learning_rate": row["learning_rate"],
            "train/tokens_per_second": row["tokens"] / row["seconds"],
        }
        found |= {f"max_logit/{block}": np.max(heads) for block, heads in row["max_logits"].items()}
        if "gamma" in row:
            found["clip/heads_clipped"] = row["heads_clipped"]
            found |= {f"gamma/{block}": np.min(heads) for block, heads in row["gamma"].items()}
        for module, load in row.get("expert_load", {}).items():
            found[f"busiest_expert/{module}"] = np.max(load) * len(load)
    return {name: float(value) for name, value in found.items()}


@contextmanager
def _to_tensorboard(folder: Path, done: int) -> Iterator[Log]:
    """Writes into the run's folder. What was written after step `done`, before the run was
    continued there, is no longer shown."""
    writer = _tensorboardx().SummaryWriter(
        str(folder / "tensorboard"), purge_step=done + 1, filename_suffix=f".{done}"
    )

    def log(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    with writer:
        yield log


@contextmanager
def _to_wandb(settings: Settings) -> Iterator[Log]:
    """Each launch is a W&B run; those of one folder are a group."""
    wandb = _wandb()
    try:
        run = wandb.init(
            project=PROJECT,
            group=settings.folder.name,
            dir=settings.folder,
            config=settings.to_json(),
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.errors.Error as error:
        raise InputError(
            f"W&B does not start ({' '.join(str(error).split())}); with WANDB_MODE=offline in the "
            "environment it takes neither network nor account"
        ) from error
    with run:
        yield run.log


def _tensorboardx() -> Any:
    return optional("tensorboardX", "tensorboardX", wanted_by="--tensorboard")


def _wandb() -> Any:
    return optional("wandb", "wandb", wanted_by="--wandb")
