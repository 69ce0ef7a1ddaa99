"""What hides behind matrix products in a compiled program, read from XLA's text of it.

An accelerator's compiler writes operations down in the order in which they start. A collective that
is asynchronous has a start and a done; while it is on its way, the device executes what stands
between the two.

    hidden = overlap(compiled)
    hidden.bytes, hidden.behind_products      # 1_000_000, 875_000
"""

import itertools
from typing import NamedTuple

import jax

from benchmarks.compiled import bytes_of, multiplies, text_of
from benchmarks.hlo import Computation, Operation, executed


class Overlap(NamedTuple):
    """Bytes that collectives bring to a device in one run of a program.

    Attributes:
      bytes: All of them, as `benchmarks.compiled.Collective` counts them.
      behind_products: Those of collectives with matrix products between start and done.
    """

    bytes: int
    behind_products: int

    @property
    def share(self) -> float:
        return self.behind_products / self.bytes if self.bytes else 1.0


def overlap(compiled: jax.stages.Compiled | str) -> Overlap:
    """Raises ValueError as `benchmarks.compiled.collectives` does."""
    total = hidden = 0
    for op, times, _ in executed(_text(compiled), _kind):
        size = times * sum(map(_bytes, _transferred(op)))
        total += size
        hidden += size * any(map(_has_products, _meanwhile(op)))
    return Overlap(total, hidden)


def _meanwhile(done: Operation) -> list[Operation]:
    """What stands between a collective's start and its done."""
    if not done.code.endswith("-done"):
        return []
    start = done.operands[0].name
    operations = iter(done.computation.operations.values())
    since = itertools.dropwhile(lambda op: op.name != start, operations)
    return list(itertools.takewhile(lambda op: op is not done, since))[1:]


def _has_products(op: Operation) -> bool:
    names = "calls", "called_computations", "body", "condition", "to_apply", "branch_computations"
    return bool(_multiplies(op)) or any(
        any(map(_has_products, called.operations.values())) for called in op.called(*names)
    )
