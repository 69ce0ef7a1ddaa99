"""Counts the contract's cells, and lists what is passed over with its reason.

python -m tests.contract
"""

import inspect

from tests.contract import test_contract
from tests.contract.links import LINKS


def main() -> None:
    behaviours = [
        (name.removeprefix("test_"), test)
        for name, test in inspect.getmembers(test_contract, inspect.isfunction)
        if hasattr(test, "kept")
    ]
    total = 0
    for name, test in behaviours:
        variants = 1
        for mark in test.pytestmark:
            if mark.name == "parametrize" and mark.args[0] != ("link", "place"):
                variants *= len(mark.args[1])
        cells = variants * len(test.kept)
        total += cells
        print(f"{cells:5}  {name.replace('_', ' ')}")
    print(f"{total:5}  cells: {len(behaviours)} behaviours of {len(LINKS)} links and recipes\n")
    print("Passed over:")
    reasons: dict[str, list[str]] = {}
    for name, test in behaviours:
        for link, place, why in test.passed_over:
            reasons.setdefault(why, []).append(f"{name} of {link} on {place}")
    for why, cells in reasons.items():
        print(f"{len(cells):5}  {why}: {', '.join(cells[:4])}{', …' * (len(cells) > 4)}")


if __name__ == "__main__":
    main()
