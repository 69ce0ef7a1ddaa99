"""HTML pages without other files: cards of tables and pictures."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from string import Template

from matplotlib.figure import Figure

from examples.mla import cli

PAGE = Template("""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
body { margin: 0; background: #f5f7fa; color: #1f2933; font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { margin: 0; font-size: 1.9rem; } h2 { margin: 0 0 .75rem; font-size: 1.2rem; }
p { margin: .25rem 0 1rem; } .lead { color: #52606d; max-width: 46rem; }
section { background: #fff; border: 1px solid #e4e7eb; border-radius: 10px;
          padding: 1.25rem 1.5rem; margin: 1.25rem 0; }
figure { margin: 0; } img { display: block; width: 100%; }
figcaption { color: #52606d; font-size: .9rem; margin-top: .5rem; max-width: 52rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid #eef1f4; text-align: left;
         vertical-align: top; font-weight: normal; overflow-wrap: anywhere; }
tbody th { color: #52606d; width: 40%; } thead th { font-weight: 600; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 1rem;
      background: #f5f7fa; border-radius: 6px; font: 13px/1.5 ui-monospace, monospace; }
mark { background: #e0eaff; color: inherit; }
</style>
<main>
<h1>$title</h1>
<p class="lead">$lead</p>
$sections
</main>
</html>
""")


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """A whole document; `sections` are HTML."""
    return PAGE.substitute(title=escape(title), lead=escape(lead), sections="\n".join(sections))


def escape(value: object) -> str:
    """A value as text in HTML: no part of it is a tag, and every character can be written."""
    return html.escape(cli.shown(str(value), keep="\n\t"))


def section(heading: str, body: str) -> str:
    """A card with a heading; `body` is HTML."""
    return f"<section>\n<h2>{escape(heading)}</h2>\n{body}\n</section>"


def table(rows: Iterable[Sequence[object]], header: Sequence[object] = ()) -> str:
    """Rows of a label and one or more values."""
    lines = [_row(cells, "td") for cells in rows]
    head = f"<thead>{_row(header, 'th')}</thead>\n" if header else ""
    return f"<table>\n{head}<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"


def _row(cells: Sequence[object], tag: str) -> str:
    label, *values = map(escape, cells)
    return f"<tr><th>{label}</th>" + "".join(f"<{tag}>{v}</{tag}>" for v in values) + "</tr>"


def picture(figure: Figure, caption: str) -> str:
    """A figure as an image inside the page."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    data = base64.b64encode(buffer.getvalue()).decode()
    text = escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
