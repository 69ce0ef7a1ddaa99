"""Layouts: which piece of which parameter is the query, key, ... of which head."""

from muonclip_jax._layouts.blocks import Block, Layout, Layouts, find_blocks
from muonclip_jax._layouts.find import find_layout
from muonclip_jax._layouts.kinds import fused_qkv, gqa, ignore, linear_attention, mha, mla
from muonclip_jax._layouts.pieces import Part, Piece
from muonclip_jax._layouts.roles import Role

__all__ = [
    "Block",
    "Layout",
    "Layouts",
    "Part",
    "Piece",
    "Role",
    "find_blocks",
    "find_layout",
    "fused_qkv",
    "gqa",
    "ignore",
    "linear_attention",
    "mha",
    "mla",
]
