"""Tables for people: in a terminal of any width, and as HTML in a notebook."""

import html
import shutil
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

# What a row says of itself: nothing, look at it, it is broken.
Mark = Literal["", "look", "bad"]

_LAST = 24  # characters that a last column may be folded to

# Colours of the notebook's own text and ground, so that both are right in dark mode too.
_STYLE = """<style>
.muonclip { overflow-x: auto; }
.muonclip table { border-collapse: collapse; margin: .5em 0; font-variant-numeric: tabular-nums; }
.muonclip caption { text-align: left; caption-side: bottom; white-space: pre-line; }
.muonclip caption.title { caption-side: top; font-weight: 600; }
.muonclip th, .muonclip td { text-align: left; vertical-align: top; white-space: pre-line;
  padding: .25em .75em; border-bottom: 1px solid rgba(128, 128, 128, .4); }
.muonclip thead th { font-weight: 600; } .muonclip tbody th { font-weight: normal; }
.muonclip .number { text-align: right; white-space: nowrap; }
.muonclip .look th { border-left: 4px solid #d97706; }
.muonclip .bad th { border-left: 4px solid #dc2626; }
.muonclip svg { display: block; max-width: 100%; height: auto; margin: .5em 0; }
</style>"""


@dataclass(frozen=True)
class Sheet:
    """One table. In a terminal that is too narrow for its columns each row is a paragraph.

    Attributes:
      headers: One for each column.
      rows: Their cells, the first of which names the row.
      title: What stands above it.
      caption: What stands below it.
      numbers: The headers of columns whose cells stand at the right.
      marks: One for each row; none: no row has one.
    """

    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    caption: str = ""
    numbers: Collection[str] = ()
    marks: Sequence[Mark] = ()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        *widths, last = (
            max(map(_width, column)) for column in zip(self.headers, *self.rows, strict=True)
        )
        needed = sum(widths) + min(last, _LAST) + 3 * len(self.headers) + 1
        yield self._columns() if needed <= options.max_width else self._paragraphs()

    def _columns(self) -> Table:
        table = Table(
            title=_plain(self.title),
            title_justify="left",
            caption=_plain(self.caption),
            caption_justify="left",
        )
        for header in self.headers:
            last = header == self.headers[-1]
            table.add_column(
                Text(header),
                justify="right" if header in self.numbers else "left",
                overflow="fold",
                no_wrap=not last,
            )
        for row in self.rows:
            table.add_row(*map(Text, row))
        return table

    def _paragraphs(self) -> Group:
        lines: list[RenderableType] = [Text(self.title)] if self.title else []
        for name, *cells in self.rows:
            told = (
                f"{header}: {cell.replace(chr(10), ', ')}"
                for header, cell in zip(self.headers[1:], cells, strict=True)
                if cell
            )
            lines += [
                Text(name, overflow="fold"),
                Padding(Text("; ".join(told), overflow="fold"), (0, 0, 0, 2)),
            ]
        return Group(*lines, *([Text(self.caption)] if self.caption else []))

    def html(self) -> str:
        """The table for screen readers too: a caption, and headers that say what they head."""
        heads = "".join(
            f"<th scope='col'{self._kind(header)}>{html.escape(header)}</th>"
            for header in self.headers
        )
        unmarked: list[Mark] = ["" for _ in self.rows]
        rows = "\n".join(map(self._row, self.rows, self.marks or unmarked))
        told = self.title or self.caption
        kind = " class='title'" if self.title else ""
        caption = f"<caption{kind}>{html.escape(told)}</caption>" if told else ""
        below = f"<p>{html.escape(self.caption)}</p>" if self.title and self.caption else ""
        body = f"<thead><tr>{heads}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
        return f"<table>{caption}{body}</table>{below}"

    def _row(self, row: Sequence[str], mark: Mark) -> str:
        name, *cells = row
        kinds = map(self._kind, self.headers[1:])
        told = "".join(
            f"<td{kind}>{html.escape(cell)}</td>" for kind, cell in zip(kinds, cells, strict=True)
        )
        kind = f" class='{mark}'" if mark else ""
        return f"<tr{kind}><th scope='row'>{html.escape(name)}</th>{told}</tr>"

    def _kind(self, header: str) -> str:
        return " class='number'" if header in self.numbers else ""


class Readable:
    """What is read as tables: printed, by `rich`, and in a notebook, there with its picture."""

    def _sheets(self) -> Sequence[Sheet]:
        raise NotImplementedError

    def _picture(self) -> str:
        """SVG, or nothing."""
        return ""

    def __rich__(self) -> Group:
        return Group(*self._sheets())

    def __str__(self) -> str:
        return as_text(self)

    def _repr_html_(self) -> str:
        return as_html((sheet.html() for sheet in self._sheets()), self._picture())


def number(value: float) -> str:
    """Three digits, and whole thousands: 0.0123, 41.2, 2204, 1.5e+06."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def as_text(renderable: RenderableType) -> str:
    """What `print` shows: as wide as the terminal, as wide as it needs where there is none."""
    width = shutil.get_terminal_size(fallback=(10_000, 24)).columns
    console = Console(width=width, color_system=None)
    with console.capture() as captured:
        console.print(renderable)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def as_html(tables: Iterable[str], picture: str) -> str:
    """What a notebook shows, without anything from elsewhere. It can be scrolled by keyboard, and
    has no empty line, so that it may stand in Markdown."""
    parts = ("<div class='muonclip' tabindex='0'>", _STYLE, *tables, picture, "</div>")
    return "\n".join(filter(None, parts))


def _plain(text: str) -> Text | None:
    """To rich `[in, out]` and names such as `a[/b]` are markup; to `Text` they are text."""
    return Text(text) if text else None


def _width(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))
