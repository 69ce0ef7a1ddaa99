"""What a device runs one after the other in a compiled program, and the bytes of memory that each
operation needs, read from XLA's text.

    found = kernels(compiled)
    traffic(found)                                       # bytes, all loops counted
    max(found, key=lambda each: each.times * each.bytes) # what needs most of them

The rule, for every program alike: an operation reads each array that it takes once, however often
it names it, and writes each of its results once. Of an array of which it takes only slices it
reads these; where it updates a slice or entries of an array in place, it reads none of that and
writes those. What only names memory (a bitcast, a tuple) moves nothing, and neither do the arrays
in a TPU's VMEM. Caches are left out: what does not fit them is read again.
"""

import math
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import jax

from benchmarks.compiled import CUBLAS, Dot, bytes_of, dot, multiplies, sizes, target, text_of
from benchmarks.hlo import SHAPE, Computation, Operation, executed


class Kernel(NamedTuple):
    """One operation that the device runs by itself: a fusion, a copy, a library's product.

    Attributes:
      name: The operation's, such as `"loop_convert_fusion.2"`.
      origin: What JAX called it, such as `"jit(f)/while/body/dot_general"`; "" where it did not.
      read: Bytes of the device's memory that one execution reads.
      written: Bytes that one execution writes.
      dots: The products in it, each executed once a time.
      times: How often it executes in one run of the program.
      conditional: It is in a branch, and executes only when that is taken.
    """

    name: str
    origin: str
    read: int
    written: int
    dots: tuple[Dot, ...]
    times: int
    conditional: bool

    @property
    def bytes(self) -> int:
        """Read and written by one execution."""
        return self.read + self.written


def kernels(compiled: jax.stages.Compiled | str) -> list[Kernel]:
    """The operations of a compiled program, or of its text, that a device runs.

    Raises:
      ValueError: One is in a loop whose number of executions depends on data.
    """
    return [
        Kernel(op.name, _origin(op), _read(op), _written(op), tuple(_dots(op)), times, conditional)
        for op, times, conditional in executed(text_of(compiled), _runs)
    ]


def traffic(found: Iterable[Kernel]) -> int:
    """Bytes of the device's memory read and written, as if every branch were taken."""
    return sum(each.times * each.bytes for each in found)


# They name memory, or stand for other operations, which are counted.
_NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "opt-barrier"),
    *("while", "conditional", "call", "after-all", "partition-id", "replica-id"),
}


def _runs(op: Operation) -> bool:
    """Asynchronous operations are counted where they are done."""
    begins = op.code.endswith(("-start", "-update"))
    return not (
        op.computation.fused or begins or op.code in _NOTHING or target(op) == "AllocateBuffer"
    )


def _started(op: Operation) -> Operation:
    """Where an asynchronous operation has its operands; any other itself."""
    while op.code.endswith(("-done", "-update")):
        op = op.operands[0]
    return op


def _origin(op: Operation) -> str:
    found = re.search(r'op_name="(.*?)"', op.rest)
    return found[1] if found else ""


def _body(op: Operation) -> Computation | None:
    """What a fusion computes."""
    return next((each for each in op.called("calls") if each.fused), None)


def _dots(op: Operation) -> Iterator[Dot]:
    op = _started(op)
    if multiplies(op):
        yield dot(op, 1, False)
    if body := _body(op):
        for each in body.operations.values():
            yield from _dots(each)


# What is read.


def _read(op: Operation) -> int:
    taken: dict[str, int] = {}
    start = _started(op)
    for number, operand in enumerate(start.operands):
        whole, source = _bytes(operand), _source(operand)
        if whole:
            part = whole * _entries(start, number) // max(1, _size(operand))
            taken[source] = min(whole, taken.get(source, 0) + part)
    return sum(taken.values())


def _source(op: Operation) -> str:
    """What the array is called that an operation only names anew."""
    match op.code:
        case "bitcast" | "opt-barrier":
            return _source(op.operands[0])
        case "get-tuple-element":
            [whole], index = op.operands, int(op.attribute("index"))
            if whole.code == "tuple":
                return _source(whole.operands[index])
            return f"{whole.name}[{index}]"
    return op.name


def _entries(op: Operation, number: int) -> int:
    """How many entries an operation needs of one of its operands."""
    operand = op.operands[number]
    if body := _body(op):
        return _entries_needed(body.parameters[number])
    match op.code:
        case "slice" | "dynamic-slice" | "gather" if number == 0:
            return min(_size(operand), _size(op))
        case "dynamic-update-slice" if number == 0 and _in_place(op):
            return 0
        case "scatter" if number == 0 and _in_place(op):
            return _updated(op)  # which it may add to
    return _size(operand)


def _entries_needed(op: Operation) -> int:
    """How many entries of what is computed inside a fusion are needed there."""
    users = op.computation.users[op.name]
    if op is op.computation.root or not users:
        return _size(op)
    needed = sum(
        _entries_needed(user) if user.code in _EACH_ENTRY else _entries(user, number)
        for user, number in users
    )
    return min(_size(op), needed)


_EACH_ENTRY = ("bitcast", "reshape", "convert", "transpose", "copy")


# What is written.


def _written(op: Operation) -> int:
    shapes, body = _in_memory(op), _body(op)
    if CUBLAS.match(target(body.root if body else op)):
        shapes = shapes[:1]  # then a workspace
    results = _results(_started(op))
    if len(results) != len(shapes):
        return sum(map(bytes_of, shapes))
    return sum(
        bytes_of(shape) * _updated(result) // _size(result)
        if result.code in _UPDATES and _in_place(result)
        else bytes_of(shape)
        for shape, result in zip(shapes, results, strict=True)
    )


def _results(op: Operation) -> list[Operation]:
    """The operations whose results are its own."""
    body = _body(op)
    if body is None:
        return [op]
    roots = body.root.operands if body.root.code == "tuple" else [body.root]
    return [_named(each) for each in roots]


def _named(op: Operation) -> Operation:
    return _named(op.operands[0]) if op.code == "bitcast" else op


_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # which operand is the new entries


def _updated(update: Operation) -> int:
    """How many entries are written, where it is in place."""
    return _size(update.operands[_UPDATES[update.code]])


def _in_place(update: Operation) -> bool:
    """Of an array that comes from outside, and whose new state leaves the fusion."""
    if not update.computation.fused:
        return True
    old, root = _named(update.operands[0]), update.computation.root
    leaves = root.operands if root.code == "tuple" else [root]
    return old.code == "parameter" and update in [_named(each) for each in leaves]


# Sizes.

_ARRAY = re.compile(rf"({SHAPE.pattern})(\{{[^}}]*\}})?")
_ELSEWHERE = re.compile(r"S\([1-9]")  # TPU: VMEM, flags, the host


def _in_memory(op: Operation) -> list[str]:
    """Shapes of its results that lie in the device's memory."""
    arrays = _ARRAY.findall(op.type)
    return [shape for shape, layout in arrays if not _ELSEWHERE.search(layout)]


def _bytes(op: Operation) -> int:
    return sum(map(bytes_of, _in_memory(op)))


def _size(op: Operation) -> int:
    return sum(math.prod(sizes(shape)) for shape in op.shapes)
