"""Every study runs in its smallest size, resumes, and shows what its raw files say."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from studies.clip.__main__ import STUDY as CLIP
from studies.common import records, training
from studies.common.model import Decoder, init_params
from studies.common.study import main, rebuild
from studies.quack.__main__ import STUDY as QUACK
from studies.rank.__main__ import STUDY as RANK
from studies.spectrum.__main__ import STUDY as SPECTRUM

STUDIES = {study.folder.name: study for study in (CLIP, RANK, SPECTRUM, QUACK)}
SIZES = [(name, size) for name, study in STUDIES.items() for size in study.grids]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Tokenizers and compiled programs, away from those of real runs. Of twenty steps most of the
    time is XLA's, so let it do less."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CACHE", tmp_path_factory.mktemp("cache"))
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.config.update("jax_compilation_cache_dir", before)


def elsewhere(study, folder):
    """The study with its results in another folder, and a place for the smoke size's."""
    folder = folder / study.folder.name
    folder.mkdir()
    (folder / "README.md").write_text("above\n<!-- results: smoke -->\nold\n<!-- end -->\nbelow\n")
    return replace(study, folder=folder)


def refuse(*args, **kwargs):
    raise AssertionError("trains again")


@pytest.mark.parametrize("name", STUDIES)
def test_smoke_runs_resumes_and_rebuilds(name, cache, tmp_path, monkeypatch, capsys):
    study = elsewhere(STUDIES[name], tmp_path)
    runs, raw = study.grids["smoke"].runs(), study.results("smoke")
    count = len(runs) + (study.aside is not None)

    assert main(study, ["--size", "smoke", "--limit", "1"]) == 0
    assert len(list(raw.glob("*.json"))) == 1
    assert f"1 of {len(runs)} runs" in capsys.readouterr().out
    first = study.path("smoke", *runs[0])
    written = first.read_bytes()

    assert main(study, ["--size", "smoke"]) == 0
    assert len(list(raw.glob("*.json"))) == count
    assert first.read_bytes() == written  # not trained again
    said = capsys.readouterr().out
    assert f"{len(runs)} of {len(runs)} runs" in said and "Stale" not in said

    for run in runs:
        record = records.read(study.path("smoke", *run))
        assert len(record["curves"]["loss"]) == record["plan"]["steps"]
        assert record["measurements"][-1]["valid_loss"] < record["measurements"][0]["valid_loss"]
        assert {"commit", "library", "versions", "device", "date", "seconds"} <= record.keys()

    monkeypatch.setattr(training, "train", refuse)
    pictures = sorted(raw.glob("*.png"))
    for picture in pictures:
        picture.unlink()
    assert main(study, ["--size", "smoke"]) == 0  # nothing is missing
    assert main(study, ["--size", "smoke", "--rebuild"]) == 0
    assert pictures and sorted(raw.glob("*.png")) == pictures
    readme = (study.folder / "README.md").read_text()
    assert readme.startswith("above\n<!-- results: smoke -->\n") and readme.endswith("below\n")
    assert "old" not in readme and all(f"results/smoke/{p.name}" in readme for p in pictures)


def test_raw_files_of_other_code_or_another_grid_are_stale(tmp_path):
    study = elsewhere(SPECTRUM, tmp_path)
    label, seed = study.grids["smoke"].runs()[0]
    path = study.path("smoke", label, seed)
    identity = study.identity("smoke", label, seed)
    assert not study.is_done("smoke", label, seed)
    records.write(identity, path)
    assert study.is_done("smoke", label, seed)
    for name, other in (("sources", "0"), ("plan", {**identity["plan"], "steps": 40})):
        records.write({**identity, name: other}, path)
        assert not study.is_done("smoke", label, seed)


def test_a_size_that_a_study_has_not_gets_one_line(capsys):
    assert main(CLIP, ["--size", "gpu_long"]) == 2
    assert "--size gpu_long: there is only smoke, cpu, gpu here" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "size"), [each for each in SIZES if each[1] != "smoke"])
def test_the_readme_shows_what_the_committed_raw_files_say(name, size, tmp_path):
    """And that this code made them. Pictures are drawn anew elsewhere."""
    study = STUDIES[name]
    copy = replace(study, folder=tmp_path / name)
    shutil.copytree(study.folder, copy.folder)
    text = rebuild(copy, size)
    assert "Stale" not in text
    committed, rebuilt = ((s.folder / "README.md").read_text() for s in (study, copy))
    assert rebuilt == committed and f"<!-- results: {size} -->\n{text}" in committed
    if study.aside and study.results(size).exists():
        assert study.aside_is_done(size)
    drawn = {path.name for path in copy.results(size).glob("*.png")}
    assert drawn == {path.name for path in study.results(size).glob("*.png")}


@pytest.mark.parametrize(("name", "size"), SIZES)
def test_every_setting_traces(name, size):
    """Models and optimizers, of sizes too that are too large to run here."""
    grid = STUDIES[name].grids[size]
    shapes = {}
    for model, optimizer in grid.settings.values():
        if model not in shapes:
            shapes[model] = jax.eval_shape(lambda model=model: init_params(model, 0))
            tokens = jax.ShapeDtypeStruct((grid.plan.batch, grid.plan.context), np.int32)
            logits = jax.eval_shape(
                lambda params, tokens, model=model: Decoder(model).apply(
                    {"params": params}, tokens
                ),
                shapes[model],
                tokens,
            )
            assert logits.shape == (*tokens.shape, model.vocab_size)
        jax.eval_shape(optimizer.chain(model).init, shapes[model])


def test_rank_has_the_sources_model():
    model, _ = RANK.grids["gpu"].settings["Muon"]
    params = jax.eval_shape(lambda: init_params(model, 0))
    assert sum(p.size for p in jax.tree.leaves(params)) == pytest.approx(88.6e6, rel=1e-3)
    for size, tokens in (("gpu", 16e6), ("gpu_long", 25e6)):
        plan = RANK.grids[size].plan
        assert plan.steps * plan.batch * plan.context == pytest.approx(tokens, rel=2e-3)


@pytest.mark.parametrize("name", STUDIES)
def test_every_claimed_comparison_has_seeds(name):
    grids = STUDIES[name].grids
    assert grids["cpu"].seeds >= (2 if name == "quack" else 3)
    assert Path(STUDIES[name].folder, "README.md").exists()
