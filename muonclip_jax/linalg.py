"""Functions of matrices that JAX differentiates: signs, clips of singular values, roots, and
equations between matrices."""

from muonclip_jax._linalg.clips import mclip
from muonclip_jax._linalg.polar import msign
from muonclip_jax._linalg.roots import inverse_root, inverse_sqrt, matrix_sqrt
from muonclip_jax._linalg.signs import mcsgn, solve_sylvester
from muonclip_jax._linalg.triangular import inverse_low_rank_triangular

__all__ = [
    "inverse_low_rank_triangular",
    "inverse_root",
    "inverse_sqrt",
    "matrix_sqrt",
    "mclip",
    "mcsgn",
    "msign",
    "solve_sylvester",
]
