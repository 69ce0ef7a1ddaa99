"""What the metadata of a build take from the repository's address: links, and those of README.

The address is the environment variable PROJECT_URL. Without it there are no links, and README's
stay relative.
"""

import importlib.util
import os
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class ProjectLinks(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        address, tag = os.environ.get("PROJECT_URL"), f"v{metadata['version']}"
        text = Path(self.root, "README.md").read_text()
        if address:
            text = with_absolute_links(Path(self.root), text, address, tag)
            metadata["urls"] = {
                "Repository": address,
                "Documentation": f"{address}/blob/{tag}/docs/index.md",
                "Changelog": f"{address}/blob/{tag}/CHANGELOG.md",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(root: Path, text: str, address: str, tag: str) -> str:
    """README where there is no repository around it, as on a package index."""
    spec = importlib.util.spec_from_file_location("links", root / "docs" / "tools" / "links.py")
    assert spec and spec.loader
    links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(links)

    def absolute(words: str, path: str, anchor: str) -> str:
        page = links.in_repository(address, tag, path)
        file = page.replace("/blob/", "/raw/", 1) if words.startswith("!") else page
        return f"{words}({file}{anchor})"

    return links.relink(text, "", absolute)
