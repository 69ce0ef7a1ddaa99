"""How logits grow: a power of the time, fitted to the part of a run in which they do."""

from typing import NamedTuple

import numpy as np

from studies.common.tables import smooth

POWERS = np.arange(0.1, 5.001, 0.01)
FEWEST = 10  # steps that a fit takes


class Growth(NamedTuple):
    """The fit S - S₀ = a·tᵖ; NaN where the phase is too short to have one."""

    power: float
    """p, of the least squares over `POWERS`."""
    linear_error: float
    """The root mean square residual with p = 1, over that with the best p."""
    explained: float
    """1 - residual / variance of the best p."""
    steps: int
    """Length of the phase."""


def growth(maxima: np.ndarray, rates: np.ndarray, start: int, share: float) -> Growth:
    """Fits a power to the growth of the largest logit.

    The curve S is the mean over the last ten steps. The phase goes from `start`, where S₀ is read,
    to the first step at which S has made `share` of its way to its largest value. Time t is counted
    in steps at the full rate, Σ η/max η, so that a falling rate alone bends nothing. Squares are of
    S itself, not of its logarithm, so that the first, smallest values do not decide.

    Args:
      maxima: The largest logit of each step, `[steps]`.
      rates: The learning rate of each step, `[steps]`.
      start: The first step of the phase: the end of the warm-up.
      share: Where the phase ends, above 0 and at most 1.
    """
    curve = smooth(maxima)[start:]
    risen = curve - curve[0]
    top = risen.max()
    if not (np.isfinite(risen).all() and top > 0):
        return Growth(np.nan, np.nan, np.nan, 0)
    end = int(np.argmax(risen >= share * top)) + 1
    if end < FEWEST:
        return Growth(np.nan, np.nan, np.nan, end)
    time = np.cumsum(rates[start : start + end] / rates.max())
    time, risen = time - time[0], risen[:end]
    bases = (time / time[-1]) ** np.append(1, POWERS)[:, None]
    factors = (bases @ risen) / (bases**2).sum(axis=1)
    linear, *errors = np.sum((risen - factors[:, None] * bases) ** 2, axis=1)
    best = int(np.argmin(errors))
    return Growth(
        power=POWERS[best],
        linear_error=float(np.sqrt(linear / errors[best])),
        explained=float(1 - errors[best] / np.sum((risen - risen.mean()) ** 2)),
        steps=end,
    )
