"""What people see of reports: in a terminal of any width, in a notebook, and as a repr."""

import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import rich

import muonclip_jax as mc
from muonclip_jax._core.pictures import RED
from muonclip_jax._core.tables import Readable

_NO_LINES = str.maketrans("", "", " │┃━─┏┡└┓┩┘")
SVG = "{http://www.w3.org/2000/svg}"
LAYOUT = mc.layouts.mha()
ATTENTION = {
    "attn<b>": {
        **{name: {"kernel": jnp.ones((3, 8, 4, 2))} for name in ("query", "key", "value")},
        "out": {"kernel": jnp.ones((3, 4, 2, 8))},
    }
}
MAXIMA = jnp.array([[1.0, 2, 3, 4], [5, 6, 7, 800], [9, jnp.nan, 11, 12]])
REPORT = mc.attention_report(ATTENTION, None, {"attn<b>": {"max_logits": MAXIMA}}, LAYOUT)
CLIP = mc.clip_report(mc.qk_clip(LAYOUT).init(ATTENTION))
COORDINATES = mc.CoordinateCheck(
    (64, 128),
    {"up": np.ones((2, 1))},
    {"up": np.array([[[1.0]], [[2.0]]])},
    tolerance=0.25,
)
SHOWN = {
    "describe": mc.describe(ATTENTION, LAYOUT),
    "attention_report": REPORT,
    "clip_report": CLIP,
    "coordinate_check": COORDINATES,
    "layout": LAYOUT,
    "schedule": mc.schedules.polar_express(),
}


class Page(HTMLParser):
    """Tags that are open, and what headers and cells say."""

    def __init__(self, text):
        super().__init__()
        self.open, self.headers, self.outside = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.headers += [dict(attrs).get("scope")] * (tag == "th")
        self.outside += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def svg_of(shown):
    text = shown._repr_html_()
    return ET.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])


@pytest.mark.parametrize("name", SHOWN)
def test_notebooks_show_a_whole_page_with_nothing_from_elsewhere(name):
    text = SHOWN[name]._repr_html_()
    page = Page(text)
    assert page.open == [] and page.outside == []
    assert page.headers and set(page.headers) == {"col", "row"} and "<caption" in text
    assert "attn<b>" not in text and "\n\n" not in text


@pytest.mark.parametrize("name", SHOWN)
def test_reprs_are_short(name):
    assert "\n" not in repr(SHOWN[name]) and len(repr(SHOWN[name])) <= 120


def test_reprs_say_what_it_is():
    assert repr(SHOWN["describe"]) == "Description(4 parameters: 4 muon, 0 other, 0 frozen)"
    assert repr(REPORT) == "AttentionReport(heads={'attn<b>': [3, 4]})"
    assert repr(CLIP) == "ClipReport(signals={'max_logits': ['attn<b>']})"
    assert repr(LAYOUT) == "Layout('mha', q: query, k: key, v: value, o: out)"
    (block,) = mc.layouts.find_blocks(LAYOUT, ATTENTION)
    assert repr(block) == "Block('attn<b>', layouts.mha(), heads=[3, 4])"
    assert jax.eval_shape(lambda: repr(REPORT) and 1.0).shape == ()


@pytest.mark.parametrize("columns", [30, 60, 90, 200])
@pytest.mark.parametrize("name", [name for name in SHOWN if isinstance(SHOWN[name], Readable)])
def test_a_terminal_of_any_width_shows_every_word(name, columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = str(SHOWN[name]).splitlines()
    assert max(map(rich.cells.cell_len, lines)) <= columns
    together = "".join(lines).translate(_NO_LINES)
    for sheet in SHOWN[name]._sheets():
        cells = [cell for row in sheet.rows for cell in row]
        for text in (*cells, sheet.title, sheet.caption):
            assert all(word in together for word in text.split()), text


def test_a_narrow_terminal_has_a_paragraph_for_each_row(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    first, second, *_ = str(SHOWN["describe"]).splitlines()
    assert first == "attn<b>/key/kernel"
    assert second == "  shape: (3, 8, 4, 2); optimizer: muon; matrices [in, out]:"


def test_the_map_of_heads_shows_each_in_its_colour():
    cells = svg_of(REPORT).findall(f"{SVG}rect")
    told = [cell.find(f"{SVG}title").text for cell in cells]
    assert told[0] == "attn<b>/0, 0: 1" and told[7] == "attn<b>/1, 3: 800" and len(told) == 12
    opacity = [float(cell.get("fill-opacity")) for cell in cells]
    assert opacity[0] == 0.1 and opacity[7] == 1.0 and opacity[1] < opacity[11] < 0.2
    assert [cell.get("fill") == RED for cell in cells] == [i == 9 for i in range(12)]
    framed = [i for i, cell in enumerate(cells) if cell.get("stroke") != "none"]
    assert framed == [7]  # above the threshold; of NaN nothing is known
    text = REPORT._repr_html_()
    assert text.count("class='look'") == 1 and text.count("class='bad'") == 1


def test_a_schedule_shows_its_polynomial():
    schedule = mc.schedules.jordan()
    (line,) = svg_of(schedule).findall(f"{SVG}polyline")
    points = np.array([pair.split(",") for pair in line.get("points").split()], float)
    x, y = points.T
    sigma = np.geomspace(schedule.lower / 10, 1, 200)
    assert (np.diff(x) > 0).all()
    # Upwards is smaller: the picture is a line through p(σ).
    assert np.corrcoef(y, schedule.apply(sigma))[0, 1] < -0.9999
    assert "3.4445" in schedule._repr_html_()
