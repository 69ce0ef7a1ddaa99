"""The public surface: names and signatures, held against surface.txt.

A change of it is meant or it is a mistake. If it is meant, record it, and write a line for the
CHANGELOG (docs/reference/promises.md says what a name is owed before it goes):

    python -m tests.test_surface --write
"""

import dataclasses
import difflib
import enum
import importlib
import inspect
import pathlib
import pkgutil
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest

import muonclip_jax as mc

FILE = pathlib.Path(__file__).parent / "surface.txt"
MODULES = [
    "muonclip_jax",
    *(f"muonclip_jax.{name}" for name in ("layouts", "schedules", "linalg", "scaling", "plots")),
]


def show_default(value: Any) -> str:
    """As it reads in the source: no addresses, and no values that a default computes."""
    if isinstance(value, mc.Schedule):
        return value.name
    if dataclasses.is_dataclass(value) or hasattr(value, "_fields"):
        return f"{type(value).__name__}(...)"
    return getattr(value, "__name__", None) or repr(value)


def signature_of(thing: Any) -> str:
    """Names, kinds and defaults of the arguments; annotations may change with Python."""
    parameters, star = [], False
    for p in inspect.signature(thing).parameters.values():
        if p.kind is p.VAR_POSITIONAL or (p.kind is p.KEYWORD_ONLY and not star):
            star = True
            if p.kind is p.KEYWORD_ONLY:
                parameters.append("*")
        text = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "") + p.name
        parameters.append(text if p.default is p.empty else f"{text}={show_default(p.default)}")
        if p.kind is p.POSITIONAL_ONLY:
            parameters.append("/")
    return f"({', '.join(parameters)})"


def lines_of(name: str, thing: Any) -> Iterator[str]:
    """One line for a name, and one for each public member of a class."""
    if isinstance(thing, ModuleType):
        yield f"{name}: module"
    elif inspect.isclass(thing) and issubclass(thing, enum.Enum):
        yield f"{name}: {', '.join(member.name for member in thing)}"
    elif inspect.isclass(thing):
        yield f"{name}{signature_of(thing)}"
        for member, value in sorted(vars(thing).items()):
            if member.startswith("_"):
                continue
            if isinstance(value, staticmethod | classmethod):
                value = value.__func__
            if inspect.isfunction(value):
                yield f"{name}.{member}{signature_of(value)}"
            elif isinstance(value, property):
                yield f"{name}.{member}"
    elif inspect.isroutine(thing):
        yield f"{name}{signature_of(thing)}"
    else:
        yield f"{name}: {thing!r}"


def surface() -> list[str]:
    found = []
    for name in MODULES:
        module = importlib.import_module(name)
        prefix = name.replace("muonclip_jax", "mc")
        for public in sorted(module.__all__):
            found += lines_of(f"{prefix}.{public}", getattr(module, public))
    return found


def test_surface_is_the_recorded_one():
    recorded = FILE.read_text().splitlines()
    changes = difflib.unified_diff(recorded, surface(), "recorded", "now", lineterm="", n=0)
    told = "\n".join(changes)
    assert not told, f"{told}\nIf this is meant: python -m tests.test_surface --write"


def test_the_packages_directory_is_its_surface():
    assert dir(mc) == sorted(mc.__all__)
    for name in mc.__all__:
        assert getattr(mc, name) is not None


@pytest.mark.parametrize(
    "recipe", [mc.muon, mc.muonclip, mc.kimi_muonclip, mc.quack], ids=lambda f: f.__name__
)
def test_recipes_show_every_option(recipe):
    kinds = {p.kind for p in inspect.signature(recipe).parameters.values()}
    assert not kinds & {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def test_every_module_is_where_its_name_says():
    """`import muonclip_jax.x.y` never gives a function that has the module's name."""
    for info in pkgutil.walk_packages(mc.__path__, "muonclip_jax."):
        module = importlib.import_module(info.name)
        package, _, name = info.name.rpartition(".")
        assert getattr(importlib.import_module(package), name) is module, info.name


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python -m tests.test_surface --write")
    FILE.write_text("\n".join(surface()) + "\n")
