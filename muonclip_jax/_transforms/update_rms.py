"""How large an orthogonalized update is, by the shape of its matrix."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import numpy as np
import optax

from muonclip_jax._core import paths
from muonclip_jax._core.options import check_choice, check_number
from muonclip_jax._parameters import routing
from muonclip_jax._parameters.matrices import MatrixSpec

Rule = Literal["match_adam", "jordan", "unit_rms_norm", "spectral", "none"]

# For Flax kernels [in, out]. PyTorch code writes [out, in]: its "rows" are our `out`.
SHAPE_SCALES: dict[str, Callable[[int, int], float]] = {
    "match_adam": lambda ins, outs: 0.2 * math.sqrt(max(ins, outs)),
    "jordan": lambda ins, outs: math.sqrt(max(1.0, outs / ins)),
    "unit_rms_norm": lambda ins, outs: math.sqrt(outs / ins),
    "spectral": lambda ins, outs: math.sqrt(max(ins, outs)),
    "none": lambda ins, outs: 1.0,
}


def scale_by_update_rms(
    rule: Rule | Callable[[int, int], float] = "match_adam",
    *,
    dimension_numbers: routing.DimensionNumbers | None = None,
) -> optax.GradientTransformation:
    """Scales orthogonalized updates `[in, out]` by a factor of their shape.

    | rule | factor | source |
    | --- | --- | --- |
    | `"match_adam"` | `0.2 * sqrt(max(in, out))`: an update RMS of 0.2, as Adam's, so Adam's learning rate and decay carry over (if all singular values are 1: below) | Moonlight, arXiv 2502.16982; `match_rms_adamw` in torch.optim.Muon |
    | `"jordan"` | `sqrt(max(1, out/in))` | K. Jordan et al. 2024; `original` in torch.optim.Muon; the default of optax.contrib.muon |
    | `"unit_rms_norm"` | `sqrt(out/in)`: unit RMS→RMS operator norm | Bernstein & Newhouse, arXiv 2409.20325; Dion, arXiv 2504.05295 |
    | `"spectral"` | `sqrt(max(in, out))` | Scion, arXiv 2502.07529; Megatron's `spectral`, often times 0.2 |
    | `"none"` | 1 | |

    0.2 is exact for orthogonal updates. In general the RMS is `0.2 * sqrt(mean(σ²))`, over the
    singular values σ of the orthogonalized matrix, as many as its shorter side. The iteration
    brings to 1 what is not too small beside the largest; of a steep spectrum the rest stays small,
    and zeros stay zero. Measured on `[512, 512]`:

    | singular values of the momentum | five steps in bfloat16, the default | 8 in float32 | 12 in float32 |
    | --- | --- | --- | --- |
    | all alike; of a Gaussian matrix | 0.200; 0.199 | 0.200 | 0.200 |
    | 1/k | 0.193 | 0.200 | 0.200 |
    | 1/k² | 0.047 | 0.075 | 0.139 |
    | eight, all others 0 | 0.028 | 0.025 | 0.025 = 0.2 sqrt(8/512) |

    In bfloat16 more steps raise rounding errors too, which lie in directions that the momentum does
    not have: of the eight, 0.081 after 8 steps and 0.186 after 12. Adam's RMS is a typical figure
    itself: whoever needs the same size for every spectrum puts `normalize_rms(0.2)` in this link's
    place.

    Args:
      rule: One of the names above, or a function of `(in, out)`, both ints.
      dimension_numbers: As for `scale_by_muon`; give both the same.

    Raises:
      ValueError: An unknown rule when built; at init and update, as `scale_by_muon`.

    Example:
        >>> tx = mc.scale_by_update_rms("unit_rms_norm")
        >>> updates, _ = tx.update({"up": jnp.ones((8, 32))}, tx.init({"up": jnp.ones((8, 32))}))
        >>> float(updates["up"][0, 0])
        2.0
    """  # noqa: E501
    check_rule("rule", rule)
    routing.check_dimension_numbers(dimension_numbers)
    factor = rule if callable(rule) else SHAPE_SCALES[rule]

    def init(params: optax.Params) -> optax.EmptyState:
        paths.check_trainable("scale_by_update_rms", params)
        for spec in routing.resolve_matrices(dimension_numbers, params).values():
            _factors(factor, spec)
        return optax.EmptyState()

    def update(updates, state, params=None):
        del params
        specs = routing.resolve_matrices(dimension_numbers, updates)

        def scale(path, u):
            return u * _multiplier(factor, u, specs[path])

        return paths.map_with_path(scale, updates), state

    return optax.GradientTransformation(init, update)


def check_rule(name: str, rule: Any) -> None:
    """Raises ValueError for what is neither a rule's name nor a function."""
    if not callable(rule):
        check_choice(name, rule, SHAPE_SCALES, beside=", or a function of (in, out)")


def _factors(factor: Callable[[int, int], float], spec: MatrixSpec) -> list[float]:
    """The factor of each kind of matrix in a parameter."""
    found = [factor(ins, outs) for _, ins, outs in spec.shapes]
    for value, (_, ins, outs) in zip(found, spec.shapes, strict=True):
        check_number(
            f"the update rule's factor for [{ins}, {outs}], matrices of {paths.show(spec.path)},",
            value,
            np.isfinite,
            "finite",
            "the recipe",
        )
    return [float(value) for value in found]


def _multiplier(factor: Callable[[int, int], float], u: jax.Array, spec: MatrixSpec) -> Any:
    """A Python float, which keeps the dtype, or an array in it that broadcasts against u."""
    factors = _factors(factor, spec)
    if len(factors) == 1:
        return factors[0]
    views = zip(factors, spec.views, strict=True)
    return np.sum([each * view.entries() for each, view in views], axis=0).astype(u.dtype)
