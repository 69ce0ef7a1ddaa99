"""Trains the MLA language model; see `python -m examples.mla.train --help`."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TextIO

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table

from examples.mla import cli, config, folder, metrics, report, watch
from examples.mla.checkpoint import Checkpoints, StopSignal
from examples.mla.cli import InputError
from examples.mla.data import (
    TokenizedText,
    load_text,
    training_batches,
    validation_batches,
)
from examples.mla.devices import Devices, describe, in_every_process, is_first
from examples.mla.mesh import spread
from examples.mla.recorder import Recorder
from examples.mla.sample import continued, prompt_tokens
from examples.mla.settings import Launch, Settings, check_same
from examples.mla.steps import create, participation, train_step, validate
from examples.mla.trained import TOKENIZER

PROGRAM = "python -m examples.mla.train"


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 2 for wrong input, 128 + n when stopped by signal n."""
    return cli.run(lambda: train(read_settings(args)))


def read_settings(args: Sequence[str] | None) -> Settings:
    """Starts JAX on the devices that the flags name, and reads all flags; with `--resume`, those
    of the run that are not given are the checkpoint's. If there are several processes, all must
    call this.

    Raises:
      InputError: Flags that are wrong, or do not fit the devices or the run to resume.
    """
    args = config.expanded(args)
    cli.peek(Devices, args).start()
    return in_every_process(lambda: _read_settings(args), alike=Settings.of_all_processes)


def _read_settings(args: Sequence[str]) -> Settings:
    launch = cli.peek(Launch, args)
    if not launch.resume:
        settings = cli.parse(Settings, args, prog=PROGRAM)
        return replace(settings, run_dir=folder.new_run_dir(settings.run_dir))
    run_dir = folder.run_dir_to_resume(launch.resume, launch.run_dir)
    folder.check_name(run_dir)
    checkpoints = Checkpoints.existing(run_dir)
    about = checkpoints.about()
    with checkpoints.one_line_errors():
        saved = Settings.from_json(about["settings"])
    settings = cli.parse(Settings, args, prog=PROGRAM, default=replace(saved, run_dir=run_dir))
    check_same(settings, saved, run_dir)
    return settings


def train(settings: Settings, console: Console | None = None) -> int:
    """Trains, or goes on training; leaves metrics, checkpoints and a report in the run's folder.

    Returns:
      0, or 128 + n when signal n ended it early.

    Raises:
      InputError: Settings or text that cannot be used; then nothing has been written.
    """
    console = console or cli.console()
    with settings.devices.on_mesh():
        run = Run(settings)
        cli.say(console, run.text.describe())
        with run.alone_in_folder():
            done = run.resume(console) if settings.resume else run.start()
            stopped_by = run.loop(done, console)
            if stopped_by is None:
                run.finish(console)
                return 0
            cli.say(
                console,
                f"{signal.Signals(stopped_by).name}: saved step {run.checkpoints.latest}; to go "
                f"on: --resume {settings.run_dir}",
            )
            return 128 + stopped_by


class Run:
    """A model, its optimizer and its text. Nothing is written before `alone_in_folder`."""

    def __init__(self, settings: Settings):
        self.settings = settings
        in_every_process(lambda: watch.check(settings))
        self.text = in_every_process(self._text, alike=lambda text: text.fingerprints)
        size = {"context": settings.context_length, "batch": settings.batch_size}
        self.batches = training_batches(self.text, seed=settings.seed, **size)
        held_out = validation_batches(self.text, count=settings.eval_batches, **size)
        self.held_out = [spread(batch) for batch in held_out]
        self.config = replace(settings.model, vocab_size=self.text.vocab_size)
        prompt_tokens(self.text.tokenizer, settings)  # raises, if it is too long
        with cli.one_line_errors():
            self.model, self.optimizer = create(settings, self.config)

    @cached_property
    def checkpoints(self) -> Checkpoints:
        return Checkpoints(self.settings.folder)

    @contextmanager
    def alone_in_folder(self) -> Iterator[None]:
        """Makes the folder of a fresh run, and lets no other process write into it.

        Raises:
          InputError: Another process does, or not every process sees the folder.
        """
        with ExitStack() as held:
            in_every_process(lambda: self._take_folder(held))
            in_every_process(self._check_folder)
            yield

    def start(self) -> int:
        """Returns step 0."""
        return self._record_start(0)

    def resume(self, console: Console) -> int:
        """Goes back to the newest checkpoint; returns its step.

        Raises:
          InputError: It is of other text, or beyond `--steps`, or does not read.
        """
        step, run_dir = self.checkpoints.latest, self.settings.folder
        about = self.checkpoints.about()
        self.text.check_same(about["text"], run_dir)
        if step > self.settings.steps:
            raise InputError(f"{run_dir} is at step {step} already, beyond --steps; raise --steps")
        if self.checkpoints.is_older(self.model, self.optimizer):
            cli.say(
                console,
                f"{run_dir}: converting the optimizer state of an older release at step {step}",
            )
        position = self.checkpoints.restore(self.model, self.optimizer)
        with self.checkpoints.one_line_errors():
            self.batches.set_state(position)
        if not in_every_process(lambda: not is_first() or metrics.rewind(run_dir, step)):
            cli.say(console, f"{run_dir / metrics.FILE} is gone: the record begins at step {step}")
        return self._record_start(step)

    def loop(self, done: int, console: Console) -> int | None:
        """Trains from step `done` to the last.

        Returns:
          The signal that ended it early, if one did; all is saved then.
        """
        settings = self.settings
        with (
            StopSignal() as stop,
            self._recording(done) as record,
            Recorder(record, settings, done, console) as recorder,
        ):
            if done == 0:
                self._evaluate(0, recorder)
            for step in range(done + 1, settings.steps + 1):
                batch = spread(next(self.batches))
                recorder.step(
                    step, train_step(self.model, self.optimizer, batch, clips=settings.clips)
                )
                stopped_by = stop.agreed()
                ends = step == settings.steps
                if ends or step % settings.eval_every == 0:
                    recorder.catch_up()
                    self._evaluate(step, recorder)
                if ends or step % settings.save_every == 0 or stopped_by:
                    recorder.catch_up()
                    self._save(step)
                    recorder.restart_clock()
                if stopped_by:
                    return stopped_by
        return None

    def finish(self, console: Console) -> None:
        """Writes a sample, and shows the run's results."""
        settings = self.settings
        sample = continued(self.model, self.text.tokenizer, settings)
        with self._metrics_file() as file:
            end = {"event": "end", "step": settings.steps, "prompt": settings.prompt}
            metrics.write(file, {**end, "sample": sample})
        if not is_first():
            return
        rows = metrics.read(settings.folder)
        table = Table(title=f"{settings.optimizer}, {settings.model.attention}", show_header=False)
        for label, value in metrics.summary(rows):
            table.add_row(label, value)
        console.print(table)
        console.rule("sample")
        cli.say(console, settings.prompt + sample, keep="\n\t")
        console.rule()
        cli.say(console, f"report: {report.build(settings.folder)}")

    def _evaluate(self, step: int, recorder: Recorder) -> None:
        losses, keys = [], {}
        for batch in self.held_out:
            loss, keys = validate(self.model, batch)
            losses.append(loss)
        ratios = jax.device_get(participation(keys))  # of the last batch
        recorder.evaluation(step, float(np.mean(jax.device_get(losses))), ratios)

    def _save(self, step: int) -> None:
        self.checkpoints.save(
            step,
            self.model,
            self.optimizer,
            position=self.batches.get_state(),
            about={"settings": self.settings.to_json(), "text": self.text.fingerprints},
        )
        if is_first():
            folder.note_newest(self.settings.folder)

    def _text(self) -> TokenizedText:
        settings = self.settings
        return load_text(
            settings.data,
            installed_packages=settings.installed_packages,
            vocab_size=settings.tokenizer_size,
            cache=settings.cache_dir,
        )

    def _take_folder(self, held: ExitStack) -> None:
        if not is_first():
            return
        run_dir = self.settings.folder
        run_dir.mkdir(parents=True, exist_ok=True)
        held.enter_context(folder.locked(run_dir))
        if not self.settings.resume:
            folder.new_run_dir(run_dir)  # another run may have been there since the flags were read

    def _check_folder(self) -> None:
        if not self.settings.folder.is_dir():
            raise InputError(
                f"{self.settings.folder}: process 0 made this folder, and process "
                f"{jax.process_index()} does not see it; give a --run-dir that all processes share"
            )

    def _record_start(self, step: int) -> int:
        sizes = jax.tree.map(jnp.size, nnx.state(self.model, nnx.Param))
        facts = {
            "text": self.text.corpus.source,
            "parameters": sum(jax.tree.leaves(sizes)),
            "vocabulary": self.text.vocab_size,
            "training tokens": len(self.text.train),
            "held-out tokens": len(self.text.valid),
            "bytes_per_token": self.text.bytes_per_token,
            "device": describe(),
            "jax": jax.__version__,
            "commit": commit(),
            "started": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        }
        row = {"event": "start", "step": step, "settings": self.settings.to_json(), "facts": facts}
        with self._metrics_file() as file:
            metrics.write(file, row)
        if is_first():
            config.write(self.settings)
            tokenizer = self.text.tokenizer.to_str().encode()
            folder.write_whole(self.settings.folder / TOKENIZER, tokenizer)
        return step

    @contextmanager
    def _recording(self, done: int) -> Iterator[Callable[[metrics.Row], None]]:
        """Gives what records a row of the metrics, and sends it to what watches the run."""
        with self._metrics_file() as file, watch.watching(self.settings, done) as send:

            def record(row: metrics.Row) -> None:
                metrics.write(file, row)
                send(row)

            yield record

    def _metrics_file(self) -> TextIO:
        path = self.settings.folder / metrics.FILE if is_first() else os.devnull
        return open(path, "a", encoding="utf-8")


def commit() -> str:
    """The commit of this code, where git knows it."""
    command = ["git", "describe", "--always", "--dirty=, with changes", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)
    except OSError:  # no git
        return "unknown"
    return found.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
