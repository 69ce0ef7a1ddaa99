"""Breaks drawn at random: one operator, constant, axis, slice or condition is another.

    muonclip_jax/_transforms/qk_clip.py:209  grouped.min  →  grouped.max

The draw depends on the seed and the source, so it repeats.
"""

import ast
import pathlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

PACKAGE = pathlib.Path(__file__).parents[2] / "muonclip_jax"

# The modules that compute. Left out: what chooses by cost (methods, plan, tiles), which changes no
# number; what prints and checks; kernels that this machine cannot run.
MODULES = [
    "_core/axes.py",
    "_core/dtypes.py",
    "_core/maxima.py",
    "_orthogonalize/iterations.py",
    "_orthogonalize/normalization.py",
    "_orthogonalize/orthogonalize.py",
    "_orthogonalize/products.py",
    "_orthogonalize/schedules.py",
    "_spread/device_group.py",
    "_spread/exchange.py",
    "_spread/moves.py",
    "_attention/attention.py",
    "_attention/chunked.py",
    "_attention/logsumexp.py",
    "_attention/max_logits.py",
    "_attention/measure.py",
    "_attention/outputs.py",
    "_attention/residuals.py",
    "_layouts/leaves.py",
    "_layouts/pieces.py",
    "_layouts/sown.py",
    "_parameters/decay.py",
    "_parameters/matrices.py",
    "_transforms/accumulate.py",
    "_transforms/arrivals.py",
    "_transforms/block_periodic.py",
    "_transforms/clip.py",
    "_transforms/hyperball.py",
    "_transforms/decay.py",
    "_transforms/momentum.py",
    "_transforms/neuron_rms.py",
    "_transforms/normalize_rms.py",
    "_transforms/qk_clip.py",
    "_transforms/quack.py",
    "_transforms/quantized.py",
    "_transforms/spectral.py",
    "_transforms/update_rms.py",
    "_diagnostics/activations.py",
    "_diagnostics/coordinate_check.py",
    "_diagnostics/heads.py",
    "_diagnostics/measures.py",
    "scaling.py",
]

# Of each operator its text, and what stands in its place.
_OPERATORS = {
    ast.Add: ("+", "-"), ast.Sub: ("-", "+"), ast.Mult: ("*", "/"), ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"), ast.Mod: ("%", "//"), ast.Pow: ("**", "*"), ast.MatMult: ("@", "+"),
    ast.BitAnd: ("&", "|"), ast.BitOr: ("|", "&"), ast.And: ("and", "or"), ast.Or: ("or", "and"),
    ast.Lt: ("<", ">="), ast.LtE: ("<=", ">"), ast.Gt: (">", "<="), ast.GtE: (">=", "<"),
    ast.Eq: ("==", "!="), ast.NotEq: ("!=", "=="), ast.Is: ("is", "is not"),
    ast.IsNot: ("is not", "is"), ast.In: ("in", "not in"), ast.NotIn: ("not in", "in"),
}  # fmt: skip
_TALKING = ("__repr", "__str", "_check")  # functions that only say something
_NAMES = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum", "any": "all",
    "all": "any", "pmax": "pmin", "pmin": "pmax", "sum": "max", "argmax": "argmin",
    "queries": "keys", "keys": "queries", "rows": "cols", "cols": "rows", "ins": "features",
}  # fmt: skip


@dataclass(frozen=True)
class Break:
    """One change of the source.

    Attributes:
      file: Below `muonclip_jax/`.
      start: Where the changed text begins, in characters.
      old: The text there.
      new: What stands in its place.
      why: What it breaks, if somebody chose it.
    """

    file: str
    start: int
    old: str
    new: str
    why: str = ""

    def source(self) -> str:
        """The changed file."""
        text = (PACKAGE / self.file).read_text()
        assert text[self.start :].startswith(self.old), f"{self} no longer applies"
        return text[: self.start] + self.new + text[self.start + len(self.old) :]

    def __str__(self) -> str:
        before = (PACKAGE / self.file).read_text()[: self.start]
        line = before.count("\n") + 1
        why = f"  ({self.why})" if self.why else ""
        return f"{self.file}:{line}  {self.old}  →  {self.new}{why}"


def draw(count: int, seed: int) -> list[Break]:
    """So many breaks, spread over the modules as their sites are."""
    sites = [site for module in MODULES for site in breaks_of(module)]
    return random.Random(seed).sample(sites, min(count, len(sites)))


def breaks_of(module: str) -> Iterator[Break]:
    """Every break that can be drawn from a module."""
    text = (PACKAGE / module).read_text()
    lines = [0]
    for line in text.splitlines(keepends=True):
        lines.append(lines[-1] + len(line.encode()))
    encoded = text.encode()

    def place(node: ast.AST) -> tuple[int, int]:
        first = lines[node.lineno - 1] + node.col_offset
        last = lines[node.end_lineno - 1] + node.end_col_offset
        return len(encoded[:first].decode()), len(encoded[:last].decode())

    for node in _computing(ast.parse(text)):
        for start, old, new in _changes(node, text, place):
            if old != new:
                yield Break(module, start, old, new)


def _computing(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes of function bodies, without annotations, messages and what raises."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Raise | ast.Assert | ast.JoinedStr | ast.Import | ast.ImportFrom):
            continue
        if isinstance(node, ast.If) and all(isinstance(x, ast.Raise) for x in node.body):
            continue  # a check; tests of errors break those
        if isinstance(node, ast.FunctionDef) and node.name.startswith(
            ("__repr", "__str", "_check")
        ):
            continue
        if isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef | ast.Module):
            bodies = node.body if isinstance(node.body, list) else [node.body]
            for one in bodies:
                yield one
                yield from _computing(one)
            continue
        if isinstance(node, ast.AnnAssign):
            if isinstance(tree, ast.FunctionDef) and node.value is not None:
                yield node.value
                yield from _computing(node.value)
            continue
        if isinstance(node, ast.arguments):
            continue
        yield node
        yield from _computing(node)


def _changes(node, text, place) -> Iterator[tuple[int, str, str]]:
    if isinstance(node, ast.BinOp):
        if type(node.op) not in _OPERATORS or _is_text(node.left):
            return
        yield _operator(node.op, text, place(node.left)[1], place(node.right)[0])
    elif isinstance(node, ast.Compare):
        yield _operator(node.ops[0], text, place(node.left)[1], place(node.comparators[0])[0])
    elif isinstance(node, ast.BoolOp):
        yield _operator(node.op, text, place(node.values[0])[1], place(node.values[1])[0])
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        start, end = place(node)
        sign = "not" if isinstance(node.op, ast.Not) else "-"
        yield start, text[start:end], text[start + len(sign) : end].lstrip()
    elif isinstance(node, ast.Constant) and type(node.value) in (int, float, bool):
        start, end = place(node)
        value = node.value
        new = (
            not value
            if isinstance(value, bool)
            else value + 1
            if type(value) is int
            else 1.5 * value
        )
        yield start, text[start:end], repr(new)
    elif isinstance(node, ast.Attribute) and node.attr in _NAMES:
        _, end = place(node)
        start = end - len(node.attr)
        yield start, node.attr, _NAMES[node.attr]
    elif isinstance(node, ast.IfExp) and not any(_is_message(x) for x in ast.walk(node)):
        (a, b), (c, d) = place(node.body), place(node.orelse)
        yield a, text[a:d], f"{text[c:d]}{text[b:c]}{text[a:b]}"
    elif isinstance(node, ast.Call) and _is_where(node) and len(node.args) == 3:
        (a, b), (c, d) = place(node.args[1]), place(node.args[2])
        yield a, text[a:d], f"{text[c:d]}{text[b:c]}{text[a:b]}"


def _operator(op: ast.AST, text: str, start: int, end: int) -> tuple[int, str, str]:
    """The operator between two operands."""
    old, new = _OPERATORS[type(op)]
    return text.index(old, start, end), old, new


def _other(value: bool | int | float) -> bool | int | float:
    if isinstance(value, bool):
        return not value
    return value + 1 if isinstance(value, int) else 1.5 * value


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_message(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr)


def _is_where(call: ast.Call) -> bool:
    return isinstance(call.func, ast.Attribute) and call.func.attr == "where"
