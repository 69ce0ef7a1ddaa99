"""Tables for people, printed by rich."""

import shutil

from rich.console import Console, RenderableType


def as_text(renderable: RenderableType) -> str:
    """What `print` shows: as wide as the terminal, as wide as it needs where there is none."""
    width = shutil.get_terminal_size(fallback=(10_000, 24)).columns
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().rstrip()
