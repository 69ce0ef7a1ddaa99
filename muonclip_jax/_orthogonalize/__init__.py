"""[..., n, m] → nearly semi-orthogonal.

schedules.py   which polynomial at which step, checked when built
iteration.py   one device: scale, iterate, and how orthogonal the result is
normalization.py   what matrices are divided by before the steps
methods.py     by which iteration and products, and what "auto" chooses
standard.py    the iteration on the matrix itself
gram.py        the iteration on its Gram matrix
precision.py   what they are summed in
products.py    matrix products, symmetric ones by half
symmetric_tpu.py, symmetric_gpu.py   the latter as Pallas kernels
stacks.py      many parameters' matrices: one stack for each shape
plan.py        on a mesh: which device orthogonalizes which part of a stack, and what it costs
spread.py      a plan carried out: there, the iteration, and back
in_team.py     the iteration on devices that hold parts of the same matrices
team.py        what they tell each other
"""
