"""A hash of the code that a run uses: of what its functions compute, not of the files they are in.

From a function, all that it names within `studies` is followed: functions, classes, constants. Each
counts by its syntax tree without comments, docstrings and annotations, so that a hash survives
another layout of the code, a move to another file, and whatever the run does not use. What a
dataclass's fields hold is in the record itself.
"""

import ast
import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

PACKAGE = "studies"
Place = tuple[str, str]  # a module and a name at its top level


@cache
def digest(*places: Place) -> str:
    """The hash of these functions and of all that they use."""
    code = sorted(f"{name} {_normal(node)}" for (_, name), node in used(places).items())
    return hashlib.sha256("\n".join(code).encode()).hexdigest()[:16]


def place(function: Callable) -> Place:
    """Where a function is defined."""
    return function.__module__, function.__qualname__


def used(places: Sequence[Place]) -> dict[Place, ast.AST]:
    """Where all that these names use is defined, and how."""
    found: dict[Place, ast.AST] = {}
    todo = list(places)
    while todo:
        module, name = todo.pop()
        defined = definitions(module).get(name)
        if isinstance(defined, tuple):  # imported
            todo.append(defined)
        elif defined is not None and (module, name) not in found:
            found[module, name] = defined
            todo.extend(_names(module, defined))
    return found


@cache
def definitions(module: str) -> dict[str, ast.AST | Place]:
    """Name → what defines it at the top level of a module of `studies`, or where it is imported
    from."""
    if module.partition(".")[0] != PACKAGE:
        return {}
    file = importlib.util.find_spec(module).origin
    found: dict[str, ast.AST | Place] = {}
    for node in ast.parse(Path(file).read_text(encoding="utf-8")).body:
        match node:
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                found[name] = node
            case ast.Assign(targets=targets):
                found |= {t.id: node for t in targets if isinstance(t, ast.Name)}
            case ast.AnnAssign(target=ast.Name(id=name)):
                found[name] = node
            case ast.ImportFrom(module=str(source), level=0) if source.startswith(PACKAGE):
                found |= {a.asname or a.name: (source, a.name) for a in node.names}
    return found


def _names(module: str, node: ast.AST) -> Iterator[Place]:
    """What a definition names: `name`, and `module.name`. Only classes count in annotations, for
    their methods are called on such values."""
    annotations = {id(part) for each in _annotations(node) for part in ast.walk(each)}
    for part in ast.walk(node):
        match part:
            case ast.Name(id=name):
                named = module, name
            case ast.Attribute(value=ast.Name(id=alias), attr=name):
                imported = definitions(module).get(alias)
                if not isinstance(imported, tuple) or not _is_module(".".join(imported)):
                    continue
                named = ".".join(imported), name
            case _:
                continue
        if id(part) not in annotations or _is_class(named):
            yield named


@cache
def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module
        return False


def _is_class(named: Place) -> bool:
    module, name = named
    defined = definitions(module).get(name)
    return _is_class(defined) if isinstance(defined, tuple) else isinstance(defined, ast.ClassDef)


def _annotations(node: ast.AST) -> Iterator[ast.AST]:
    for part in ast.walk(node):
        for field in ("annotation", "returns"):
            if (found := getattr(part, field, None)) is not None:
                yield found


def _normal(node: Any) -> str:
    """A syntax tree as text that is the same on every Python."""
    match node:
        case list():
            return "[" + " ".join(map(_normal, node)) + "]"
        case ast.AST():
            parts = [
                f"{name}={_normal(value)}"
                for name, value in ast.iter_fields(_without_words(node))
                if name not in ("annotation", "returns", "kind", "type_comment", "type_params")
                and value not in (None, [])
            ]
            return f"{type(node).__name__}({' '.join(parts)})"
    return repr(node)


def _without_words(node: ast.AST) -> ast.AST:
    """Without docstrings, those of attributes too, and without a dataclass's fields."""
    if not isinstance(node, ast.FunctionDef | ast.ClassDef):
        return node
    data = isinstance(node, ast.ClassDef) and any(
        "dataclass" in ast.unparse(each) for each in node.decorator_list
    )
    body = [
        each
        for each in node.body
        if not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
        and not (data and isinstance(each, ast.AnnAssign))
    ]
    return type(node)(**{**dict(ast.iter_fields(node)), "body": body})
