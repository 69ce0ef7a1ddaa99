"""Newton–Schulz on arrays `[..., n, m]`. It knows no mesh: `_spread` uses it on one.

newton_schulz.py   how to orthogonalize, as one value: schedule, dtype, method
orthogonalize.py   the function, and how orthogonal a result is
iterations.py      the algorithm: the standard and the Gram iteration
normalization.py   what matrices are divided by before the steps
products.py        matrix products, symmetric ones by half
symmetric_tpu.py   those as a kernel for TPUs, imported only when it is asked for
methods.py         which iteration and which products, and what "auto" chooses
rates.py           what a CPU multiplies fast, which "auto" goes by
schedules.py       which polynomial at which step, checked when built
"""
