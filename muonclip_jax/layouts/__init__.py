"""Attention layouts: which piece of which parameter is the query, key, ... of which head.

A layout is a declaration; `find_blocks` finds the attention blocks that fit it and checks every
shape. Per-head Muon, QuacK, QK-Clip and `describe` read nothing else about a model.
"""

from muonclip_jax.layouts.blocks import (
    Block,
    Layout,
    Layouts,
    as_layouts,
    entries,
    find_blocks,
    leaves_of,
    left_out,
    module_path,
    multipliers,
    outside_patterns,
    refuse_qk_norm,
)
from muonclip_jax.layouts.find import find_layout, is_flax_attention
from muonclip_jax.layouts.kinds import fused_qkv, gqa, ignore, mha, mla
from muonclip_jax.layouts.pieces import GAIN_ROLES, KEY_ROLES, QUERY_ROLES, Part, Piece, Role

__all__ = [
    "GAIN_ROLES",
    "KEY_ROLES",
    "QUERY_ROLES",
    "Block",
    "Layout",
    "Layouts",
    "Part",
    "Piece",
    "Role",
    "as_layouts",
    "entries",
    "find_blocks",
    "find_layout",
    "fused_qkv",
    "gqa",
    "ignore",
    "is_flax_attention",
    "leaves_of",
    "left_out",
    "mha",
    "mla",
    "module_path",
    "multipliers",
    "outside_patterns",
    "refuse_qk_norm",
]
