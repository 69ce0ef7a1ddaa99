"""Read-only: what happens inside the heads."""

from muonclip_jax.diagnostics import plots
from muonclip_jax.diagnostics.activations import read_activations, sow_activations
from muonclip_jax.diagnostics.heads import head_matrices
from muonclip_jax.diagnostics.measures import (
    effective_rank,
    eigenvalue_participation_ratio,
    nuclear_rank,
    participation_ratio,
    singular_values,
    spectral_norm,
    stable_rank,
)
from muonclip_jax.diagnostics.report import AttentionReport, HeadReport, attention_report

__all__ = [
    "AttentionReport",
    "HeadReport",
    "attention_report",
    "effective_rank",
    "eigenvalue_participation_ratio",
    "head_matrices",
    "nuclear_rank",
    "participation_ratio",
    "plots",
    "read_activations",
    "singular_values",
    "sow_activations",
    "spectral_norm",
    "stable_rank",
]
