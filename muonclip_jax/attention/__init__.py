"""Attention that reports max logits, other sources of them, and their way out of a Flax model."""

from muonclip_jax.attention.api import dot_product_attention
from muonclip_jax.attention.max_logits import MAX_LOGITS, read_max_logits, sow_max_logits
from muonclip_jax.attention.measure import measure_max_logits
from muonclip_jax.attention.residuals import max_logits_bound, max_logits_from_residuals

__all__ = [
    "MAX_LOGITS",
    "dot_product_attention",
    "max_logits_bound",
    "max_logits_from_residuals",
    "measure_max_logits",
    "read_max_logits",
    "sow_max_logits",
]
