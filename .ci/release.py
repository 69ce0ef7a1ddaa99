"""Builds, checks and tags the version that pyproject.toml names. `make release` runs it."""

import os
import pathlib
import re
import subprocess
import sys
import tomllib


def problems(root: pathlib.Path, address: str) -> list[str]:
    """What stands in the way of a release, each with what to do."""
    version = version_of(root)
    changes = re.search(r"^## (.*)$", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    cited = re.search(r"^version: (.*)$", (root / "CITATION.cff").read_text(), re.MULTILINE)
    found = []
    if changed := git(root, "status", "--porcelain"):
        found.append(f"The working tree has changes; commit or drop them:\n{changed}")
    if not re.fullmatch(r"https://\S+[^\s/]", address):
        found.append(
            f"PROJECT_URL is {address!r}: links need the repository's https:// address, without a "
            "slash at the end. Say make release PROJECT_URL=https://..."
        )
    if changes is None or changes[1] != version:
        found.append(
            f"The first part of CHANGELOG.md is {changes and changes[1]!r}: give version {version} "
            f"one, ## {version}, and leave nothing above it."
        )
    if cited is None or cited[1] != version:
        found.append(
            f"CITATION.cff has version {cited and cited[1]}; pyproject.toml has {version}."
        )
    if git(root, "tag", "--list", f"v{version}"):
        found.append(f"The tag v{version} is there: raise the version in pyproject.toml.")
    return found


def version_of(root: pathlib.Path) -> str:
    return tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]


def git(root: pathlib.Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", root, *arguments], check=True, capture_output=True, text=True
    ).stdout.rstrip()


def release(root: pathlib.Path, pythons: list[str]) -> None:
    if found := problems(root, os.environ.get("PROJECT_URL", "")):
        sys.exit("No release:\n" + "\n".join(f"- {each}" for each in found))
    subprocess.run([root / ".ci" / "package", *pythons], check=True)
    version = version_of(root)
    git(root, "tag", "--annotate", f"v{version}", "--message", f"muonclip_jax {version}")
    print(
        f"Tagged v{version}; dist/ has its sdist and wheel. Nothing is published yet:\n"
        f"  git push origin v{version} site\n  {pythons[0]} -m twine upload dist/*"
    )


if __name__ == "__main__":
    release(pathlib.Path(__file__).parent.parent, sys.argv[1:])
