"""Prints pip constraints that pin every dependency to its lower bound in pyproject.toml."""

import itertools
import pathlib
import re
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"].values()
requirements = itertools.chain(project["dependencies"], *extras)
for requirement in requirements:
    if match := re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement):
        print(f"{match[1]}=={match[2]}")
