"""Newton–Schulz schedules: which odd quintic, or cubic, is applied at which step."""

from muonclip_jax._orthogonalize.schedules import (
    Schedule,
    aol,
    cans,
    cubic,
    deepseek_v4,
    jordan,
    polar_express,
    you,
)

__all__ = ["Schedule", "aol", "cans", "cubic", "deepseek_v4", "jordan", "polar_express", "you"]
