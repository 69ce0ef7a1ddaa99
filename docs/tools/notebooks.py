"""Notebooks as pages: Markdown as it is, code, and the output that was kept."""

import base64
import html
import itertools
from collections.abc import Iterator
from typing import Any


def markdown(notebook: dict[str, Any]) -> str:
    """A notebook (nbformat 4, as JSON) as one page of Markdown.

    Pictures get the words of their cell's metadata, `"alt"`. Lines that speak to the notebook and
    not to Python (`%matplotlib inline`) are left out.

    Raises:
      ValueError: A picture without words, an error that was kept, or an output of another kind.
    """
    return "\n\n".join(part for cell in notebook["cells"] for part in _parts(cell)) + "\n"


def _parts(cell: dict[str, Any]) -> Iterator[str]:
    source = "".join(cell["source"])
    if cell["cell_type"] == "markdown":
        yield source
        return
    lines = [line for line in source.splitlines() if not line.startswith("%")]
    yield _fenced("python", "\n".join(lines).strip())
    for kind, outputs in itertools.groupby(cell["outputs"], lambda output: output["output_type"]):
        if kind == "stream":
            texts = ("".join(output["text"]) for output in outputs)
            yield _fenced("text", "".join(texts).rstrip())
            continue
        yield from (_shown(output, source, cell["metadata"].get("alt")) for output in outputs)


def _shown(output: dict[str, Any], source: str, words: str | None) -> str:
    data = output.get("data")
    if data is None:
        raise ValueError(f"An output of the kind {output['output_type']} of:\n{source}")
    if "text/html" in data:
        return "".join(data["text/html"])
    if "image/svg+xml" in data:
        if not words:
            raise ValueError('A picture without words: say what it shows in the metadata, "alt".')
        picture = base64.b64encode("".join(data["image/svg+xml"]).encode()).decode()
        return f'<img alt="{html.escape(words)}" src="data:image/svg+xml;base64,{picture}">'
    return _fenced("text", "".join(data["text/plain"]))


def _fenced(language: str, text: str) -> str:
    return f"```{language}\n{text}\n```"
