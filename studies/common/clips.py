"""What a clip did, from the records: all of it follows from the max logits of every step."""

import numpy as np

from studies.common.records import Json
from studies.common.tables import curve


def threshold(record: Json) -> float | None:
    """τ, None without a clip."""
    return record["optimizer"]["threshold"]


def max_logits(record: Json) -> np.ndarray:
    """`[steps, heads of all layers]`, layer by layer."""
    return flat(curve(record, "max_logits"))


def passes(record: Json) -> np.ndarray:
    """Which heads are above τ, `[steps, heads]`."""
    return max_logits(record) > threshold(record)


def halves(record: Json) -> tuple[float, float]:
    """The share of head-steps above τ in each half of the run, in percent."""
    first, second = np.array_split(100 * passes(record), 2)
    return first.mean(), second.mean()


def applied(record: Json) -> np.ndarray:
    """The factors that the clip multiplied a head's logits by, `[steps, heads]`; with a rope key
    that each head clips, the part of the logits that is made with it."""
    factors = np.minimum(1, threshold(record) / curve(record, "max_logits"))
    factors = np.where(factors > 0, factors, 1)  # neither negative nor broken maxima clip
    if record["optimizer"]["scope"] == "layer":
        factors = np.broadcast_to(factors.min(axis=-1, keepdims=True), factors.shape)
    elif record["optimizer"].get("shared_keys") == "each_head":
        factors = np.sqrt(factors * factors.prod(axis=-1, keepdims=True))
    return flat(factors)


def flat(values: np.ndarray) -> np.ndarray:
    """`[steps, layers, heads]` as `[steps, heads of all layers]`."""
    return values.reshape(len(values), -1)
