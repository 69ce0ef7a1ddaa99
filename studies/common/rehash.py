"""Keeps records current when code was moved or rewritten and still computes the same.

    python -m studies.common.rehash COMMIT            # or the folder of a checkout of it
    python -m studies.common.rehash COMMIT clip quack # these studies only

Runs the probe (a few steps of every setting) with the code of COMMIT and with that of now, on this
machine, and compares all numbers bit for bit. Records that were current at COMMIT, and whose
setting's numbers are equal, get the hash of now. The others stay as they are: stale.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from studies.common import records
from studies.common.probe import SIZE
from studies.common.records import ASIDE, ROOT, Json
from studies.common.study import Study

PROBE = Path(__file__).with_name("probe.py")
Probed = dict[str, dict[str, Any]]  # study → what the probe says of it


def main(before: str, *only: str) -> int:
    """Runs the command for all studies, or for `only` these.

    Returns:
      The exit status: 1 if a record that was current has other numbers now.
    """
    names = only or sorted(file.parent.name for file in ROOT.glob("studies/*/__main__.py"))
    with checkout(before) as tree:
        probed = run_probe(tree, [n for n in names if (tree / "studies" / n).exists()])
    differs = False
    for name, now in run_probe(ROOT, list(probed)).items():
        study = import_module(f"studies.{name}.__main__").STUDY
        rehashed, differences = rehash(study, probed[name], now["numbers"])
        print(f"{name}: {rehashed} records have the hash of now")
        for label, difference in differences.items():
            print(f"  {label}: {difference}")
        differs |= bool(differences)
    return int(differs)


def rehash(study: Study, before: Json, now: Json) -> tuple[int, dict[str, str]]:
    """Gives the hash of now to the records of a study that were current and compute the same.

    Args:
      study: The study.
      before: What the probe said with the code of before.
      now: Label → numbers, with the code of now.

    Returns:
      The number of records with the hash of now, and by label how other numbers differ.
    """
    path = study.record_file(SIZE)
    found = records.read(path)
    current = {key if key == ASIDE else tuple(key) for key in before["current"]}
    differences = {
        label: difference
        for label, numbers in before["numbers"].items()
        if (difference := compare(numbers, now.get(label)))
    }
    for key, record in found.items():
        if key in current and key != ASIDE and key[0] not in differences:
            record["sources"] = study.code_hash()
    if ASIDE in current and not differences:
        found[ASIDE]["sources"] = study.aside_hash()
    records.write(found.values(), path)
    return len(study.current(SIZE)), differences


def compare(before: Json, now: Json | None) -> str:
    """How two runs' numbers differ; nothing if they are equal, bit for bit."""
    if json.dumps(before, sort_keys=True) == json.dumps(now, sort_keys=True):
        return ""
    one, other = (np.array(list(_leaves(each)), np.float64) for each in (before, now))
    if one.shape != other.shape:
        return "other figures"
    largest = np.max(np.abs(one - other) / np.maximum(np.abs(one), np.finfo(float).tiny))
    return f"numbers differ by up to {largest:.2g} of themselves"


def run_probe(tree: Path, names: list[str]) -> Probed:
    """What the probe says with the code of a tree."""
    command = [sys.executable, "-", *names]
    with PROBE.open() as script:
        found = subprocess.run(command, stdin=script, stdout=subprocess.PIPE, cwd=tree, check=True)
    return json.loads(found.stdout)


@contextmanager
def checkout(commit: str) -> Iterator[Path]:
    """A commit's tree, for as long as it is asked for."""
    if Path(commit).is_dir():
        yield Path(commit)
        return
    git = ["git", "-C", str(ROOT), "worktree"]
    with TemporaryDirectory() as folder:
        tree = Path(folder) / "before"
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        parts = value if isinstance(value, list) else [value[name] for name in sorted(value)]
        for part in parts:
            yield from _leaves(part)
    else:
        yield value


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("Usage: python -m studies.common.rehash COMMIT [STUDY...]")
    sys.exit(main(*sys.argv[1:]))
