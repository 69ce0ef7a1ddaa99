"""Tables and pictures of `transfer`, from the records."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

import muonclip_jax as mc
from studies.common import pictures
from studies.common.chosen import GRID_SEEDS
from studies.common.records import Json, Runs
from studies.common.tables import by_seed, paired, spread, table, valid_loss

Sweep = dict[float, list[Json]]  # rate → records, one a seed; rates rise
Rules = dict[str, dict[int, Sweep]]  # rule → width → sweep
STANDARD = "unit_rms_norm"  # what others' losses are compared with


def report(runs: Runs, _aside: Json | None, folder: Path) -> str:
    """The tables; pictures go into the folder."""
    rules = by_rule(runs)
    drawn = pictures.link(draw(rules, folder / "rates.png"))
    return "\n\n".join((losses(rules), shifts(rules), costs(rules), best_losses(rules), drawn))


def by_rule(runs: Runs) -> Rules:
    """The runs by rule, width and rate, the latter two rising."""
    rules: Rules = {}
    for label, seeds in runs.items():
        rule = label.rpartition(", width ")[0]
        width, rate = seeds[0]["model"]["d_model"], seeds[0]["optimizer"]["learning_rate"]
        rules.setdefault(rule, {}).setdefault(width, {})[rate] = seeds
    return {
        rule: {width: dict(sorted(sweep.items())) for width, sweep in sorted(widths.items())}
        for rule, widths in rules.items()
    }


def losses(rules: Rules) -> str:
    """A line a rule and width, a column a rate."""
    rates = sorted({r for widths in rules.values() for sweep in widths.values() for r in sweep})
    rows = [
        (f"{rule}, {width}", *(cell(sweep.get(rate)) for rate in rates))
        for rule, widths in rules.items()
        for width, sweep in widths.items()
    ]
    return table(("validation loss", *(f"η = {rate:g}" for rate in rates)), rows)


def cell(seeds: list[Json] | None) -> str:
    return spread(map(valid_loss, seeds), ".3f") if seeds else ""


def shifts(rules: Rules) -> str:
    """How the best rate moves from the smallest width to the largest."""
    every = sorted({width for widths in rules.values() for width in widths})
    header = ("", *(f"best rate, {width}" for width in every))
    header += (f"log2 of it, {every[-1]} less {every[0]}, 95%", "muP's")
    rows = []
    for rule, widths in rules.items():
        small, large = widths[min(widths)], widths[max(widths)]
        of_widths = (best_rate(widths[width]) if width in widths else "" for width in every)
        shift = paired(log_bests(large), log_bests(small), ".2f")
        rows.append((rule, *of_widths, shift, f"{math.log2(predicted(rule, widths)):+.2f}"))
    return table(header, rows)


def costs(rules: Rules) -> str:
    """What it costs at the largest width to take the small model's best rate, as it is and times
    the ratio of `mc.scaling`."""
    rows = []
    for rule, widths in rules.items():
        large = widths[max(widths)]
        rate, own = lowest(widths[min(widths)]), lowest(large)
        ratio = predicted(rule, widths)
        taken = [nearest(large, rate * factor) for factor in (1, ratio)]
        told = [
            "the same rate"
            if each == own
            else paired(by_seed(large[each], valid_loss), by_seed(large[own], valid_loss))
            for each in taken
        ]
        rows.append((rule, f"{rate:g}", f"{own:g}", *told))
    header = ("validation loss, largest width", "best at the smallest", "best", "cost of it, 95%")
    return table((*header, "cost of it times muP's ratio, 95%"), rows)


def best_losses(rules: Rules) -> str:
    """Every rule at its own best rate, against the standard one, at the outer widths."""
    rows = []
    for rule, widths in rules.items():
        row = [rule]
        for width in (min(widths), max(widths)):
            sweep, standard = widths[width], rules.get(STANDARD, {}).get(width)
            own = sweep[lowest(sweep)]
            row.append(cell(own))
            if standard is None or rule == STANDARD:
                row.append("")
            else:
                other = standard[lowest(standard)]
                row.append(paired(by_seed(own, valid_loss), by_seed(other, valid_loss)))
        rows.append(row)
    less = f"less {STANDARD}'s, 95%"
    return table(("at the best rate", "smallest width", less, "largest width", less), rows)


def predicted(rule: str, widths: Mapping[int, Sweep]) -> float:
    """The ratio of the best rates, largest width over smallest, that muP asks for: of kernels of
    which both sides grow. Hyperball claims that it is 1."""
    name = rule.partition(",")[0]
    if name == "hyperball":
        return 1.0
    small, large = ((width, width) for width in (min(widths), max(widths)))
    return mc.scaling.muon_by_width(name, small, large)


def log_best(rates: list[float], values: list[float]) -> float:
    """log2 of the rate at which a parabola through the lowest value and those beside it, over
    log2 of the rates, is lowest; of an end of the rates where the lowest is there."""
    x, y = np.log2(rates), np.where(np.isfinite(values), values, np.inf)
    i = int(y.argmin())
    if not 0 < i < len(y) - 1 or not np.isfinite(y[i - 1 : i + 2]).all():
        return float(x[i])
    a, b, _ = np.polyfit(x[i - 1 : i + 2] - x[i], y[i - 1 : i + 2], 2)
    return float(x[i] - b / (2 * a))


def log_bests(sweep: Sweep) -> dict[int, float | None]:
    """Seed → `log_best` of the rates that this seed was trained with."""
    of_seed: dict[int, dict[float, float]] = {}
    for rate, seeds in sweep.items():
        for record in seeds:
            of_seed.setdefault(record["seed"], {})[rate] = valid_loss(record)
    return {seed: log_best(list(each), list(each.values())) for seed, each in of_seed.items()}


def best_rate(sweep: Sweep) -> str:
    """That of the grid's mean curve, and whether it is at an end of the grid."""
    rates = list(sweep)
    found = 2 ** log_best(rates, [mean_loss(sweep[rate]) for rate in rates])
    at_end = lowest(sweep) in (rates[0], rates[-1])
    return f"{found:.3g}{', an end of the grid' if at_end else ''}"


def lowest(sweep: Sweep) -> float:
    """The rate of the grid with the lowest mean loss."""
    means = {rate: mean_loss(seeds) for rate, seeds in sweep.items()}
    return min(means, key=lambda rate: means[rate] if np.isfinite(means[rate]) else np.inf)


def mean_loss(seeds: list[Json]) -> float:
    """Over the seeds that every setting has."""
    return float(np.mean([valid_loss(r) for r in seeds if r["seed"] in GRID_SEEDS]))


def nearest(sweep: Sweep, rate: float) -> float:
    """The rate of a sweep that is nearest in ratio."""
    return min(sweep, key=lambda each: abs(math.log(each / rate)))


def draw(rules: Rules, path: Path) -> Path:
    """Loss over rate, a line a width, a panel a rule."""
    every = sorted({width for widths in rules.values() for width in widths})
    colors = {f"width {width}": None for width in every}
    with pictures.picture(path, len(rules), width=2.7) as axes:
        for each, (rule, widths) in zip(axes, rules.items(), strict=True):
            bands = {}
            for width, sweep in widths.items():
                seeds = min(map(len, sweep.values()))
                values = [[valid_loss(r) for r in records[:seeds]] for records in sweep.values()]
                bands[f"width {width}"] = list(sweep), np.array(values).T
            pictures.lines(each, bands, of=colors)
            each.set(xscale="log", xlabel="learning rate", title=rule)
            each.set_xticks([0.003, 0.01, 0.03, 0.1], ["0.003", "0.01", "0.03", "0.1"])
            each.set_xticks([], minor=True)
        axes[0].set_ylabel("validation loss (nats per token)")
    return path
