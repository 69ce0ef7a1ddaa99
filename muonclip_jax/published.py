"""Published optimizers, by name, as their sources have them: each a chain of this library's links.

    kimi_muonclip   whole kernels → Muon without Nesterov → QK-Clip
    moonlight       whole kernels → Muon → Adam's RMS
    normuon         whole kernels → momentum → msign → each neuron's running RMS → Adam's RMS
    muonh           whole kernels → Muon → a step on the sphere of the first norm
    nanochat        equal neurons → msign → each neuron's running RMS → cautious decay

Whoever wants another combination chains the links: `partition_matrices` has an example.
"""

import math
from typing import Any

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._core.masks import Frozen, Mask
from muonclip_jax._core.maxima import AxisName
from muonclip_jax._core.options import check_ascent, check_rate
from muonclip_jax._core.shardings import Shardings
from muonclip_jax._layouts.blocks import Layouts
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._orthogonalize.schedules import Schedule, jordan
from muonclip_jax._parameters import routing
from muonclip_jax._parameters.granularity import Granularity
from muonclip_jax._spread.plan import DevicesPerMatrix
from muonclip_jax._transforms.clip import Threshold
from muonclip_jax._transforms.decay import decayed_weights
from muonclip_jax._transforms.hyperball import hyperball
from muonclip_jax._transforms.momentum import momentum_trace
from muonclip_jax._transforms.muon import scale_by_muon
from muonclip_jax._transforms.neuron_rms import scale_by_neuron_rms
from muonclip_jax._transforms.normalize_rms import normalize_rms
from muonclip_jax._transforms.orthogonalization import scale_by_orthogonalization
from muonclip_jax._transforms.partition import learning_rates, partition_matrices
from muonclip_jax._transforms.update_rms import scale_by_update_rms
from muonclip_jax.recipes import ADAM, check_decayed_other, muon, muonclip

_JORDAN = NewtonSchulz(jordan(5))
# Polar Express made with a safety factor of 1.02, and its matrix divided by 1.01 times its norm.
_NANOCHAT = NewtonSchulz(
    Schedule(
        "nanochat",
        (
            (8.156554524902461, -22.48329292557795, 15.878769915207462),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        norm_factor=1.01,
        source="github.com/karpathy/nanochat, nanochat/optim.py",
    )
)
# nanochat's for what is not a matrix.
_FAST_ADAM = optax.scale_by_adam(b1=0.8, b2=0.95, eps=1e-10)


def kimi_muonclip(
    learning_rate: optax.ScalarOrSchedule,
    *,
    layout: Layouts,
    threshold: Threshold = 100.0,
    axis_name: AxisName = None,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    other: optax.GradientTransformation = ADAM,
    momentum: ArrayLike = 0.95,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008 (frozen)
    weight_decay: optax.ScalarOrSchedule = 0.1,
    weight_decay_mask: Mask | None = None,
    rules: routing.Rules | None = None,
    frozen: Frozen | None = None,
    mu_dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MuonClip as published: the optimizer of Kimi K2, with whole kernels and without Nesterov.

        M ← μ M + G
        O ← msign(M) · 0.2 · sqrt(max(n, m))      of each kernel, n × m, whole as it is stored
        W ← W − η (O + λ W)                       W on the right is the weight before the step
        then, for each head whose largest logit S is above τ, with γ = τ / S:
            its queries and its own keys (of MLA q_nope, k_nope) ← · sqrt(γ)
            its queries of a key that heads share (of MLA q_rope) ← · γ, the shared key as it is

    It is `muonclip` with these settings, and is called alike. Where each comes from:

    | setting | source |
    | --- | --- |
    | the four lines, without Nesterov | Su Jianlin, "QK-Clip", spaces.ac.cn/archives/11126; Kimi K2, arXiv 2507.20534, Algorithm 1 |
    | τ = 100 | both |
    | λ = 0.1 | the Kimi K2 report, section 2.5 |
    | μ = 0.95; Adam with b1 = 0.9, b2 = 0.95 for embeddings, unembeddings, norms, with Muon's η and λ | Moonlight's code (github.com/MoonshotAI/Moonlight; arXiv 2502.16982), on which the article builds |
    | one matrix a kernel, all heads of it | Moonlight's code, which takes every parameter of two axes as it is stored. The other two write W as n × m, and name heads in the clip only |
    | fused queries, keys and values as one matrix | this library's reading of the same; Kimi's models store MLA's kernels apart, so no source had to say |
    | a key of GQA or MQA that heads share is not clipped | this library's; the article says it of MLA's shared rope key, for a reason that holds here too: the clip would hit innocent heads |
    | five Polar Express steps in bfloat16 for msign | this library's; the report says Newton–Schulz, Moonlight's code takes five of Jordan's steps with Nesterov |
    | what does not decay: biases, gains, norms (the table of `muon`) | this library's; Moonlight's code lets all of them decay |

    How far it is from the box, given the same gradients and maxima, after 20 steps, as a share of
    the way that each kernel went, beside a float64 transcription with an SVD for msign: 3e-7 with
    `newton_schulz=NewtonSchulz(schedules.polar_express(12), "float32")`, and 0.3% with the default
    schedule (small kernels, gradients with singular values 1/k; `scale_by_update_rms` says what
    five steps do to steeper ones). `tests/recipes/published.py` is the transcription.

    Args:
      learning_rate: η, a number or an Optax schedule. Kimi K2's was 2e-4 at most.
      layout: Where queries, keys, values and outputs are, as in `muonclip`.
      threshold: τ of `qk_clip`, or a schedule of it.
      axis_name: As in `qk_clip`: inside `jax.shard_map` and `jax.pmap`, the axes of the data.
        (There is no `heads_axis_name`: kernels whose heads are spread by hand are not whole.)
      other_learning_rate: This and all that follow are as in `muon`.
      other: What parameters that are not Muon's get.
      momentum: μ.
      newton_schulz: How to orthogonalize.
      weight_decay: λ.
      weight_decay_mask: What decays.
      rules: What to do with parameters by path.
      frozen: What gets no updates, and is not clipped either, as in `qk_clip`.
      mu_dtype: The dtype of Muon's momentum; "int8" is a quarter of float32, see `scale_by_muon`.
      shardings: How the parameters are split over a mesh with Auto axes.
      devices_per_matrix: How many devices make a group, which holds one matrix among them.

    Raises:
      TypeError, ValueError: As `muonclip`, and for kernels whose pieces are no one matrix, because their
        inputs lie along different axes.

    Example:
        >>> optimizer = mc.kimi_muonclip(2e-4, layout=layout)
        >>> state = optimizer.init(params)
        >>> updates, state = optimizer.update(grads, state, params, max_logits=sown)
        >>> params = optax.apply_updates(params, updates)
        >>> rows = mc.describe(params, layout, granularity=mc.Granularity.kimi_k2())
        >>> [str(row.matrices[0]) for row in rows if row.path == "attn/query/kernel"]
        ['q 1 × [8, 8] of 2 heads']
    """  # noqa: E501
    return muonclip(
        learning_rate,
        layout=layout,
        threshold=threshold,
        alpha=0.5,
        shared_keys="untouched",
        scope="head",
        axis_name=axis_name,
        other_learning_rate=other_learning_rate,
        other=other,
        momentum=momentum,
        nesterov=False,  # the box has none
        newton_schulz=newton_schulz,
        update_rms="match_adam",
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        granularity=Granularity.kimi_k2(),
        rules=rules,
        frozen=frozen,
        mu_dtype=mu_dtype,
        shardings=shardings,
        devices_per_matrix=devices_per_matrix,
    )


def moonlight(
    learning_rate: optax.ScalarOrSchedule,
    *,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    other: optax.GradientTransformation = ADAM,
    momentum: ArrayLike = 0.95,
    newton_schulz: NewtonSchulz = _JORDAN,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    weight_decay_mask: Mask | None = None,
    layout: Layouts | None = None,
    rules: routing.Rules | None = None,
    frozen: Frozen | None = None,
    mu_dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Muon as Moonlight was trained (arXiv 2502.16982, and its code at github.com/MoonshotAI).

        M ← μ M + G;  O ← NS₅(G + μ M) · 0.2 · sqrt(max(n, m))      of each kernel, whole
        W ← W − η (O + λ W)

    It is `muon` with Jordan's five steps and whole kernels. Two settings are this library's: what
    does not decay (the table of `muon`; Moonlight's code lets all of them decay), and embeddings
    and unembeddings by name. Kimi K2's optimizer, without Nesterov and with QK-Clip, is
    `kimi_muonclip`.

    Args:
      learning_rate: η, a number or an Optax schedule. Moonlight's was 4.2e-4 at most.
      other_learning_rate: This and all that follow are as in `muon`.
      other: What parameters that are not Muon's get.
      momentum: μ.
      newton_schulz: How to orthogonalize.
      weight_decay: λ.
      weight_decay_mask: What decays.
      layout: The model's attention, where a kernel has more than two axes.
      rules: What to do with parameters by path.
      frozen: What gets no updates.
      mu_dtype: The dtype of Muon's momentum.
      shardings: How the parameters are split over a mesh with Auto axes.
      devices_per_matrix: How many devices make a group.

    Raises:
      TypeError, ValueError: As `muon`.

    Example:
        >>> optimizer = mc.moonlight(4e-4, layout=layout)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    """
    return muon(
        learning_rate,
        other_learning_rate=other_learning_rate,
        other=other,
        momentum=momentum,
        nesterov=True,
        newton_schulz=newton_schulz,
        update_rms="match_adam",
        weight_decay=weight_decay,
        weight_decay_mask=weight_decay_mask,
        layout=layout,
        granularity=Granularity.kimi_k2(),
        rules=rules,
        frozen=frozen,
        mu_dtype=mu_dtype,
        shardings=shardings,
        devices_per_matrix=devices_per_matrix,
    )


def normuon(
    learning_rate: optax.ScalarOrSchedule,
    *,
    other_learning_rate: optax.ScalarOrSchedule | None = None,
    other: optax.GradientTransformation = ADAM,
    momentum: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    newton_schulz: NewtonSchulz = _JORDAN,
    weight_decay: optax.ScalarOrSchedule = 0.1,
    weight_decay_mask: Mask | None = None,
    layout: Layouts | None = None,
    granularity: Granularity = Granularity.kimi_k2(),  # noqa: B008 (frozen)
    rules: routing.Rules | None = None,
    frozen: Frozen | None = None,
    mu_dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """NorMuon as published (arXiv 2510.05491, Algorithm 1): Muon with a second moment per neuron.

        M ← β₁ M + (1 − β₁) G;  O ← NS₅(M)
        v ← β₂ v + (1 − β₂) mean over inputs of O²;  Ô ← O / (√v + ε)
        W ← W − η λ W − 0.2 η √(n m) / ‖Ô‖_F · Ô

    Neurons are the columns of a Flax kernel `[in, out]`. The factor 1 − β₁ is left out here, since
    NS₅ ignores it. The authors' code differs from their algorithm: it looks ahead (Nesterov), and
    keeps the norm of O, times Jordan's `sqrt(max(1, out/in))`, in place of 0.2 √(n m); that is
    `scale_by_muon()`, `scale_by_neuron_rms(keep_rms=True)`, `scale_by_update_rms("jordan")`.

    State: momentum, and one float32 number for each neuron.

    Args:
      learning_rate: η, a number or an Optax schedule. The size of an update is Adam's.
      other_learning_rate: As in `muon`.
      other: What parameters that are not Muon's get.
      momentum: β₁.
      b2: β₂ of `scale_by_neuron_rms`, whose ε is 1e-8.
      newton_schulz: How to orthogonalize.
      weight_decay: λ, as in `muon`, and so are all that follow.
      weight_decay_mask: What decays.
      layout: The model's attention.
      granularity: Which heads make one matrix; the source takes whole kernels.
      rules: What to do with parameters by path.
      frozen: What gets no updates.
      mu_dtype: The dtype of Muon's momentum.
      shardings: How the parameters are split over a mesh with Auto axes.
      devices_per_matrix: How many devices make a group.

    Raises:
      TypeError, ValueError: As `muon` and `scale_by_neuron_rms`.

    Example:
        >>> optimizer = mc.normuon(1e-3, layout=layout)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    """
    check_ascent("other", other)

    def direction(numbers: routing.DimensionNumbers | None) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_muon(
                momentum,
                nesterov=False,
                newton_schulz=newton_schulz,
                dimension_numbers=numbers,
                mu_dtype=mu_dtype,
                shardings=shardings,
                devices_per_matrix=devices_per_matrix,
            ),
            scale_by_neuron_rms(b2, dimension_numbers=numbers, shardings=shardings),
            normalize_rms(0.2, dimension_numbers=numbers, shardings=shardings),
        )

    numbers = routing.choose(None, layout, granularity, rules)
    decay = decayed_weights(weight_decay, weight_decay_mask, numbers, layout, frozen)
    check_decayed_other(other, weight_decay, weight_decay_mask)
    return optax.chain(
        partition_matrices(direction, other, dimension_numbers=numbers, frozen=frozen),
        decay,
        learning_rates(learning_rate, other_learning_rate, numbers),
    )


def muonh(
    learning_rate: optax.ScalarOrSchedule,
    other_learning_rate: optax.ScalarOrSchedule,
    *,
    other: optax.GradientTransformation = ADAM,
    momentum: ArrayLike = 0.95,
    newton_schulz: NewtonSchulz = _JORDAN,
    layout: Layouts | None = None,
    granularity: Granularity = Granularity.kimi_k2(),  # noqa: B008 (frozen)
    rules: routing.Rules | None = None,
    frozen: Frozen | None = None,
    mu_dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """MuonH: Muon on the sphere of each matrix's first norm, without decay (arXiv 2606.16899).

        M ← μ M + G;  O ← NS₅(G + μ M)                    of each kernel, whole
        W ← R · N(W − η R N(O)),  N(x) = x / ‖x‖_F,  R = ‖W₀‖_F

    All other parameters get Adam, and do not decay. (Levanter's code also keeps the unembedding on
    its sphere, behind Adam: `partition_matrices` with `optax.scale_by_adam()` and `hyperball` for
    it.) Its authors find 20 to 30% fewer tokens than Muon at up to 1.2B parameters; others do not
    (nanochat's log of January 2026). `docs/explanation/studies.md` has what this library measured.

    State: momentum, and one float32 number for each matrix.

    Args:
      learning_rate: η, the length of a step relative to ‖W₀‖_F; of a run with decay it is about
        `sqrt(learning_rate * weight_decay)`. A number or an Optax schedule.
      other_learning_rate: That of `other`, likewise.
      other: What parameters that are not Muon's get, as in `muon`.
      momentum: μ, as in `muon`, and so are all that follow.
      newton_schulz: How to orthogonalize.
      layout: The model's attention.
      granularity: Which heads make one matrix; the source takes whole kernels. A matrix has a
        radius of its own.
      rules: What to do with parameters by path.
      frozen: What gets no updates.
      mu_dtype: The dtype of Muon's momentum.
      shardings: How the parameters are split over a mesh with Auto axes.
      devices_per_matrix: How many devices make a group.

    Raises:
      TypeError, ValueError: As `muon` and `hyperball`.

    Example:
        >>> optimizer = mc.muonh(0.02, 6e-4, layout=layout)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    """

    def steps(numbers: routing.DimensionNumbers | None) -> optax.GradientTransformation:
        return optax.chain(
            scale_by_muon(
                momentum,
                newton_schulz=newton_schulz,
                dimension_numbers=numbers,
                mu_dtype=mu_dtype,
                shardings=shardings,
                devices_per_matrix=devices_per_matrix,
            ),
            hyperball(learning_rate, dimension_numbers=numbers, shardings=shardings),
        )

    return partition_matrices(
        steps,
        _descending(other, other_learning_rate),
        layout=layout,
        granularity=granularity,
        rules=rules,
        frozen=frozen,
    )


def nanochat(
    learning_rate: optax.ScalarOrSchedule,
    other_learning_rate: optax.ScalarOrSchedule,
    *,
    other: optax.GradientTransformation = _FAST_ADAM,
    momentum: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    newton_schulz: NewtonSchulz = _NANOCHAT,
    weight_decay: optax.ScalarOrSchedule = 0.2,
    layout: Layouts | None = None,
    granularity: Granularity = Granularity.kimi_k2(),  # noqa: B008 (frozen)
    rules: routing.Rules | None = None,
    frozen: Frozen | None = None,
    mu_dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformationExtraArgs:
    """The optimizer of nanochat in 2026: MuonEq, Polar Express, Muon+, NorMuon and cautious decay.

        M ← μ M + (1 − μ) G;  U ← (1 − μ) G + μ M         of each kernel, whole
        U ← each neuron (a column of [in, out]) to the same norm             MuonEq
        O ← NS₅(U), brought to the norm √min(n, m)                           Polar Express, Muon+
        v ← β₂ v + (1 − β₂) mean of O² along the shorter side;  Ô ← O / √v, of the norm of O
        W ← W − η' (Ô + λ W · [Ô · W ≥ 0]),  η' = η sqrt(max(1, out/in))     cautious decay

    All other parameters get Adam with b1 = 0.8, and do not decay. Its script also lowers λ to 0
    over the run (`weight_decay` takes a schedule), raises μ from 0.85 in the first 300 steps
    (`optax.inject_hyperparams(mc.nanochat)`, μ a schedule there), and gives embeddings,
    unembeddings and scalars rates of their own (`other=optax.partition(...)` with
    `optax.scale`, at an `other_learning_rate` of 1).

    Source: github.com/karpathy/nanochat, nanochat/optim.py, with its own table of coefficients.

    State: momentum, and one float32 number for each row or column of the longer side.

    Args:
      learning_rate: η, a number or an Optax schedule. nanochat's is 0.02.
      other_learning_rate: That of `other`, likewise.
      other: What parameters that are not Muon's get, as in `muon`.
      momentum: μ.
      b2: β₂ of `scale_by_neuron_rms`.
      newton_schulz: How to orthogonalize.
      weight_decay: λ of the matrices, a number or an Optax schedule; with 0 the update needs no
        `params`.
      layout: The model's attention, as in `muon`, and so are all that follow.
      granularity: Which heads make one matrix; the source takes whole kernels.
      rules: What to do with parameters by path.
      frozen: What gets no updates.
      mu_dtype: The dtype of Muon's momentum.
      shardings: How the parameters are split over a mesh with Auto axes.
      devices_per_matrix: How many devices make a group.

    Raises:
      TypeError, ValueError: As `muon`, `normalize_rms` and `scale_by_neuron_rms`.

    Example:
        >>> optimizer = mc.nanochat(0.02, 0.004, layout=layout)
        >>> updates, state = optimizer.update(grads, optimizer.init(params), params)
    """
    check_rate("learning_rate", learning_rate)

    def steps(numbers: routing.DimensionNumbers | None) -> optax.GradientTransformation:
        return optax.chain(
            momentum_trace(momentum, nesterov=True, mu_dtype=mu_dtype, shardings=shardings),
            normalize_rms(of="outputs", dimension_numbers=numbers, shardings=shardings),
            scale_by_orthogonalization(
                newton_schulz,
                dimension_numbers=numbers,
                shardings=shardings,
                devices_per_matrix=devices_per_matrix,
            ),
            normalize_rms(dimension_numbers=numbers, shardings=shardings),
            scale_by_update_rms(_of_orthogonal, dimension_numbers=numbers),
            scale_by_neuron_rms(
                b2,
                1e-30,  # next to nothing: it keeps zeros from being divided by zero
                of="longer",
                keep_rms=True,
                dimension_numbers=numbers,
                shardings=shardings,
            ),
            decayed_weights(weight_decay, _everything, None, None, None, cautious=True),
            scale_by_update_rms("jordan", dimension_numbers=numbers),  # the decay too
            optax.scale_by_learning_rate(learning_rate),
        )

    return partition_matrices(
        steps,
        _descending(other, other_learning_rate),
        layout=layout,
        granularity=granularity,
        rules=rules,
        frozen=frozen,
    )


def _descending(
    other: optax.GradientTransformation, other_learning_rate: optax.ScalarOrSchedule
) -> optax.GradientTransformation:
    """`other` at its own rate, without decay."""
    check_ascent("other", other)
    check_rate("other_learning_rate", other_learning_rate)
    return optax.chain(other, optax.scale_by_learning_rate(other_learning_rate))


def _of_orthogonal(ins: int, outs: int) -> float:
    """The RMS of a matrix whose singular values are 1."""
    return 1 / math.sqrt(max(ins, outs))


def _everything(params: Any) -> Any:
    return jax.tree.map(lambda _: True, params)
