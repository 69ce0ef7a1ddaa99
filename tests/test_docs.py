"""Every Python block of the README and the docs runs, in order, and every command is checked."""

import json
import pathlib
import re

import pytest

import muonclip_jax as mc
from docs.tools.links import relink

ROOT = pathlib.Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks/records"
KINDS = ("attention", "embedding", "unembedding")
# A block may go on from those of the same name on another page: `<!-- test: linen, after PAGE -->`.
BLOCK = re.compile(
    r"<!-- test: (?P<name>[\w-]+)(?:, after (?P<after>\S+))? -->\n```python\n(?P<code>.*?)```",
    re.DOTALL,
)

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG = {"watching", "accumulation", "clips", "sharding"}  # pages that train models


def blocks(page: pathlib.Path, name: str) -> list[str]:
    """The blocks of a name on a page, behind those of the page that the first one goes on from."""
    found = [match for match in BLOCK.finditer(page.read_text()) if match["name"] == name]
    assert found, f"{page} has no block {name!r}"
    before = blocks(ROOT / "docs" / found[0]["after"], name) if found[0]["after"] else []
    return before + [match["code"] for match in found]


def every_name():
    for page in PAGES:
        for name in dict.fromkeys(match["name"] for match in BLOCK.finditer(page.read_text())):
            marks = [pytest.mark.slow] if page.stem in LONG else []
            yield pytest.param(page, name, marks=marks, id=f"{page.relative_to(ROOT)}-{name}")


@pytest.mark.parametrize(("page", "name"), [*every_name()])
def test_blocks_run(page, name):
    namespace = {"__name__": f"{page}:{name}"}
    for block in blocks(page, name):
        exec(compile(block, f"{page}:{name}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_python_block_is_left_out(page):
    text = page.read_text()
    assert text.count("```python") == len(BLOCK.findall(text))


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda page: page.name
)
def test_links_lead_to_files(page):
    """Within the repository; `make docs` checks the site's, with anchors."""
    found = []
    relink(
        page.read_text(), str(page.parent.relative_to(ROOT)), lambda *link: found.append(link) or ""
    )
    assert not [path for _, path, _ in found if not (ROOT / path).exists()]


def test_readme_is_read_in_a_minute():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_readme_s_figures_are_those_of_the_records():
    """What a newer record says, README must say too."""
    text = " ".join((ROOT / "README.md").read_text().split())
    coverage = json.loads((RECORDS / "2026-11-30-coverage.json").read_text())["libraries"].values()
    lost = [sum(each["misrouted by optax"].get(kind, 0) for each in coverage) for kind in KINDS]
    assert (
        "gives {:,} attention kernels to Adam, and {} embeddings and {} unemb".format(*lost) in text
    )
    right, all_ = (sum(each[key] for each in coverage) for key in ("right", "configurations"))
    assert f"In {all_} configurations" in text and f"parameter of {right} of them" in text

    step = json.loads((RECORDS / "2026-11-22-optimizer_step.json").read_text())["rows"][0]
    shares = [1 / step[f"ratio_vs_{peer}"] for peer in ("optax", "optax_bf16", "torch")]
    said = (
        "takes {:.2f} of the time of Optax's, {:.2f} of it in bfloat16, {:.2f} of PyTorch's"
        ", and {:.2f} of Optax's temporaries; with AVX2 only, {:.2f} and {:.2f} of Optax's"
    )
    avx2 = json.loads((RECORDS / "2026-12-01-optimizer_step-avx2.json").read_text())["rows"][0]
    shares += [step["temp_share_of_optax"]]
    shares += [1 / avx2["ratio_vs_optax"], avx2["temp_share_of_optax"]]
    assert said.format(*shares) in text

    moved = (on_an_h100("step", method)["hbm_bytes"] / 1e9 for method in ("ours", "optax"))
    said = "Compiled for an H100, it moves {:.1f} GB of memory where Optax's moves {:.1f}."
    assert said.format(*moved) in text


def on_an_h100(work, method, products="triton"):
    rows = json.loads((RECORDS / "2026-12-01-roofline-h100.json").read_text())["rows"]
    [row] = (
        row
        for row in rows
        if (row["work"], row["method"], row["products"]) == (work, method, products)
    )
    return row


@pytest.mark.parametrize("work", ["4096x4096", "4096x16384", "step"])
def test_performance_says_what_an_h100_would_do(work):
    text = (ROOT / "docs/performance.md").read_text()
    ours, optax = (on_an_h100(work, method) for method in ("ours", "optax"))
    figures = [
        (row["temp_bytes"] / 1e6, row["hbm_bytes"] / 1e9, sum(row["flops"].values()) / 1e12)
        for row in (ours, optax)
    ]
    label = work.replace("x", "×").replace("step", "a whole step, GPT-2 small's parameters")
    gigabytes = "{:.2f}" if figures[1][1] < 10 else "{:.1f}"
    row = "| {} | {:.0f} | {:.2f} | {:.2f} T | {:.0f} MB, " + gigabytes + " GB, {:.2f} T |"
    assert row.format(label, *figures[0], *figures[1]) in text
    if work == "step":
        ratios = [each["ratio_to_bound"] for each in (ours, optax)]
        assert "{:.2f} times that on an H100 (Optax {:.2f})".format(*ratios) in text


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    entries = set(re.findall(r"^::: muonclip_jax\.([\w.]+)$", text, re.MULTILINE))
    also = {"Layout", "Schedule"}  # shown as members of layouts and schedules
    assert {name for name in entries if not name.startswith("_")} | also == set(mc.__all__)
