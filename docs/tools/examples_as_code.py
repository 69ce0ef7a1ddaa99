"""For mkdocstrings: shows a docstring's `Example:` as code.

Griffe knows the section by its plural only, and takes the singular for a paragraph of Markdown.
"""

import re

import griffe


class ExamplesAsCode(griffe.Extension):
    """Renames the section before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = re.sub(
                r"^( *)Example:$", r"\1Examples:", obj.docstring.value, flags=re.MULTILINE
            )
