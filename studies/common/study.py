"""What a study is, and its command: train what is missing, then rebuild what is shown."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from examples.mla import cli
from studies.common import records, training
from studies.common.records import Json, Runs
from studies.common.training import Measure, Plan, Setting

Size = Literal["smoke", "cpu", "gpu", "gpu_long"]
ASIDE = "aside.json"


@dataclass(frozen=True)
class Grid:
    """The runs of one size: every setting with every seed."""

    plan: Plan
    settings: Mapping[str, Setting]
    seeds: int

    def runs(self) -> list[tuple[str, int]]:
        """Label and seed of each, seed by seed, so that half a grid compares all settings."""
        return [(label, seed) for seed in range(self.seeds) for label in self.settings]


def smoke(settings: Mapping[str, Setting], *labels: str) -> Grid:
    """A grid of seconds, of these settings only; it shows that all parts run, and nothing else."""
    plan = Plan("package", steps=20, batch=4, context=32, measure_every=10, valid_batches=1)
    return Grid(plan, {label: settings[label] for label in labels}, seeds=1)


@dataclass(frozen=True)
class Study:
    """A study.

    Attributes:
      folder: Where its README.md is, and `results/SIZE`.
      grids: What is run.
      report: From the records by label, one a seed, and the folder of the results, to Markdown;
        pictures go into that folder.
      measure: What is measured beside what `train` measures anyway.
      aside: What is measured once for a grid and is no training run; goes into `aside.json`.
    """

    folder: Path
    grids: Mapping[Size, Grid]
    report: Callable[[Runs, Path], str]
    measure: Measure | None = None
    aside: Callable[[Grid], Mapping[str, Any]] | None = None

    def results(self, size: Size) -> Path:
        """The folder of raw files and pictures."""
        return self.folder / "results" / size

    def path(self, size: Size, label: str, seed: int) -> Path:
        """The raw file of a run."""
        return self.results(size) / f"{records.slug(label)}-seed{seed}.json"

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
                "sources": records.digest_of_sources(self.measure),
            }
        )

    def is_done(self, size: Size, label: str, seed: int) -> bool:
        """Whether the run's raw file is there, and is not of another grid or code."""
        path = self.path(size, label, seed)
        if not path.exists():
            return False
        record = records.read(path)
        return all(record[name] == own for name, own in self.identity(size, label, seed).items())

    def aside_is_done(self, size: Size) -> bool:
        """Whether `aside.json` is there, and made by this code."""
        path = self.results(size) / ASIDE
        sources = records.digest_of_sources(self.aside)
        return path.exists() and records.read(path)["sources"] == sources


@dataclass(frozen=True)
class Flags:
    """Trains what has no raw file yet, then rebuilds tables and pictures."""

    size: Size = "smoke"
    """smoke takes seconds and tells nothing; cpu at most 20 minutes on two cores; gpu is as near to
    the source's own setting as can be, and gpu_long to its second one, where it has two."""
    rebuild: bool = False
    """Train nothing: only rebuild, from the raw files."""
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
    grid = study.grids[size]
    missing = [run for run in grid.runs() if not study.is_done(size, *run)][:limit]
    if missing:
        text = training.load_text(grid.plan, _vocab_size(grid))
        console.print(text.describe(), soft_wrap=True)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeElapsedColumn(), console=console) as bar:
            overall = bar.add_task(study.folder.name, total=len(missing))
            for label, seed in missing:
                steps = bar.add_task(f"{label}, seed {seed}", total=grid.plan.steps)
                with records.stopwatch() as seconds:
                    result = training.train(
                        grid.settings[label],
                        grid.plan,
                        text,
                        seed,
                        measure=study.measure,
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
                records.write(record, study.path(size, label, seed))
                bar.remove_task(steps)
                bar.advance(overall)
    if study.aside and all(study.is_done(size, *run) for run in grid.runs()):
        _measure_aside(study, size)


def _measure_aside(study: Study, size: Size) -> None:
    if not study.aside_is_done(size):
        found = study.aside(study.grids[size])
        record = {"sources": records.digest_of_sources(study.aside), **records.provenance()}
        records.write({**record, **found}, study.results(size) / ASIDE)


def rebuild(study: Study, size: Size) -> str:
    """Tables and pictures from the raw files alone, put into the README where it has a place for
    this size.

    Returns:
      The Markdown.
    """
    grid = study.grids[size]
    there = [run for run in grid.runs() if study.path(size, *run).exists()]
    if not there:
        text = "Not run."
    else:
        runs: Runs = {}
        for label, seed in there:
            runs.setdefault(label, []).append(records.read(study.path(size, label, seed)))
        stale = [run for run in there if not study.is_done(size, *run)]
        origin = records.origin(runs, of=len(grid.runs()), stale=stale)
        text = f"{origin}\n\n{study.report(runs, study.results(size))}"
    records.write_section(study.folder / "README.md", size, text)
    return text


def _vocab_size(grid: Grid) -> int:
    (size,) = {model.vocab_size for model, _ in grid.settings.values()}
    return size
