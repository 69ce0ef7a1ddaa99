"""Scaling rules: from what was tuned on a small model to what a large one should get.

Numbers in, numbers out. Most rules are powers of a ratio, large over small, and so compose: from A
to B and from B to C is from A to C. Kernels are Flax's, `[in, out]`: PyTorch writes `[out, in]`.

    shape scales    how large Muon's update of a matrix is        shape_scale, muon_update_rms
    RMS matches     Muon's rate for Adam's size of update         adam_update_rms, match_rate
    width, depth    rates and initial values of muP               muon_by_width, adam_by_width, ...
    batch, length   rates, betas, decay                           rate_by_batch, decay_product, ...
    all at once     from a small model's values to a large one's  transfer
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from muonclip_jax._core.options import check_choice, check_count, check_number
from muonclip_jax._transforms.update_rms import SHAPE_SCALES, Rule, check_rule

__all__ = [
    "Size",
    "Tuned",
    "adam_by_width",
    "adam_update_rms",
    "beta_by_batch",
    "decay_product",
    "init_by_width",
    "match_rate",
    "muon_by_width",
    "muon_update_rms",
    "rate_by_batch",
    "rate_by_depth",
    "rate_by_length",
    "residual_by_depth",
    "shape_scale",
    "transfer",
]

ShapeRule = Rule | Callable[[int, int], float]
Kind = Literal["hidden", "embedding", "unembedding", "vector"]
Decay = Literal["width", "length", "fixed"]

# Powers of the width in muP, for Adam: its rate, and the standard deviation of the first weights.
_ADAM_POWERS = {"hidden": -1.0, "embedding": 0.0, "unembedding": -1.0, "vector": 0.0}
_INIT_POWERS = {"hidden": -0.5, "embedding": 0.0, "unembedding": -1.0, "vector": 0.0}


def shape_scale(rule: ShapeRule, ins: int, outs: int) -> float:
    """The factor that an orthogonalized update `[in, out]` takes by its shape.

    The formulas and their sources are the table of `mc.scale_by_update_rms`, which applies them. Su
    Jianlin (kexue.fm/archives/11772) compares four of them: none, Jordan's, muP's
    (`"unit_rms_norm"`) and Moonlight's (`"match_adam"`).

    Args:
      rule: A name of that table, or a function of `(in, out)`.
      ins: Rows of a Flax kernel `[in, out]`, the fan in.
      outs: Its columns, the fan out.

    Returns:
      The factor.

    Raises:
      ValueError: An unknown rule, or sides that are no whole numbers of at least 1.

    Example:
        >>> [round(mc.scaling.shape_scale(rule, 64, 256), 2) for rule in ("jordan", "match_adam")]
        [2.0, 3.2]
    """
    check_rule("rule", rule)
    check_count("ins", ins)
    check_count("outs", outs)
    return float((rule if callable(rule) else SHAPE_SCALES[rule])(ins, outs))


def muon_update_rms(rule: ShapeRule, ins: int, outs: int) -> float:
    """The RMS of the entries of a Muon update `[in, out]`, before the learning rate.

    An orthogonal matrix has min(in, out) singular values of 1 and in·out entries, so an RMS of
    `1 / sqrt(max(in, out))`; the rule's factor multiplies it. `mc.scale_by_update_rms` says how much
    less it is where not all singular values are brought to 1.

    Args:
      rule: As for `shape_scale`.
      ins: Rows of a Flax kernel `[in, out]`.
      outs: Its columns.

    Returns:
      The RMS.

    Raises:
      ValueError: As `shape_scale`.

    Example:
        >>> mc.scaling.muon_update_rms("match_adam", 64, 256), mc.scaling.muon_update_rms("none", 64, 256)
        (0.2, 0.0625)
    """  # noqa: E501
    return shape_scale(rule, ins, outs) / math.sqrt(max(ins, outs))


def adam_update_rms(b1: ArrayLike = 0.9, signal: ArrayLike = 0.0) -> Any:
    """The RMS of Adam's update, before the learning rate: `sqrt((1-b1) / (1+b1))` for pure noise.

    With s = (mean / standard deviation)² of a gradient's entry over steps,

        RMS = sqrt((s + (1 - b1) / (1 + b1)) / (s + 1))

    Assumed: entries are independent from step to step, of a fixed mean and variance; b2 averages so
    long that v is their mean square; many steps have passed. b1 = 0.9 and s = 0 give 0.229, and
    training measures 0.2 to 0.3: the 0.2 that Moonlight matches. The same square root is the RMS of
    any average of noise with that b (`optax.ema`) over the noise's own. Muon's momentum has no such
    factor: what is orthogonalized forgets its size.

    Source: Su Jianlin, "Why is Adam's update RMS 0.2?", kexue.fm/archives/11267.

    Args:
      b1: Adam's first β, in [0, 1).
      signal: s, at least 0.

    Returns:
      The RMS, between 0 and 1.

    Raises:
      ValueError: A number out of its range.

    Example:
        >>> round(float(mc.scaling.adam_update_rms(0.9)), 3)
        0.229
    """
    b1 = _numbers("b1", b1, lambda b: (b >= 0) & (b < 1), "in [0, 1)")
    s = _numbers("signal", signal, lambda s: (s >= 0) & np.isfinite(s), "finite, at least 0")
    return ((s + (1 - b1) / (1 + b1)) / (s + 1)) ** 0.5


def match_rate(adam_rate: ArrayLike, rule: ShapeRule, ins: int, outs: int, rms: float = 0.2) -> Any:
    """The rate at which Muon's updates of a matrix `[in, out]` are as large as Adam's.

    `adam_rate * rms / muon_update_rms(rule, ins, outs)`: with `"match_adam"` Adam's own rate, for
    that rule is made of this (Moonlight, arXiv 2502.16982).

    Args:
      adam_rate: Adam's learning rate, above 0.
      rule: As for `shape_scale`.
      ins: Rows of a Flax kernel `[in, out]`.
      outs: Its columns.
      rms: Adam's update RMS: 0.2 as Moonlight has it, or `adam_update_rms(b1)`.

    Returns:
      Muon's learning rate.

    Raises:
      ValueError: As `shape_scale`; a rate or an RMS that is not above 0.

    Example:
        >>> round(float(mc.scaling.match_rate(1e-3, "jordan", 256, 1024)), 5)
        0.0032
    """
    rate = _above_zero("adam_rate", adam_rate)
    return rate * _above_zero("rms", rms) / muon_update_rms(rule, ins, outs)


def muon_by_width(rule: ShapeRule, small: tuple[int, int], large: tuple[int, int]) -> float:
    """What Muon's rate is multiplied by, in muP, when a matrix grows.

    muP asks for updates with a spectral norm proportional to sqrt(out/in), so that they change
    activations alike at every width (Yang et al., arXiv 2310.17813). Muon's have `η · shape_scale`,
    so with s for the shape scale

        η_large / η_small = sqrt(out'/in') / s(in', out')  ·  s(in, out) / sqrt(out/in)

    Where both sides grow by r that is 1 with `"none"`, `"jordan"` and `"unit_rms_norm"`, and
    `1/sqrt(r)` with `"match_adam"` and `"spectral"`. Only `"unit_rms_norm"` gives 1 for every
    shape.

    A matrix is what is orthogonalized. Heads of an output projection that are orthogonalized one by
    one, each `[head, out]`, all add to the same outputs: there are r times as many, so outputs
    change more though each head's rate is right. `mc.Granularity({"o": "all"})` takes them whole
    (docs/how-to/scaling.md shows both).

    Args:
      rule: As for `shape_scale`.
      small: `(in, out)` of a Flax kernel in the small model.
      large: The same kernel's in the large one.

    Returns:
      The ratio of the rates, large over small.

    Raises:
      ValueError: As `shape_scale`; what is no pair.

    Example:
        >>> mc.scaling.muon_by_width("match_adam", (64, 256), (256, 1024))
        0.5
    """
    for name, shape in (("small", small), ("large", large)):
        if not isinstance(shape, tuple) or len(shape) != 2:
            raise ValueError(f"{name} must be (in, out), two whole numbers, got {shape!r}.")
    (ins, outs), (more_ins, more_outs) = small, large
    scales = shape_scale(rule, ins, outs) / shape_scale(rule, more_ins, more_outs)
    return scales * math.sqrt(more_outs / more_ins * ins / outs)


def adam_by_width(kind: Kind, ratio: ArrayLike) -> Any:
    """What Adam's rate is multiplied by, in muP, when the width grows.

    | kind | rate | first standard deviation (`init_by_width`) |
    | --- | --- | --- |
    | `"hidden"`, a matrix `[in, out]` of which both sides grow | 1/r | 1/sqrt(r) |
    | `"embedding"`, `[vocabulary, out]`, or other inputs of fixed size | 1 | 1 |
    | `"unembedding"`, `[in, vocabulary]`, or other outputs of fixed size | 1/r | 1/r |
    | `"vector"`: biases and gains | 1 | 1 |

    The other way for unembeddings, which `transfer` takes: rate and first values stay, and the model
    multiplies its logits by 1/r. Attention's logits are q·k/d instead of q·k/sqrt(d) where the size
    of heads, d, grows.

    Source: Yang et al., "Tensor Programs V", arXiv 2203.03466, tables 3 and 8.

    Args:
      kind: What the parameter is.
      ratio: r, the large width over the small one, above 0.

    Returns:
      The ratio of the rates.

    Raises:
      ValueError: An unknown kind, or a ratio that is not above 0.

    Example:
        >>> float(mc.scaling.adam_by_width("hidden", 4)), float(mc.scaling.adam_by_width("vector", 4))
        (0.25, 1.0)
    """  # noqa: E501
    check_choice("kind", kind, _ADAM_POWERS)
    return _above_zero("ratio", ratio) ** _ADAM_POWERS[kind]


def init_by_width(kind: Kind, ratio: ArrayLike) -> Any:
    """What the first weights' standard deviation is multiplied by, in muP, when the width grows.

    The table, which Adam and Muon share, and its source are in `adam_by_width`.

    Args:
      kind: What the parameter is.
      ratio: The large width over the small one, above 0.

    Returns:
      The ratio of the standard deviations.

    Raises:
      ValueError: An unknown kind, or a ratio that is not above 0.

    Example:
        >>> float(mc.scaling.init_by_width("hidden", 4))
        0.5
    """
    check_choice("kind", kind, _INIT_POWERS)
    return _above_zero("ratio", ratio) ** _INIT_POWERS[kind]


def residual_by_depth(ratio: ArrayLike, power: float = 1.0) -> Any:
    """What a residual branch's multiplier is multiplied by when the depth grows: `r^-power`.

    | power | whose | what it does |
    | --- | --- | --- |
    | 1 | CompleteP, Dey et al., arXiv 2505.01618; with Muon, Qiu et al., arXiv 2512.05620 | rates stay; every block learns features |
    | 0.5 | Depth-muP, Yang et al., arXiv 2310.02244 | first activations of every depth alike; rates fall with 1/sqrt(r) |

    The model is to multiply what every attention and every MLP adds to the stream by this.

    Args:
      ratio: r, the large depth over the small one, above 0.
      power: From 0.5 to 1.

    Returns:
      The ratio of the multipliers.

    Raises:
      ValueError: A ratio that is not above 0, a power out of its range.

    Example:
        >>> float(mc.scaling.residual_by_depth(4)), float(mc.scaling.residual_by_depth(4, power=0.5))
        (0.25, 0.5)
    """  # noqa: E501
    _check_depth_power("power", power)
    return _above_zero("ratio", ratio) ** -power


def rate_by_depth(ratio: ArrayLike, power: float = 1.0) -> Any:
    """What the rate of hidden matrices is multiplied by when the depth grows: `r^(power - 1)`.

    L steps of size η, each behind a multiplier of `L^-power`, are to change the output alike at
    every depth. That holds for optimizers whose updates forget the gradient's size: Adam and Muon.

    Args:
      ratio: r, the large depth over the small one, above 0.
      power: Of the residual multiplier, see `residual_by_depth` for it and the sources.

    Returns:
      The ratio of the rates.

    Raises:
      ValueError: As `residual_by_depth`.

    Example:
        >>> float(mc.scaling.rate_by_depth(4)), float(mc.scaling.rate_by_depth(4, power=0.5))
        (1.0, 0.5)
    """
    _check_depth_power("power", power)
    return _above_zero("ratio", ratio) ** (power - 1)


def rate_by_batch(
    small: ArrayLike, large: ArrayLike, power: float = 0.5, critical: ArrayLike | None = None
) -> Any:
    """What the rate is multiplied by when the batch grows: `(large / small)^power`.

    | optimizer | power | source |
    | --- | --- | --- |
    | Adam | 0.5, with `beta_by_batch` | Malladi et al., arXiv 2205.10287, where noise dominates |
    | Muon | 0.5 | Su Jianlin, kexue.fm/archives/11285, where noise dominates |
    | SGD | 1 | Goyal et al., arXiv 1706.02677 |

    Noise dominates below the critical batch B, at which it is as large as the gradient. With B,

        ratio = ((1 + B/small) / (1 + B/large))^power

    which is the power law for batches far below B, and 1 far above it (McCandlish et al.,
    arXiv 1812.06162, for SGD; their Adam needed a power between 0.5 and 1).

    Args:
      small: The small batch, in tokens or sequences, above 0.
      large: The large one, in the same unit.
      power: See above, from 0 to 1.
      critical: B, in the same unit; None for one that is not near.

    Returns:
      The ratio of the rates.

    Raises:
      ValueError: A batch that is not above 0, a power out of its range.

    Example:
        >>> float(mc.scaling.rate_by_batch(32, 128))
        2.0
        >>> float(mc.scaling.rate_by_batch(32, 128, power=1, critical=128))
        2.5
    """
    check_number("power", power, lambda p: 0 <= p <= 1, "in [0, 1]")
    small, large = _above_zero("small", small), _above_zero("large", large)
    if critical is None:
        return (large / small) ** power
    noise = _above_zero("critical", critical)
    return ((1 + noise / small) / (1 + noise / large)) ** power


def beta_by_batch(beta: ArrayLike, ratio: ArrayLike) -> Any:
    """Adam's b1 or b2 for a larger batch: `1 - ratio (1 - beta)`, as many tokens of memory.

    Goes with the square root of `rate_by_batch`, as does `eps / sqrt(ratio)`. A source for Muon's
    momentum is not known.

    Source: Malladi et al., arXiv 2205.10287.

    Args:
      beta: b1 or b2 of the small batch, in [0, 1).
      ratio: The large batch over the small one, above 0.

    Returns:
      That of the large batch.

    Raises:
      ValueError: The large batch has more tokens than the small one's memory, so that no beta is
        left.

    Example:
        >>> round(float(mc.scaling.beta_by_batch(0.95, 4)), 3)
        0.8
    """
    beta = _numbers("beta", beta, lambda b: (b >= 0) & (b < 1), "in [0, 1)")
    found = 1 - _above_zero("ratio", ratio) * (1 - beta)
    if not isinstance(found, Tracer) and np.any(found < 0):
        raise ValueError(
            f"beta {beta} has no counterpart at {ratio} times the batch: 1 - {ratio} "
            f"(1 - {beta}) is below 0. The rule ends here: choose the beta by hand, or a smaller "
            "batch."
        )
    return found


def rate_by_length(ratio: ArrayLike, power: float = 0.32) -> Any:
    """What the rate is multiplied by when training has more tokens: `r^-power`.

    0.32 was fitted to AdamW's best rates (Bjorck et al., arXiv 2409.19913), and found again for
    Muon on a sphere (Ren et al., arXiv 2603.28743).

    Args:
      ratio: r, the tokens of the long run over those of the short one, above 0.
      power: At least 0.

    Returns:
      The ratio of the rates.

    Raises:
      ValueError: A ratio that is not above 0, a power that is negative.

    Example:
        >>> round(float(mc.scaling.rate_by_length(10)), 3)
        0.479
    """
    check_number("power", power, lambda p: 0 <= p < math.inf, "finite, at least 0")
    return _above_zero("ratio", ratio) ** -power


def decay_product(
    *, width: ArrayLike = 1.0, batch: ArrayLike = 1.0, length: ArrayLike = 1.0
) -> Any:
    """What the product of rate and decay, ηλ, is multiplied by: `batch / (width · length)`.

    ηλ is what each step takes off the weights, so 1/(ηλ) is how many steps they remember.

    | argument | rule | source |
    | --- | --- | --- |
    | `width` | ηλ falls with the width. Found for runs whose length grows with the model, so give `length` no ratio beside it. At a rate that stays, as with `"unit_rms_norm"`, λ itself is 1/width | Qiu et al., arXiv 2512.05620 |
    | `length` | the memory is the same share of the run, whatever the width | Wang and Aitchison, arXiv 2405.13698 |
    | `batch` | the memory is as many tokens, which are fewer steps | the same; Bergsma et al., arXiv 2505.13738 |

    The first two differ: with Adam's muP rate of 1/width the first keeps λ, and the second lets it
    grow with the width.

    Args:
      width: The large model's width over the small one's, above 0.
      batch: Their batches, likewise.
      length: Their tokens of training, likewise.

    Returns:
      The ratio of ηλ, large over small. Divide by that of η for the one of λ.

    Raises:
      ValueError: A ratio that is not above 0.

    Example:
        >>> float(mc.scaling.decay_product(width=4)), float(mc.scaling.decay_product(batch=2, length=4))
        (0.25, 0.5)
    """  # noqa: E501
    width, length = _above_zero("width", width), _above_zero("length", length)
    return _above_zero("batch", batch) / (width * length)


@dataclass(frozen=True)
class Size:
    """How large a model and its training are.

    Attributes:
      width: Of the residual stream. MLPs and the number of heads grow with it, heads keep their
        size.
      depth: Blocks.
      batch: Tokens a step.
      steps: Steps of the run.

    Raises:
      ValueError: What is no whole number of at least 1.

    Example:
        >>> mc.scaling.Size(width=256, depth=4, batch=65_536, steps=2_000).tokens
        131072000
    """

    width: int
    depth: int
    batch: int
    steps: int

    def __post_init__(self):
        for field in fields(self):
            check_count(field.name, getattr(self, field.name))

    @property
    def tokens(self) -> int:
        """Tokens of the run."""
        return self.batch * self.steps


@dataclass(frozen=True)
class Tuned:
    """The values that a model's training is tuned by.

    Attributes:
      learning_rate: Muon's, the highest where it follows a schedule.
      weight_decay: λ of `mc.muon`, which multiplies it by the rate.
      other_learning_rate: Adam's, for embeddings, unembeddings and vectors. None is
        `learning_rate`.
      init_std: Of hidden matrices; None where it is `1/sqrt(in)` anyway, as Flax's default is.
      logit_multiplier: What the model multiplies its output logits by.
      residual_multiplier: What it multiplies by what each attention and MLP adds.
      b1: Adam's; None to leave it alone.
      b2: Adam's; None to leave it alone.

    Raises:
      TypeError: What is no number.
      ValueError: A number out of its range.

    Example:
        >>> mc.scaling.Tuned(learning_rate=0.02, weight_decay=0.1, other_learning_rate=3e-3).b1
    """

    learning_rate: float
    weight_decay: float
    other_learning_rate: float | None = None
    init_std: float | None = None
    logit_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    b1: float | None = None
    b2: float | None = None

    def __post_init__(self):
        for name in ("learning_rate", "logit_multiplier", "residual_multiplier"):
            _check_above_zero(name, getattr(self, name))
        for name in ("other_learning_rate", "init_std"):
            if getattr(self, name) is not None:
                _check_above_zero(name, getattr(self, name))
        wanted = "finite, at least 0"
        check_number("weight_decay", self.weight_decay, lambda x: 0 <= x < math.inf, wanted)
        for name in ("b1", "b2"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), lambda x: 0 <= x < 1, "in [0, 1)")


def transfer(
    tuned: Tuned,
    small: Size,
    large: Size,
    *,
    update_rms: Rule = "match_adam",
    decay: Decay = "width",
    depth_power: float = 1.0,
    critical_batch: float | None = None,
    length_power: float = 0.0,
) -> Tuned:
    """A large model's values, from those that were tuned on a small one.

    With ratios r of large over small, n of widths, l of depths, b of batches, t of tokens:

    | value | is multiplied by | from |
    | --- | --- | --- |
    | `learning_rate` | `muon_by_width` of a matrix of which both sides grow · l^(depth_power-1) · batch · t^-length_power | `muon_by_width`, `rate_by_depth`, `rate_by_batch`, `rate_by_length` |
    | `other_learning_rate` | batch · t^-length_power: embeddings and vectors, and unembeddings with the logit multiplier | `adam_by_width`, and the same |
    | `logit_multiplier` | 1/n | `adam_by_width`: the model is to multiply its logits by it |
    | `init_std` | 1/sqrt(n) | `init_by_width` |
    | `residual_multiplier` | l^-depth_power | `residual_by_depth`: the model is to multiply branches by it |
    | `weight_decay` | with η for `learning_rate`: `"width"` b/n over η's ratio; `"length"` b/t over η's ratio; `"fixed"` 1 | `decay_product` |
    | `b1`, `b2` | 1 - b (1 - β) | `beta_by_batch` |

    Here "batch" is `rate_by_batch(small.batch, large.batch, critical=critical_batch)`. It takes
    pairs of sizes of any order, and equal ones change nothing. Muon's momentum stays. With a layout,
    or Flax's own attention, give `mc.muon` the model's layout and
    `granularity=mc.Granularity({"o": "all"})`: see `muon_by_width`. The decay of
    what is not Muon's is λ times its own rate; nothing was published for it. Sources differ, most
    on decay and length, so compare two values at a size in between where that can be paid for;
    `studies/transfer` measured these rules at small widths (docs/how-to/scaling.md).

    Args:
      tuned: The small model's values.
      small: Its size.
      large: The large model's size.
      update_rms: The `update_rms` that `mc.muon` gets, in both: a name.
      decay: Which rule the decay follows, see `decay_product`.
      depth_power: See `residual_by_depth`.
      critical_batch: In tokens, see `rate_by_batch`.
      length_power: See `rate_by_length`, where 0.32 is from; 0 leaves the rate alone.

    Returns:
      Values for `mc.muon(t.learning_rate, other_learning_rate=t.other_learning_rate,
      weight_decay=t.weight_decay, update_rms=update_rms)`, and for the model.

    Raises:
      TypeError: `tuned` or a size of another type.
      ValueError: An option out of its range; betas that the batch leaves nothing of.

    Example:
        >>> tuned = mc.scaling.Tuned(0.02, weight_decay=0.1, other_learning_rate=3e-3)
        >>> small = mc.scaling.Size(width=256, depth=4, batch=65_536, steps=2_000)
        >>> large = mc.scaling.Size(width=1024, depth=16, batch=262_144, steps=2_000)
        >>> t = mc.scaling.transfer(tuned, small, large, update_rms="unit_rms_norm")
        >>> t.learning_rate, t.other_learning_rate, t.weight_decay, t.logit_multiplier
        (0.04, 0.006, 0.05, 0.25)
        >>> tx = mc.muon(t.learning_rate, other_learning_rate=t.other_learning_rate,
        ...     weight_decay=t.weight_decay, update_rms="unit_rms_norm")
    """  # noqa: E501
    for name, value, kind in (
        ("tuned", tuned, Tuned),
        ("small", small, Size),
        ("large", large, Size),
    ):
        if not isinstance(value, kind):
            wanted = f"muonclip_jax.scaling.{kind.__name__}"
            raise TypeError(f"{name} must be a {wanted}, got {value!r}.")
    check_choice("update_rms", update_rms, SHAPE_SCALES)
    check_choice("decay", decay, get_args(Decay))
    _check_depth_power("depth_power", depth_power)
    wanted = "finite, at least 0"
    check_number("length_power", length_power, lambda p: 0 <= p < math.inf, wanted)
    if critical_batch is not None:
        _check_above_zero("critical_batch", critical_batch)
    width, depth = large.width / small.width, large.depth / small.depth
    batch, tokens = large.batch / small.batch, large.tokens / small.tokens
    both = float(
        rate_by_batch(small.batch, large.batch, critical=critical_batch)
        * rate_by_length(tokens, length_power)
    )
    sides = [(size.width, size.width) for size in (small, large)]
    muon = both * muon_by_width(update_rms, *sides) * float(rate_by_depth(depth, depth_power))
    products = {
        "width": decay_product(width=width, batch=batch),
        "length": decay_product(batch=batch, length=tokens),
        "fixed": muon,
    }
    other = tuned.other_learning_rate
    return replace(
        tuned,
        learning_rate=tuned.learning_rate * muon,
        weight_decay=tuned.weight_decay * float(products[decay] / muon),
        other_learning_rate=(tuned.learning_rate if other is None else other) * both,
        init_std=None
        if tuned.init_std is None
        else tuned.init_std * float(init_by_width("hidden", width)),
        logit_multiplier=tuned.logit_multiplier / width,
        residual_multiplier=tuned.residual_multiplier
        * float(residual_by_depth(depth, depth_power)),
        b1=None if tuned.b1 is None else float(beta_by_batch(tuned.b1, batch)),
        b2=None if tuned.b2 is None else float(beta_by_batch(tuned.b2, batch)),
    )


def _check_depth_power(name: str, value: Any) -> None:
    check_number(name, value, lambda p: 0.5 <= p <= 1, "in [0.5, 1]")


def _check_above_zero(name: str, value: Any) -> None:
    check_number(name, value, lambda x: 0 < x < math.inf, "finite, above 0")


def _above_zero(name: str, value: ArrayLike) -> Any:
    return _numbers(name, value, lambda x: (x > 0) & np.isfinite(x), "finite, above 0")


def _numbers(name: str, value: Any, is_right: Callable[[Any], Any], wanted: str) -> Any:
    """The value as numbers to calculate with; traced ones are not checked."""
    if isinstance(value, Tracer):
        return value
    try:
        found = np.asarray(value, np.float64)
    except (TypeError, ValueError):
        found = np.array(np.nan)
    if isinstance(value, bool | str) or value is None or not np.all(is_right(found)):
        raise ValueError(f"{name} must be {wanted}, got {value!r}.")
    return value if isinstance(value, jax.Array) else found[()]
