"""Imports inside the package go one way."""

import ast
import pathlib
import subprocess
import sys

PACKAGE = pathlib.Path(__file__).parent.parent / "muonclip_jax"

# Each part may import the parts before it.
ORDER = [
    "_core",
    "_orthogonalize",
    "_linalg",
    "_spread",
    "_attention",
    "_layouts",
    "_parameters",
    "_transforms",
    "layouts",
    "schedules",
    "linalg",
    "recipes",
    "published",
    "scaling",
    "_trainers",
    "_diagnostics",
    "plots",
]


def part_of(module: str) -> str:
    return module.removeprefix("muonclip_jax").lstrip(".").split(".")[0]


def imports_of(file: pathlib.Path):
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("muonclip_jax"):
            if node.module == "muonclip_jax":
                yield from (alias.name for alias in node.names)
            else:
                yield part_of(node.module)
        elif isinstance(node, ast.Import):
            yield from (part_of(a.name) for a in node.names if a.name.startswith("muonclip_jax."))


def test_imports_go_one_way():
    seen = set()
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if part == "__init__":
            continue
        assert part in ORDER, f"{part} is new: give it a place in ORDER"
        seen.add(part)
        for imported in imports_of(file):
            assert ORDER.index(imported) <= ORDER.index(part), f"{file.name} imports {imported}"
    assert seen == set(ORDER)


def test_examples_import_only_the_public_surface():
    for file in (PACKAGE.parent / "examples").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert not (node.module or "").startswith("muonclip_jax."), file.name


def test_importing_loads_nothing_slow():
    """Not what Flax does not load either: Pallas, NNX; nor matplotlib."""
    code = """
import sys, jax, flax, optax
before = set(sys.modules)
import muonclip_jax
print(*set(sys.modules) - before)
"""
    loaded = subprocess.check_output([sys.executable, "-c", code], text=True).split()
    slow = ("jax.experimental.pallas", "jax._src.pallas", "flax.nnx", "matplotlib", "tokamax")
    assert not [module for module in loaded if module.startswith(slow)]


# All that the package imports. docs/reference/promises.md says what follows: nothing that only
# POSIX has, no files, no connections, no other processes, nothing unpickled.
IMPORTED = {
    "collections", "contextlib", "contextvars", "dataclasses", "difflib", "fnmatch", "functools",
    "glob",  # which finds no files here, but reads patterns
    "html", "importlib", "inspect", "itertools", "math", "numbers", "operator", "re",
    "shutil",  # the width of the terminal
    "statistics", "sys", "time", "typing", "warnings",
    "einops", "flax", "jax", "matplotlib", "muonclip_jax", "numpy", "optax", "rich", "tokamax",
}  # fmt: skip


# What a processor multiplies fast is told by /proc/cpuinfo, where there is one.
ALSO = {"rates.py": {"pathlib", "platform"}}


def test_the_package_needs_no_posix_and_touches_nothing_outside():
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            match node:
                case ast.Import():
                    names = [alias.name for alias in node.names]
                case ast.ImportFrom():
                    names = [node.module or ""]
                case ast.Call(func=ast.Name(id="open" | "exec" | "eval" | "compile" as name)):
                    names = [f"{name}()"]
                case _:
                    continue
            for name in names:
                allowed = IMPORTED | ALSO.get(file.name, set())
                assert name.split(".")[0] in allowed, f"{file.name} uses {name}"
