"""[..., n, m] → nearly semi-orthogonal.

schedules.py   which polynomial at which step, checked when built
iteration.py   the batched Newton–Schulz iteration, and how orthogonal its result is
stacks.py      many parameters' matrices: one stack for each shape
plan.py        on a mesh: which device orthogonalizes which part of a stack, and what it costs
spread.py      a plan carried out: there, the iteration, and back
team.py        what the devices that hold parts of the same matrices tell each other
"""

from muonclip_jax.orthogonalize import schedules
from muonclip_jax.orthogonalize.iteration import orthogonality_error, orthogonalize
from muonclip_jax.orthogonalize.plan import DevicesPerMatrix, Plan, check_devices_per_matrix
from muonclip_jax.orthogonalize.schedules import Schedule
from muonclip_jax.orthogonalize.stacks import Matrices, orthogonalize_all, plans

__all__ = [
    "DevicesPerMatrix",
    "Matrices",
    "Plan",
    "Schedule",
    "check_devices_per_matrix",
    "orthogonality_error",
    "orthogonalize",
    "orthogonalize_all",
    "plans",
    "schedules",
]
