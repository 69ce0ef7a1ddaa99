"""Breaks chosen by hand: the mistakes that a colleague would make, in numerics and wiring.

They stand in `chosen.txt`, each as

    module: what is then wrong
    - the text, which stands once in the module
    + what stands in its place
"""

import pathlib
import re

from tests.mutants.drawn import PACKAGE, Break

_ENTRY = re.compile(r"^(\S+\.py): (.+)\n- (.+)\n\+ (.*)$", re.MULTILINE)


def chosen() -> list[Break]:
    """All of them, each at its place.

    Raises:
      ValueError: One no longer applies.
    """
    table = pathlib.Path(__file__).with_name("chosen.txt").read_text()
    found = [_at(*entry.groups()) for entry in _ENTRY.finditer(table)]
    if len(found) != table.count("\n- "):
        raise ValueError("chosen.txt has an entry that is not as the docstring says.")
    return found


def _at(file: str, why: str, old: str, new: str) -> Break:
    text = (PACKAGE / file).read_text()
    if text.count(old) != 1:
        raise ValueError(
            f"{file} has {old!r} {text.count(old)} times, not once: correct this break ({why})."
        )
    return Break(file, text.index(old), old, new, why)
