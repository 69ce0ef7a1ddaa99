"""The report of a run: one HTML file, made from its metrics.jsonl and, where `compare` has trained
the same model with and without the clip, from theirs.

Rebuild it with `python -m examples.mla.report RUN_DIR`.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np
import tyro

from examples.mla import cli, comparison, figures, metrics
from examples.mla.comparison import Comparison, settings_of
from examples.mla.folder import write_whole
from examples.mla.metrics import Row, column, per_head, select
from examples.mla.page import (
    columns,
    escape,
    formatted,
    page,
    pairs,
    paragraph,
    pictures,
    section,
    table,
)

FILE = "report.html"
# What rows of something else raise where their values are used.
OTHER_ROWS = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)
PLACES = {"data", "cache_dir", "run_dir", "resume"}  # settings that say where, not what


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
        html = run_page(rows, comparison.find(run_dir, settings_of(rows)))
    except OTHER_ROWS as error:
        raise cli.InputError(
            f"{run_dir / metrics.FILE}: not the metrics of a run ({error!r})"
        ) from error
    write_whole(run_dir / FILE, html.encode())
    return run_dir / FILE


def run_page(rows: Sequence[Row], compared: Comparison | None) -> str:
    """The report of one run as HTML, with a comparison of the same model if there is one."""
    settings, steps = settings_of(rows), select(rows, "step")
    return page(
        f"{settings['optimizer']} on {settings['model']['attention'].upper()}",
        what_happened(rows),
        about(rows),
        [
            section("Largest logit", largest_logit(steps, settings["threshold"])),
            section("With and without the clip", with_and_without(compared, settings)),
            columns(
                section("Result", pairs(metrics.summary(rows))),
                section("Loss", pictures({"Loss": figures.loss({"": rows})}, {"Loss": LOSS})),
            ),
            section("Heads", *heads(steps, settings["threshold"])),
            columns(
                section("Clip factors", clip_factors(steps)),
                section("Participation ratio", participation_ratio(select(rows, "eval"))),
            ),
            *([section("Experts", experts(steps))] if metrics.has_experts(steps) else []),
            section("Sample", sample(select(rows, "end"))),
            section("Settings", pairs(shown_settings(settings))),
        ],
    )


def what_happened(rows: Sequence[Row]) -> str:
    """The run in one sentence."""
    settings, steps = settings_of(rows), select(rows, "step")
    done, threshold = steps[-1]["step"], settings["threshold"]
    unfinished = f" of {settings['steps']:,}" if done < settings["steps"] else ""
    return (
        f"In {done:,}{unfinished} steps {course(rows)}; {clipping(steps)}the largest attention "
        f"logit was {in_thresholds(np.fmax.reduce(metrics.peak(steps)), threshold)}."
    )


def course(rows: Sequence[Row]) -> str:
    """Where the loss went, in words."""
    steps, evals = select(rows, "step"), select(rows, "eval")
    kind, losses = (
        ("held-out", column(evals, "loss"))
        if len(evals) > 1
        else ("training", column(steps, "loss"))
    )
    if np.isnan(losses).any():
        return f"the {kind} loss stopped being a number"
    verb = "fell" if losses[-1] < losses[0] else "rose"
    return f"the {kind} loss {verb} from {losses[0]:.2f} to {losses[-1]:.2f} nats per token"


def clipping(steps: Sequence[Row]) -> str:
    """How much was clipped, in words, with what joins it to the sentence."""
    if not metrics.clips(steps):
        return "nothing was clipped, and "
    share = metrics.share_clipped(steps)
    return f"QK-Clip scaled {share:.1%} of all head-steps down, and " if share else ""


def in_thresholds(logit: float, threshold: float) -> str:
    """A logit, and what it is of the threshold."""
    return f"{logit:.1f}, {logit / threshold:.2f} times the threshold of {threshold:g}"


def about(rows: Sequence[Row]) -> str:
    """Which text, which machine, when, how long, and which code."""
    facts = select(rows, "start")[-1]["facts"]
    seconds = column(select(rows, "step"), "seconds").sum()
    known = {name: facts[name] for name in ("started", "commit") if name in facts}
    parts = [
        f"Text: {names_alone(facts['text'])}",
        f"device: {facts['device']}",
        f"JAX {facts['jax']}",
        f"{duration(seconds)} in training steps",
        *(f"{name} {value}" for name, value in known.items()),
    ]
    return " · ".join(parts)


def names_alone(paths: str) -> str:
    """Paths without their folders."""
    return " + ".join(PurePath(path).name for path in paths.split(" + "))


def duration(seconds: float) -> str:
    """A time in the units that a reader takes."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{hours} h {minutes} min"
        if hours
        else f"{minutes} min {rest} s"
        if minutes
        else f"{rest} s"
    )


LOSS = (
    "Cross-entropy in nats per token: of every training batch (faint), their running mean, and "
    "of the held-out files."
)
HEADS = (
    "The largest attention logit of every head in each step's batch; one panel a layer. The dashed "
    "line is the threshold τ."
)
LAST = "Median max logit of the last tenth of the steps"
CLIP_FACTORS = (
    "γ = min(1, τ / max logit) where it was below 1: layers and their heads down, steps across. "
    "The stronger the colour, the smaller γ; the smallest was {:.3f}."
)
PARTICIPATION_RATIO = (
    "(Σσ)² / Σσ² over the singular values σ of a head's keys [tokens, features], as they enter "
    "the logits, on held-out text, uncentred; mean over the heads of a layer. The larger, the "
    "more directions the keys use."
)
EXPERTS = (
    "Tokens that the busiest expert of each layer got in a step, over a fair share: 1 is balanced. "
    "Running mean. No token is dropped."
)


def largest_logit(steps: Sequence[Row], threshold: float) -> str:
    """The largest logit against the threshold, and how many heads were clipped."""
    runs = {"largest of all heads": steps}
    shown = {"Largest max logit of any head, over steps": figures.peaks(runs, threshold)}
    if metrics.clips(steps):
        shown["Share of heads clipped, over steps"] = figures.heads_clipped(steps)
    return pictures(shown, {})


def with_and_without(compared: Comparison | None, settings: Mapping[str, Any]) -> str:
    """What would have happened without the clip, where it is known."""
    if compared is None:
        return paragraph(
            "Not tried with this model beside this run: make compare, with the flags of the "
            "model, trains it with and without the clip; this report, built again, shows both."
        )
    differences = compared.differences(settings)
    which = (
        f"Shown is the comparison “{compared.name}”, with the same model; it has "
        f"{', '.join(differences)}."
        if differences
        else f"Shown is the comparison “{compared.name}”: the same settings, seed and batches."
    )
    label = "Largest max logit of any head, with and without the clip"
    return columns(
        f"<div>{paragraph(compared.verdict())}{paragraph(which)}</div>",
        pictures({label: compared.picture()}, {}),
    )


def heads(steps: Sequence[Row], threshold: float) -> list[str]:
    """Every head's maxima, over steps and at the end."""
    applied = (
        "QK-Clip rescales the weights of a head that has passed it."
        if metrics.clips(steps)
        else "This run does not clip: the line is for comparison."
    )
    panels = figures.max_logits(steps, threshold)
    blocks = per_head(steps, "max_logits")
    fewer = f" Shown are the {len(panels)} of {len(blocks)} layers with the largest."
    return [
        paragraph(f"{HEADS} {applied}" + fewer * (len(panels) < len(blocks))),
        pictures({f"Max logits of {block}": figure for block, figure in panels.items()}, {}),
        f"<h3>{LAST}</h3>",
        last_maxima(steps),
    ]


def last_maxima(steps: Sequence[Row]) -> str:
    """Layers down, heads across, or of many heads what they reach."""
    last = per_head(steps[-max(1, len(steps) // 10) :], "max_logits")
    medians = {block: np.median(maxima, axis=0) for block, maxima in last.items()}
    widest = max(map(len, medians.values()))
    if widest <= figures.MANY:
        header = [f"head {i}" for i in range(widest)]
    else:
        header = ["lowest", "median", "highest"]
        medians = {
            block: np.array([heads.min(), np.median(heads), heads.max()])
            for block, heads in medians.items()
        }
    rows = ((block, *map("{:,.2f}".format, values)) for block, values in medians.items())
    return table(LAST, ["layer", *header], rows)


def clip_factors(steps: Sequence[Row]) -> str:
    """Where heads were clipped, or why there is nothing to show."""
    if not metrics.clips(steps):
        return paragraph("This run does not clip.")
    smallest = min(gamma.min() for gamma in per_head(steps, "gamma").values())
    label = "Clip factors of heads, over steps"
    shown = {label: figures.clip_factors(steps)}
    return pictures(shown, {label: CLIP_FACTORS.format(smallest)})


def participation_ratio(evals: Sequence[Row]) -> str:
    """Its course over training."""
    if not evals:
        return paragraph("The run has had no validation yet.")
    label = "Participation ratio of each layer's keys, over steps"
    return pictures({label: figures.participation_ratio(evals)}, {label: PARTICIPATION_RATIO})


def experts(steps: Sequence[Row]) -> str:
    """How evenly the experts are used."""
    label = "Load of each layer's busiest expert, over steps"
    return pictures({label: figures.expert_load(steps)}, {label: EXPERTS})


def sample(ends: Sequence[Row]) -> str:
    """The generated text, its prompt marked."""
    if not ends:
        return paragraph("The run is not finished yet.")
    prompt, text = (escape(ends[-1][name]) for name in ("prompt", "sample"))
    return f"<pre><mark>{prompt}</mark>{text}</pre>"


def shown_settings(settings: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All settings but those that name places on this machine."""
    values = metrics.flat(settings).items()
    return [(name.replace("_", " "), formatted(v)) for name, v in values if name not in PLACES]


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
