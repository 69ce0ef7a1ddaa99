"""Raw files: one JSON a run, with all that is needed to say where it came from."""

import hashlib
import inspect
import json
import math
import platform
import re
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import device

Json = dict[str, Any]
Runs = dict[str, list[Json]]  # label → records, one a seed

ROOT = Path(__file__).parents[2]
PACKAGES = ("jax", "jaxlib", "optax", "flax", "numpy")
# What decides the numbers of every run.
SOURCES = ("model.py", "optimizers.py", "training.py")
DIGITS = 5  # significant ones, of what is measured


def digest_of_sources(own: Callable | None) -> str:
    """A hash of the studies' code that makes numbers (not of what draws them): what they share, and
    the file of the study's `own` function."""
    files = [Path(__file__).parent / name for name in SOURCES]
    if own is not None:
        files.append(Path(inspect.getsourcefile(own)))
    return _digest(files)


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


def write(record: Mapping[str, Any], path: Path) -> None:
    """All of it or nothing, whatever happens meanwhile; a line for each of its entries."""
    lines = (f"{json.dumps(name)}: {_compact(value)}" for name, value in tidy(record).items())
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    partial.replace(path)


def read(path: Path) -> Json:
    """A raw file."""
    return json.loads(path.read_text(encoding="utf-8"))


def slug(label: str) -> str:
    """A label as the name of a file."""
    return re.sub(r"[^a-z0-9.]+", "-", label.lower().replace("τ", "tau")).strip("-")


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


def _compact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))


def _digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _git_head() -> str:
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"
