"""One word for one thing: words that the package once used in a sense of its own stay away.

Each row has the word to write instead, what is searched for, and where. Patterns are narrow enough
that the same letters in their ordinary sense pass: there is no list of exceptions, and there is to
be none.
"""

import ast
import pathlib
import re
from collections import Counter

import pytest

ROOT = pathlib.Path(__file__).parent.parent
CODE = ["muonclip_jax/**/*.py"]
PROSE = ["README.md", "docs/**/*.md"]
SPREAD = ["muonclip_jax/_spread/*.py"]

RULES = {
    "team": ("device group", r"(?<![a-z])([Tt]eams?|TEAMS?)(?![a-z])", CODE + PROSE),
    "together": (
        "device group",
        r"\bhold\w* [^.]{0,40}\btogether\b(?! with)|\bdevices together\b|\btogether\.(size|axes)\b",
        CODE + PROSE,
    ),
    "here and there, of a plan": (
        "stored and working sharding",
        r"\.(here|there)\b(?!\w|[.,;:)]*\s+[A-Z]|[.,;:)]*$)|\b(here|there)\s*(=[^=]|:\s*\w+\[)"
        r"|\bthere and back\b",
        SPREAD,
    ),
    "look, of the Gram iteration": (
        "restart",
        r"\blook(s|ed|ing)? at X\b|\b(between|before|without|with a) looks?\b|X is not looked at",
        ["muonclip_jax/_orthogonalize/*.py", *PROSE],
    ),
    "segment, of the Gram iteration": (
        "steps between restarts",
        r"\bsegments?\b(?!_)",
        ["muonclip_jax/_orthogonalize/*.py", "docs/explanation/schedules.md", "README.md"],
    ),
    "copies, as a place": ("replicated", r"[\"`]copies[\"`]|\bcopies\s*[:=]", CODE + PROSE),
    "entries at once": ("chunk size", r"\bentries[_ ]at[_ ]once\b", CODE + PROSE),
    "slices": ("chunks", r"\bin_slices\b|\b(eight|so many|last) slices?\b", CODE + PROSE),
    "wide, of a dtype": (
        "accumulation_dtype",
        r"(?<![\w.])wide\(|\btiles\.wide\b|_at_least_float32",
        CODE + PROSE,
    ),
    "accumulator, of a product": (
        "accumulation_dtype",
        r"\baccumulator's dtype\b|\baccumulator\(",
        [f"muonclip_jax/{part}/*.py" for part in ("_core", "_orthogonalize", "_attention")],
    ),
    "Matrices, of values and of a specification": (
        "MatrixArray, MatrixSpec",
        r"\bHeadMatrices\b|\bclass Matrices\b|\bMatrices\(|\[Matrices\]|: Matrices\b(?! )",
        CODE + PROSE,
    ),
    "there, as what is split": ("working", r"`there`|`here`", CODE + PROSE),
}


def found(pattern: str, places: list[str]) -> list[str]:
    compiled = re.compile(pattern)
    lines = []
    for place in places:
        for file in sorted(ROOT.glob(place)):
            for number, line in enumerate(file.read_text().splitlines(), 1):
                if compiled.search(line):
                    lines.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    return lines


@pytest.mark.parametrize("old", RULES)
def test_old_word_is_gone(old):
    new, pattern, places = RULES[old]
    lines = found(pattern, places)
    assert not lines, f"write {new!r}, not {old!r}:\n" + "\n".join(lines)


def test_no_two_classes_share_a_name():
    names = Counter(
        node.name.strip("_")
        for file in ROOT.glob(CODE[0])
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
    )
    assert not [name for name, count in names.items() if count > 1]
