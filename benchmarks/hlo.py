"""Which operations of a compiled program execute, and how often, read from XLA's text of it."""

import operator
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

LONGEST_LOOP = 100_000  # executions that we are ready to count through

# The text: computations of operations, one operation a line.

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
OPERATION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][a-z0-9\-]*)\((.*)$")
SHAPE = re.compile(r"[a-z]\w*\[[\d,]*\]")
NAME = re.compile(r"%([\w.\-]+)")
FUSIONS = ("fusion", "fusion-start", "async-start")


@dataclass
class Computation:
    """Operations of one scope. `fused`: it is what a fusion does, or an
    asynchronous operation."""

    name: str
    program: dict[str, "Computation"]
    operations: dict[str, "Operation"] = field(default_factory=dict)
    root: "Operation | None" = None
    fused: bool = False

    @cached_property
    def parameters(self) -> list["Operation"]:
        found = (op for op in self.operations.values() if op.code == "parameter")
        return sorted(found, key=lambda op: int(op.arguments))

    @cached_property
    def users(self) -> dict[str, list[tuple["Operation", int]]]:
        """Operation → those that take its result, and as which operand."""
        found: dict[str, list[tuple[Operation, int]]] = {name: [] for name in self.operations}
        for op in self.operations.values():
            for number, operand in enumerate(op.operands):
                found[operand.name].append((op, number))
        return found


@dataclass
class Operation:
    """`%name = type code(arguments), attributes`"""

    computation: Computation
    name: str
    type: str
    code: str
    rest: str

    @cached_property
    def _parts(self) -> tuple[str, str]:
        depth = accumulate((c == "(") - (c == ")") for c in self.rest)
        end = next(at for at, below in enumerate(depth) if below < 0)
        return self.rest[:end], self.rest[end + 1 :]

    @property
    def arguments(self) -> str:
        return self._parts[0]

    @cached_property
    def operands(self) -> list["Operation"]:
        return [self.computation.operations[name] for name in NAME.findall(self.arguments)]

    @property
    def shapes(self) -> tuple[str, ...]:
        return tuple(SHAPE.findall(self.type))

    def attribute(self, name: str) -> str | None:
        found = re.search(rf', {name}=(?:\{{(.*?)\}}|"(.*?)"|([^,\s]+))', self._parts[1])
        return found and next(text for text in found.groups() if text is not None)

    def called(self, *names: str) -> list[Computation]:
        text = " ".join(self.attribute(name) or "" for name in names)
        return [self.computation.program[each] for each in NAME.findall(text)]


def parse(text: str) -> Computation:
    """Returns the entry."""
    program: dict[str, Computation] = {}
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            computation = program[match[2]] = Computation(match[2], program)
            if match[1]:
                entry = computation
        elif match := OPERATION.match(line):
            operation = Operation(computation, *match.groups()[1:])
            computation.operations[operation.name] = operation
            if match[1]:
                computation.root = operation
    for computation in list(program.values()):
        for op in computation.operations.values():
            if op.code in FUSIONS:
                for called in op.called("calls"):
                    called.fused = True
    return entry


# Executions.


def executed(
    text: str, wanted: Callable[[Operation], Any]
) -> Iterator[tuple[Operation, int, bool]]:
    """The wanted operations, how often each executes, whether that is subject to a condition: where
    loops' counters decide about a branch it is not.

    Raises:
      ValueError: one is in a loop whose number of executions depends on data.
    """
    return _walk(Scope(parse(text), ()), wanted)


def _walk(
    scope: "Scope", wanted: Callable[[Operation], Any], calls: Sequence[Any] | None = None
) -> Iterator[tuple[Operation, int, bool]]:
    """Of a computation that is called with each of these arguments, of which `scope` has what is
    the same for all; once with those of `scope`, if there are none."""
    calls = [scope.arguments] if calls is None else calls
    for op in scope.computation.operations.values():
        if wanted(op):
            yield op, len(calls), False
        if op.code == "while":
            for each, times, conditional in _walk_loop(op, scope, wanted):
                yield each, times * len(calls), conditional
        elif op.code == "conditional":
            yield from _walk_branches(op, scope, wanted, calls)
        else:
            applied = ("to_apply",) if op.code == "call" else ()  # elsewhere: to single numbers
            for computation in op.called("calls", "called_computations", *applied):
                called = Scope(computation, scope.values(op.operands))
                for each, times, conditional in _walk(called, wanted):
                    yield each, times * len(calls), conditional


def _walk_branches(
    op: Operation, scope: "Scope", wanted: Callable[[Operation], Any], calls: Sequence[Any]
) -> Iterator[tuple[Operation, int, bool]]:
    branches = op.called("branch_computations", "true_computation", "false_computation")
    taken = [_branch(op, Scope(scope.computation, each), len(branches)) for each in calls]
    for number, (branch, operand) in enumerate(zip(branches, op.operands[1:], strict=True)):
        certain = None not in taken
        often = taken.count(number) if certain else len(calls)
        for each, times, conditional in _walk(Scope(branch, (scope.value(operand),)), wanted):
            if often:
                yield each, times * often, conditional or not certain


def _branch(op: Operation, scope: "Scope", count: int) -> int | None:
    """Which one is taken."""
    choice = scope.value(op.operands[0])
    if choice is None:
        return None
    if op.attribute("true_computation"):
        return 0 if choice else 1
    return choice if 0 <= choice < count else count - 1


def _walk_loop(
    loop: Operation, scope: "Scope", wanted: Callable[[Operation], Any]
) -> Iterator[tuple[Operation, int, bool]]:
    states, constants = _states(loop, scope)
    for computation in loop.called("body", "condition"):
        arguments = [(None,)] if states is None else [(state,) for state in states]
        for op, times, conditional in _walk(Scope(computation, (constants,)), wanted, arguments):
            if states is None:
                raise ValueError(
                    f"%{op.name}, a {op.code}, is in the loop %{loop.name}, which runs as often "
                    "as the data says: its executions cannot be counted"
                )
            yield op, times, conditional


def _states(loop: Operation, scope: "Scope") -> tuple[list[Any] | None, Any]:
    """Runs the loop's counter. Returns the loop's state before each execution of the body, None
    when their number depends on data, and the part of it that never changes."""
    [condition], [body] = loop.called("condition"), loop.called("body")
    state = constants = scope.value(loop.operands[0])
    states: list[Any] = []
    while len(states) < LONGEST_LOOP:
        going_on = Scope(condition, (state,)).value(condition.root)
        if not going_on:
            return (states if going_on is not None else None), constants
        states.append(state)
        state = Scope(body, (state,)).value(body.root)
        constants = _common(constants, state)
    return None, None


def _common(one: Any, other: Any) -> Any:
    if isinstance(one, tuple) and isinstance(other, tuple):
        return tuple(map(_common, one, other))
    return one if one == other else None


ARITHMETIC = {
    "add": operator.add,
    "subtract": operator.sub,
    "multiply": operator.mul,
    "maximum": max,
    "minimum": min,
    "and": operator.and_,
    "or": operator.or_,
}
SAME = ("copy", "bitcast", "convert", "reshape", "opt-barrier")


@dataclass
class Scope:
    """The scalars that a computation knows when it is called with `arguments`: numbers, tuples of
    values, None for what depends on data."""

    computation: Computation
    arguments: Sequence[Any]
    known: dict[str, Any] = field(default_factory=dict)

    def values(self, ops: Iterable[Operation]) -> tuple[Any, ...]:
        return tuple(map(self.value, ops))

    def value(self, op: Operation) -> Any:
        if op.name not in self.known:
            self.known[op.name] = self._value(op)
        return self.known[op.name]

    def _value(self, op: Operation) -> Any:
        match op.code:
            case "constant":
                truth = {"true": 1, "false": 0}.get(op.arguments)
                return int(op.arguments) if re.fullmatch(r"-?\d+", op.arguments) else truth
            case "parameter":
                return self.arguments[int(op.arguments)] if self.arguments else None
            case "tuple":
                return self.values(op.operands)
            case "get-tuple-element":
                whole = self.value(op.operands[0])
                return whole and whole[int(op.attribute("index"))]
            case "fusion" | "call":
                [called] = op.called("calls", "to_apply")
                return Scope(called, self.values(op.operands)).value(called.root)
            case "compare":
                compare = getattr(operator, op.attribute("direction").lower())
                return self._apply(compare, op)
            case code if code in ARITHMETIC:
                return self._apply(ARITHMETIC[code], op)
            case code if code in SAME:
                return self.value(op.operands[0])
        return None

    def _apply(self, function: Callable[[Any, Any], Any], op: Operation) -> Any:
        operands = self.values(op.operands)
        return None if None in operands else function(*operands)
