"""Gathers the pages of the site into site-source/, whose folders are those of the site.

Pages of docs/ keep their places. What lies elsewhere in the repository, and is read on the site
too, is copied beside them. Links between pages follow. A link to another file leads to the
repository where PROJECT_URL says where that is, and is plain text where nothing does.

python -m docs.tools.gather
"""

import json
import os
import shutil
import subprocess
from pathlib import Path

from docs.tools.links import in_repository, relink
from docs.tools.notebooks import markdown

ROOT = Path(__file__).parents[2]
SITE = ROOT / "site-source"
ELSEWHERE = {
    "CHANGELOG.md": "reference/changelog.md",
    "CONTRIBUTING.md": "reference/contributing.md",
}


def place_of(path: str) -> str | None:
    """Where the site has a file of the repository; None where it has not."""
    if path in ELSEWHERE:
        return ELSEWHERE[path]
    folder, name = os.path.split(path)
    if path.startswith("studies/") and name == "README.md":
        return f"{folder}/index.md"
    if path.startswith("docs/") and not path.startswith("docs/tools/"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    return path if name.endswith((".png", ".svg")) else None


def page(path: str, url: str, ref: str) -> tuple[str, set[str]]:
    """A page as the site has it, and the pictures of elsewhere that it shows."""
    shown = set()

    def change(words: str, target: str, anchor: str) -> str:
        if not (ROOT / target).exists():
            raise SystemExit(f"{path}: the link {words} leads to {target}, which does not exist.")
        place = place_of(target)
        if place is not None:
            if words.startswith("!"):
                shown.add(target)
            return f"{words}({os.path.relpath(place, os.path.dirname(place_of(path)))}{anchor})"
        return f"{words}({in_repository(url, ref, target)}{anchor})" if url else words[1:-1]

    text = (ROOT / path).read_text()
    if path.endswith(".ipynb"):
        text = markdown(json.loads(text))
    return relink(text, os.path.dirname(path), change), shown


def gather(url: str, ref: str) -> None:
    """Writes all of site-source/ anew."""
    shutil.rmtree(SITE, ignore_errors=True)
    docs = ROOT / "docs"
    found = [*docs.rglob("*.md"), *docs.rglob("*.ipynb"), *ROOT.glob("studies/*/README.md")]
    files = {str(file.relative_to(ROOT)) for file in (*docs.rglob("*.svg"), *docs.glob("assets/*"))}
    for path in [*ELSEWHERE, *(str(file.relative_to(ROOT)) for file in found)]:
        text, shown = page(path, url, ref)
        files |= shown
        file = SITE / place_of(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    for path in files:
        file = SITE / place_of(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, file)


if __name__ == "__main__":
    commit = subprocess.run(
        ["git", "-C", ROOT, "rev-parse", "HEAD"], check=True, capture_output=True, text=True
    )
    gather(os.environ.get("PROJECT_URL", ""), commit.stdout.strip())
