"""[..., n, m] → nearly semi-orthogonal.

schedules.py   which polynomial at which step, checked when built
iteration.py   the batched Newton–Schulz iteration, and how orthogonal its result is
"""

from muonclip_jax.orthogonalize import schedules
from muonclip_jax.orthogonalize.iteration import orthogonality_error, orthogonalize
from muonclip_jax.orthogonalize.schedules import Schedule

__all__ = ["Schedule", "orthogonality_error", "orthogonalize", "schedules"]
