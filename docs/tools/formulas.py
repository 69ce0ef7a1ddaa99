"""An extension of Python-Markdown: formulas in the pages become MathML when the site is built.

Browsers show MathML by themselves, so that no page asks another host for a script or a font. The
same `$...$` and `$$...$$` are shown by GitHub.
"""

import html
import re

from latex2mathml import converter
from markdown import Markdown
from markdown.extensions import Extension
from markdown.postprocessors import Postprocessor

# What pymdownx.arithmatex makes of them.
_FORMULA = re.compile(
    r'<span class="arithmatex">\\\((?P<inline>.*?)\\\)</span>'
    r'|<div class="arithmatex">\s*\\\[(?P<block>.*?)\\\]\s*</div>',
    re.DOTALL,
)


class _Typeset(Postprocessor):
    """Runs on the HTML of a page, behind all others."""

    def run(self, text: str) -> str:
        return _FORMULA.sub(_typeset, text)


class Formulas(Extension):
    """Beside pymdownx.arithmatex with `generic: true`."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.postprocessors.register(_Typeset(md), "formulas", priority=-100)


def makeExtension(**options) -> Formulas:
    """What Python-Markdown calls."""
    return Formulas(**options)


def mathml(formula: str, display: str = "inline") -> str:
    """LaTeX as MathML; raises ValueError for what would be shown as it is written."""
    made = converter.convert(formula, display=display)
    if re.search(r"\\|&(?!#?\w+;)|<mi>&amp;</mi>", made):
        raise ValueError(f"latex2mathml knows not all of {formula!r}; it gives {made}")
    return made


def _typeset(found: re.Match) -> str:
    display = "inline" if found["block"] is None else "block"
    formula = html.unescape(found["inline"] or found["block"]).strip()
    try:
        return mathml(formula, display)
    except Exception as error:  # latex2mathml has many of its own
        raise ValueError(f"The formula {formula!r}: {error}") from error
