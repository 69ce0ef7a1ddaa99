"""The same run with and without QK-Clip: model, data, seed and learning rate alike.

python -m examples.mla.compare --help
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from examples.mla import cli, config, figures, metrics
from examples.mla.cli import InputError
from examples.mla.devices import Devices, in_every_process, is_first
from examples.mla.folder import new_run_dir, write_whole
from examples.mla.metrics import Row, select
from examples.mla.page import escape, page, picture, section, table
from examples.mla.settings import UNCLIPPED, Settings
from examples.mla.train import train

FILE = "compare.html"

# Twice the learning rate of the healthy run: the logits outgrow any threshold.
DEFAULTS = Settings(steps=400, learning_rate=2e-2)

Runs = Mapping[str, Sequence[Row]]  # optimizer → metrics, the one that clips first


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit status, as `train.main` does."""
    return cli.run(lambda: compare(read_settings(args)))


def read_settings(args: Sequence[str] | None) -> Settings:
    """Starts JAX on the devices that the flags name, and reads the flags of both runs."""
    args = config.expanded(args)
    cli.peek(Devices, args).start()
    return in_every_process(lambda: _read_settings(args), alike=Settings.of_all_processes)


def _read_settings(args: Sequence[str]) -> Settings:
    return cli.parse(
        Settings,
        args,
        prog="python -m examples.mla.compare",
        description="Trains the same model twice, with and without QK-Clip, and compares.",
        default=DEFAULTS,
    )


def compare(settings: Settings) -> int:
    """Runs both, each into its own folder, and writes one report of the two.

    Args:
      settings: Those of both runs; `optimizer` is the one that clips.

    Returns:
      0, or 128 + n when signal n ended a run early.

    Raises:
      InputError: `--resume`, an optimizer that does not clip, or what `train` raises.
    """
    if settings.resume:
        raise InputError("a comparison starts both runs anew; leave out --resume")
    if not settings.clips:
        raise InputError(
            f"--optimizer {settings.optimizer} does not clip; give the one that does, "
            f"{' or '.join(UNCLIPPED)}: it is compared with itself without the clip"
        )
    folder, console = in_every_process(lambda: new_run_dir(settings.run_dir)), cli.console()
    names = (settings.optimizer, UNCLIPPED[settings.optimizer])
    for name in names:
        console.rule(name)
        status = train(replace(settings, optimizer=name, run_dir=folder / name), console)
        if status:
            return status
    if not is_first():
        return 0
    runs = {name: metrics.read(folder / name) for name in names}
    path = folder / FILE
    write_whole(path, comparison_page(runs, settings).encode())
    console.rule("comparison")
    cli.say(console, verdict(runs, settings))
    cli.say(console, f"report: {path}")
    return 0


def relative_peaks(rows: Sequence[Row], settings: Settings) -> np.ndarray:
    """The largest max logit of any head in units of τ, float64 `[steps]`, after the warm-up."""
    return metrics.peak(select(rows, "step"))[settings.warmup_steps :] / settings.threshold


def verdict(runs: Runs, settings: Settings) -> str:
    """The max logits of both runs after the warm-up, in units of τ."""
    parts = []
    for name, rows in runs.items():
        peaks = relative_peaks(rows, settings)
        above = np.nanmean(peaks > 3)
        parts.append(
            f"{name}: max logits up to {np.nanmax(peaks):.2f} τ, median {np.nanmedian(peaks):.2f} "
            f"τ, above 3τ in {above:.0%} of the steps"
        )
    return f"After the warm-up, with τ = {settings.threshold:g}: {'; '.join(parts)}."


def comparison_page(runs: Runs, settings: Settings) -> str:
    """The report of both as HTML."""
    summaries = [dict(metrics.summary(rows)) for rows in runs.values()]
    shared = [(label, *(s.get(label, "") for s in summaries)) for label in summaries[0]]
    links = "".join(
        f'<p><a href="{name}/report.html">All about {name}</a></p>' for name in map(escape, runs)
    )
    return page(
        " and ".join(runs),
        verdict(runs, settings),
        [
            section("Max logits", picture(figures.peaks(runs, settings.threshold), PEAKS)),
            section("Loss", picture(figures.loss(runs), LOSS)),
            section("Result", table(shared, header=("", *runs)) + links),
            section("Settings", table(metrics.flat(settings.to_json()).items())),
        ],
    )


PEAKS = (
    "The largest attention logit of any head in each step's batch. Both runs start from the same "
    "parameters and see the same batches; only the last link of the chain differs."
)
LOSS = (
    "Cross-entropy in nats per token: of every training batch (faint), their running mean, and "
    "of the held-out files (dots)."
)


if __name__ == "__main__":
    sys.exit(main())
