"""The same run with and without QK-Clip."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from examples.mla import compare, metrics
from examples.mla.metrics import column, select

HIGH = {
    "steps": 100,
    "learning_rate": 0.04,
    "warmup": 10,
    "threshold": 2,
    "batch_size": 16,
    "context_length": 16,
    "save_every": 100,
    "eval_every": 100,
}


@pytest.fixture(scope="module")
def folder(flags, tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare") / "both"
    assert compare.main(flags(folder, **HIGH)) == 0
    return folder


def peaks(folder, name):
    """After the warm-up, in units of the threshold."""
    steps = select(metrics.read(folder / name), "step")
    return metrics.peak(steps)[HIGH["warmup"] :] / HIGH["threshold"]


@pytest.mark.slow
def test_muonclip_stays_near_the_threshold_that_muon_alone_passes_threefold(folder):
    # Measured: 1.2 with the clip, in the median 1.05, and 4.7 without. A maximum is of the step's
    # own batch, before its clip, so it overshoots by what one step at this rate can add.
    clipped, free = peaks(folder, "muonclip"), peaks(folder, "muon")
    assert clipped.max() < 1.4 and np.median(clipped) < 1.15
    assert free.max() > 3


@pytest.mark.slow
def test_only_the_clip_differs(folder):
    clipped, free = (select(metrics.read(folder / n), "step") for n in ("muonclip", "muon"))
    assert clipped[0]["loss"] == free[0]["loss"]
    assert clipped[0]["max_logits"] == free[0]["max_logits"]
    np.testing.assert_array_equal(column(clipped, "learning_rate"), column(free, "learning_rate"))
    settings = [metrics.read(folder / n)[0]["settings"] for n in ("muonclip", "muon")]
    assert {k for k in settings[0] if settings[0][k] != settings[1][k]} == {"optimizer"}


@pytest.mark.slow
def test_the_report_has_both_in_one_picture_and_the_numbers(folder):
    html = (folder / "compare.html").read_text()
    assert re.findall("<h2>(.*)</h2>", html) == ["Max logits", "Loss", "Result", "Settings"]
    assert html.count("<svg ") == 2
    clipped, free = (peaks(folder, name).max() for name in ("muonclip", "muon"))
    assert f"with muonclip the largest logit reached {clipped:.2f} τ" in html
    assert f"with muon the largest logit reached {free:.2f} τ" in html
    links = re.findall(r'<a href="([^"]*)"', html)
    assert links and all((folder / link).exists() for link in links)


@pytest.mark.slow
def test_both_reports_show_the_other_run(folder):
    for name in ("muonclip", "muon"):
        html = (folder / name / "report.html").read_text()
        assert "Shown is the comparison “both”: the same settings, seed and batches." in html


@pytest.mark.slow
def test_the_picture_is_a_file_of_its_own_for_light_and_dark(folder):
    picture = ElementTree.parse(folder / "compare.svg").getroot()
    name = "{http://www.w3.org/2000/svg}"
    assert picture.get("aria-label") == compare.PICTURE_SHOWS
    texts = {text.text for text in picture.iter(f"{name}text")}
    assert {"with QK-Clip (muonclip)", "without it (muon)", "threshold τ = 2", "3τ"} <= texts
    style = picture.find(f"{name}style").text
    assert "svg { --card: #ffffff;" in style and "@media (prefers-color-scheme: dark)" in style


WRONG = {
    "nothing to leave out": (["--optimizer", "adamw"], "--optimizer adamw does not clip; give the"),
    "resume": (["--resume"], "a comparison starts both runs anew; leave out --resume"),
    "steps": (["--steps", "0"], "--steps must be at least 1, got 0"),
}


@pytest.mark.parametrize(("more", "message"), WRONG.values(), ids=WRONG)
def test_wrong_flags_get_one_line(flags, tmp_path, capsys, more, message):
    assert compare.main([*flags(tmp_path / "both"), *more]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1
    assert not (tmp_path / "both").exists()
