"""Figures as SVG for light and dark screens: text stays text, and a colour is a name that the page,
or a style of the picture's own, gives a value."""

import html
import io
import re

from matplotlib import rc_context
from matplotlib.figure import Figure

from examples.mla.figures import FAINT, GRID, INK, SERIES, WARNING

# Name: as a figure is drawn, and in the dark. Against the background, text has a contrast of 4.5 at
# least, and lines one of 3.
COLOURS = {
    "card": ("#ffffff", "#1b2129"),
    "ink": (INK, "#e6eaef"),
    "faint": (FAINT, "#6b7785"),
    "grid": (GRID, "#323a45"),
    "warning": (WARNING, "#ff7b72"),
} | {
    f"series-{i}": (color, dark)
    for i, (color, dark) in enumerate(
        zip(
            SERIES,
            (
                "#6ea8fe",
                "#f5b041",
                "#34d399",
                "#b794f6",
                "#f687b3",
                "#38bdf8",
                "#a3d04a",
                "#b0b8c4",
            ),
            strict=True,
        )
    )
}
FONT = "system-ui, sans-serif"
DARK = "@media (prefers-color-scheme: dark)"


def inline(figure: Figure, label: str) -> str:
    """A figure as an element of a page whose style has `colours`.

    Args:
      figure: Drawn with the colours of `figures`.
      label: What it shows, in a few words without backslashes; unique in the page.
    """
    size = r'width="[^"]*" height="[^"]*"'  # as wide as the page lets it be
    return re.sub(f"<svg ([^>]*){size}", f"<svg {_role(label)} \\1", _drawn(figure, label))


def standalone(figure: Figure, label: str) -> str:
    """A figure as a file of its own."""
    style = f"<style>\n{colours('svg')}\n</style>"
    return re.sub("<svg ([^>]*>)", f"<svg {_role(label)} \\1\n{style}", _drawn(figure, label))


def _role(label: str) -> str:
    return f'role="img" aria-label="{html.escape(label)}"'


def colours(selector: str) -> str:
    """The style that gives the colours their values."""

    def values(dark: bool) -> str:
        return " ".join(f"--{name}: {both[dark]};" for name, both in COLOURS.items())

    return f"{selector} {{ {values(False)} }}\n{DARK} {{ {selector} {{ {values(True)} }} }}"


def _drawn(figure: Figure, salt: str) -> str:
    """The element alone, with names for colours and one font. Groups lose their numbers: in another
    figure of the same page they are the same."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        figure.savefig(buffer, format="svg", metadata=nothing)
    text = re.sub(r"^.*?(?=<svg )", "", buffer.getvalue(), flags=re.DOTALL)
    text = re.sub(r' id="[a-z]+[\w.]*_\d+"', "", text)
    text = re.sub(r"font-family: [^;\"]*", f"font-family: {FONT}", text)
    for name, (color, _) in COLOURS.items():
        text = text.replace(color, f"var(--{name})")
    return text
