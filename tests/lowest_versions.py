"""Prints pip constraints that pin every dependency to its lower bound in pyproject.toml."""

import pathlib
import re
import tomllib

project = tomllib.loads(pathlib.Path("pyproject.toml").read_text())["project"]
requirements = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
for requirement in requirements:
    if match := re.fullmatch(r"([\w-]+)(?:\[\w+\])?>=([\w.]+)", requirement):
        print(f"{match[1]}=={match[2]}")
