"""What goes between a trainer that owns its step and an optimizer that needs max logits."""
