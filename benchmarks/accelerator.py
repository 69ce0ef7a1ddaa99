"""All that is measured on a GPU or a TPU, in one go of at most ten minutes.

    python -m benchmarks.accelerator
    python -m benchmarks.accelerator --part attention train_step

First the numerics against float64, then the benchmarks with their peers, each in a process of its
own, since it takes the device for itself. Each part writes a record, such as
benchmarks/records/2026-12-01-nvidia-h100-80gb-hbm3-numerics.json, when it is done: after an
interruption name the parts that are missing. A part that fails or takes too long is said at the
end, and the exit status is 1; where there is no accelerator it is 2.
"""

import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal, get_args

import tyro

Part = Literal["numerics", "orthogonalize", "optimizer_step", "attention", "train_step"]

# Part → its options, and the seconds that it may take. Compiling is most of it.
LIMITS: dict[Part, tuple[tuple[str, ...], int]] = {
    "numerics": ((), 120),
    "orthogonalize": (
        ("--methods", "auto", "--torch", "torch", "--repeats", "5", "--seconds-per-shape", "10"),
        120,
    ),
    "optimizer_step": (("--compile-layers", "--compile-repeats", "1"), 150),
    "attention": (
        (
            *("--lengths", "2048", "--batch-sizes", "4", "--causal", "True"),
            *("--memory-lengths", "8192", "--seconds-per-comparison", "5"),
        ),
        90,
    ),
    "train_step": (("--seconds-at-most", "30"), 120),
}
FIND = "import jax; print(jax.default_backend(), '|', jax.devices()[0].device_kind)"


@dataclass(frozen=True)
class Options:
    """What this machine's accelerator computes, and how fast."""

    part: tuple[Part, ...] = get_args(Part)
    """Those to run, to go on after an interruption."""
    records: Path = Path("benchmarks/records")
    """Where the records go."""


def find_device() -> str | None:
    """What kind of accelerator JAX sees; None if it sees the CPU alone. In another process, since
    this one must not take it."""
    found = subprocess.run([sys.executable, "-c", FIND], capture_output=True, text=True)
    backend, _, kind = found.stdout.strip().rpartition("\n")[2].partition(" | ")
    return kind if found.returncode == 0 and backend != "cpu" else None


def run(part: Part, device: str, options: Options) -> str | None:
    """Runs one part. Returns what was wrong with it."""
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    record = options.records / f"{date.today().isoformat()}-{name}-{part}.json"
    arguments, limit = LIMITS[part]
    command = [sys.executable, "-m", f"benchmarks.{part}", "--json", str(record), *arguments]
    print(f"== {part}, at most {limit} s", flush=True)
    try:
        status = subprocess.run(command, timeout=limit).returncode
    except subprocess.TimeoutExpired:
        return f"{part} took more than {limit} s"
    return f"{part} ended with status {status}" if status else None


def main(options: Options) -> int:
    device = find_device()
    if device is None:
        print("There is no accelerator here: JAX sees no GPU and no TPU.")
        return 2
    options.records.mkdir(parents=True, exist_ok=True)
    wrong = [why for part in options.part if (why := run(part, device, options))]
    for why in wrong:
        print(why)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options)))
