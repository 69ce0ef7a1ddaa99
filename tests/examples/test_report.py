"""The report and the metrics that it is made from."""

import io
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from examples.mla import figures, metrics, page, report, svg, train
from examples.mla.cli import InputError
from examples.mla.metrics import select

SECTIONS = [
    "Largest logit",
    "With and without the clip",
    "Result",
    "Loss",
    "Heads",
    "Clip factors",
    "Participation ratio",
    "Sample",
    "Settings",
]


@pytest.fixture
def rows(finished):
    return metrics.read(finished)


def rebuilt(rows, tmp_path):
    with (tmp_path / metrics.FILE).open("w") as file:
        for row in rows:
            metrics.write(file, row)
    return report.build(tmp_path).read_text()


def headings(html):
    return re.findall("<h2>(.*)</h2>", html)


def pictures(html):
    """What each picture shows."""
    return re.findall('<svg role="img" aria-label="([^"]*)"', html)


def lead(html):
    return re.search('<p class="lead">(.*)</p>', html)[1]


def test_every_section_is_there_with_its_pictures(finished):
    html = (finished / "report.html").read_text()
    assert headings(html) == SECTIONS
    assert pictures(html) == [
        "Largest max logit of any head, over steps",
        "Share of heads clipped, over steps",
        "Loss",
        "Max logits of layers/0/attn",
        "Clip factors of heads, over steps",
        "Participation ratio of each layer&#x27;s keys, over steps",
    ]
    assert "muonclip on MLA" in html


def test_it_opens_with_what_happened(finished, rows):
    first, *_, last = metrics.column(select(rows, "eval"), "loss")
    steps = select(rows, "step")
    largest = metrics.peak(steps).max()
    clipped = sum(row["heads_clipped"] for row in steps) / 12
    assert lead((finished / "report.html").read_text()) == (
        f"In 6 steps the held-out loss fell from {first:.2f} to {last:.2f} nats per token; QK-Clip "
        f"scaled {clipped:.1%} of all head-steps down, and the largest attention logit was "
        f"{largest:.1f}, {largest / 0.5:.2f} times the threshold of 0.5."
    )


def test_it_says_where_and_when_and_how_long_but_no_path(finished, rows, text_file):
    html = (finished / "report.html").read_text()
    said = re.search('<p class="quiet">(.*)</p>', html)[1]
    assert said.startswith("Text: text.txt · device: cpu · JAX ")
    assert re.search(r" · \d+ s in training steps · started \d{4}-\d\d-\d\d \d\d:\d\d UTC", said)
    assert f"commit {train.commit()}" in said
    for place in (text_file.parent, finished, Path.cwd()):
        assert str(place) not in html


def test_the_page_needs_nothing_else(finished):
    html = (finished / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert sources and all(source.startswith("#") for source in sources)  # within its pictures
    assert "<script" not in html and "@import" not in html and "<img" not in html
    assert set(re.findall(r"url\(([^)]{0,20})", html)) == {
        f"#{clip}" for clip in re.findall('<clipPath id="([^"]*)"', html)
    }


def test_pictures_follow_the_page_in_the_dark_and_their_text_is_text(finished):
    html = (finished / "report.html").read_text()
    style, body = html.split("</style>", 1)
    assert "@media (prefers-color-scheme: dark)" in style
    assert not re.search("(fill|stroke): #", body)  # every colour has a name
    assert set(re.findall(r"var\(--([\w-]+)\)", body)) <= set(re.findall(r"--([\w-]+): #", style))
    assert re.search("<text [^>]*>largest max logit</text>", body)
    ids = re.findall(' id="([^"]*)"', body)
    assert ids and len(ids) == len(set(ids))


def contrast(one, other):
    """WCAG 2's ratio of two colours, `#rrggbb`."""

    def luminance(color):
        channels = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) / 255
        linear = np.where(channels > 0.04045, ((channels + 0.055) / 1.055) ** 2.4, channels / 12.92)
        return linear @ [0.2126, 0.7152, 0.0722]

    high, low = sorted([luminance(one), luminance(other)], reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("dark", [False, True])
def test_colours_stand_out_from_the_background(dark):
    colours = {name: both[dark] for name, both in svg.COLOURS.items()}
    assert contrast(colours["ink"], colours["card"]) > 7
    lines = [name for name in colours if name.startswith("series") or name == "warning"]
    assert len(lines) == 9 and all(contrast(colours[n], colours["card"]) > 3 for n in lines)


def many(rows, heads, layers):
    """The same run with more heads and layers, each maximum another."""

    def wider(row):
        if row["event"] != "step":
            return row
        names = [f"layers/{i}/attn" for i in range(layers)]
        grid = 0.3 + 0.001 * (np.arange(heads) + heads * np.arange(layers)[:, None])
        values = grid * (1 + row["step"])
        gamma = np.minimum(1, 0.5 / values)
        return {
            **row,
            "max_logits": dict(zip(names, values.tolist(), strict=True)),
            "gamma": dict(zip(names, gamma.tolist(), strict=True)),
        }

    return [wider(row) for row in rows]


def test_heads_are_told_apart_by_colour_and_name(rows, tmp_path):
    html = rebuilt(many(rows, heads=8, layers=2), tmp_path)
    panel = html.split("Max logits of layers/1/attn")[1].split("</svg>")[0]
    assert [name for name in re.findall(r">(head \d)<", panel)] == [f"head {i}" for i in range(8)]
    assert {f"series-{i}" for i in range(8)} <= set(re.findall(r"var\(--([\w-]+)\)", panel))
    assert '<th scope="col">head 7</th>' in html


def test_many_heads_and_layers_are_summarised(rows, tmp_path):
    html = rebuilt(many(rows, heads=16, layers=20), tmp_path)
    assert len(html) < 1_000_000
    shown = [name for name in pictures(html) if name.startswith("Max logits of")]
    assert len(shown) == figures.PANELS and shown[-1] == "Max logits of layers/19/attn"
    assert "Shown are the 12 of 20 layers with the largest." in html
    assert "lowest to highest of 16" in html and "head 8" not in html
    head = re.findall('<th scope="col">(.*?)</th>', html)
    assert head == ["layer", "lowest", "median", "highest"]
    low, high = (7 * (0.3 + 0.001 * (16 * 19 + head)) for head in (0, 15))
    assert f"attn</th><td>{low:.2f}</td>" in html and f"<td>{high:.2f}</td></tr>" in html


def compared(tmp_path, rows, inside="compare", **changed):
    """Beside the run in `tmp_path / "run"`, one with the clip and one without, changed."""
    for name in ("muonclip", "muon"):
        run_dir = tmp_path / inside / name
        run_dir.mkdir(parents=True)
        with (run_dir / metrics.FILE).open("w") as file:
            for row in rows:
                if row["event"] == "start":
                    row = {**row, "settings": {**row["settings"], "optimizer": name, **changed}}
                metrics.write(file, row)
    (tmp_path / "run").mkdir(exist_ok=True)
    return tmp_path / "run"


WITHOUT = "Not tried with this model beside this run: make compare"


def test_a_report_shows_what_happens_without_the_clip_where_compare_tried_it(rows, tmp_path):
    run_dir = compared(tmp_path, rows, learning_rate=0.25, seed=1_000)
    html = rebuilt(rows, run_dir)
    assert "Largest max logit of any head, with and without the clip" in pictures(html)
    assert ">with QK-Clip (muonclip)</text>" in html and ">without it (muon)</text>" in html
    assert "After the warm-up, at a threshold τ of 0.5: with muonclip the largest logit" in html
    assert "learning rate 0.25 (here 0.1), seed 1,000 (here 0)" in html and WITHOUT not in html


def test_the_nearest_comparison_is_shown(rows, tmp_path):
    compared(tmp_path, rows, inside="far", steps=9, seed=3)
    compared(tmp_path, rows, inside="near", steps=9)
    html = rebuilt(rows, compared(tmp_path, rows, inside="other", steps=9, learning_rate=1.0))
    assert "Shown is the comparison “near”, with the same model; it has steps 9 (here 6)." in html


def test_a_run_of_a_comparison_shows_the_other(rows, tmp_path):
    compared(tmp_path, rows)
    html = report.build(tmp_path / "compare" / "muon").read_text()
    assert "Shown is the comparison “compare”: the same settings, seed and batches." in html


NO_COMPARISON = {
    "another model": lambda d, rows: compared(d, rows, model={"d_model": 3}),
    "another threshold": lambda d, rows: compared(d, rows, threshold=3),
    "not finished": lambda d, rows: compared(d, rows[:-1]),
    "no start": lambda d, rows: compared(d, rows[1:]),
    "one alone": lambda d, rows: shutil.rmtree(compared(d, rows).parent / "compare" / "muon"),
    "another program's": lambda d, rows: compared(d, [{"event": "start", "settings": {}}]),
}


@pytest.mark.parametrize("make", NO_COMPARISON.values(), ids=NO_COMPARISON)
def test_what_is_no_comparison_of_this_model_is_not_shown(rows, tmp_path, make):
    make(tmp_path, rows)
    assert WITHOUT in rebuilt(rows, tmp_path / "run")


def test_it_is_rebuilt_from_the_metrics_alone(finished, tmp_path, capsys):
    shutil.copy(finished / metrics.FILE, tmp_path)
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == (finished / "report.html").read_text()


def test_the_text_is_escaped(rows, tmp_path):
    end = {**rows[-1], "prompt": "<b>", "sample": "a < b && <script>alert(1)</script>"}
    html = rebuilt([*rows[:-1], end], tmp_path)
    assert "<mark>&lt;b&gt;</mark>a &lt; b &amp;&amp; &lt;script&gt;alert(1)" in html


def test_a_run_that_does_not_clip_says_so(rows, tmp_path):
    free = [{k: v for k, v in row.items() if k != "gamma"} for row in rows]
    html = rebuilt(free, tmp_path)
    assert "<p>This run does not clip.</p>" in html and len(pictures(html)) == 4
    assert "head-steps" not in html and "; nothing was clipped, and the largest" in lead(html)


def test_a_run_that_is_not_finished_has_a_report(rows, tmp_path):
    html = rebuilt(rows[:4], tmp_path)
    assert "The run is not finished yet." in html
    assert lead(html).startswith("In 2 of 6 steps the training loss ")


def test_a_diverged_run_has_a_report(rows, tmp_path):
    steps = [dict(row) for row in rows]
    for row in steps:
        if row["event"] in ("step", "eval") and row["step"] > 2:
            row["loss"] = math.nan
        if row["event"] == "step" and row["step"] == 4:
            row["max_logits"] = {k: [math.inf, math.nan] for k in row["max_logits"]}
    html = rebuilt(steps, tmp_path)
    assert headings(html) == SECTIONS
    assert "<td>nan</td>" in html and "the held-out loss stopped being a number" in lead(html)


def test_the_summary_is_what_the_rows_say(rows):
    summary = dict(metrics.summary(rows))
    steps = select(rows, "step")
    assert summary["steps"] == "6" and summary["tokens"] == "96"
    largest = max(max(heads) for row in steps for heads in row["max_logits"].values())
    assert summary["largest max logit"] == f"{largest:.2f}"
    clipped = sum(row["heads_clipped"] for row in steps)
    assert summary["head-steps clipped"] == f"{clipped / 12:.1%}"
    loss = select(rows, "eval")[-1]["loss"]
    bits = loss / math.log(2) / rows[0]["facts"]["bytes_per_token"]
    assert summary["validation bits per byte"] == f"{bits:.3f}"
    assert summary["validation perplexity"] == f"{math.exp(loss):.4g}"


def test_the_rate_leaves_out_steps_that_compiled():
    step = {"tokens": 10, "compiled": False}
    rows = [{**step, "seconds": 100, "compiled": True}, {**step, "seconds": 2}]
    assert metrics.tokens_per_second(rows) == 5
    assert metrics.tokens_per_second(rows[:1]) == 0.1  # better than none


def test_numbers_that_are_not_finite_are_null():
    file = io.StringIO()
    metrics.write(file, {"a": np.float32("nan"), "b": {"c": np.array([1.0, np.inf])}, "d": (2,)})
    assert json.loads(file.getvalue()) == {"a": None, "b": {"c": [1.0, None]}, "d": [2]}


def test_a_line_cut_short_is_left_out_and_a_bad_one_is_named(rows, tmp_path):
    rebuilt(rows, tmp_path)
    with (tmp_path / metrics.FILE).open("a") as file:
        file.write('{"event": "st')
    assert metrics.read(tmp_path) == rows
    (tmp_path / metrics.FILE).write_text("no metrics\nat all\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl, line 1: not the metrics of a run"):
        metrics.read(tmp_path)


def test_rewinding_keeps_what_was_recorded_up_to_the_step(rows, tmp_path):
    rebuilt(rows, tmp_path)
    metrics.rewind(tmp_path, 3)
    kept = metrics.read(tmp_path)
    assert kept == rows[:6] and kept[-1]["event"] == "eval"
    metrics.rewind(tmp_path, 3)
    assert metrics.read(tmp_path) == kept


def test_curves_are_thinned_without_losing_a_peak():
    values = np.zeros(10_000)
    values[4321] = 7
    thin = figures.thin(values, np.nanmax)
    assert len(thin) == figures.POINTS and thin.max() == 7
    np.testing.assert_array_equal(figures.thin(np.arange(5.0)), np.arange(5.0))
    assert np.isnan(figures.thin(np.full(3, np.nan))).all()


def test_the_running_mean_starts_without_bias():
    np.testing.assert_allclose(figures.running_mean(np.full(5, 3.0)), 3.0, rtol=1e-12)  # float64
    assert figures.running_mean(np.array([1.0, 2.0]))[0] == 1


def test_tables_escape_and_have_headers():
    html = page.table("a<b", ["", "one", "two"], [("a<b", 1, "x & y")])
    assert '<th scope="row">a&lt;b</th><td>1</td><td>x &amp; y</td></tr>' in html
    assert '<th scope="col">one</th><th scope="col">two</th></tr></thead>' in html
    assert 'role="region" tabindex="0" aria-label="a&lt;b"' in html
    assert page.pairs([("a", "<")]).count('<th scope="row">a</th><td>&lt;</td>') == 1


def test_numbers_are_written_for_readers():
    values = (None, True, False, 12345, 0.0123456, 10_000.0, "text")
    expected = ["none", "yes", "no", "12,345", "0.01235", "10,000", "text"]
    assert [page.formatted(value) for value in values] == expected
    assert [report.duration(s) for s in (3.4, 171, 7260)] == ["3 s", "2 min 51 s", "2 h 1 min"]


def test_nothing_to_report(finished, rows, tmp_path, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.endswith(
        "nowhere/metrics.jsonl: no such file; give the folder of a run\n"
    )
    rebuilt(rows[:3], tmp_path)
    metrics.rewind(tmp_path, 0)
    assert report.main([str(tmp_path)]) == 2
    assert "its metrics hold no step yet; train first" in capsys.readouterr().err
