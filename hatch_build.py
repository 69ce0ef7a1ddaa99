"""What the metadata of a build take from the repository's address: links, and those of README.

The address is the environment variable PROJECT_URL. Without it there are no links, and README's
stay relative.
"""

import os
import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface

# `](target)` and `src="target"`, where the target is a file of the repository.
LINK = re.compile(r'(\]\(|src=")(?![a-z]+:|#)([^)"\s]+)')
PICTURES = (".svg", ".png")


class ProjectLinks(MetadataHookInterface):
    def update(self, metadata: dict) -> None:
        address = os.environ.get("PROJECT_URL")
        text = Path(self.root, "README.md").read_text()
        if address:
            text = with_absolute_links(text, address, metadata["version"])
            metadata["urls"] = {
                "Repository": address,
                "Changelog": f"{address}/blob/v{metadata['version']}/CHANGELOG.md",
            }
        metadata["readme"] = {"content-type": "text/markdown", "text": text}


def with_absolute_links(text: str, address: str, version: str) -> str:
    """The same page where there is no repository around it, as on a package index."""

    def absolute(match: re.Match[str]) -> str:
        before, target = match.groups()
        kind = "raw" if target.split("#")[0].endswith(PICTURES) else "blob"
        return f"{before}{address}/{kind}/v{version}/{target}"

    return LINK.sub(absolute, text)
