"""Markdown tables of means and spreads over seeds."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.special import stdtrit

from studies.common.records import Json


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def spread(values: Iterable[float | None], form: str = ".2f") -> str:
    """`mean ± standard deviation` over seeds; says how many are not finite, and means the rest."""
    values = [np.nan if value is None else float(value) for value in values]
    finite = [value for value in values if np.isfinite(value)]
    lost = f"{len(values) - len(finite)} of {len(values)} not finite"
    if not finite:
        return lost
    text = f"{statistics.fmean(finite):{form}}"
    if len(finite) > 1:
        text += f" ± {statistics.stdev(finite):{form.lstrip('+')}}"
    return text if len(finite) == len(values) else f"{text} ({lost})"


def by_seed(
    seeds: Iterable[Json], value: Callable[[Json], float | None]
) -> dict[int, float | None]:
    """Seed → a value of its record, as `paired` takes it."""
    return {record["seed"]: value(record) for record in seeds}


def paired(
    first: Mapping[int, float | None], second: Mapping[int, float | None], form: str = ".3f"
) -> str:
    """The mean of `first - second` over the seeds that both have, with a 95% interval of Student's
    t; "no difference told" where the interval holds 0.

    Args:
      first: Seed → value; see `by_seed`.
      second: The same of what it is compared with. Equal seeds have the same first parameters and
        the same data, so that what a seed does to both cancels.
      form: The format of a number; a sign is put before it.

    Returns:
      Words instead of an interval where fewer than two seeds are finite on both sides. Pairs that
      are not finite are told and left out.
    """
    form = f"+{form.lstrip('+')}"
    seeds = sorted(first.keys() & second.keys())
    values = ((first[seed], second[seed]) for seed in seeds)
    differences = np.array([np.nan if None in pair else pair[0] - pair[1] for pair in values])
    finite = differences[np.isfinite(differences)]
    lost = len(differences) - len(finite)
    count = f"{len(finite)} seed{'s' * (len(finite) != 1)}"
    count += f", {lost} of {len(differences)} not finite" if lost else ""
    if len(finite) < 2:
        return f"no interval ({count})"
    mean = finite.mean()
    reach = stdtrit(len(finite) - 1, 0.975) * finite.std(ddof=1) / len(finite) ** 0.5
    text = f"{mean:{form}} [{mean - reach:{form}}, {mean + reach:{form}}] ({count})"
    return text if abs(mean) > reach else f"{text}: no difference told"


def curve(record: Json, name: str) -> np.ndarray:
    """A curve `[steps, ...]`, NaN where it was not finite."""
    return np.array(record["curves"][name], np.float64)


def measured(record: Json, name: str) -> np.ndarray:
    """What was measured between the steps, `[measurements, ...]`."""
    return np.array([row[name] for row in record["measurements"]], np.float64)


def last(record: Json, name: str) -> np.ndarray:
    """What was measured at the end."""
    return measured(record, name)[-1]


def valid_loss(record: Json) -> float:
    """The validation loss at the end."""
    return float(last(record, "valid_loss"))


def steps(record: Json) -> np.ndarray:
    """The steps of curves, from 1."""
    return np.arange(1, record["plan"]["steps"] + 1)


def smooth(values: np.ndarray, window: int = 10) -> np.ndarray:
    """The mean of each value and those before it, `window` in all."""
    ends = range(1, len(values) + 1)
    return np.array([values[max(0, end - window) : end].mean() for end in ends])


def tail(values: np.ndarray, share: float = 0.2) -> np.ndarray:
    """The last fifth of a curve."""
    return values[-max(1, round(len(values) * share)) :]


def last_peak(record: Json) -> float:
    """The largest max logit of all heads, in the median of the last fifth of the steps."""
    maxima = curve(record, "max_logits")
    return float(np.median(tail(maxima.max(axis=(1, 2)))))
