"""How well a trained model predicts text: the run's, or another.

python -m examples.mla.evaluate RUN --data PATH
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import jax
import numpy as np
import tyro
from flax import nnx
from rich.table import Table

from examples.mla import cli, data, metrics, trained
from examples.mla.cli import InputError
from examples.mla.mesh import spread
from examples.mla.settings import LARGEST
from examples.mla.steps import cross_entropy
from examples.mla.trained import Trained


@dataclass(frozen=True)
class Arguments:
    """Measures the model of a run's newest checkpoint on text that it was not trained on: all that
    the run held out, or what --data gives. Tokens that fill no batch are left out."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    data: tuple[Path, ...] = ()
    """UTF-8 text files, Parquet files with a column "text", or folders of them; all of it is taken.
    By default the text that the run held out."""
    batch_size: int | None = None
    """Sequences at once; by default as in the run."""
    context_length: int | None = None
    """Tokens per sequence; by default as in the run."""


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for wrong input."""

    def evaluate() -> int:
        given = cli.parse(Arguments, args, prog="python -m examples.mla.evaluate")
        table = Table(title=f"{given.run_dir.name}, on text it has not seen", show_header=False)
        for label, value in results(trained.load(given.run_dir), given):
            table.add_row(label, value)
        cli.console().print(table)
        return 0

    return cli.run(evaluate)


def results(run: Trained, given: Arguments) -> list[tuple[str, str]]:
    """The loss on all batches of the text, as pairs of label and text.

    Raises:
      InputError: The text is not the run's, or too little; or sizes that cannot be.
    """
    sizes = {"batch_size": given.batch_size, "context_length": given.context_length}
    with cli.one_line_errors():
        changed = {name: size for name, size in sizes.items() if size is not None}
        settings = replace(run.settings, **changed)
    text = unseen_text(run, given.data)
    batches = data.validation_batches(
        text, context=settings.context_length, batch=settings.batch_size, count=LARGEST
    )
    loss_of = nnx.jit(cross_entropy)
    loss = float(np.mean(jax.device_get([loss_of(run.model, spread(b)) for b in batches])))
    return [
        ("checkpoint, step", f"{run.step:,}"),
        ("tokens", f"{sum(batch[:, 1:].size for batch in batches):,}"),
        *metrics.losses(loss, text.bytes_per_token),
    ]


def unseen_text(run: Trained, other: Sequence[Path]) -> data.TokenizedText:
    """Other text, or what the run held out, as the validation part of a text.

    Raises:
      InputError: The files are not those that the run was trained with.
    """
    settings = run.settings
    if other:
        corpus = data.read_corpus(other)
        documents = corpus.train + corpus.valid
    else:
        corpus = data.read_corpus(settings.data, installed_packages=settings.installed_packages)
        if corpus.fingerprint != run.fingerprints["text"]:
            raise InputError(
                f"{corpus.source}: its text is not the one that the run was trained with, so what "
                "it held out is not known; give other text with --data"
            )
        documents = corpus.valid
    tokens = data.encode(run.tokenizer, documents)
    return data.TokenizedText(
        data.Corpus(corpus.source, (), documents), run.tokenizer, tokens[:0], tokens
    )


if __name__ == "__main__":
    sys.exit(main())
