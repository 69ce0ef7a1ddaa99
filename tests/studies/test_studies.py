"""Every study runs in its smallest size, resumes, and shows what its records say."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from studies.abilities.__main__ import STUDY as ABILITIES
from studies.clip.__main__ import STUDY as CLIP
from studies.common import records, training
from studies.common.model import Decoder, init_params
from studies.common.probe import numbers_of
from studies.common.records import ASIDE
from studies.common.rehash import compare, rehash
from studies.common.study import main, rebuild
from studies.decay.__main__ import STUDY as DECAY
from studies.family.__main__ import STUDY as FAMILY
from studies.finetune.__main__ import STUDY as FINETUNE
from studies.mla_norm.__main__ import STUDY as MLA_NORM
from studies.quack.__main__ import STUDY as QUACK
from studies.rank.__main__ import STUDY as RANK
from studies.shared_keys.__main__ import STUDY as SHARED_KEYS
from studies.spectrum.__main__ import STUDY as SPECTRUM
from studies.transfer.__main__ import STUDY as TRANSFER

STUDIES = {
    study.folder.name: study
    for study in (
        ABILITIES,
        CLIP,
        SHARED_KEYS,
        DECAY,
        FAMILY,
        FINETUNE,
        MLA_NORM,
        RANK,
        SPECTRUM,
        QUACK,
        TRANSFER,
    )
}
SIZES = [(name, size) for name, study in STUDIES.items() for size in study.grids]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Tokenizers and compiled programs, away from those of real runs."""
    before = jax.config.jax_compilation_cache_dir
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CACHE", tmp_path_factory.mktemp("cache"))
        yield
    jax.config.update("jax_compilation_cache_dir", before)


def elsewhere(study, folder):
    """The study with its results in another folder, and a place for the smoke size's."""
    folder = folder / study.folder.name
    folder.mkdir()
    (folder / "README.md").write_text("above\n<!-- results: smoke -->\nold\n<!-- end -->\nbelow\n")
    return replace(study, folder=folder)


def refuse(*args, **kwargs):
    raise AssertionError("trains again")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["spectrum", "quack"])  # with what they measure, and aside
def test_smoke_runs_resumes_and_rebuilds(name, cache, tmp_path, monkeypatch, capsys):
    check_a_smoke_run(elsewhere(STUDIES[name], tmp_path), monkeypatch, capsys)


def test_a_study_resumes_and_rebuilds(cache, tmp_path, monkeypatch, capsys):
    """The same without training: what it would give is what the committed records say."""
    cpu, known = SPECTRUM.grids["cpu"], records.read(SPECTRUM.record_file("cpu"))
    grid = replace(cpu, settings=dict([*cpu.settings.items()][:2]), seeds=1)

    def train(setting, plan, text, seed, **options):
        (label,) = (label for label, each in grid.settings.items() if each == setting)
        return {name: known[label, seed][name] for name in ("curves", "measurements")}

    text = SimpleNamespace(train=[], fingerprints={}, describe=lambda: "a text")
    monkeypatch.setattr(training, "load_text", lambda plan, vocab_size: text)
    monkeypatch.setattr(training, "train", train)
    study = elsewhere(replace(SPECTRUM, grids={"smoke": grid}), tmp_path)
    check_a_smoke_run(study, monkeypatch, capsys)


def check_a_smoke_run(study, monkeypatch, capsys):
    runs, file = study.grids["smoke"].runs(), study.record_file("smoke")

    assert main(study, ["--size", "smoke", "--limit", "1"]) == 0
    written = file.read_bytes()
    assert list(records.read(file)) == runs[:1]
    assert f"1 of {len(runs)} runs" in capsys.readouterr().out

    assert main(study, ["--size", "smoke"]) == 0
    assert file.read_bytes().startswith(written)  # not trained again
    found = records.read(file)
    assert list(found) == runs + [ASIDE] * (study.aside is not None) == study.current("smoke")
    said = capsys.readouterr().out
    assert f"{len(runs)} of {len(runs)} runs" in said and "Stale" not in said

    for record in map(found.get, runs):
        assert len(record["curves"]["loss"]) == record["plan"]["steps"]
        assert record["measurements"][-1]["valid_loss"] < record["measurements"][0]["valid_loss"]
        assert {"commit", "library", "versions", "device", "date", "seconds"} <= record.keys()

    monkeypatch.setattr(training, "train", refuse)
    folder = study.pictures("smoke")
    pictures = sorted(folder.glob("*.png"))
    for picture in pictures:
        picture.unlink()
    assert main(study, ["--size", "smoke"]) == 0  # nothing is missing
    assert main(study, ["--size", "smoke", "--rebuild"]) == 0
    assert pictures and sorted(folder.glob("*.png")) == pictures
    readme = (study.folder / "README.md").read_text()
    assert readme.startswith("above\n<!-- results: smoke -->\n") and readme.endswith("below\n")
    assert "old" not in readme and all(f"results/smoke/{p.name}" in readme for p in pictures)


def test_records_of_other_code_or_another_grid_are_stale(tmp_path):
    study = elsewhere(SPECTRUM, tmp_path)
    run = study.grids["smoke"].runs()[0]
    identity = study.identity("smoke", *run)
    assert not study.current("smoke")
    records.add(identity, study.record_file("smoke"))
    assert study.current("smoke") == [run]
    # The record is older than an option that it leaves at its default.
    model = {name: value for name, value in identity["model"].items() if name != "soft_cap"}
    records.add({**identity, "model": model}, study.record_file("smoke"))
    assert study.current("smoke") == [run]
    for name, other in (("sources", "0"), ("plan", {**identity["plan"], "steps": 40})):
        records.add({**identity, name: other}, study.record_file("smoke"))
        assert not study.current("smoke")


def test_rehash_is_for_equal_numbers_and_current_records(tmp_path):
    study = elsewhere(replace(SPECTRUM, aside=refuse), tmp_path)
    study = replace(study, grids={"cpu": replace(study.grids["smoke"], seeds=2)})
    runs, file = study.grids["cpu"].runs(), study.record_file("cpu")
    for run in runs:
        records.add({**study.identity("cpu", *run), "sources": "before"}, file)
    records.add({ASIDE: "refuse", "sources": "before"}, file)
    before = {
        "current": [list(run) for run in runs[:3]] + [ASIDE],
        "numbers": {"Muon": {"loss": [1.0, float("nan")]}, "AdamW": {"loss": [2.0]}},
    }
    # AdamW computes something else; seed 1 of it was stale before.
    now = {"Muon": {"loss": [1.0, float("nan")]}, "AdamW": {"loss": [2.5]}}
    rehashed, differences = rehash(study, before, now)
    assert rehashed == 2 and study.current("cpu") == [("Muon", 0), ("Muon", 1)]
    assert differences == {"AdamW": "numbers differ by up to 0.25 of themselves"}
    assert records.read(file).keys() == {*runs, ASIDE}
    rehashed, differences = rehash(study, before, before["numbers"])
    assert rehashed == 4 and study.current("cpu") == [*runs[:3], ASIDE] and not differences


def test_chosen_settings_get_more_seeds():
    grid = replace(SPECTRUM.grids["smoke"], seeds=2)
    assert [seed for _, seed in grid.runs()] == [0, 0, 1, 1]
    chosen = replace(grid, chosen=("AdamW",), chosen_seeds=4)
    both = [(label, seed) for seed in (0, 1) for label in ("Muon", "AdamW")]
    assert chosen.runs() == [*both, ("AdamW", 2), ("AdamW", 3)]
    with pytest.raises(ValueError, match=r"chosen: \['Adam'\] is no setting"):
        replace(grid, chosen=("Adam",))


@pytest.mark.slow
def test_the_probe_repeats_bit_for_bit(tmp_path):
    grid = SPECTRUM.grids["smoke"]
    study = replace(
        SPECTRUM, grids={"cpu": replace(grid, settings=dict([*grid.settings.items()][:1]))}
    )
    one, other = (numbers_of(study, training) for _ in range(2))
    assert compare(one["Muon"], other["Muon"]) == ""
    assert [row["step"] for row in one["Muon"]["measurements"]] == [0, 4, 8]


def test_a_size_that_a_study_has_not_gets_one_line(capsys):
    assert main(CLIP, ["--size", "gpu_long"]) == 2
    assert "--size gpu_long: there is only smoke, cpu, gpu here" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "size"), [each for each in SIZES if each[1] != "smoke"])
def test_the_readme_shows_what_the_committed_records_say(name, size, tmp_path):
    """And that this code made them. Pictures are drawn anew elsewhere."""
    study = STUDIES[name]
    copy = replace(study, folder=tmp_path / name)
    shutil.copytree(study.folder, copy.folder)
    text = rebuild(copy, size)
    assert "Stale" not in text
    committed, rebuilt = ((s.folder / "README.md").read_text() for s in (study, copy))
    assert rebuilt == committed and f"<!-- results: {size} -->\n{text}" in committed
    if study.aside and study.record_file(size).exists():
        assert ASIDE in study.current(size)
    drawn = {path.name for path in copy.pictures(size).glob("*.png")}
    assert drawn == {path.name for path in study.pictures(size).glob("*.png")}


@pytest.mark.parametrize(
    ("name", "size"),
    [pytest.param(*each, marks=[pytest.mark.slow] * (each[1] != "gpu")) for each in SIZES],
)
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
    grid = STUDIES[name].grids["cpu"]
    assert grid.seeds >= (2 if grid.chosen else 3) and grid.chosen_seeds >= 5
    assert Path(STUDIES[name].folder, "README.md").exists()
