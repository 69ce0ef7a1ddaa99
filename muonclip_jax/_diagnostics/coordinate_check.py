"""The coordinate check: does a step change activations alike at every width?"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from muonclip_jax._core import paths, sowing
from muonclip_jax._core.options import check_count, check_number, check_transformation
from muonclip_jax._core.tables import Mark, Readable, Sheet

Loss = Callable[[Any], tuple[jax.Array, Mapping[Any, Any]]]
Model = Callable[[int], tuple[Callable[[jax.Array], Any], Loss]]

_MARKS: dict[str, Mark] = {"stays": "", "not finite": "bad"}  # others are to look at
_OF_FLAX = ("__call__",)  # the name under which Linen captures what a module returns


@dataclass(frozen=True, repr=False)
class CoordinateCheck(Readable):
    """What `coordinate_check` found. `print` shows a table, `mc.plots.coordinates` a picture.

    Attributes:
      widths: The widths, rising.
      first: By the activation's path, its RMS before the first step, float64 `[widths, seeds]`.
      changes: Same keys, the RMS of its change since then, after each step,
        `[widths, seeds, steps]`.
      tolerance: How far from 0 a slope may be.

    Example:
        >>> found = {"mlp": np.array([[[1.0]], [[2.0]], [[4.0]]])}
        >>> first = {"mlp": np.ones((3, 1))}
        >>> check = mc.CoordinateCheck((64, 128, 256), first, found, tolerance=0.25)
        >>> check.slopes, check.verdicts
        ({'mlp': 1.0}, {'mlp': 'grows'})
    """

    widths: tuple[int, ...]
    first: Mapping[str, np.ndarray]
    changes: Mapping[str, np.ndarray]
    tolerance: float

    @property
    def slopes(self) -> dict[str, float]:
        """By path, the power of the width that the change after the last step follows, rounded to
        three digits: least squares over logarithms, the seeds' mean. NaN where a change is 0 or not
        finite."""
        return {path: self._slope(change[..., -1]) for path, change in self.changes.items()}

    @property
    def verdicts(self) -> dict[str, str]:
        """By path "stays", "grows" or "vanishes", "does not move" or "not finite"."""
        return {path: self._verdict(path, slope) for path, slope in self.slopes.items()}

    def __repr__(self) -> str:
        return f"CoordinateCheck(widths={self.widths}, activations={len(self.changes)})"

    def _sheets(self) -> list[Sheet]:
        small, large = self.widths[0], self.widths[-1]
        steps = next(iter(self.changes.values())).shape[-1]
        caption = (
            f"RMS after {steps} steps; a slope is the power of the width, 0 where none matters"
        )
        numbers = (f"change at {small}", f"at {large}", "slope", "at first")
        rows = []
        slopes, verdicts = self.slopes, self.verdicts
        for path, change in self.changes.items():
            ends = (f"{change[i, :, -1].mean():.3g}" for i in (0, -1))
            both = (f"{slope:+.2f}" for slope in (slopes[path], self._slope(self.first[path])))
            rows.append((path, *ends, *both, verdicts[path]))
        headers = ("activation", *numbers, "with width")
        marks: list[Mark] = [_MARKS.get(verdict, "look") for verdict in verdicts.values()]
        return [Sheet(headers, rows, caption=caption, numbers=numbers, marks=marks)]

    def _slope(self, values: np.ndarray) -> float:
        """Of `[widths, seeds]`."""
        if not (np.isfinite(values) & (values > 0)).all():
            return np.nan
        logs = np.log2(values).mean(axis=1)
        return round(float(np.polyfit(np.log2(self.widths), logs, 1)[0]), 3)

    def _verdict(self, path: str, slope: float) -> str:
        if not np.isfinite(self.changes[path][..., -1]).all():
            return "not finite"
        if np.isnan(slope):
            return "does not move"
        if abs(slope) <= self.tolerance:
            return "stays"
        return "grows" if slope > 0 else "vanishes"


def coordinate_check(
    model: Model,
    optimizer: Callable[[int], optax.GradientTransformation],
    widths: Sequence[int],
    *,
    steps: int = 4,
    seeds: int = 2,
    tolerance: float = 0.25,
) -> CoordinateCheck:
    """Trains a model at several widths for a few steps, and tells how activations change with width.

    For each activation a, seed and width, after t steps:

        RMS(a_t - a_0) = sqrt(mean over its entries of (a_t - a_0)²)

    In muP it follows no power of the width: a rate that suits a small model suits a large one (Yang
    et al., "Tensor Programs V", arXiv 2203.03466, appendix D.1). An activation whose change grows
    with the width makes the best rate fall, one whose change vanishes learns nothing in the end.
    Widths two to one apart, from 64 on, and rates at which a step is small tell most; a slope of two
    narrow widths tells little.

    Cost: `steps + 1` forward passes and `steps` backward ones for each seed and width, and a
    compilation for each width. Activations come to the host; their RMS is computed in float64.

    Args:
      model: From a width to two functions: `init(key)`, which gives parameters, and `loss(params)`,
        which gives the loss and the activations of a batch that stays the same: Linen's
        `intermediates` (of `capture_intermediates=True`, say), an NNX State of them, or a nested
        dict. Paths must be the same at every width; a path's arrays are taken together. What is not
        floating point is left out.
      optimizer: From a width to a transformation with its learning rate, such as
        `lambda width: mc.muon(0.02, update_rms="unit_rms_norm")`. Its update gets the activations as
        `max_logits`, for recipes with a clip.
      widths: At least two, rising.
      steps: Updates, on the same batch.
      seeds: Keys that `init` gets, `jax.random.key(0)` and so on.
      tolerance: A slope of at most so much, up or down, is told as "stays".

    Returns:
      A `CoordinateCheck`.

    Raises:
      TypeError: An option of the wrong type; a loss that gives no pair.
      ValueError: Fewer than two widths, or not rising; no activations, or of other paths at another
        width.

    Example:
        >>> x = jnp.ones((8, 4))
        >>> def model(width):
        ...     def loss(params):
        ...         hidden = x @ params["w"]
        ...         return jnp.mean(hidden**2), {"hidden": hidden}
        ...     return lambda key: {"w": jax.random.normal(key, (4, width)) / 2}, loss
        >>> check = mc.coordinate_check(model, lambda width: optax.adam(1e-2), (64, 128, 256))
        >>> check.verdicts
        {'hidden': 'stays'}
    """  # noqa: E501
    for name, value in (("model", model), ("optimizer", optimizer)):
        if not callable(value):
            raise TypeError(f"{name} must be a function of a width, got {value!r}.")
    several = isinstance(widths, Sequence) and not isinstance(widths, str) and len(widths) >= 2
    if not several:
        raise ValueError(f"widths must be two whole numbers or more, got {widths!r}.")
    for width in widths:
        check_count("widths", width)
    if list(widths) != sorted(set(widths)):
        raise ValueError(f"widths must be rising, got {widths!r}.")
    check_count("steps", steps)
    check_count("seeds", seeds)
    check_number("tolerance", tolerance, lambda x: 0 < x < float("inf"), "finite, above 0")
    found = [_of_width(model, optimizer, width, steps, seeds) for width in widths]
    _check_paths(widths, found)
    # Of each width and path `[seeds, steps + 1]`, the RMS at first in front.
    joined = {path: np.stack([each[path] for each in found]) for path in found[0]}
    first = {path: values[..., 0] for path, values in joined.items()}
    changes = {path: values[..., 1:] for path, values in joined.items()}
    return CoordinateCheck(tuple(widths), first, changes, tolerance)


def _of_width(
    model: Model,
    optimizer: Callable[[int], optax.GradientTransformation],
    width: int,
    steps: int,
    seeds: int,
) -> dict[str, np.ndarray]:
    """By path `[seeds, steps + 1]`: the RMS at first, then those of the changes."""
    init, loss = model(width)
    tx = optimizer(width)
    check_transformation(f"optimizer({width})", tx)
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def activations(params: Any) -> dict[str, list[jax.Array]]:
        return _activations(loss(params), width)

    @jax.jit
    def step(params: Any, state: Any) -> tuple[Any, Any]:
        grads, sown = jax.grad(loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, max_logits=sown)
        return optax.apply_updates(params, updates), state

    def of_seed(seed: int) -> list[dict[str, float]]:
        params = init(jax.random.key(seed))
        state, before = tx.init(params), _on_host(activations(params))
        rows = [{path: _rms(values) for path, values in before.items()}]
        for _ in range(steps):
            params, state = step(params, state)
            now = _on_host(activations(params))
            rows.append({path: _rms(now[path] - values) for path, values in before.items()})
        return rows

    rows = [of_seed(seed) for seed in range(seeds)]
    return {path: np.array([[row[path] for row in each] for each in rows]) for path in rows[0][0]}


def _activations(returned: Any, width: int) -> dict[str, list[jax.Array]]:
    """By path, what a loss gave beside its value."""
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise TypeError(
            f"model({width}): loss(params) must give the loss and the activations, found "
            f"{type(returned).__name__}."
        )
    found: dict[str, list[jax.Array]] = {}
    for path, value in sowing.sown(returned[1]):
        own = path[: -len(_OF_FLAX)] if path[-len(_OF_FLAX) :] == _OF_FLAX else path
        arrays = [x for x in map(jnp.asarray, jax.tree.leaves(value)) if _is_real(x)]
        if arrays:
            found.setdefault(paths.show(own) or "output", []).extend(arrays)
    if not found:
        raise ValueError(f"model({width}): no activations. {sowing.WAS_IT_COLLECTED}")
    return found


def _is_real(x: jax.Array) -> bool:
    return bool(jnp.issubdtype(x.dtype, jnp.floating))


def _on_host(found: dict[str, list[jax.Array]]) -> dict[str, np.ndarray]:
    """Every path's entries in a row, float64."""
    return {
        path: np.concatenate([np.asarray(x, np.float64).ravel() for x in arrays])
        for path, arrays in jax.device_get(found).items()
    }


def _rms(values: np.ndarray) -> float:
    return float(np.sqrt(np.mean(values**2)))


def _check_paths(widths: Sequence[int], found: Sequence[Mapping[str, Any]]) -> None:
    for width, each in zip(widths, found, strict=True):
        if differing := sorted(each.keys() ^ found[0].keys()):
            raise ValueError(
                f"widths must have the same activations: {', '.join(map(repr, differing))} is at "
                f"only one of {widths[0]} and {width}. Does the depth change with the width?"
            )
