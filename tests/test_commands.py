"""Every command of the README and the docs: no line that fails when pasted.

A command of `make` is expanded by `make -n`, and what that would run is checked like the others: a
module is there and can be run, and its own parser knows every flag; an extra is one of ours. A
command of a kind that is not known here fails.
"""

import contextlib
import functools
import importlib.util
import io
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Iterator
from unittest import mock

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted(ROOT.glob("studies/*/README.md")),
]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
PYTHON = re.compile(r"(\S*/)?python3?")
KNOWN = ("text", "python", "sh", "diff")  # what blocks may be
MISTAKES = (
    ROOT / "docs/how-to/errors.md"
)  # tests/test_mistakes.py makes them, and reads the answers


def commands(text: str) -> Iterator[str]:
    """Lines of blocks of `sh`, without comments, and code in a line that begins like a command."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words)
    without_blocks = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for code in re.findall(r"`([^`]+)`", without_blocks):
        if re.match(r"(make|pip|git|\S*python3?|\.venv/bin/\S+) [^=]", code):
            yield shlex.join(shlex.split(code))


FOUND = {command: page for page in PAGES for command in commands(page.read_text())}


def expanded(words: list[str]) -> list[list[str]]:
    """What `make` would run: the lines of Python among it."""
    env = {**os.environ, "MAKEFLAGS": ""}
    done = subprocess.run(
        ["make", "-n", "VENV=.venv", *words[1:]], cwd=ROOT, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.replace("\\\n", " ").splitlines()
    return [shlex.split(line) for line in lines if re.match(r"\S*/python -m (?!pip|venv)", line)]


@functools.cache
def help_of(module: str) -> str:
    """What a module says of its flags."""
    said = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [module, "--help"]),
        contextlib.redirect_stdout(said),
        contextlib.suppress(SystemExit),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of what is imported already
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    return said.getvalue()


def check_module(module: str) -> pathlib.Path:
    """It can be run: a module with a `__main__` part, or a package with a file of that name."""
    spec = importlib.util.find_spec(module)
    assert spec, f"there is no module {module}"
    folders = spec.submodule_search_locations
    file = pathlib.Path(folders[0], "__main__.py") if folders else pathlib.Path(spec.origin)
    assert '__name__ == "__main__"' in file.read_text(), f"{module} cannot be run"
    return file


def check_pip(words: list[str]) -> None:
    for wanted in words[2:]:
        local = re.fullmatch(r"\.(?:\[([\w,]+)\])?", wanted)
        assert local or wanted in ("pyarrow", "wandb"), f"{wanted} is on no package index"
        for extra in ((local and local[1]) or "").split(","):
            assert not extra or extra in EXTRAS, f"there is no extra {extra}"


def check(words: list[str]) -> list[str]:
    """Checks a command, and returns the flags that are left to be checked, behind their module."""
    match words:
        case ["make", *_]:
            return [flag for line in expanded(words) for flag in check(line)]
        case ["pip", "install", *_]:
            check_pip(words)
        case [".venv/bin/pre-commit", "install"]:
            assert any(wanted.startswith("pre-commit") for wanted in EXTRAS["dev"])
        case [python, "-c", code] if PYTHON.fullmatch(python):
            exec(code, {})
        case [python, "-m", ("pytest" | "zensical") as module, *_] if PYTHON.fullmatch(python):
            for path in words[3:]:
                assert not path.startswith("tests/") or (ROOT / path).exists(), path
        case [python, "-m", module, *arguments] if PYTHON.fullmatch(python):
            file = check_module(module)
            flags = [word.split("=")[0] for word in arguments if word.startswith("--")]
            return [module, *(flag for flag in flags if f'"{flag}"' not in file.read_text())]
        case _:
            pytest.fail(f"a kind of command that this test does not know: {words}")
    return []


@pytest.mark.parametrize("command", FOUND)
def test_a_command_would_run(command):
    check(shlex.split(command))


@pytest.mark.slow
@pytest.mark.parametrize("command", [each for each in FOUND if "--" in each])
def test_its_flags_are_known(command):
    module, *flags = check(shlex.split(command)) or ("",)
    for flag in flags:
        assert flag in help_of(module), f"{FOUND[command]}: {module} knows no {flag}"


@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if page != MISTAKES],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_blocks_have_a_kind_that_is_checked(page):
    """`text` is a part of a tested file, which a mark names: its lines up to their arguments."""
    text = page.read_text()
    fences = re.findall(r"^```(.*)$", text, re.MULTILINE)
    assert set(fences[::2]) <= {*KNOWN, ""}, page
    for file, block in re.findall(r"<!-- in: (\S+) -->\n```text\n(.*?)```", text, re.DOTALL):
        tested = (ROOT / file).read_text()
        for line in block.splitlines():
            assert line.split("(")[0] in tested, f"{file} has no {line!r}"
    marked = text.count("<!-- in: ")
    assert text.count("```text\n") == marked, f"{page}: say where the text is tested"
