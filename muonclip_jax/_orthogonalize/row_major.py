"""A copy in row-major order, also in programs that are exported.

XLA folds a transposition into the product behind it, unless the layout between is constrained.
`jax.export` refuses this constraint, as no custom call that may change is taken; a barrier serves
instead, and makes bfloat16 products on CPU slower by 7 to 30%. Which of them it is can only be told
when a program is lowered, so this is a primitive with a lowering of its own.
"""

import jax
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

_row_major = Primitive("row_major")


def row_major(x: jax.Array) -> jax.Array:
    """The same numbers, in memory as they are written down."""
    return _row_major.bind(x)


def _constrained(x: jax.Array) -> jax.Array:
    return with_layout_constraint(x, Layout(major_to_minor=tuple(range(x.ndim))))


def _lowered(ctx: mlir.LoweringRuleContext, x: mlir.ir.Value):
    exported = ctx.module_context.lowering_parameters.for_export
    how = lax.optimization_barrier if exported else _constrained
    return mlir.lower_fun(how, multiple_results=False)(ctx, x)


_row_major.def_impl(lambda x: x)
_row_major.def_abstract_eval(lambda x: x)
ad.deflinear2(_row_major, lambda cotangent, _: [row_major(cotangent)])
batching.primitive_batchers[_row_major] = lambda args, axes: (row_major(*args), *axes)
mlir.register_lowering(_row_major, _lowered)
