"""The notebooks run, and what they show is what the code of today gives."""

import json
import pathlib
import re

import nbclient
import nbformat
import pytest

from docs.tools.notebooks import markdown

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[-+]?\d+)?")
NUMBERS = re.compile(f"{NUMBER.pattern}(?:(?:, | … | to | -> )?{NUMBER.pattern})*")
# Which heads are to be looked at, and by how much a training explodes, rounding decides: other
# processors, threads and versions of JAX round otherwise.
TO_LOOK_AT = re.compile(r"(above|exploding|clips without effect): [\d, ]+;?")
# The processor decides what "auto" is.
AUTO = re.compile(
    r"in \w+, as a CPU does with products of \d+ GFLOP/s in bfloat16 and \d+ in float32"
)
ALIKE = 2.0  # at most three times as large


def read_texts(notebook):
    """What each cell shows in words: what it printed, and its tables without their tags."""
    for cell in notebook.cells:
        told = []
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            page = data.get("text/html", "" if data else output.get("text", ""))
            text = re.sub(r"<style>.*?</style>|<svg.*?</svg>|<[^>]*>", " ", page, flags=re.DOTALL)
            told += TO_LOOK_AT.sub("", text).split()
        yield AUTO.sub("", " ".join(told))


@pytest.mark.slow
@every_notebook
def test_running_it_again_shows_the_same(file, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    kept = nbformat.read(file, as_version=4)
    again = nbformat.read(file, as_version=4)
    folder = {"metadata": {"path": str(ROOT)}}
    nbclient.NotebookClient(again, timeout=300, resources=folder).execute()
    for before, after in zip(read_texts(kept), read_texts(again), strict=True):
        assert NUMBERS.sub("#", before) == NUMBERS.sub("#", after), "make notebooks, and look at it"
        numbers = [list(map(float, NUMBER.findall(text))) for text in (before, after)]
        if len(numbers[0]) == len(numbers[1]):  # lowest and highest may round to one number
            assert numbers[0] == pytest.approx(numbers[1], rel=ALIKE, abs=1)


@every_notebook
def test_it_was_run_from_top_to_bottom_and_makes_a_page(file):
    notebook = json.loads(file.read_text())
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    page = markdown(notebook)
    assert page.startswith("# ") and "<table>" in page and "%matplotlib" not in page
    assert len(page) < 1_000_000


def test_a_notebook_becomes_a_page():
    picture = {"output_type": "display_data", "data": {"image/svg+xml": ["<svg/>"]}}
    cells = [
        {"cell_type": "markdown", "source": ["# A\n", "b"], "metadata": {}},
        {
            "cell_type": "code",
            "source": ["%magic\n", "print(1)"],
            "metadata": {"alt": 'a "line"'},
            "outputs": [{"output_type": "stream", "text": ["1\n"]}, picture],
        },
    ]
    assert markdown({"cells": cells}) == (
        "# A\nb\n\n```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
        '<img alt="a &quot;line&quot;" src="data:image/svg+xml;base64,PHN2Zy8+">\n'
    )
    cells[1]["metadata"] = {}
    with pytest.raises(ValueError, match="picture without words"):
        markdown({"cells": cells})
    cells[1]["outputs"] = [{"output_type": "stream", "text": text} for text in ("1\n", "2\n")]
    assert "```text\n1\n2\n```" in markdown({"cells": cells})
    cells[1]["outputs"] = [{"output_type": "error"}]
    with pytest.raises(ValueError, match=r"kind error of:\n%magic"):
        markdown({"cells": cells})
