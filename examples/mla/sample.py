"""Text from a model: at the end of a run, and from a run's newest checkpoint.

python -m examples.mla.sample RUN --prompt "class "
"""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from tokenizers import Tokenizer

from examples.mla import cli, trained
from examples.mla.cli import InputError
from examples.mla.data import SEPARATOR
from examples.mla.model import Decoder, generate
from examples.mla.settings import Settings


def prompt_tokens(tokenizer: Tokenizer, settings: Settings) -> np.ndarray:
    """The prompt behind a separator, int32 `[tokens]`.

    Raises:
      InputError: It leaves nothing of the model's longest sequence.
    """
    prompt = [tokenizer.token_to_id(SEPARATOR), *tokenizer.encode(settings.prompt).ids]
    if len(prompt) >= settings.model.max_length:
        raise InputError(
            f"--prompt is {len(prompt)} tokens long and leaves nothing of the model's "
            f"--max-length {settings.model.max_length}; shorten it"
        )
    return np.array(prompt, np.int32)


def continued(model: Decoder, tokenizer: Tokenizer, settings: Settings) -> str:
    """What the model says after the prompt, with the settings' length, temperature and seed."""
    prompt = prompt_tokens(tokenizer, settings)
    length = min(settings.sample_tokens, settings.model.max_length - len(prompt))
    key = jax.random.key(settings.seed)
    tokens = generate(model, jnp.asarray(prompt), length, settings.temperature, key)
    return tokenizer.decode(np.asarray(tokens)[len(prompt) :].tolist(), skip_special_tokens=False)


@dataclass(frozen=True)
class Arguments:
    """Continues a prompt with the model of a run's newest checkpoint. What is not given is as in
    the run, whose report ends with the same sample."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""
    prompt: str | None = None
    """Text with which the sample begins."""
    sample_tokens: int | None = None
    """Tokens in the sample."""
    temperature: float | None = None
    """Temperature; 0 takes the likeliest token."""
    seed: int | None = None
    """Seed of the sample."""


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 2 for wrong input."""

    def sample() -> int:
        given = asdict(cli.parse(Arguments, args, prog="python -m examples.mla.sample"))
        run = trained.load(given.pop("run_dir"))
        with cli.one_line_errors():
            changed = {name: value for name, value in given.items() if value is not None}
            settings = replace(run.settings, **changed)
        text = settings.prompt + continued(run.model, run.tokenizer, settings)
        cli.say(cli.console(), text, keep="\n\t")
        return 0

    return cli.run(sample)


if __name__ == "__main__":
    sys.exit(main())
