"""docs/tools/formulas.py: LaTeX in the pages becomes MathML, or the build stops."""

import pathlib
import re

import pytest

pytest.importorskip("latex2mathml", reason="of the docs extra")
markdown = pytest.importorskip("markdown", reason="of the docs extra")

DOCS = pathlib.Path(__file__).parent.parent / "docs"
PAGES = sorted(page for page in DOCS.rglob("*.md") if "$" in page.read_text())


def built(text):
    arithmatex = {"pymdownx.arithmatex": {"generic": True}}
    names = ["tables", "pymdownx.superfences", "pymdownx.arithmatex", "docs.tools.formulas"]
    return markdown.markdown(text, extensions=names, extension_configs=arithmatex)


def test_formulas_in_lines_in_tables_and_on_their_own():
    html = built("Of $a < b$.\n\n$$\\sqrt{n}$$\n\n| a | b |\n| --- | --- |\n| $x_i$ | `$y$` |\n")
    assert re.findall(r'display="(\w+)"', html) == ["inline", "block", "inline"]
    assert "<mo>&#x0003C;</mo>" in html and "<msqrt>" in html and "<msub>" in html
    assert "$y$" in html  # code stays code
    assert "arithmatex" not in html


@pytest.mark.parametrize(
    "formula", [r"\unheard{x}", r"\begin{aligned} a &= b \end{aligned}", r"\frac"]
)
def test_what_is_not_understood_stops_the_build_with_the_formula(formula):
    with pytest.raises(ValueError, match="The formula ") as error:
        built(f"$${formula}$$")
    assert repr(formula) in str(error.value)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_no_formula_of_the_pages_is_left_as_it_is_written(page):
    html = built(page.read_text())
    text = re.sub(r"<(pre|code).*?</\1>", "", html, flags=re.DOTALL)
    assert "$" not in text
