"""Updates → updates: the links of the chain."""

from muonclip_jax.transforms.accumulate import AccumulateState, accumulate, accumulate_state
from muonclip_jax.transforms.muon import MuonState, scale_by_muon
from muonclip_jax.transforms.qk_clip import (
    QKClipState,
    apply_qk_clip,
    clip_factor,
    qk_clip,
    qk_clip_state,
)
from muonclip_jax.transforms.quack import QuackState, quack_state, scale_by_quack
from muonclip_jax.transforms.update_rms import scale_by_update_rms

__all__ = [
    "AccumulateState",
    "MuonState",
    "QKClipState",
    "QuackState",
    "accumulate",
    "accumulate_state",
    "apply_qk_clip",
    "clip_factor",
    "qk_clip",
    "qk_clip_state",
    "quack_state",
    "scale_by_muon",
    "scale_by_quack",
    "scale_by_update_rms",
]
