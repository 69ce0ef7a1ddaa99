"""The same run with and without QK-Clip: model, data, seed and learning rate alike.

python -m examples.mla.compare --help
"""

import sys
from collections.abc import Sequence
from dataclasses import replace

from examples.mla import cli, comparison, config, figures, metrics, report, svg
from examples.mla.cli import InputError
from examples.mla.comparison import Comparison
from examples.mla.devices import Devices, in_every_process, is_first
from examples.mla.folder import new_run_dir, write_whole
from examples.mla.page import columns, escape, page, pairs, pictures, section, table
from examples.mla.settings import UNCLIPPED, Settings
from examples.mla.train import train

FILE, PICTURE = "compare.html", "compare.svg"

# Twice the learning rate of the healthy run: the logits outgrow any threshold.
DEFAULTS = Settings(steps=400, learning_rate=2e-2)


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
    """Runs both, each into its own folder, and writes one report of the two, and their picture.

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
    compared = comparison.read(folder, settings.optimizer)
    path = folder / FILE
    write_whole(folder / PICTURE, svg.standalone(compared.picture(), PICTURE_SHOWS).encode())
    write_whole(path, comparison_page(compared).encode())
    for name in names:
        report.build(folder / name)  # again: now there is something to compare with
    console.rule("comparison")
    cli.say(console, compared.verdict())
    cli.say(console, f"report: {path}")
    return 0


def comparison_page(compared: Comparison) -> str:
    """The report of both as HTML."""
    runs = compared.runs
    summaries = [dict(metrics.summary(rows)) for rows in runs.values()]
    shared = [(label, *(s.get(label, "") for s in summaries)) for label in summaries[0]]
    links = "".join(
        f'<p><a href="{name}/report.html">All about {name}</a></p>' for name in map(escape, runs)
    )
    loss = "Loss of both, over steps"
    return page(
        " and ".join(runs),
        compared.verdict(),
        report.about([row for rows in runs.values() for row in rows]),
        [
            columns(
                section(
                    "Max logits",
                    pictures({PICTURE_SHOWS: compared.picture()}, {PICTURE_SHOWS: PEAKS}),
                ),
                section("Loss", pictures({loss: figures.loss(runs)}, {loss: LOSS})),
            ),
            section("Result", table("Results of both", ("result", *runs), shared), links),
            section("Settings", pairs(report.shown_settings(compared.settings))),
        ],
    )


PICTURE_SHOWS = "Largest max logit of any head over steps, with and without QK-Clip"
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
