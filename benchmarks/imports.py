"""What importing the package adds to importing JAX, Flax and Optax, in CPU-seconds.

    python -m benchmarks.imports [--modules]

Each of `REPEATS` fresh processes imports those three and then the package, and counts the CPU time
of the second part. Python keeps compiled modules, as after any installation: one more process
before them sees to that. `--modules` lists the modules that take the longest, themselves only.
"""

import argparse
import os
import statistics
import subprocess
import sys

REPEATS = 5
GOAL = 0.15
ENVIRONMENT = {**os.environ, "PYTHONDONTWRITEBYTECODE": ""}  # empty: compiled modules are kept
PROGRAM = """
import time, jax, flax, optax
before = time.process_time()
import muonclip_jax
print(time.process_time() - before)
"""


def seconds() -> list[float]:
    """CPU-seconds that importing the package took, in each of the processes."""
    command = [sys.executable, "-c", PROGRAM]
    run = lambda: float(subprocess.check_output(command, text=True, env=ENVIRONMENT))  # noqa: E731
    return [run() for _ in range(1 + REPEATS)][1:]


def slowest(count: int = 15) -> list[tuple[float, str]]:
    """(milliseconds, module) of the modules that the package alone imports."""
    program = "import jax, flax, optax; print('here', file=__import__('sys').stderr)\n"
    command = [sys.executable, "-X", "importtime", "-c", program + "import muonclip_jax"]
    told = subprocess.run(
        command, check=True, capture_output=True, text=True, env=ENVIRONMENT
    ).stderr
    rows = []
    for line in told.split("\nhere\n")[1].splitlines():
        own, _, module = line.removeprefix("import time:").split("|")
        rows.append((int(own) / 1000, module.strip()))
    return sorted(rows, reverse=True)[:count]


def main() -> int:
    """Prints the median, and says by its exit status whether it is within the goal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", action="store_true", help="list the slowest modules")
    if parser.parse_args().modules:
        for milliseconds, module in slowest():
            print(f"{milliseconds:8.1f} ms  {module}")
    median = statistics.median(seconds())
    print(f"Importing muonclip_jax adds {median:.3f} CPU-seconds (goal: at most {GOAL})")
    return 0 if median <= GOAL else 1


if __name__ == "__main__":
    sys.exit(main())
