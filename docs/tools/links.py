"""Relative links of Markdown, and where they lead when a page is read outside of the repository."""

import os.path
import re
from collections.abc import Callable

# Code, in which nothing is a link; or a link or picture, whose text may have code in it.
_CODE_OR_LINK = re.compile(
    r"```.*?```|(?P<words>!?\[(?:[^\[\]]|\[[^\[\]]*\])*\])\((?P<target>[^()\s]+)\)|`[^`\n]*`",
    re.DOTALL,
)


def in_repository(url: str, ref: str, path: str) -> str:
    """The address of a file's page at a commit or tag, as GitHub and GitLab have it."""
    return f"{url}/blob/{ref}/{path}"


def relink(markdown: str, folder: str, change: Callable[[str, str, str], str]) -> str:
    """Puts `change(words, path, anchor)` in the place of each relative link.

    `words` are the link's, with brackets; `path` is from the top of the repository; `anchor` begins
    with "#", or is empty. Links within a page stay, and so do those to other hosts.
    """

    def replace(found: re.Match) -> str:
        target = found["target"]
        if target is None or target.startswith("#") or re.match(r"[a-z]+:", target):
            return found[0]
        path, hash_, anchor = target.partition("#")
        return change(found["words"], os.path.normpath(os.path.join(folder, path)), hash_ + anchor)

    return _CODE_OR_LINK.sub(replace, markdown)
