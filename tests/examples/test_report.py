"""The report and the metrics that it is made from."""

import io
import json
import math
import re
import shutil

import numpy as np
import pytest

from examples.mla import figures, metrics, page, report
from examples.mla.cli import InputError
from examples.mla.metrics import select

SECTIONS = [
    "Result",
    "Loss",
    "Max logits",
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


def test_every_section_is_there_with_its_picture(finished):
    html = (finished / "report.html").read_text()
    assert re.findall("<h2>(.*)</h2>", html) == SECTIONS
    assert html.count("<img ") == 5
    assert "muonclip on MLA" in html and "after 6 steps on" in html


def test_the_page_needs_nothing_else(finished):
    html = (finished / "report.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,30})', html)
    assert sources and all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    assert "<script" not in html and "@import" not in html


def test_it_is_rebuilt_from_the_metrics_alone(finished, tmp_path, capsys):
    shutil.copy(finished / metrics.FILE, tmp_path)
    assert report.main([str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    words = lambda path: re.sub(r"base64,[^\"]*", "", path.read_text())  # noqa: E731
    assert words(tmp_path / "report.html") == words(finished / "report.html")


def test_the_text_is_escaped(rows, tmp_path):
    end = {**rows[-1], "prompt": "<b>", "sample": "a < b && <script>alert(1)</script>"}
    html = rebuilt([*rows[:-1], end], tmp_path)
    assert "<mark>&lt;b&gt;</mark>a &lt; b &amp;&amp; &lt;script&gt;alert(1)" in html


def test_a_run_that_does_not_clip_says_so(rows, tmp_path):
    free = [{k: v for k, v in row.items() if k != "gamma"} for row in rows]
    html = rebuilt(free, tmp_path)
    assert "<p>This run does not clip.</p>" in html and html.count("<img ") == 4
    assert "head-steps clipped" not in html


def test_a_run_that_is_not_finished_has_a_report(rows, tmp_path):
    html = rebuilt(rows[:4], tmp_path)
    assert "The run is not finished yet." in html and "after 2 steps on" in html


def test_a_diverged_run_has_a_report(rows, tmp_path):
    steps = [dict(row) for row in rows]
    for row in steps:
        if row["event"] in ("step", "eval") and row["step"] > 2:
            row["loss"] = math.nan
        if row["event"] == "step" and row["step"] == 4:
            row["max_logits"] = {k: [math.inf, math.nan] for k in row["max_logits"]}
    html = rebuilt(steps, tmp_path)
    assert re.findall("<h2>(.*)</h2>", html) == SECTIONS
    assert "<td>nan</td>" in html


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


def test_tables_escape_and_align():
    html = page.table([("a<b", 1, "x & y")], header=("", "one", "two"))
    assert "<tr><th>a&lt;b</th><td>1</td><td>x &amp; y</td></tr>" in html
    assert "<thead><tr><th></th><th>one</th><th>two</th></tr></thead>" in html


def test_nothing_to_report(finished, rows, tmp_path, capsys):
    assert report.main([str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.endswith(
        "nowhere/metrics.jsonl: no such file; give the folder of a run\n"
    )
    rebuilt(rows[:3], tmp_path)
    metrics.rewind(tmp_path, 0)
    assert report.main([str(tmp_path)]) == 2
    assert "its metrics hold no step yet; train first" in capsys.readouterr().err
