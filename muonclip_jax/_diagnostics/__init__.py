"""Read-only: what happens inside the heads."""
