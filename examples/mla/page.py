"""HTML pages without other files, for light and dark screens of any width: cards of text, tables
and pictures."""

import html
from collections.abc import Iterable, Mapping, Sequence
from string import Template

from matplotlib.figure import Figure

from examples.mla import cli, svg

PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
$colours
:root { --page: #f5f7fa; --quiet: #52606d; --mark: #dbe7ff; color-scheme: light dark; }
$dark { :root { --page: #12161c; --quiet: #a9b4c0; --mark: #2b4170; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
       font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 66rem; margin: 0 auto;
       padding: clamp(1rem, 4vw, 2.5rem) clamp(.75rem, 3vw, 2rem); }
h1 { margin: 0; font-size: 1.7rem; line-height: 1.25; }
h2 { margin: 0 0 .75rem; font-size: 1.2rem; }
h3 { margin: 1.25rem 0 .25rem; font-size: 1rem; }
p { margin: .25rem 0 1rem; max-width: 46rem; } .lead { font-size: 1.15rem; margin-top: .75rem; }
.quiet, figcaption { color: var(--quiet); font-size: .9rem; }
section { background: var(--card); border: 1px solid var(--grid); border-radius: 10px;
          padding: 1.25rem clamp(.9rem, 3vw, 1.5rem); margin: 1.25rem 0; }
.columns { display: grid; gap: 1.25rem clamp(1.25rem, 3vw, 2rem); margin: 1.25rem 0;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); }
.columns > section { margin: 0; } section .columns { margin: 0; }
figure { margin: 0; max-width: 32rem; } figcaption { margin-top: .5rem; }
svg { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--series-0); }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: .3rem .75rem .3rem 0; border-bottom: 1px solid var(--grid); text-align: left;
         vertical-align: top; font-weight: normal; overflow-wrap: anywhere; }
tbody th { color: var(--quiet); } thead th { font-weight: 600; }
.scroll td, .scroll th { white-space: nowrap; } .pairs th { width: 55%; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; padding: 1rem;
      background: var(--page); border-radius: 6px; font: 13px/1.5 ui-monospace, monospace; }
mark { background: var(--mark); color: inherit; } a { color: var(--series-0); }
</style>
</head>
<body>
<main>
<h1>$title</h1>
<p class="lead">$lead</p>
<p class="quiet">$about</p>
$sections
</main>
</body>
</html>
""")


def page(title: str, lead: str, about: str, sections: Sequence[str]) -> str:
    """A whole document: its title, what happened, where and when; `sections` are HTML."""
    return PAGE.substitute(
        title=escape(title),
        lead=escape(lead),
        about=escape(about),
        sections="\n".join(sections),
        colours=svg.colours(":root"),
        dark=svg.DARK,
    )


def escape(value: object) -> str:
    """A value as text in HTML: no part of it is a tag, and every character can be written."""
    return html.escape(cli.shown(str(value), keep="\n\t"))


def formatted(value: object) -> str:
    """A setting or a fact as a reader writes it."""
    match value:
        case None:
            return "none"
        case bool():
            return "yes" if value else "no"
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if value.is_integer() else f"{value:.4g}"
        case _:
            return str(value)


def section(heading: str, *body: str) -> str:
    """A card with a heading; `body` is HTML."""
    return "\n".join(["<section>", f"<h2>{escape(heading)}</h2>", *body, "</section>"])


def paragraph(text: str) -> str:
    """Text."""
    return f"<p>{escape(text)}</p>"


def pairs(rows: Iterable[tuple[object, object]]) -> str:
    """A table of labels and values."""
    lines = (f'<tr><th scope="row">{escape(k)}</th><td>{escape(v)}</td></tr>' for k, v in rows)
    return '<table class="pairs"><tbody>\n' + "\n".join(lines) + "\n</tbody></table>"


def table(label: str, header: Sequence[object], rows: Iterable[Sequence[object]]) -> str:
    """Rows of a label and values under a header, in a region of its own that scrolls on a narrow
    screen; `label` says what the table is."""
    head = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in header)
    lines = (
        f'<tr><th scope="row">{escape(first)}</th>'
        + "".join(f"<td>{escape(cell)}</td>" for cell in rest)
        + "</tr>"
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(label)}">\n'
        f"<table><thead><tr>{head}</tr></thead><tbody>\n"
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


def pictures(figures: Mapping[str, Figure], captions: Mapping[str, str]) -> str:
    """Figures beside or below one another.

    Args:
      figures: By what each shows, in a few words; unique in the page.
      captions: What is to be said below each, for those that need it.
    """
    shown = (
        f"<figure>{svg.inline(figure, label)}"
        + (f"<figcaption>{escape(captions[label])}</figcaption>" if label in captions else "")
        + "</figure>"
        for label, figure in figures.items()
    )
    return columns(*shown)


def columns(*parts: str) -> str:
    """Parts of a page beside one another, or below one another on a narrow screen."""
    return '<div class="columns">\n' + "\n".join(parts) + "\n</div>"
