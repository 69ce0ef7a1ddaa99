"""Functions of a matrix on arrays `[..., n, m]`, which JAX differentiates. It knows no mesh.

polar.py        the matrix sign of rectangular matrices
clips.py        clips of singular values, made of it
roots.py        square roots, and inverse p-th roots, of symmetric matrices
signs.py        the sign of square matrices, and Sylvester's equation
triangular.py   the inverse of a diagonal plus a triangle of low rank
solves.py       the equations that derivatives solve
factors.py      eigenvalues, singular values, inverses, products
options.py      by= and lower=, and the schedule that is accurate enough
"""
