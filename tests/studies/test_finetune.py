"""Training in two phases, and the study of it."""

from dataclasses import replace

import jax
import numpy as np
import pytest

from examples.mla import data
from studies.common import records, texts, training
from studies.common import study as studies
from studies.common.model import ModelConfig
from studies.common.optimizers import Optimizer
from studies.common.training import Plan, Setting
from studies.finetune import report
from studies.finetune.__main__ import STUDY

FILE = '''"""About the module."""
# About nothing.
class A:
    """About A."""
    x = "no docstring"  # a comment

    async def f(self):
        """About f.

        More of it.
        """

def g():
    return 1
'''


def test_code_and_words_share_nothing():
    code, words = texts.code_of(FILE), texts.words_of(FILE)
    assert words == "About the module.\n\nAbout A.\n\nAbout f.\n\nMore of it."
    assert "About" not in code and "comment" not in code and "no docstring" in code
    namespace = {}
    exec(code, namespace)
    assert namespace["g"]() == 1 and hasattr(namespace["A"], "f")


def test_what_is_no_python_has_neither():
    for broken in ("print 'two'", "x = '\0'"):
        assert texts.code_of(broken) == texts.words_of(broken) == ""


def test_a_file_is_on_one_side_of_the_split_in_both_texts(tmp_path):
    def file(name):
        return f'"""Words of {name}."""\n{name} = 1\n'

    corpus = data.Corpus("files", tuple(map(file, "abc")), (file("d"), "e = 1\n"))
    text = texts.code_then_words(corpus, data.BYTE_VOCABULARY, tmp_path)
    assert text.first.corpus.train == ("a = 1", "b = 1", "c = 1")
    assert text.first.corpus.valid == ("d = 1", "e = 1")
    assert text.corpus.train == tuple(f"Words of {name}." for name in "abc")
    assert text.corpus.valid == ("Words of d.",)  # one file has no words
    assert text.tokenizer is text.first.tokenizer
    assert len(text.train) == 3 * (1 + len("Words of a."))  # a token a byte, and the separators
    other = replace(text, first=replace(text.first, corpus=text.corpus))
    assert other.fingerprints != text.fingerprints


MODEL = ModelConfig(
    vocab_size=257, d_model=16, layers=2, heads=2, kv_heads=2, rope=8, v=8, d_ff=16, init_std=0.3
)
PLAN = Plan("package", 4, 2, 16, measure_every=2, valid_batches=1, pretrain_steps=4)
BEFORE = Optimizer(direction="adam", learning_rate=0.03, warmup=1)
SETTING = Setting(MODEL, Optimizer(direction="adam", learning_rate=0.01, pretrained=BEFORE))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    train, valid = ([FILE.replace("A", f"{side}{i}") for i in range(9)] for side in "XY")
    corpus = data.Corpus("files", tuple(train), tuple(valid))
    return texts.code_then_words(corpus, MODEL.vocab_size, tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="module")
def before(text):
    return training.pretrain(MODEL, BEFORE, PLAN, text, seed=1)


def test_a_second_phase_starts_where_the_first_ended(text, before):
    copy = jax.tree.map(np.copy, before)
    run = training.train(SETTING, PLAN, text, seed=1, pretrained=before)
    jax.tree.map(np.testing.assert_array_equal, before, copy)  # the steps worked on copies
    first, *_, last = run["measurements"]
    losses = [
        float(training.evaluate(MODEL, before, training.validation(each, PLAN))["valid_loss"])
        for each in (text, text.first)
    ]
    assert [first["valid_loss"], first["first_loss"]] == losses
    assert last["valid_loss"] < first["valid_loss"]
    assert all((rank == 0).all() for rank in first["change_rank"].values())
    weights = np.float64(before["layers"]["mlp"]["up"]["kernel"])
    shares = np.linalg.svd(weights, compute_uv=False)
    shares /= shares.sum(axis=-1, keepdims=True)
    expected = np.exp(-np.sum(shares * np.log(shares), axis=-1)) / 16
    # float32 singular values.
    np.testing.assert_allclose(first["weight_rank"]["up"], expected, rtol=1e-5)
    assert first["weight_rank"].keys() == {"wq", "wk", "wv", "wo", "up", "down"}
    assert all((rank > 0).all() and (rank <= 1).all() for rank in last["change_rank"].values())


def test_the_first_phase_is_the_first_texts_and_the_seeds(text, before, monkeypatch):
    again = training.pretrain(MODEL, BEFORE, PLAN, text, seed=1)
    jax.tree.map(np.testing.assert_array_equal, before, again)
    seen = []

    def steps(config, optimizer, state, batches, probe):
        seen.extend(np.asarray(batches))
        return state, {}

    monkeypatch.setattr(training, "take_steps", steps)
    training.pretrain(MODEL, BEFORE, PLAN, text, seed=1)
    expected = training.training_batches(text.first, replace(PLAN, steps=4), seed=1)
    np.testing.assert_array_equal(seen, expected)
    assert not np.array_equal(expected, training.training_batches(text, PLAN, seed=1))


def test_without_parameters_at_hand_a_run_makes_them(text, before, monkeypatch):
    asked = []
    monkeypatch.setattr(training, "pretrain", lambda *args: asked.append(args) or before)
    training.train(SETTING, replace(PLAN, steps=2), text, seed=1)
    ((config, optimizer, _, _, seed),) = asked
    assert (config, optimizer, seed) == (MODEL, BEFORE, 1)


def test_a_first_phase_divides_by_the_measurements():
    with pytest.raises(ValueError, match="3 steps do not divide by 2"):
        replace(PLAN, pretrain_steps=3)


def test_runs_share_the_first_phase(tmp_path, monkeypatch):
    """Of each pretraining and seed; and each run gets its own."""
    grid = replace(STUDY.grids["smoke"], seeds=2)
    asked, got = [], []

    def pretrain(model, optimizer, plan, text, seed):
        asked.append((optimizer.direction, seed))
        return f"{optimizer.direction} {seed}"

    def train(setting, plan, text, seed, *, pretrained, **options):
        got.append(pretrained == f"{setting.optimizer.pretrained.direction} {seed}")
        return {}

    class Text:
        train, fingerprints, describe = [], {}, staticmethod(lambda: "a text")

    monkeypatch.setattr(training, "pretrain", pretrain)
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(training, "load_text", lambda plan, size: Text)
    study = replace(STUDY, folder=tmp_path, grids={"smoke": grid})
    studies.run_missing(study, "smoke", None, studies.Console(quiet=True))
    assert asked == [("adam", 0), ("muon", 0), ("adam", 1), ("muon", 1)]
    assert len(got) == len(grid.runs()) and all(got)
    assert study.current("smoke") == grid.runs()
    # A record of before a new option holds for what leaves it at its default.
    (path,) = tmp_path.glob("results/*.jsonl")
    old = [*records.read(path).values()]
    for record in old:
        del record["optimizer"]["pretrained"]["decay_of"]
    records.write(old, path)
    assert study.current("smoke") == grid.runs()


def record(loss, seed=0, rate=0.1, forgot=0.0, **ranks):
    rank = {"weight_rank": {"wq": [0.5, 0.7]}, "change_rank": {"wq": [0.2, 0.4]}, **ranks}
    start, end = ({"valid_loss": x, "first_loss": 1.0, **rank} for x in (9.0, loss))
    return {
        "seed": seed,
        "measurements": [start, {**end, "first_loss": 1.0 + forgot}],
        "curves": {"max_logits": [[[1.0, 4.0]], [[3.0, 2.0]]]},
        "optimizer": {"learning_rate": rate, "threshold": 2.5},
    }


def test_the_best_rate_is_of_the_mean_and_never_diverged():
    found = {
        0.1: [record(3.0), record(3.0, 1)],
        0.2: [record(2.0), record(3.5, 1)],
        0.3: [record(1.0), record(None, 1)],
    }
    assert report.best_rate(found) == 0.2
    more = {**found, 0.3: [record(2.5), record(3.0, 1)], 0.1: [*found[0.1], record(0.0, 2)]}
    assert report.best_rate(more) == 0.2  # of the seeds that all rates have
    text = report.tuning_table({("Adam", "Muon"): found})
    assert "0.2: **2.750 ± 1.061**" in text and "0.1: 3.000 ± 0.000 |" in text
    assert text.endswith("|  |")  # not at the grid's edge
    assert report.tuning_table({("Adam", "Muon"): dict([*found.items()][:2])}).endswith("| yes |")


def test_the_mismatch_is_paired_over_seeds():
    tuners = ("Adam", "Muon", "MuonClip", "per-head Muon")
    losses = {("Adam", "Muon"): 3.2, ("Muon", "Adam"): 3.6}  # 3 otherwise
    best = {
        (first, then): [record(losses.get((first, then), 3.0) + seed, seed) for seed in range(3)]
        for first in ("Adam", "Muon")
        for then in tuners
    }
    lines = report.differences(best).splitlines()
    assert (
        "| mismatched less matched, mean of both | +0.400 [+0.400, +0.400] (3 seeds) |" in lines[2]
    )
    assert "after Adam: Muon less Adam | +0.200" in lines[3]
    assert "after Muon: Adam less Muon | +0.600" in lines[4]
    assert "after Adam: MuonClip less Muon | -0.200" in lines[5]
    assert "+0.000 [+0.000, +0.000] (3 seeds): no difference told" in lines[6]
    half = {pair: best[pair] for pair in (("Adam", "Adam"), ("Adam", "Muon"))}
    assert report.differences(half).splitlines()[2:] == [lines[3]]  # of half a grid
    summary = report.summary(best).splitlines()[2]
    assert (
        "| 0.600 ± 0.000 | 0.600 ± 0.000 | 0.300 ± 0.000 | 4.0 ± 0.0 | 4.0 ± 0.0 | 3.0" in summary
    )
    assert summary.endswith("| 50.0 ± 0.0 |")  # two of four head-steps are above 2.5
