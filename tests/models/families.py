"""Layouts of model families that several packages have."""

from muonclip_jax._layouts.blocks import Layout
from muonclip_jax._layouts.pieces import Piece

GEMMA = Layout(
    "gemma",
    (
        Piece("q", "q_einsum/w", "heads in features"),
        Piece("k", "kv_einsum/w", "part heads in features", select={"part": 0}),
        Piece("v", "kv_einsum/w", "part heads in features", select={"part": 1}),
        Piece("o", "attn_vec_einsum/w", "heads features out"),
    ),
    shared_keys=True,
)
