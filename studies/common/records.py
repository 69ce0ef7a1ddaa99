"""Records: a file of JSON Lines for each study and size, a run a line, with all that is needed to
say where it came from.

A line has the keys `setting` and `seed`, which no other line of its file shares. The line of what a
study measures aside, which is no run, has the key `aside` instead.
"""

import hashlib
import json
import math
import platform
import re
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import device

Json = dict[str, Any]
Key = tuple[str, int] | str  # setting and seed of a run, or `ASIDE`
Runs = dict[str, list[Json]]  # label → records, one a seed

ROOT = Path(__file__).parents[2]
ASIDE = "aside"
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
DIGITS = 5  # significant ones, of what is measured


def provenance() -> Json:
    """Of which code, on what, and when."""
    versions = {name: metadata.version(name) for name in PACKAGES}
    library = sorted((ROOT / "muonclip_jax").rglob("*.py"))
    return {
        "commit": _git_head(),
        "library": _digest(library),
        "versions": {"python": platform.python_version(), **versions},
        "device": device(),
        "date": date.today().isoformat(),
    }


def tidy(value: Any) -> Any:
    """As JSON has it: dataclasses as objects, arrays as lists of numbers of `DIGITS` digits, None
    for what is not finite."""
    if is_dataclass(value):
        return {field.name: tidy(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: tidy(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [tidy(each) for each in value]
    if hasattr(value, "tolist"):
        return tidy(np.asarray(value).tolist())
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value


def key(record: Json) -> Key:
    """What tells a line of a file from its others."""
    return ASIDE if ASIDE in record else (record["setting"], record["seed"])


def read(path: Path) -> dict[Key, Json]:
    """The records of a file, in its order; none where there is no file. Each can be changed.

    A last line that was not written to its end, because the run was killed, is left out with a
    warning.
    """
    if not path.exists():
        return {}
    *lines, rest = path.read_bytes().split(b"\n")
    if rest:
        warnings.warn(f"{path}: the last line is not whole and is left out.", stacklevel=2)
    found = map(json.loads, lines)
    return {key(record): record for record in found}


def add(record: Mapping[str, Any], path: Path) -> None:
    """Puts a record at the end of a file, in place of an older one with its key. A kill at any
    moment leaves a file with the other records whole."""
    record = tidy(record)
    old = read(path)
    if path.exists() and (key(record) in old or not path.read_bytes().endswith(b"\n")):
        old.pop(key(record), None)
        write([*old.values(), record], path)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(_line(record))


def write(found: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Makes a file of these records: all of it or nothing, whatever happens meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_bytes(b"".join(map(_line, found)))
    partial.replace(path)


def origin(runs: Runs, *, of: int, stale: Sequence[tuple[str, int]]) -> str:
    """A paragraph on where the numbers come from."""
    every = [record for seeds in runs.values() for record in seeds]
    plan, first = every[0]["plan"], every[0]
    tokens = plan["batch"] * plan["context"]

    def all_of(name: str) -> str:
        return ", ".join(sorted({str(record[name]) for record in every}))

    parts = [
        f"{len(every)} of {of} runs, {plan['steps']} steps of {tokens:,} tokens each",
        f"device: {all_of('device')}",
        f"JAX {first['versions']['jax']}, Python {first['versions']['python']}",
        f"{all_of('date')}, commit {', '.join(sorted({r['commit'][:10] for r in every}))}",
    ]
    note = "; ".join(parts) + "."
    if stale:
        names = ", ".join(f"{label} (seed {seed})" for label, seed in stale)
        note += f"\n\n**Stale**, of another grid or other code than there is now: {names}."
    return note


def write_section(readme: Path, name: str, text: str) -> None:
    """Replaces what is between the readme's markers of that name; without markers, nothing."""
    if not readme.exists():
        return
    marked = re.compile(rf"(<!-- results: {name} -->\n).*?(<!-- end -->)", re.DOTALL)
    old = readme.read_text(encoding="utf-8")
    new = marked.sub(lambda found: f"{found[1]}{text}\n{found[2]}", old)
    if new != old:
        readme.write_text(new, encoding="utf-8")


@contextmanager
def stopwatch() -> Iterator[Callable[[], float]]:
    """Gives a function that tells the seconds since."""
    start = time.perf_counter()
    yield lambda: time.perf_counter() - start


def _line(record: Mapping[str, Any]) -> bytes:
    text = json.dumps(tidy(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _git_head() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
