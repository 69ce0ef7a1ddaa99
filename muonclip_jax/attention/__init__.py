"""Attention that reports max logits, and their way out of a Flax model."""

from muonclip_jax.attention.chunked import dot_product_attention
from muonclip_jax.attention.max_logits import MAX_LOGITS, read_max_logits, sow_max_logits

__all__ = ["MAX_LOGITS", "dot_product_attention", "read_max_logits", "sow_max_logits"]
