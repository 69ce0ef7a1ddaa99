"""Breaks the package, one change at a time, and tells which breaks no test catches.

    make mutants                                 # 200 drawn, and all of those chosen by hand
    make mutants ARGS="--drawn 20 --seed 3"      # fewer
    make mutants ARGS="--longest 2000"           # on a machine that does other things too

Each break is a process of its own, forked from one that has imported JAX: its modules come from the
changed source, and the tests of its folder run until the first fails. Nothing is written.
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
import time

from tests.mutants.argued import ARGUED
from tests.mutants.chosen import chosen
from tests.mutants.drawn import PACKAGE, Break, draw

ROOT = PACKAGE.parent

# The tests that are asked about a module, those that are nearest first.
TESTS = {
    "_core/axes": ["parameters", "layouts", "core"],
    "_core": [
        "core",
        "transforms/test_clip_in_shard_map.py",
        "transforms/test_qk_clip.py",
        "attention",
    ],
    "_orthogonalize": ["orthogonalize", "transforms/test_muon.py", "cases/test_gram.py"],
    "_spread": ["spread"],
    "_attention": ["attention", "cases/test_attention.py"],
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
}


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


def tests_for(file: str) -> list[str]:
    """The tests that are asked about a module, in turn: those of its own name, then those of the
    longest prefix in the table."""
    prefix = max((p for p in TESTS if file.startswith(p)), key=len)
    module = PACKAGE / file
    own = ROOT / "tests" / module.parent.name.lstrip("_") / f"test_{module.stem}.py"
    found = [own, *(ROOT / "tests" / name for name in TESTS[prefix])]
    return [str(path) for path in dict.fromkeys(found) if path.exists()]


def _child(break_: Break) -> bool:
    """Whether a test fails; runs in the forked process."""
    import chex
    import pytest

    sys.meta_path.insert(0, _Changed(break_))
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not long", "--no-header"]
    none_selected = pytest.ExitCode.NO_TESTS_COLLECTED
    for tests in tests_for(break_.file):
        chex.clear_trace_counter()  # what is asked first is asked again with its folder
        if pytest.main([*options, tests]) not in (0, none_selected):
            return True
    return False


def survivors(breaks: list[Break], workers: int, longest: float) -> list[Break]:
    """The breaks that no test catches. One by which a test takes longer is caught."""
    waiting = collections.deque(breaks)
    running: dict[int, tuple[Break, float]] = {}
    alive, done = [], 0
    while waiting or running:
        while waiting and len(running) < workers:
            break_ = waiting.popleft()
            pid = os.fork()
            if pid == 0:
                os.setpgid(0, 0)
                os._exit(int(_child(break_)))
            running[pid] = break_, time.monotonic()
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            for late, (_, since) in running.items():
                if time.monotonic() - since > longest:
                    os.kill(late, signal.SIGKILL)
            time.sleep(0.1)
            continue
        break_, since = running.pop(pid)
        done += 1
        if status == 0:
            alive.append(break_)
        verdict = "ALIVE " if status == 0 else "late  " if os.WIFSIGNALED(status) else "caught"
        print(f"{done:4} {verdict} {time.monotonic() - since:6.1f} s  {break_}", flush=True)
    return alive


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--drawn", type=int, default=200, help="how many are drawn")
    parser.add_argument("--seed", type=int, default=16)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--longest", type=float, default=400.0, help="seconds for one break")
    parser.add_argument("--chosen", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--only", default="", help="files that begin so")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the record")
    options = parser.parse_args()
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "mutants"))
    for name in ("chex", "flax.nnx", "hypothesis", "optax", "orbax.checkpoint", "pytest"):
        importlib.import_module(name)  # once, for all that are forked

    by_hand = chosen() if options.chosen else []
    breaks = [*by_hand, *draw(options.drawn, options.seed)]
    breaks = [b for b in breaks if b.file.startswith(options.only)]
    print("Without a break, for tests that fail anyway catch nothing:", flush=True)
    unbroken = list(
        {tuple(tests_for(b.file)): Break(b.file, 0, '"""', '"""') for b in breaks}.values()
    )
    if len(survivors(unbroken, options.workers, options.longest)) < len(unbroken):
        sys.exit("These tests fail without a break. Mend them first.")
    print("With breaks:", flush=True)
    alive = survivors(breaks, options.workers, options.longest)
    argued = [b for b in alive if (b.file, b.old, b.new) in ARGUED]
    count = lambda bs, own: sum(bool(b.why) == own for b in bs)  # noqa: E731
    figures = {
        "drawn": count(breaks, False),
        "drawn and caught": count(breaks, False) - count(alive, False),
        "chosen": count(breaks, True),
        "chosen and caught": count(breaks, True) - count(alive, True),
        "alive": [str(b) for b in alive],
        "alive and argued": [str(b) for b in argued],
    }
    print(json.dumps(figures, indent=2, ensure_ascii=False))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=2, ensure_ascii=False) + "\n")
    enough = figures["drawn and caught"] >= 0.95 * figures["drawn"]
    sys.exit(not (enough and count(alive, True) == 0))


if __name__ == "__main__":
    main()
