"""Which tests run which lines of the package, as coverage saw it in one run of all of them."""

import ast
import functools
import os
import pathlib
import subprocess
import sys

import coverage

from tests.mutants.drawn import PACKAGE, Break

ROOT = PACKAGE.parent
# What `make mutants` asks: all tests but those that take long.
QUICK = "not slow and not long"


def watch(file: pathlib.Path, workers: int) -> None:
    """Runs all quick tests, and writes down which lines each of them runs.

    Raises:
      subprocess.CalledProcessError: A test fails without any break.
    """
    told = {"COVERAGE_FILE": str(file), "COVERAGE_CORE": "ctrace"}
    options = ["--cov=muonclip_jax", "--cov-context=test", "--cov-report=", "-q"]
    # Of its own: pytest keeps the last three folders only, and others may run it meanwhile.
    options += [f"--basetemp={file.parent / 'pytest'}"]
    run = [sys.executable, "-m", "pytest", f"-n{workers}", "--dist=loadfile", "-m", QUICK, *options]
    subprocess.run(run, cwd=ROOT, env={**os.environ, **told}, check=True)


class Covering:
    """Reads what `watch` wrote: once, whole, as processes that are forked must not share the
    database."""

    def __init__(self, file: pathlib.Path):
        data = coverage.CoverageData(str(file))
        data.read()
        names = data.measured_files()
        if not names:
            raise ValueError(f"{file} has no measurement; remove it, and it is made again.")
        self.contexts = {pathlib.Path(n).resolve(): data.contexts_by_lineno(n) for n in names}
        data.close(force=True)

    def tests(self, break_: Break) -> frozenset[str]:
        """The names of the tests that run the statement of a break; none of what is run by an
        import alone."""
        by_line = self.contexts.get((PACKAGE / break_.file).resolve(), {})
        contexts = {context for line in _lines(break_) for context in by_line.get(line, ())}
        return frozenset(context.partition("|")[0] for context in contexts if context)


def _lines(break_: Break) -> range:
    """The lines of the innermost statement around a break."""
    text = (PACKAGE / break_.file).read_text()
    line = text[: break_.start].count("\n") + 1
    around = [node for node in _statements(text) if node.lineno <= line <= _end(node)]
    inner = min(around, key=lambda node: _end(node) - node.lineno)
    return range(inner.lineno, _end(inner) + 1)


@functools.cache
def _statements(text: str) -> tuple[ast.stmt, ...]:
    return tuple(node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.stmt))


def _end(node: ast.stmt) -> int:
    """Its last line; of one that holds others, that of its own head."""
    body = getattr(node, "body", None)
    return max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or node.lineno
