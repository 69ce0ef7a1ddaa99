"""The report of a run: one HTML file, made from metrics.jsonl alone.

Rebuild it with `python -m examples.mla.report RUN_DIR`.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from examples.mla import cli, figures, metrics
from examples.mla.folder import write_whole
from examples.mla.metrics import Row, select
from examples.mla.page import escape, page, picture, section, table

FILE = "report.html"
# What rows of something else raise where their values are used.
OTHER_ROWS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


def build(run_dir: Path) -> Path:
    """Writes the report of a run into its folder.

    Args:
      run_dir: The folder with metrics.jsonl.

    Returns:
      The path of the report.

    Raises:
      InputError: No metrics there, or none of a single step.
    """
    rows = metrics.read(run_dir)
    if not select(rows, "start") or not select(rows, "step"):
        raise cli.InputError(f"{run_dir}: its metrics hold no step yet; train first")
    try:
        html = run_page(rows)
    except OTHER_ROWS as error:
        raise cli.InputError(
            f"{run_dir / metrics.FILE}: not the metrics of a run ({error!r})"
        ) from error
    write_whole(run_dir / FILE, html.encode())
    return run_dir / FILE


def run_page(rows: Sequence[Row]) -> str:
    """The report of one run as HTML."""
    start = select(rows, "start")[-1]
    settings, facts = start["settings"], start["facts"]
    steps = select(rows, "step")
    return page(
        f"{settings['optimizer']} on {settings['model']['attention'].upper()}",
        f"A language model after {steps[-1]['step']:,} steps on {facts['text']}.",
        [
            section("Result", table(metrics.summary(rows))),
            section("Loss", picture(figures.loss({"": rows}), LOSS)),
            section("Max logits", max_logits(steps, settings["threshold"])),
            section("Heads", picture(figures.heads(steps), HEADS)),
            section("Clip factors", clip_factors(steps)),
            section("Participation ratio", participation_ratio(select(rows, "eval"))),
            *([section("Experts", experts(steps))] if metrics.has_experts(steps) else []),
            section("Sample", sample(select(rows, "end"))),
            section("Settings", table({**facts, **metrics.flat(settings)}.items())),
        ],
    )


LOSS = (
    "Cross-entropy in nats per token: of every training batch (faint), their running mean, and "
    "of the held-out files."
)
MAX_LOGITS = (
    "The largest attention logit of every head in each step's batch; one panel a layer, one line "
    "a head. The dashed line is the threshold τ."
)
HEADS = (
    "The same, layers down and heads across: the median of the last tenth of the steps. Red is not "
    "finite."
)
CLIP_FACTORS = (
    "γ = min(1, τ / max logit): layers and their heads down, steps across (the smallest where "
    "several share a column). The palest colour is 1, not clipped."
)
PARTICIPATION_RATIO = (
    "(Σσ)² / Σσ² over the singular values σ of a head's keys [tokens, features], as they enter "
    "the logits, on held-out text, uncentred; mean over the heads of a layer. The larger, the "
    "more directions the keys use."
)


def max_logits(steps: Sequence[Row], threshold: float) -> str:
    """Every head's maxima."""
    applied = (
        "QK-Clip rescales the weights of a head that has passed it."
        if metrics.clips(steps)
        else "This run does not clip: the line is for comparison."
    )
    return picture(figures.max_logits(steps, threshold), f"{MAX_LOGITS} {applied}")


def clip_factors(steps: Sequence[Row]) -> str:
    """The heat map of clip factors, or the reason why there is none."""
    if not metrics.clips(steps):
        return "<p>This run does not clip.</p>"
    return picture(figures.clip_factors(steps), CLIP_FACTORS)


def participation_ratio(evals: Sequence[Row]) -> str:
    """Its course over training."""
    if not evals:
        return "<p>The run has had no validation yet.</p>"
    return picture(figures.participation_ratio(evals), PARTICIPATION_RATIO)


EXPERTS = (
    "Tokens that the busiest expert of each layer got in a step, over a fair share: 1 is balanced. "
    "Running mean. No token is dropped."
)


def experts(steps: Sequence[Row]) -> str:
    """How evenly the experts are used."""
    return picture(figures.expert_load(steps), EXPERTS)


def sample(ends: Sequence[Row]) -> str:
    """The generated text, its prompt marked."""
    if not ends:
        return "<p>The run is not finished yet.</p>"
    prompt, text = (escape(ends[-1][name]) for name in ("prompt", "sample"))
    return f"<pre><mark>{prompt}</mark>{text}</pre>"


@dataclass(frozen=True)
class Arguments:
    """Rebuilds report.html of a run from its metrics.jsonl."""

    run_dir: tyro.conf.Positional[Path]
    """Folder of the run."""


def main(args: Sequence[str] | None = None) -> int:
    """Returns the exit status."""

    def rebuild() -> int:
        path = build(cli.parse(Arguments, args, prog="python -m examples.mla.report").run_dir)
        print(cli.shown(str(path)))
        return 0

    return cli.run(rebuild)


if __name__ == "__main__":
    sys.exit(main())
