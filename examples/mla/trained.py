"""A trained model, from nothing but the folder of its run."""

from dataclasses import dataclass, replace
from pathlib import Path

from tokenizers import Tokenizer

from examples.mla import folder
from examples.mla.checkpoint import Checkpoints
from examples.mla.data import read_tokenizer
from examples.mla.model import Decoder
from examples.mla.settings import Settings
from examples.mla.steps import create

TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Trained:
    """A model as its run's newest checkpoint has it.

    Attributes:
      settings: The run's.
      tokenizer: The run's.
      fingerprints: Of the run's text and vocabulary.
      model: With the checkpoint's parameters.
      step: The checkpoint's.
    """

    settings: Settings
    tokenizer: Tokenizer
    fingerprints: dict[str, str]
    model: Decoder
    step: int


def load(run_dir: Path) -> Trained:
    """Reads a run's newest checkpoint. Writes nothing: the run may be going on.

    Raises:
      InputError: There is none, or it does not read, or the tokenizer is missing.
    """
    folder.check_name(run_dir)
    checkpoints = Checkpoints.existing(run_dir)
    about = checkpoints.about()
    with checkpoints.one_line_errors():
        settings = Settings.from_json(about["settings"])
    tokenizer = read_tokenizer(run_dir / TOKENIZER, about["text"]["vocabulary"])
    config = replace(settings.model, vocab_size=tokenizer.get_vocab_size())
    model, optimizer = create(settings, config)
    checkpoints.restore(model, optimizer)
    return Trained(settings, tokenizer, about["text"], model, checkpoints.latest)
