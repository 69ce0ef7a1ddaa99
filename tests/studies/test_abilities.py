"""What `abilities` measures, and what its tables say of records made by hand."""

import numpy as np
import pytest

from studies.abilities import report
from studies.abilities.__main__ import STUDY
from studies.abilities.measures import BINS, LENGTHS, REACH, TRAINED, measure
from studies.common import synthetic, training
from studies.common.model import init_params


def record(seed, *, far, long):
    """A loss of 2 within the context (3 in its first half) and `far` beyond; right always at the
    trained lengths, and at a share `long` of the longer ones."""
    within = [3.0] * (BINS // 2) + [2.0] * (BINS // 2)
    losses = [*within, *([far] * (REACH - 1) * BINS)]
    accuracies = [1.0] * TRAINED + [long] * (len(LENGTHS) - TRAINED)
    measured = {
        "valid_loss": 2.5,
        "position_loss": losses,
        "english_loss": [4.0] * BINS + [9.0] * (REACH - 1) * BINS,
        "copying": accuracies,
        "recall": accuracies,
    }
    return {
        "seed": seed,
        "measurements": [{**measured, "valid_loss": 9.0}, measured],
        "curves": {"max_logits": [[[5.0]]] * 10},
    }


RUNS = {
    "MLA, none": [record(seed, far=2.25 + seed, long=0.5) for seed in range(3)],
    "MLA, QK-norm": [record(seed, far=3.5 + seed, long=0.25) for seed in range(3)],
    "MHA, none": [record(0, far=2.0, long=1.0)],
    "MHA, QK-norm": [record(seed, far=2.0, long=1.0) for seed in range(3)],
}


def test_a_value_for_each_measure():
    one = RUNS["MLA, none"][0]
    found = {name: measure(one) for name, measure in report.MEASURES.items()}
    assert found == {
        "validation loss": 2.5,
        "loss on English": 4.0,
        "loss beyond the context, minus within": pytest.approx(0.25),
        "copying, trained lengths": 1.0,
        "copying, longer": 0.5,
        "recall, trained lengths": 1.0,
        "recall, longer": 0.5,
    }


def test_differences_are_from_none_of_the_same_attention():
    header, _, mla, mha = report.differences(RUNS).splitlines()
    columns = [each.strip() for each in header.split("|")]
    cells = [each.strip() for each in mla.split("|")]
    found = dict(zip(columns, cells, strict=True))
    assert found["minus none, of the same seed"] == "MLA, QK-norm"
    assert found["loss beyond the context, minus within"].startswith("+1.250 [+1.250, +1.250]")
    assert found["recall, longer"] == "-0.250 [-0.250, -0.250] (3 seeds)"
    assert found["validation loss"].endswith("no difference told")
    assert mha.startswith("| MHA, QK-norm |") and "no interval (1 seed)" in mha


def test_pictures_are_one_an_attention(tmp_path):
    text = report.report(RUNS, None, tmp_path / "cpu")
    assert {path.name for path in (tmp_path / "cpu").iterdir()} == {"mla.png", "mha.png"}
    assert "| MLA, none | 2.500 ± 0.000 | 4.000 ± 0.000 |" in text
    right = "1.00 ± 0.00 | " * TRAINED
    assert f"| MLA, QK-norm, recall | {right}0.25 ± 0.00 |" in text


@pytest.mark.parametrize("size", STUDY.grids)
def test_every_synthetic_token_is_in_the_vocabulary(size):
    """A number beyond it would be read as NaN, and not refused."""
    grid = STUDY.grids[size]
    longest = max(int(share * grid.plan.context) for share in LENGTHS)
    rng = np.random.default_rng(0)
    drawn = (
        make(rng, np.full(50, longest), REACH * grid.plan.context + 1, grid.plan.context)
        for make in (synthetic.strings, synthetic.facts)
    )
    most = max(int(each.max()) for each in drawn)
    assert {model.vocab_size > most for model, _ in grid.settings.values()} == {True}


def test_an_untrained_model_knows_nothing(tmp_path):
    """The measure itself: accuracies near none, and losses near log(vocabulary) on both texts."""
    text = training.data.TokenizedText(
        training.data.Corpus("bytes", (), ()),
        training.data.load_tokenizer(("",), 257, tmp_path),
        train=np.zeros(1, np.int32),
        valid=np.random.default_rng(0).integers(257, size=2000, dtype=np.int32),
    )
    setting = STUDY.grids["smoke"].settings["MLA, partial QK-norm"]
    context = STUDY.grids["smoke"].plan.context
    params = init_params(setting.model, 0)
    batch = np.zeros((2, context + 1), np.int32)
    found = measure(setting, training.State(params, None, None), batch, text)
    for task in report.TASKS:
        assert len(found[task]) == len(LENGTHS) and max(found[task]) < 0.2, task
    # Logits of normed states of width 32 and embeddings of 0.06 have a variance of 32 · 0.06², of
    # which half is added to log 257. English repeats tokens, which tied embeddings expect.
    for name, apart in (("position_loss", 0.1), ("english_loss", 0.5)):
        assert found[name].shape == (REACH * BINS,)
        expected = np.log(257) + 16 * 0.06**2
        np.testing.assert_allclose(found[name], expected, atol=apart, err_msg=name)
