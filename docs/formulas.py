"""For mkdocs: formulas in the pages become MathML when the site is built.

Browsers show MathML by themselves, so that no page asks another host for a script or a font. The
same `$...$` and `$$...$$` are shown by GitHub.
"""

import html
import re

from latex2mathml import converter
from mkdocs.exceptions import PluginError

# What pymdownx.arithmatex makes of them.
_FORMULA = re.compile(
    r'<span class="arithmatex">\\\((?P<inline>.*?)\\\)</span>'
    r'|<div class="arithmatex">\s*\\\[(?P<block>.*?)\\\]\s*</div>',
    re.DOTALL,
)


def on_page_content(content: str, *, page, config, files) -> str:
    """Called by mkdocs with the HTML of each page."""
    del config, files
    return _FORMULA.sub(lambda found: _typeset(found, page.file.src_uri), content)


def mathml(formula: str, display: str = "inline") -> str:
    """LaTeX as MathML; raises ValueError for what would be shown as it is written."""
    made = converter.convert(formula, display=display)
    if re.search(r"\\|&(?!#?\w+;)|<mi>&amp;</mi>", made):
        raise ValueError(f"latex2mathml knows not all of {formula!r}; it gives {made}")
    return made


def _typeset(found: re.Match, place: str) -> str:
    display = "inline" if found["block"] is None else "block"
    formula = html.unescape(found["inline"] or found["block"]).strip()
    try:
        return mathml(formula, display)
    except Exception as error:  # latex2mathml has many of its own
        raise PluginError(f"{place}: the formula {formula!r}: {error}") from error
