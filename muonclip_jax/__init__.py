"""Muon, QK-Clip, MuonClip and QuacK as composable Optax transformations for Flax models."""

# ruff: noqa: RUF022 (data-flow order)
from muonclip_jax import layouts
from muonclip_jax.attention import (
    dot_product_attention,
    max_logits_bound,
    max_logits_from_residuals,
    measure_max_logits,
    read_max_logits,
    sow_max_logits,
)
from muonclip_jax.description import describe
from muonclip_jax.diagnostics import (
    AttentionReport,
    HeadReport,
    attention_report,
    effective_rank,
    eigenvalue_participation_ratio,
    head_matrices,
    nuclear_rank,
    participation_ratio,
    plots,
    read_activations,
    singular_values,
    sow_activations,
    spectral_norm,
    stable_rank,
)
from muonclip_jax.layouts import Layout, find_layout
from muonclip_jax.orthogonalize import (
    Method,
    Schedule,
    orthogonality_error,
    orthogonalize,
    schedules,
)
from muonclip_jax.recipes import muon, muonclip, quack
from muonclip_jax.routing import muon_dimension_numbers
from muonclip_jax.transforms import (
    AccumulateState,
    MuonState,
    QKClipState,
    QuackState,
    accumulate,
    accumulate_state,
    apply_qk_clip,
    qk_clip,
    qk_clip_state,
    quack_state,
    scale_by_muon,
    scale_by_quack,
    scale_by_update_rms,
)

__all__ = [
    # kernel
    "orthogonalize",
    "schedules",
    "Schedule",
    "Method",
    # transformations
    "scale_by_muon",
    "MuonState",
    "scale_by_update_rms",
    "scale_by_quack",
    "QuackState",
    "quack_state",
    "qk_clip",
    "QKClipState",
    "qk_clip_state",
    "apply_qk_clip",
    "accumulate",
    "AccumulateState",
    "accumulate_state",
    # recipes: the chains
    "muon",
    "muonclip",
    "quack",
    # which parameters, which heads
    "muon_dimension_numbers",
    "layouts",
    "Layout",
    "find_layout",
    "describe",
    # max logits
    "dot_product_attention",
    "measure_max_logits",
    "max_logits_from_residuals",
    "max_logits_bound",
    "sow_max_logits",
    "read_max_logits",
    # read-only: heads
    "attention_report",
    "AttentionReport",
    "HeadReport",
    "head_matrices",
    "sow_activations",
    "read_activations",
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
