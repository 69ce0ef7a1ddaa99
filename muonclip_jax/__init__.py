"""Muon, QK-Clip, MuonClip and QuacK as composable Optax transformations for Flax models."""

# ruff: noqa: RUF022 (data-flow order)
from typing import TYPE_CHECKING

from muonclip_jax import layouts, linalg, plots, scaling, schedules
from muonclip_jax._attention.attention import dot_product_attention
from muonclip_jax._attention.flax import attention_fn
from muonclip_jax._attention.max_logits import read_max_logits, sow_max_logits
from muonclip_jax._attention.measure import measure_max_logits
from muonclip_jax._attention.outputs import measure_max_output
from muonclip_jax._attention.residuals import max_logits_bound, max_logits_from_residuals
from muonclip_jax._core.axes import MatrixPattern
from muonclip_jax._core.sowing import read_signal, sow_signal
from muonclip_jax._diagnostics.activations import read_activations, sow_activations
from muonclip_jax._diagnostics.check_layout import LayoutProof, check_layout
from muonclip_jax._diagnostics.clip_report import ClipReport, SignalReport, clip_report
from muonclip_jax._diagnostics.coordinate_check import CoordinateCheck, coordinate_check
from muonclip_jax._diagnostics.heads import head_matrices
from muonclip_jax._diagnostics.measures import (
    effective_rank,
    eigenvalue_participation_ratio,
    nuclear_rank,
    participation_ratio,
    singular_values,
    spectral_norm,
    stable_rank,
)
from muonclip_jax._diagnostics.report import AttentionReport, HeadReport, attention_report
from muonclip_jax._orthogonalize.methods import Method
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._orthogonalize.orthogonalize import orthogonality_error, orthogonalize
from muonclip_jax._orthogonalize.rates import Rates, declared_rates, measured_rates
from muonclip_jax._parameters.description import describe
from muonclip_jax._parameters.granularity import Granularity
from muonclip_jax._parameters.routing import muon_dimension_numbers
from muonclip_jax._trainers.linen import TrainState
from muonclip_jax._transforms.accumulate import AccumulateState, accumulate, accumulate_state
from muonclip_jax._transforms.block_periodic import (
    PeriodicOrthogonalizationState,
    scale_by_periodic_orthogonalization,
)
from muonclip_jax._transforms.clip import ClipState, ScheduledClipState, clip_by_signal
from muonclip_jax._transforms.decay import add_decayed_weights
from muonclip_jax._transforms.elsewhere import from_optax_muon, from_torch_muon
from muonclip_jax._transforms.hyperball import HyperballState, hyperball
from muonclip_jax._transforms.muon import scale_by_muon
from muonclip_jax._transforms.neuron_rms import NeuronRMSState, scale_by_neuron_rms
from muonclip_jax._transforms.normalize_rms import normalize_rms
from muonclip_jax._transforms.orthogonalization import scale_by_orthogonalization
from muonclip_jax._transforms.output_clip import max_output_clip
from muonclip_jax._transforms.partition import partition_matrices
from muonclip_jax._transforms.qk_clip import QKClipState, apply_qk_clip, qk_clip, qk_clip_state
from muonclip_jax._transforms.quack import QuackState, quack_state, scale_by_quack
from muonclip_jax._transforms.spectral import (
    SpectralNormState,
    cap_spectral_norm,
    clip_singular_values,
    decay_spectral_norm,
)
from muonclip_jax._transforms.update_rms import scale_by_update_rms
from muonclip_jax._transforms.upgrade import upgrade_state
from muonclip_jax.layouts import Layout, find_layout
from muonclip_jax.published import kimi_muonclip, moonlight, muonh, nanochat, normuon
from muonclip_jax.recipes import muon, muon_direction, muonclip, quack
from muonclip_jax.schedules import Schedule

if TYPE_CHECKING:  # these import NNX, which takes as long as this package: who uses them waits
    from muonclip_jax._trainers.maxtext import use_in_maxtext
    from muonclip_jax._trainers.nnx import MaxLogits, record_max_logits, use_recorded_max_logits

    __version__: str

__all__ = [
    # kernel
    "orthogonalize",
    "schedules",
    "Schedule",
    "Method",
    "NewtonSchulz",
    "Rates",
    "declared_rates",
    "measured_rates",
    "linalg",
    # transformations
    "scale_by_muon",
    "scale_by_orthogonalization",
    "scale_by_periodic_orthogonalization",
    "PeriodicOrthogonalizationState",
    "scale_by_update_rms",
    "normalize_rms",
    "scale_by_neuron_rms",
    "NeuronRMSState",
    "partition_matrices",
    "add_decayed_weights",
    "scale_by_quack",
    "QuackState",
    "quack_state",
    "qk_clip",
    "QKClipState",
    "qk_clip_state",
    "apply_qk_clip",
    "max_output_clip",
    "clip_by_signal",
    "ClipState",
    "ScheduledClipState",
    "clip_singular_values",
    "cap_spectral_norm",
    "decay_spectral_norm",
    "SpectralNormState",
    "hyperball",
    "HyperballState",
    "accumulate",
    "AccumulateState",
    "accumulate_state",
    "upgrade_state",
    "from_optax_muon",
    "from_torch_muon",
    # recipes: the chains
    "muon",
    "muonclip",
    "kimi_muonclip",
    "moonlight",
    "normuon",
    "muonh",
    "nanochat",
    "quack",
    "muon_direction",
    "scaling",
    # which parameters, which heads
    "muon_dimension_numbers",
    "Granularity",
    "MatrixPattern",
    "layouts",
    "Layout",
    "find_layout",
    "describe",
    "check_layout",
    "LayoutProof",
    # max logits
    "dot_product_attention",
    "attention_fn",
    "measure_max_logits",
    "measure_max_output",
    "max_logits_from_residuals",
    "max_logits_bound",
    "sow_max_logits",
    "read_max_logits",
    "sow_signal",
    "read_signal",
    # trainers that own their step
    "record_max_logits",
    "use_recorded_max_logits",
    "use_in_maxtext",
    "MaxLogits",
    "TrainState",
    # read-only: heads
    "attention_report",
    "AttentionReport",
    "HeadReport",
    "clip_report",
    "ClipReport",
    "SignalReport",
    "head_matrices",
    "sow_activations",
    "read_activations",
    "coordinate_check",
    "CoordinateCheck",
    "plots",
    # read-only: matrices
    "singular_values",
    "spectral_norm",
    "participation_ratio",
    "eigenvalue_participation_ratio",
    "effective_rank",
    "stable_rank",
    "nuclear_rank",
    "orthogonality_error",
]


def __getattr__(name: str):
    if name == "__version__":
        from importlib.metadata import version

        return version("muonclip_jax")
    if name in ("MaxLogits", "record_max_logits", "use_recorded_max_logits"):
        from muonclip_jax._trainers import nnx

        return getattr(nnx, name)
    if name == "use_in_maxtext":
        from muonclip_jax._trainers.maxtext import use_in_maxtext

        return use_in_maxtext
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
