"""What a study is, and its command: train what is missing, then rebuild what is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.mla import cli
from studies.common import records, sources, training
from studies.common.model import ModelConfig
from studies.common.optimizers import Optimizer
from studies.common.records import ASIDE, Json, Key, Runs
from studies.common.training import Measure, Plan, Setting

TRAIN = "studies.common.training", "train"
Size = Literal["smoke", "cpu", "cpu_long", "gpu", "gpu_long"]


@dataclass(frozen=True)
class Grid:
    """The runs of one size: every setting with every seed, and chosen ones with more.

    Attributes:
      plan: What all runs share.
      settings: Label → setting.
      seeds: Seeds of every setting, 0 to `seeds - 1`.
      chosen: Labels of the settings that get `chosen_seeds` instead: those that a verdict compares.
      chosen_seeds: Their seeds, where there are chosen ones.
    """

    plan: Plan
    settings: Mapping[str, Setting]
    seeds: int
    chosen: Sequence[str] = ()
    chosen_seeds: int = 5

    def __post_init__(self):
        if unknown := set(self.chosen) - self.settings.keys():
            raise ValueError(f"chosen: {sorted(unknown)} is no setting of {list(self.settings)}.")

    def seeds_of(self, label: str) -> int:
        """How many seeds a setting gets."""
        return max(self.seeds, self.chosen_seeds) if label in self.chosen else self.seeds

    def runs(self) -> list[tuple[str, int]]:
        """Label and seed of each, seed by seed, so that half a grid compares all settings."""
        most = max(map(self.seeds_of, self.settings))
        return [
            (label, seed)
            for seed in range(most)
            for label in self.settings
            if seed < self.seeds_of(label)
        ]


def smoke(settings: Mapping[str, Setting], *labels: str) -> Grid:
    """A grid of seconds, of these settings only; it shows that all parts run, and nothing else."""
    plan = Plan("package", steps=20, batch=4, context=32, measure_every=10, valid_batches=1)
    return Grid(plan, {label: settings[label] for label in labels}, seeds=1)


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
      folder: Where its README.md and its results are.
      grids: What is run.
      report: From the records by label, one a seed, what was measured aside and the folder of the
        pictures, to Markdown; pictures go into that folder.
      measure: What is measured beside what `train` measures anyway.
      aside: What is measured once for a grid and is no training run.
      optimizer: The class of the settings' optimizers, where it is the study's own.
    """

    folder: Path
    grids: Mapping[Size, Grid]
    report: Callable[[Runs, Json | None, Path], str]
    measure: Measure | None = None
    aside: Callable[[Grid], Mapping[str, Any]] | None = None
    optimizer: type[Optimizer] = Optimizer

    def record_file(self, size: Size) -> Path:
        """The file of records."""
        return self.folder / "results" / f"{size}.jsonl"

    def pictures(self, size: Size) -> Path:
        """The folder of pictures."""
        return self.folder / "results" / size

    def identity(self, size: Size, label: str, seed: int) -> Json:
        """What a record says that is of this run as the grid has it now, made by this code."""
        grid = self.grids[size]
        model, optimizer = grid.settings[label]
        return records.tidy(
            {
                "setting": label,
                "seed": seed,
                "plan": grid.plan,
                "model": model,
                "optimizer": optimizer,
                "sources": self.code_hash(),
            }
        )

    def code_hash(self) -> str:
        """The hash of the code that makes a run's numbers."""
        own = [self.measure] if self.measure else []
        own += [self.optimizer] if self.optimizer is not Optimizer else []
        return sources.digest(TRAIN, *map(sources.place, own))

    def aside_hash(self) -> str:
        """The same of what is measured aside."""
        return sources.digest(sources.place(self.aside))

    def current(self, size: Size) -> list[Key]:
        """The records that are there and of the grid and the code of now."""
        grid, found = self.grids[size], records.read(self.record_file(size))
        keys: list[Key] = [run for run in grid.runs() if run in found]
        keys = [run for run in keys if _agrees(found[run], self.identity(size, *run))]
        if self.aside and found.get(ASIDE, {}).get("sources") == self.aside_hash():
            keys.append(ASIDE)
        return keys


def _agrees(record: Json, identity: Json) -> bool:
    """Whether a record is of this identity. Options that came after it have their defaults."""
    kinds = {"plan": Plan, "model": ModelConfig, "optimizer": Optimizer}
    filled = {name: records.tidy(kind()) | record[name] for name, kind in kinds.items()}
    if first := filled["optimizer"]["pretrained"]:
        filled["optimizer"]["pretrained"] = records.tidy(Optimizer()) | first
    return all({**record, **filled}[name] == own for name, own in identity.items())


@dataclass(frozen=True)
class Flags:
    """Trains what has no record yet, then rebuilds tables and pictures."""

    size: Size = "smoke"
    """smoke takes seconds and tells nothing; cpu at most 20 minutes on two cores, and so does
    cpu_long, which has fewer settings and more steps; gpu is as near to the source's own setting as
    can be, and gpu_long to its second one, where it has two."""
    rebuild: bool = False
    """Train nothing: only rebuild, from the records."""
    limit: int | None = None
    """Train at most so many of the missing runs."""


def main(study: Study, args: Sequence[str] | None = None) -> int:
    """Runs the command.

    Returns:
      The exit status: 0, or 2 for wrong input, of which one line tells.
    """
    return cli.run(lambda: _main(study, args))


def _main(study: Study, args: Sequence[str] | None) -> int:
    flags = cli.parse(Flags, args, prog=f"python -m studies.{study.folder.name}")
    if flags.size not in study.grids:
        raise cli.InputError(f"--size {flags.size}: there is only {', '.join(study.grids)} here")
    console = Console()
    if not flags.rebuild:
        jax.config.update("jax_compilation_cache_dir", str(training.CACHE / "xla"))
        run_missing(study, flags.size, flags.limit, console)
    console.print(rebuild(study, flags.size), markup=False, highlight=False, soft_wrap=True)
    return 0


def run_missing(study: Study, size: Size, limit: int | None, console: Console) -> None:
    """Trains the runs that are not done; each is written when it ends."""
    grid, done = study.grids[size], study.current(size)
    missing = [run for run in grid.runs() if run not in done][:limit]
    if missing:
        text = training.load_text(grid.plan, _vocab_size(grid))
        console.print(text.describe(), soft_wrap=True)

        @lru_cache(maxsize=4)  # runs of a seed follow each other, and share what comes before
        def pretrained(model: ModelConfig, optimizer: Optimizer | None, seed: int) -> Any:
            return optimizer and training.pretrain(model, optimizer, grid.plan, text, seed)

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
            overall = bar.add_task(study.folder.name, total=len(missing))
            for label, seed in missing:
                steps = bar.add_task(f"{label}, seed {seed}", total=grid.plan.steps)
                setting = grid.settings[label]
                first = pretrained(setting.model, setting.optimizer.pretrained, seed)
                with records.stopwatch() as seconds:
                    result = training.train(
                        setting,
                        grid.plan,
                        text,
                        seed,
                        measure=study.measure,
                        pretrained=first,
                        on_progress=lambda done, bar=bar, steps=steps: bar.update(
                            steps, completed=done
                        ),
                    )
                record = {
                    **study.identity(size, label, seed),
                    **records.provenance(),
                    "text": {"train_tokens": len(text.train), **text.fingerprints},
                    "seconds": seconds(),
                    **result,
                }
                records.add(record, study.record_file(size))
                bar.remove_task(steps)
                bar.advance(overall)
    done = study.current(size)
    if study.aside and ASIDE not in done and all(run in done for run in grid.runs()):
        record = {ASIDE: study.aside.__name__, "sources": study.aside_hash()}
        found = study.aside(grid)
        records.add({**record, **records.provenance(), **found}, study.record_file(size))


def rebuild(study: Study, size: Size) -> str:
    """Tables and pictures from the records alone, put into the README where it has a place for
    this size.

    Returns:
      The Markdown.
    """
    grid, found = study.grids[size], records.read(study.record_file(size))
    there = [run for run in grid.runs() if run in found]
    if not there:
        text = "Not run."
    else:
        runs: Runs = {}
        for label, seed in there:
            runs.setdefault(label, []).append(found[label, seed])
        current = study.current(size)
        stale = [run for run in there if run not in current]
        origin = records.origin(runs, of=len(grid.runs()), stale=stale)
        report = study.report(runs, found.get(ASIDE), study.pictures(size))
        text = f"{origin}\n\n{report}"
    records.write_section(study.folder / "README.md", size, text)
    return text


def _vocab_size(grid: Grid) -> int:
    (size,) = {model.vocab_size for model, _ in grid.settings.values()}
    return size
