"""Markdown tables of means and spreads over seeds."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

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


def curve(record: Json, name: str) -> np.ndarray:
    """A curve `[steps, ...]`, NaN where it was not finite."""
    return np.array(record["curves"][name], np.float64)


def measured(record: Json, name: str) -> np.ndarray:
    """What was measured between the steps, `[measurements, ...]`."""
    return np.array([row[name] for row in record["measurements"]], np.float64)


def last(record: Json, name: str) -> np.ndarray:
    """What was measured at the end."""
    return measured(record, name)[-1]


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
