"""Attention that reports max logits, other sources of them, and their way out of a Flax model."""
