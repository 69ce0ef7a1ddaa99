"""Measures and tables, against numbers worked out by hand or by NumPy."""

import math
import re

import jax
import numpy as np
import pytest
from scipy import stats

import muonclip_jax as mc
from studies.clip import report as clip
from studies.common import clips, records, sweeps
from studies.common.before import old_runs, side_by_side
from studies.common.tables import by_seed, paired, smooth, spread, table, tail
from studies.quack import report as quack
from studies.shared_keys import report as shared_keys
from studies.spectrum import report as spectrum
from studies.spectrum.measures import TOP, meeting


def test_meeting_is_what_the_package_measures():
    w, d = np.asarray(jax.random.normal(jax.random.key(0), (2, 3, 12, 20)))
    found = meeting(w, d)
    u, _, vt = np.linalg.svd(np.float64(w[1]))
    expected = {
        "weight_entropy": np.log(mc.effective_rank(w, 2)) / math.log(12),
        "update_entropy": np.log(mc.effective_rank(d, 2)) / math.log(12),
        "update_rank": mc.effective_rank(d) / 12,
        "weight_norm": mc.spectral_norm(w),
        "update_norm": mc.spectral_norm(d),
        "update_frobenius": np.sqrt((d**2).sum(axis=(1, 2))),
    }
    for name, value in expected.items():
        # The package's float32 singular values.
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    grown = [u[:, i] @ d[1] @ vt[i] for i in range(TOP)]
    np.testing.assert_allclose(found["projections"][1], grown, rtol=1e-9)


def test_a_run_that_diverged_is_told():
    whole, broken = np.ones((1, 4, 4), np.float32), np.full((1, 4, 4), np.nan, np.float32)
    for pair in ((whole, broken), (broken, whole)):
        with pytest.raises(FloatingPointError, match="lower its learning rate"):
            meeting(*pair)


def spectrum_record(weights, updates):
    met = records.tidy(meeting(weights, updates))
    kernels = dict.fromkeys(("q", "k"), met)
    model = {"heads": 4, "kv_heads": 4, "nope": 0, "rope": 16, "d_model": 64, "d_ff": 1}
    return {"measurements": [{"kernels": kernels}], "model": {**model, "v": 16}}


def test_overlap_is_one_by_chance_and_large_along_the_weights():
    w, d = jax.random.normal(jax.random.key(0), (2, 16, 64, 64))
    # 128 projections: their mean square is within 4 standard deviations, 4 sqrt(2/128), of 1.
    assert spectrum.over_chance(spectrum_record(w, d)) == pytest.approx(1, abs=0.25)
    along = spectrum_record(w, w)
    assert spectrum.over_chance(along) > 5
    assert spectrum.top_growth(along) == pytest.approx(1, rel=1e-4)
    assert spectrum.top_growth(spectrum_record(w, -w)) == pytest.approx(-1, rel=1e-4)


def clip_record(scope, shared_keys="untouched"):
    maxima = [[[1.0, 4.0]], [[3.0, 8.0]], [[-1.0, None]]]
    return {
        "curves": {"max_logits": maxima},
        "optimizer": {"threshold": 2.0, "scope": scope, "shared_keys": shared_keys},
    }


def test_clip_factors_by_head_and_by_layer():
    by_head, by_layer = clip_record("head"), clip_record("layer")
    np.testing.assert_array_equal(clips.passes(by_head), [[0, 1], [1, 1], [0, 0]])
    np.testing.assert_allclose(clips.applied(by_head)[:2], [[1, 0.5], [2 / 3, 0.25]])
    np.testing.assert_allclose(clips.applied(by_layer)[:2], [[0.5, 0.5], [0.25, 0.25]])
    # A negative maximum and one that is not finite clip nothing.
    np.testing.assert_array_equal(clips.applied(by_head)[2], [1, 1])


def test_a_rope_key_that_each_head_clips_lowers_the_others():
    record = clip_record("head", "each_head")
    # √γ of the head's own queries, times the product of all √γ of its layer.
    roots = np.sqrt([[1, 1 / 2], [2 / 3, 1 / 4]])
    np.testing.assert_allclose(clips.applied(record)[:2], roots * roots.prod(axis=1)[:, None])
    # Of six head-steps, one: the first step's first head. By head none is, by layer the same one.
    assert clip.innocent([record]) == clip.innocent([clip_record("layer")]) == "16.7"
    assert clip.innocent([clip_record("head")]) == "0.0"


def test_halves_count_head_steps():
    # Of the first two steps 3 of 4 are above τ, of the last none.
    assert clips.halves(clip_record("head")) == (75.0, 0.0)


def loss_records(label, losses, **optimizer):
    """Runs of a setting, one a seed, with all that the reports read."""
    return [
        {
            "setting": label,
            "seed": seed,
            "plan": {"steps": 2},
            "optimizer": {"threshold": None, "scope": "head", "learning_rate": 0.1, **optimizer},
            "curves": {"max_logits": [[[1.0, 4.0]], [[3.0, 8.0]]], "loss": [5.0, loss]},
            "measurements": [
                {"step": 0, "valid_loss": 5.0, "q_rms": [[0.5, 0.5]], "k_rms": [[0.5]]},
                {"step": 2, "valid_loss": loss, "q_rms": [[0.5, 2.0]], "k_rms": [[0.005]]},
            ],
        }
        for seed, loss in enumerate(losses)
    ]


def cells(text, label):
    """The cells of the line of a Markdown table with this label."""
    (line,) = (line for line in text.splitlines() if line.startswith(f"| {label} |"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_clip_compares_losses_with_no_clip_and_with_the_clip_per_head():
    runs = {
        "Muon": loss_records("Muon", [3.0, 3.2]),
        "MuonClip τ=2": loss_records("MuonClip τ=2", [3.1, 3.3], threshold=2.0),
        "MuonClip τ=2, all heads": loss_records("", [3.0, 3.5], threshold=2.0, scope="layer"),
        "AdamW": loss_records("AdamW", [4.0, 4.0]),
        "AdamW, 0.3 of the rate": loss_records("", [4.0, 4.0]),
    }
    text = clip.differences(runs)
    of_muon = [by_seed(runs[label], clip.valid_loss) for label in runs]
    per_head, all_heads = cells(text, "MuonClip τ=2"), cells(text, "MuonClip τ=2, all heads")
    assert per_head == [paired(of_muon[1], of_muon[0]), ""]
    assert all_heads == [paired(of_muon[2], of_muon[0]), paired(of_muon[2], of_muon[1])]
    assert per_head[0].startswith("+0.100") and all_heads[1].startswith("+0.050")
    assert "AdamW" not in text


def test_old_runs_stand_beside_new_ones(tmp_path):
    old = loss_records("A", [3.0, 3.2]) + loss_records("gone", [1.0])
    records.write(old, tmp_path / "cpu-before.jsonl")
    before = old_runs(tmp_path / "cpu")
    assert list(before) == ["A", "gone"] and not old_runs(tmp_path / "gpu")
    new = {"A": loss_records("A", [3.1, 3.3]), "B": loss_records("B", [9.0])}
    text = side_by_side(before, new, {"loss": clip.loss}, clip.valid_loss)
    assert text.splitlines()[0] == "|  | loss, before | loss, now | loss now, less that before |"
    found = cells(text, "A")
    assert found[:2] == ["3.100 ± 0.141", "3.200 ± 0.141"] and found[2].startswith("+0.100")
    assert "gone" not in text and "| B |" not in text


def test_shared_keys_tells_what_becomes_of_the_weights(tmp_path):
    runs = {
        "no clip": loss_records("no clip", [3.0, 3.2]),
        "untouched": loss_records("untouched", [3.1, 3.3], threshold=2.0),
        "split": loss_records("split", [3.0, 3.4], threshold=2.0),
    }
    text = shared_keys.report(runs, None, tmp_path)
    assert (tmp_path / "weights.png").exists()
    losses, clipped, weights, _ = text.split("\n\n")
    assert cells(losses, "no clip")[1] == "" and cells(losses, "untouched")[2] == ""
    assert cells(losses, "split")[1].startswith("+0.100")
    assert cells(losses, "split")[2].startswith("+0.000")
    assert "no clip" not in clipped
    # The last step's largest maximum, 8, over τ; one of two heads in the first step, both in the
    # second; γ are 1 and 2/3 of one head, 1/2 and 1/4 of the other.
    assert cells(clipped, "split") == [
        "4.00 ± 0.00",
        "50.0 ± 0.0",
        "100.0 ± 0.0",
        f"{(2 / 3 + 1 / 8) / 2:.2g} ± 0",
    ]
    # Queries of 0.5 and 2 from 0.5: twice, by the geometric mean. A step is 0.2 · 0.1.
    assert [cell.split()[0] for cell in cells(weights, "split")] == [
        "2", "0.01", "0.5", "2", "0.005", "0.005", "4", "4e+02",
    ]  # fmt: skip


def quack_record(losses, maxima=((1.0,),), changes=((9.0,), (0.5,)), warmup=1):
    return {
        "measurements": [{"valid_loss": loss} for loss in losses],
        "curves": {"max_logits": maxima, "logit_change": changes},
        "optimizer": {"warmup": warmup, "learning_rate": 0.1},
    }


def test_divergence_is_counted_and_told():
    fine, worse, broken = map(quack_record, ([5.0, 3.0], [5.0, 6.0], [5.0, None]))
    assert list(map(sweeps.diverged, (fine, worse, broken))) == [False, True, True]
    assert sweeps.cell([fine, fine], sweeps.valid_loss, ".1f") == "3.0 ± 0.0"
    assert sweeps.cell([fine, worse], sweeps.valid_loss, ".1f") == "4.5 ± 2.1, 1 of 2 diverged"
    assert sweeps.cell([broken], sweeps.valid_loss, ".1f") == "1 of 1 not finite, 1 of 1 diverged"


def test_quack_compares_methods_at_each_rate():
    runs = {
        f"MHA, {method}, {rate:g}": loss_records(method, losses, learning_rate=rate)
        for method, rate, losses in (
            ("none", 0.1, [3.0, 3.2]),
            ("none", 1.0, [5.0, 5.2]),
            ("QuacK", 0.1, [2.9, 3.1]),
            ("Q and K at 0.1", 0.1, [3.0, 3.4]),
        )
    }
    text = sweeps.differences(
        "MHA, validation loss", sweeps.by_method(runs, "MHA, "), quack.VERDICTS
    )
    assert text.splitlines()[0] == (
        "| MHA, validation loss | QuacK less none | QuacK less Q and K at 0.1 "
        "| Q and K at 0.1 less none |"
    )
    found = cells(text, "η = 0.1")
    assert [cell.split()[0] for cell in found] == ["-0.100", "-0.200", "+0.100"]
    assert cells(text, "η = 1") == ["", "", ""]


def test_largest_change_leaves_out_the_warm_up():
    assert sweeps.largest_change(quack_record([5.0, 3.0])) == 0.5


def test_spread():
    assert spread([1.0, 3.0], ".1f") == "2.0 ± 1.4"
    assert spread([1.0], ".1f") == "1.0"
    assert spread([1.0, 3.0, None, math.inf], ".1f") == "2.0 ± 1.4 (2 of 4 not finite)"
    assert spread([-1.0, 2.0], "+.1f") == "+0.5 ± 2.1"


@pytest.mark.parametrize("seeds", [2, 3, 5])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_paired_is_students_interval_of_the_differences(seeds, shift):
    one, other = np.random.default_rng(seeds).normal(size=(2, seeds)) / 10
    one += shift
    expected = stats.ttest_rel(one, other).confidence_interval(0.95)
    text = paired(dict(enumerate(one)), dict(enumerate(other)), ".9f")
    found = [float(number) for number in re.findall(r"[+-]\d\.\d+", text)]
    # Nine digits are printed.
    assert found == pytest.approx([np.mean(one - other), *expected], abs=1e-9)
    assert f"({seeds} seeds)" in text
    assert text.endswith(": no difference told") == (expected.low <= 0 <= expected.high)


def test_paired_takes_equal_seeds_in_any_order():
    one, other = {0: 1.0, 1: 5.0, 2: 9.0, 7: 100.0}, {2: 8.0, 1: 4.0, 0: 0.0, 8: -100.0}
    assert paired(one, other, ".1f") == "+1.0 [+1.0, +1.0] (3 seeds)"
    assert paired(one, one, "+.1f") == "+0.0 [+0.0, +0.0] (4 seeds): no difference told"


def test_paired_tells_what_is_missing():
    assert paired({0: 1.0}, {0: 2.0}) == "no interval (1 seed)"
    assert paired({0: 1.0, 1: 2.0}, {2: 2.0}) == "no interval (0 seeds)"
    one = {0: 1.0, 1: None, 2: 3.0, 3: math.inf}
    other = {0: 0.0, 1: 1.0, 2: 2.0, 3: math.inf}
    assert paired(one, other, ".0f") == "+1 [+1, +1] (2 seeds, 2 of 4 not finite)"
    assert paired({0: 1.0, 1: None}, other) == "no interval (1 seed, 1 of 2 not finite)"


def test_by_seed_reads_records():
    records_of_seeds = [run("a", seed=3, x=1.0), run("a", seed=1, x=None)]
    assert by_seed(records_of_seeds, lambda r: r["x"]) == {3: 1.0, 1: None}


def test_smooth_is_a_mean_of_the_values_so_far():
    np.testing.assert_allclose(smooth(np.array([1.0, 2, 3, 5]), window=2), [1, 1.5, 2.5, 4])
    broken = smooth(np.array([1.0, np.nan, 3, 5]), window=2)
    np.testing.assert_allclose(broken, [1, np.nan, np.nan, 4])


def test_tail_is_the_last_fifth():
    np.testing.assert_array_equal(tail(np.arange(10)), [8, 9])
    np.testing.assert_array_equal(tail(np.arange(2)), [1])


def test_table():
    assert table(("a", "b"), [(1, "x")]) == "| a | b |\n| --- | --- |\n| 1 | x |"


def run(label, seed=0, **values):
    return {"setting": label, "seed": seed, **values}


def test_records_hold_what_json_can(tmp_path):
    path = tmp_path / "deeper" / "cpu.jsonl"
    value = {"x": np.float32(1 / 3), "y": [np.inf, -1, True, None], "z": np.arange(2)}
    records.add(run("Muon τ", **value), path)
    found = run("Muon τ", x=0.33333, y=[None, -1, True, None], z=[0, 1])
    assert records.read(path) == {("Muon τ", 0): found}
    assert path.read_text().count("\n") == 1


def test_a_record_replaces_its_older_one_and_no_other(tmp_path):
    path = tmp_path / "cpu.jsonl"
    assert records.read(path) == {}
    added = [run("a"), run("a", 1), {records.ASIDE: "time", "x": 1}, run("a", x=2)]
    for record in added:
        records.add(record, path)
    assert list(records.read(path).values()) == added[1:]
    assert [p.name for p in tmp_path.iterdir()] == ["cpu.jsonl"]


def test_a_kill_leaves_the_other_records(tmp_path):
    path = tmp_path / "cpu.jsonl"
    for seed in range(2):
        records.add(run("a", seed), path)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # the last line was not written to its end
    with pytest.warns(UserWarning, match="last line is not whole"):
        assert list(records.read(path)) == [("a", 0)]
    with pytest.warns(UserWarning, match="last line is not whole"):
        records.add(run("a", 1), path)
    assert path.read_bytes() == whole


def test_a_section_is_replaced_and_nothing_else(tmp_path):
    readme = tmp_path / "README.md"
    other = "<!-- results: gpu -->\nNot run.\n<!-- end -->\n"
    readme.write_text(f"# T\n<!-- results: cpu -->\nold \\1\n<!-- end -->\n{other}")
    records.write_section(readme, "cpu", r"new \2")
    assert readme.read_text() == f"# T\n<!-- results: cpu -->\nnew \\2\n<!-- end -->\n{other}"
