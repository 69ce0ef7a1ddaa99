"""Puts the built site into the branch `site`, in a folder of its version; older ones stay there.

python -m docs.tools.publish     # `make release` calls it, behind `make docs`; nothing is pushed

The branch is what a host of pages serves. Its first page leads to the newest version, and
`versions.json` feeds the selector on every page.
"""

import io
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
BRANCH = "site"
FIRST_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>muonclip_jax</title>
<meta http-equiv="refresh" content="0; url={newest}/"></head>
<body><a href="{newest}/">muonclip_jax {newest}</a></body></html>
"""


def publish(repository: Path, built: Path, version: str) -> None:
    """Commits a built site to the branch, which is made when it is missing."""
    with tempfile.TemporaryDirectory() as place:
        pages = Path(place, "pages")
        parent = git(
            repository, "rev-parse", "--quiet", "--verify", f"refs/heads/{BRANCH}", fail=False
        )
        pages.mkdir()
        if parent:
            with tarfile.open(fileobj=io.BytesIO(archive(repository))) as tar:
                tar.extractall(pages, filter="data")
        shutil.rmtree(pages / version, ignore_errors=True)
        shutil.copytree(built, pages / version)
        write_entrance(pages)
        index = {"GIT_INDEX_FILE": str(Path(place, "index"))}
        git(repository, "--work-tree", pages, "add", "--all", "--force", ".", env=index)
        tree = git(repository, "write-tree", env=index)
        parents = ["-p", parent] if parent else []
        commit = git(repository, "commit-tree", tree, *parents, "-m", f"The site of {version}")
        git(repository, "update-ref", f"refs/heads/{BRANCH}", commit)


def write_entrance(pages: Path) -> None:
    """The list of versions, newest first, and the page that leads to the newest."""
    folders = (file.name for file in pages.iterdir() if file.is_dir())
    versions = sorted(folders, key=lambda name: [int(n) for n in name.split(".")], reverse=True)
    listed = [{"version": name, "title": name, "aliases": []} for name in versions]
    (pages / "versions.json").write_text(json.dumps(listed))
    (pages / "index.html").write_text(FIRST_PAGE.format(newest=versions[0]))


def git(repository: Path, *words: str | Path, env: dict[str, str] | None = None, fail=True) -> str:
    done = subprocess.run(
        ["git", "-C", repository, *words],
        env={**os.environ, **(env or {})},
        check=fail,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


def archive(repository: Path) -> bytes:
    """All files of the branch, as a tar."""
    words = ["git", "-C", repository, "archive", BRANCH]
    return subprocess.run(words, check=True, capture_output=True).stdout


if __name__ == "__main__":
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    publish(ROOT, ROOT / "site", settings["project"]["version"])
