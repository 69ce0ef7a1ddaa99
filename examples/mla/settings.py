"""The flags of a training run."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

import muonclip_jax as mc
from examples.mla import cli, metrics
from examples.mla.cli import InputError
from examples.mla.data import BYTE_VOCABULARY
from examples.mla.devices import Devices
from examples.mla.model import ModelConfig

LARGEST = 2**31 - 1  # steps and sizes are counted in int32
# Each chain that clips, and the same chain without the clip.
UNCLIPPED = {"muonclip": "muon", "quackclip": "quack", "adamclip": "adamw"}

# A resumed run may have other values of these; all other settings must be the checkpoint's.
FREE_ON_RESUME = {
    *("steps", "learning_rate", "warmup", "threshold", "weight_decay", "relative_learning_rate"),
    *("eval_every", "eval_batches", "save_every", "prompt", "sample_tokens", "temperature"),
    *("data", "installed_packages", "cache_dir"),  # the text is fingerprinted
    *("tensorboard", "wandb"),
}


# What runs of earlier releases did, which had no such flag: on every CPU they took bfloat16.
ADDED = {
    **{"experts": 0, "tensorboard": False, "wandb": False},
    **{"rates.bfloat16": 1470.0, "rates.float32": 290.0},
}


def _folder_or_true(words: list[str]) -> Path | bool:
    if len(words) > 1:
        raise ValueError(f"takes one folder or none, got {' '.join(words)}")
    return Path(words[0]) if words else True


FolderOrTrue = Annotated[
    Path | bool,
    PrimitiveConstructorSpec(
        nargs="*",
        metavar="[FOLDER]",
        instance_from_str=_folder_or_true,
        is_instance=lambda value: isinstance(value, Path | bool),
        str_from_instance=lambda value: [str(value)],
    ),
]


@dataclass(frozen=True)
class Launch:
    """The flags of a launch rather than of a run. With those about devices they are what
    checkpoints do not keep."""

    run_dir: Path | None = None
    """Folder of the run; by default a new one in runs/."""
    resume: FolderOrTrue = False
    """Continue the run in FOLDER, or in --run-dir, or the one in runs/ that was saved last, from
    its newest checkpoint. Flags that are not given have that run's values; only --mesh and the
    other flags about devices do not."""
    config: Path | None = None
    """A TOML file whose keys are these flags without their dashes, as settings.toml in every run's
    folder is. Flags on the command line win."""


@dataclass(frozen=True)
class Settings(Launch):
    """Trains a small multi-head latent attention language model on real text.

    Ctrl-C or SIGTERM finishes the step, saves and exits with status 130 or 143; --resume goes on
    from there, bit for bit.
    """

    steps: int = 1200
    """Training steps."""
    batch_size: int = 8
    """Sequences per step."""
    context_length: int = 128
    """Tokens per sequence."""
    optimizer: Literal["muonclip", "muon", "quackclip", "quack", "adamclip", "adamw"] = "muonclip"
    """quack is Muon with QuacK; the names with clip are followed by QK-Clip."""
    per_head: bool = False
    """Muon orthogonalizes the query, key, value and output of each head separately; without it
    whole kernels, as Moonlight's code takes them."""
    relative_learning_rate: float = 1.0
    """QuacK's τ: the learning rate of queries and keys, relative to the others'."""
    learning_rate: float = 1e-2
    """Highest learning rate; it falls along a cosine to a tenth."""
    warmup: int = 50
    """Steps of linear warm-up, at most half of the run."""
    threshold: float = 15.0
    """QK-Clip's threshold τ. Kimi K2 took 100; a run as small and short as this one seldom gets
    there, so heads are only clipped with a smaller threshold."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    data: tuple[Path, ...] = ()
    """UTF-8 text files, Parquet files with a column "text", or folders of them; by default the
    Python standard library's sources."""
    installed_packages: bool = False
    """Add the sources of the installed packages."""
    tokenizer: Literal["bpe", "bytes"] = "bpe"
    """Byte-level BPE with --vocab-size tokens, trained on the text; or one token a byte."""
    seed: int = 0
    """Seed of the parameters, the order of the data and the sample."""
    eval_every: int = 100
    """Steps between validations."""
    eval_batches: int = 8
    """Held-out batches per validation."""
    save_every: int = 300
    """Steps between checkpoints."""
    prompt: str = "def "
    """Text with which the sample begins."""
    sample_tokens: int = 200
    """Tokens in the sample."""
    temperature: float = 0.8
    """Temperature of the sample; 0 takes the likeliest token."""
    tensorboard: bool = False
    """Write what is measured for TensorBoard too, into the run's folder."""
    wandb: bool = False
    """Send what is measured to Weights & Biases too; WANDB_MODE=offline in the environment keeps it
    in the run's folder."""
    rates: mc.Rates = field(default_factory=mc.declared_rates)
    """What a CPU multiplies fast, in GFLOP/s, by which Muon's dtype and products are chosen there;
    by default as this processor declares. A resumed run keeps its own."""
    cache_dir: Path = Path(".cache/mla")
    """Folder of trained tokenizers."""
    model: Annotated[ModelConfig, tyro.conf.arg(name="")] = ModelConfig()  # noqa: RUF009 (frozen)
    devices: Annotated[Devices, tyro.conf.arg(name="")] = Devices()  # noqa: RUF009 (frozen)

    def __post_init__(self):
        at_least_one = ("steps", "batch_size", "context_length", "eval_every", "eval_batches")
        for name in (*at_least_one, "save_every", "sample_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} must be at least 1, got {getattr(self, name)}")
            if getattr(self, name) > LARGEST:
                raise ValueError(
                    f"{flag(name)} must be at most {LARGEST}, got {getattr(self, name)}"
                )
        for name in ("learning_rate", "threshold", "relative_learning_rate"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{flag(name)} must be above 0 and finite, got {getattr(self, name)}"
                )
        for name in ("warmup", "weight_decay", "temperature", "seed"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(
                    f"{flag(name)} must be 0 or more, and finite, got {getattr(self, name)}"
                )
        if self.seed >= 2**32:
            raise ValueError(f"--seed must be below 2**32, got {self.seed}")
        if not self.prompt:
            raise ValueError("--prompt must not be empty")
        if any("\ud800" <= c <= "\udfff" for c in self.prompt):  # bytes that do not decode
            raise ValueError("--prompt is no UTF-8 text")
        if self.clips and self.model.qk_norm != "none":
            raise ValueError(
                f"--qk-norm {self.model.qk_norm} undoes what QK-Clip does to the kernels before "
                f"it; take --qk-norm none, or --optimizer {UNCLIPPED[self.optimizer]}"
            )
        if self.optimizer == "quack" and self.model.qk_norm != "none":
            raise ValueError(
                f"--qk-norm {self.model.qk_norm} takes the norms that QuacK controls out of "
                "the logits; take --qk-norm none, or --optimizer muon"
            )
        if self.context_length > self.model.max_length:
            raise ValueError(
                f"--context-length {self.context_length} is more than the model's --max-length "
                f"{self.model.max_length}; lower the one or raise the other"
            )
        if self.batch_size % self.devices.batch_parts:
            raise ValueError(
                f"--batch-size {self.batch_size} does not spread over the fsdp and data axes of "
                f"--mesh {self.devices.mesh}; it must be a multiple of {self.devices.batch_parts}"
            )
        if self.devices.several and self.run_dir is None:
            raise ValueError("several processes need a --run-dir, in a place that all of them see")

    @property
    def folder(self) -> Path:
        """The folder of the run, once it is decided (folder.py)."""
        if self.run_dir is None:
            raise ValueError("this run has no folder yet: set run_dir")
        return self.run_dir

    @property
    def warmup_steps(self) -> int:
        """Steps of this run's warm-up."""
        return min(self.warmup, self.steps // 2)

    @property
    def tokenizer_size(self) -> int:
        """Vocabulary size that the tokenizer is asked for."""
        return BYTE_VOCABULARY if self.tokenizer == "bytes" else self.model.vocab_size

    @property
    def clips(self) -> bool:
        """Whether the optimizer ends with QK-Clip."""
        return self.optimizer in UNCLIPPED

    def of_all_processes(self) -> "Settings":
        """What several processes must have in common: all but which of them each is."""
        return replace(self, devices=Devices())

    def to_json(self) -> dict[str, Any]:
        """Plain values, for checkpoints and metrics, without what is a launch's, not the run's."""
        run = {name: value for name, value in asdict(self).items() if name not in OF_LAUNCH}
        return json.loads(json.dumps(run, default=str))

    @classmethod
    def from_json(cls, saved: Any) -> "Settings":
        """The inverse of `to_json`, by way of the command line's parser, which checks types.

        Raises:
          InputError: These are not the settings of a run.
        """
        if not isinstance(saved, dict) or not isinstance(saved.get("model"), dict):
            raise InputError("no settings of a run")
        values = {k: v for k, v in (ADDED | metrics.flat(saved)).items() if k not in OF_LAUNCH}
        needed = metrics.flat(cls().to_json()).keys()
        if missing := sorted(needed - values.keys()):
            raise InputError(f"settings without {', '.join(missing)}")
        values["data"] = values["data"] or []  # None in releases up to 0.1.0
        return cli.parse(cls, arguments(values), prog="")


def arguments(values: Mapping[str, Any]) -> list[str]:
    """Settings as they are given on the command line."""
    words = []
    for name, value in values.items():
        match value:
            case bool():
                words.append(flag(name if value else f"no-{name}"))
            case list():
                words += [flag(name), *(os.path.join(".", item) for item in value)]
            case _:
                words.append(f"{flag(name)}={value}")
    return words


# What is a launch's and not the run's: checkpoints do not keep it. Those of earlier releases did.
OF_LAUNCH = {"devices", *(field.name for field in fields(Launch))}


def flag(name: str) -> str:
    """The flag of a field on the command line."""
    return "--" + name.replace("_", "-")


def check_same(settings: Settings, saved: Settings, checkpoint: Path) -> None:
    """Refuses to continue a checkpoint as another model or run.

    Raises:
      InputError: Settings that belong to the checkpoint differ; each is named with both values.
    """

    def fixed(s: Settings) -> dict[str, Any]:
        run = metrics.flat(asdict(s))
        return {k: v for k, v in run.items() if k not in FREE_ON_RESUME | OF_LAUNCH}

    of_checkpoint = fixed(saved)
    differing = [
        f"{flag(name)} {value} (checkpoint: {of_checkpoint[name]})"
        for name, value in fixed(settings).items()
        if value != of_checkpoint[name]
    ]
    if differing:
        raise InputError(
            f"{checkpoint} is of another model or run: {', '.join(differing)}; leave these flags "
            "out to resume it, or start a new run without --resume"
        )
