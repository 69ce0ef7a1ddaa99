"""Tables for people, printed by rich."""

import shutil
from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.text import Text


def plain(cells: Iterable[str]) -> list[Text]:
    """Cells that show what they say: to rich `[in, out]` and names such as `a[/b]` are markup."""
    return [Text(cell) for cell in cells]


def as_text(renderable: RenderableType) -> str:
    """What `print` shows: as wide as the terminal, as wide as it needs where there is none."""
    width = shutil.get_terminal_size(fallback=(10_000, 24)).columns
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return captured.get().rstrip()
