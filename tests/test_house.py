"""What keeps the house small: lengths, helpers, ignores, and what is imported when."""

import ast
import inspect
import io
import pathlib
import re
import tokenize
from collections.abc import Iterator

import muonclip_jax as mc

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "muonclip_jax"
LINES_OF_CODE = 13_260  # of the package, without docstrings, comments and empty lines
PRIVATE_PER_THOUSAND = 22
LONGEST = 60  # lines of code in a function, without its docstring
IGNORES = 10  # of the type checker, in the package and the examples
PASS_THROUGH = {
    "sow_activations"
}  # names its values as Flax's modules name theirs: any name will do

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: pathlib.Path) -> dict[str, str]:
    return {
        str(file.relative_to(ROOT)): file.read_text()
        for folder in folders or (PACKAGE,)
        for file in sorted(folder.rglob("*.py"))
    }


def functions() -> Iterator[tuple[str, Function]]:
    for name, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, Function):
                yield f"{name}:{node.lineno} {node.name}", node


def lines_of_code(node: Function) -> int:
    """From `def` to the end, without the docstring and empty lines between its parts."""
    first = node.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)
    docstring = first.end_lineno - first.lineno + 1 if documented else 0
    return node.end_lineno - node.lineno + 1 - docstring


def test_the_package_stays_small():
    """What grows must have earned it: raise the number in the commit that says why."""
    lines = 0
    for text in sources().values():
        tree = ast.parse(text)
        code = {
            line
            for token in tokenize.generate_tokens(io.StringIO(text).readline)
            if token.type not in NO_CODE
            for line in range(token.start[0], token.end[0] + 1)
        }
        documented = (ast.Module, ast.ClassDef, *Function.__args__)
        for node in ast.walk(tree):
            if isinstance(node, documented) and ast.get_docstring(node) is not None:
                code -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
        lines += len(code)
    assert lines <= LINES_OF_CODE


def test_private_helpers_are_few():
    lines = sum(len(text.splitlines()) for text in sources().values())
    private = [n for n, node in functions() if re.match("_(?!_)", node.name)]
    assert len(private) * 1000 <= PRIVATE_PER_THOUSAND * lines, f"{len(private)} in {lines} lines"


def test_functions_are_short():
    long = {name: count for name, node in functions() if (count := lines_of_code(node)) > LONGEST}
    assert not long


def test_the_type_checker_is_rarely_silenced_and_never_without_a_reason():
    found = [
        f"{name}:{number}: {line.strip()}"
        for name, text in sources(PACKAGE, ROOT / "examples").items()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(r"#.*\b(pyright|type): *ignore", line)
    ]
    assert len(found) <= IGNORES, "\n".join(found)
    bare = [line for line in found if not re.search(r"ignore(\[[\w, ]+\])?\W+\w+", line)]
    assert not bare, "say why behind the ignore:\n" + "\n".join(bare)


def test_public_functions_show_every_argument():
    hidden = [
        name
        for module in (mc, mc.layouts, mc.schedules, mc.linalg, mc.scaling, mc.plots)
        for name in module.__all__
        if inspect.isfunction(thing := getattr(module, name)) and name not in PASS_THROUGH
        if {p.kind for p in inspect.signature(thing).parameters.values()}
        & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}
    ]
    assert not hidden


def imported_at_import_time(node: ast.AST) -> Iterator[str]:
    """The modules that a module's body imports, but not its functions, nor for a type checker."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Function | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from imported_at_import_time(child)


def test_kernels_languages_are_imported_where_they_are_asked_for():
    """A module of kernels may import Pallas; then no other module imports it at its top."""
    tops = {name: set(imported_at_import_time(ast.parse(text))) for name, text in sources().items()}
    kernels = {
        name.removesuffix(".py").replace("/", ".")
        for name, modules in tops.items()
        if any(re.search(r"\b(pallas|triton|mosaic)\b", module) for module in modules)
    }
    assert len(kernels) <= 1, kernels
    early = [name for name, modules in tops.items() if modules & kernels]
    assert not early, f"imported at the top: {kernels}"
