"""Breaks the package, one change at a time, and tells which breaks no test catches.

    make mutants                                 # 200 drawn, and all of those chosen by hand
    make mutants ARGS="--drawn 20 --seed 3"      # fewer
    make mutants ARGS="--longest 2000"           # on a machine that does other things too

One run of all quick tests, without a break, tells which of them run which lines. Each break is then
a process of its own, forked from one that has imported JAX: its modules come from the changed
source, and the tests that run the changed line are asked, the nearest first, until one fails. What
these do not catch is asked again with every test of the folders in `FOLDERS`. At last every test
that caught something is run without a break. Nothing of the package is written.
"""

import argparse
import collections
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Collection

from tests.mutants.argued import ARGUED
from tests.mutants.chosen import chosen
from tests.mutants.covering import QUICK, ROOT, Covering, watch
from tests.mutants.drawn import PACKAGE, Break, draw

# The tests that are near a module, the nearest first.
FOLDERS = {
    "scaling": ["test_scaling.py", "cases/test_options.py"],
    "_core/axes": ["parameters", "layouts", "core"],
    "_core/masks": ["cases/test_frozen.py"],
    "_core": [
        "core",
        "transforms/test_clip_in_shard_map.py",
        "transforms/test_qk_clip.py",
        "attention",
    ],
    "_orthogonalize": ["orthogonalize", "transforms/test_muon.py", "cases/test_gram.py"],
    "_spread": ["spread"],
    "_attention": ["attention", "cases/test_attention.py", "transforms"],
    "_layouts": ["layouts", "transforms", "cases", "test_errors.py"],
    "_parameters": ["parameters", "recipes", "cases"],
    "_transforms/accumulate": ["transforms/test_accumulate.py", "cases/test_meshes.py"],
    "_transforms/quack": [
        "transforms/test_quack.py",
        "transforms/test_quack_logits.py",
        "cases/test_streams.py",
        "recipes",
    ],
    "_transforms/clip": [
        "cases/test_clip.py",
        "cases/test_frozen.py",
        "transforms",
        "states",
        "recipes",
        "test_errors.py",
    ],
    "_transforms": ["transforms", "states", "cases", "recipes", "test_errors.py"],
    "_diagnostics": ["diagnostics"],
    "recipes": ["recipes", "cases"],
    "published": ["recipes", "cases"],
}
IGNORED = ["-p", "no:cacheprovider", "--no-header", "-W", "ignore"]


class _Changed(importlib.abc.MetaPathFinder, importlib.machinery.SourceFileLoader):
    """Finds the broken module and gives it the changed source."""

    def __init__(self, break_: Break):
        self.source = break_.source()
        name = "muonclip_jax." + break_.file.removesuffix(".py").replace("/", ".")
        super().__init__(name, str(PACKAGE / break_.file))

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.name:
            return importlib.util.spec_from_file_location(fullname, self.path, loader=self)
        return None

    def get_code(self, fullname):
        return compile(self.source, self.path, "exec", dont_inherit=True)


class _Asked:
    """A pytest plugin: of what is collected only these tests, and which of them failed."""

    def __init__(self, tests: Collection[str] | None):
        self.tests = tests
        self.failed: list[str] = []

    def pytest_collection_modifyitems(self, items):
        items[:] = [item for item in items if self.tests is None or item.nodeid in self.tests]

    def pytest_runtest_logreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)

    def pytest_collectreport(self, report):
        if report.failed:
            self.failed.append(report.nodeid)


def nearest(file: str) -> list[str]:
    """The files of tests near a module: that of its own name, then those of `FOLDERS`."""
    prefix = max((p for p in FOLDERS if file.startswith(p)), key=len)
    module = PACKAGE / file
    own = ROOT / "tests" / module.parent.name.lstrip("_") / f"test_{module.stem}.py"
    found = [own] if own.exists() else []
    for name in FOLDERS[prefix]:
        place = ROOT / "tests" / name
        found += sorted(place.rglob("test_*.py")) if place.is_dir() else [place]
    return [str(path.relative_to(ROOT)) for path in dict.fromkeys(found)]


def first_failed(files: Collection[str], tests: Collection[str] | None) -> str | None:
    """The first of these tests that fails, file after file; None of `tests`: all of the files."""
    import chex
    import pytest

    for file in files:
        chex.clear_trace_counter()  # of the same test, in a file that was asked before
        asked = _Asked(tests)
        code = pytest.main([*IGNORED, "-x", "-q", "-m", QUICK, file], plugins=[asked])
        if code not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            return asked.failed[0] if asked.failed else file
    return None


def by_coverage(covering: Covering) -> Callable[[Break], str | None]:
    """Asks the tests that run the changed statement; of what runs at import, all that are near."""

    def ask(break_: Break) -> str | None:
        tests, near = covering.tests(break_), nearest(break_.file)
        having = list(dict.fromkeys(test.partition("::")[0] for test in tests))
        files = [f for f in near if not tests or f in having]
        others = [f for f in having if f not in near]
        return first_failed([*files, *others], tests or None)

    return ask


def by_folder(break_: Break) -> str | None:
    """Asks every test that is near."""
    return first_failed(nearest(break_.file), None)


def caught(
    breaks: list[Break], ask: Callable[[Break], str | None], workers: int, longest: float
) -> dict[Break, str]:
    """The breaks that a test catches, each with the test. One by which a test takes longer than
    `longest` is caught."""
    waiting = collections.deque(breaks)
    running: dict[int, tuple[Break, float]] = {}
    found: dict[Break, str] = {}
    done = 0
    with tempfile.TemporaryDirectory() as folder:
        told = pathlib.Path(folder)
        while waiting or running:
            while waiting and len(running) < workers:
                break_ = waiting.popleft()
                if (pid := os.fork()) == 0:
                    _child(break_, ask, told)
                running[pid] = break_, time.monotonic()
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                for late, (_, since) in running.items():
                    if time.monotonic() - since > longest:
                        os.killpg(late, signal.SIGKILL)
                time.sleep(0.05)
                continue
            break_, since = running.pop(pid)
            done += 1
            said = told / str(pid)
            by = said.read_text() if said.exists() else "" if status == 0 else "time"
            if by:
                found[break_] = by
            seconds = time.monotonic() - since
            print(f"{done:4} {seconds:6.1f} s  {break_}  {by or 'ALIVE'}", flush=True)
    return found


def _child(break_: Break, ask: Callable[[Break], str | None], told: pathlib.Path) -> None:
    """Runs in the forked process, and ends it."""
    os.setpgid(0, 0)
    sys.meta_path.insert(0, _Changed(break_))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    if test := ask(break_):
        (told / str(os.getpid())).write_text(test)
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--drawn", type=int, default=200, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--longest", type=float, default=400.0, help="seconds for one break")
    parser.add_argument("--chosen", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", default="", help="files that begin so")
    parser.add_argument("--covered", type=pathlib.Path, help="what an earlier run saw, to reuse")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the record")
    options = parser.parse_args()
    covered = options.covered or ROOT / ".cache" / "mutants.coverage"
    if not (options.covered and covered.exists()):
        covered.parent.mkdir(exist_ok=True)
        watch(covered, options.workers)
    covering = Covering(covered)
    for name in ("chex", "flax.nnx", "hypothesis", "optax", "orbax.checkpoint", "pytest"):
        importlib.import_module(name)  # once, for all that are forked

    by_hand = chosen() if options.chosen else []
    breaks = [*by_hand, *draw(options.drawn, options.seed)]
    breaks = [b for b in breaks if b.file.startswith(options.only)]
    limits = options.workers, options.longest
    found = caught(breaks, by_coverage(covering), *limits)
    print("Again, by all tests that are near:", flush=True)
    found |= caught([b for b in breaks if b not in found], by_folder, *limits)

    print("The tests that caught something, without a break:", flush=True)
    wrong = _failing_files({test for test in found.values() if "::" in test}, *limits)
    alive = [b for b in breaks if b not in found or found[b].partition("::")[0] in wrong]
    argued = [b for b in alive if (b.file, b.old, b.new) in ARGUED]
    count = lambda bs, own: sum(bool(b.why) == own for b in bs)  # noqa: E731
    figures = {
        "drawn": count(breaks, False),
        "drawn and caught": count(breaks, False) - count(alive, False),
        "chosen": count(breaks, True),
        "chosen and caught": count(breaks, True) - count(alive, True),
        "alive": [str(b) for b in alive],
        "alive and argued": [str(b) for b in argued],
        "caught by time": [str(b) for b, test in found.items() if test == "time"],
        "files that fail without a break": sorted(wrong),
    }
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    enough = figures["drawn and caught"] >= 0.95 * figures["drawn"]
    sys.exit(not (enough and count(alive, True) == 0))


def _failing_files(tests: Collection[str], workers: int, longest: float) -> set[str]:
    """The files in which one of the tests fails without a break: they catch nothing."""
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    # Breaks that change nothing, each with a file of tests for its reason.
    unbroken = [Break("__init__.py", 0, '"""', '"""', file) for file in by_file]

    def ask(break_: Break) -> str | None:
        return first_failed([break_.why], by_file[break_.why])

    return {break_.why for break_ in caught(unbroken, ask, workers, longest)}


if __name__ == "__main__":
    main()
