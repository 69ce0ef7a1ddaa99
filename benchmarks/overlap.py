"""What hides behind matrix products in a compiled program, read from XLA's text of it.

    overlap(compiled)      # Overlap(bytes=1000000, behind_products=875000)

A compiler for accelerators writes operations down in the order in which they start. A collective
that is asynchronous has a start and a done; while it is on its way, the device executes what stands
between the two. Whether that takes as long nobody knows here.
"""

import itertools
from typing import NamedTuple

import jax

from benchmarks.compiled import bytes_of, kind_of, multiplies, text_of, transferred
from benchmarks.hlo import Operation, executed

CALLS = ("calls", "called_computations", "body", "to_apply", "branch_computations")


class Overlap(NamedTuple):
    """Bytes that collectives bring to a device in one run of a program.

    Attributes:
      bytes: All of them, as `benchmarks.compiled.Collective` counts them.
      behind_products: Those of collectives with matrix products between their start and done.
    """

    bytes: int
    behind_products: int

    @property
    def share(self) -> float:
        return self.behind_products / self.bytes if self.bytes else 1.0


def overlap(compiled: jax.stages.Compiled | str) -> Overlap:
    """Of a compiled program, or of its text.

    Raises:
      ValueError: A collective is in a loop whose number of executions depends on data.
    """
    total = hidden = 0
    for op, times, _ in executed(text_of(compiled), kind_of):
        size = times * sum(map(bytes_of, transferred(op)))
        total += size
        hidden += size * any(map(_has_products, _meanwhile(op)))
    return Overlap(total, hidden)


def _meanwhile(done: Operation) -> list[Operation]:
    """What stands between a collective's start and its done."""
    if not done.code.endswith("-done"):
        return []
    (start,) = done.operands
    operations = iter(done.computation.operations.values())
    since = itertools.dropwhile(lambda op: op is not start, operations)
    return list(itertools.takewhile(lambda op: op is not done, since))[1:]


def _has_products(op: Operation) -> bool:
    called = (each for computation in op.called(*CALLS) for each in computation.operations.values())
    return multiplies(op) or any(map(_has_products, called))
