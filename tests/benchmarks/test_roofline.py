"""The roofline's arithmetic, and its rows where a compiler for the chip is installed."""

import json

import pytest

from benchmarks import gpu, roofline
from benchmarks.chips import CHIPS
from benchmarks.compiled import Dot
from benchmarks.kernels import Kernel

H100 = CHIPS["h100"]


def dot(flops, dtypes=("bf16", "bf16"), precision="default"):
    return Dot(flops, dtypes, "f32[8,8]", 1, False, precision)


@pytest.mark.parametrize(
    ("kernel", "seconds"),
    [
        # Bound by memory, by products; executed three times.
        (Kernel("k", "", 10**9, 10**9, (dot(10**9),), 1, False), 2e9 / H100.hbm_rate),
        (Kernel("k", "", 10**6, 0, (dot(10**12), dot(10**12)), 1, False), 2e12 / 989.4e12),
        (Kernel("k", "", 10**9, 0, (), 3, False), 3e9 / H100.hbm_rate),
        # float32 as it comes is TF32, and all of it is slower by far; the wider factor counts.
        (Kernel("k", "", 0, 0, (dot(10**12, ("f32", "f32")),), 1, False), 1e12 / 494.7e12),
        (
            Kernel("k", "", 0, 0, (dot(10**12, ("f32", "f32"), "highest"),), 1, False),
            1e12 / 66.9e12,
        ),
        (Kernel("k", "", 0, 0, (dot(10**12, ("bf16", "f32")),), 1, False), 1e12 / 494.7e12),
    ],
)
def test_the_longer_of_products_and_bytes(kernel, seconds):
    estimate = roofline.Estimate([kernel, kernel], H100)
    assert estimate.total_seconds == pytest.approx(2 * seconds)


def test_flops_of_a_step_are_those_of_its_matrices():
    n, wide = 768, 3072
    square, other = 6 * n**3, 4 * n**2 * wide + 2 * n**3
    assert roofline.standard_flops("step") == 5 * 12 * (4 * square + 2 * other)
    assert roofline.standard_flops("4096x4096") == 5 * 6 * 4096**3


@pytest.mark.parametrize("chip", ["h100", "v5p"])
def test_rows(chip, monkeypatch, tmp_path, capsys):
    if why := roofline.missing(chip):
        pytest.skip(why)
    n, m = 256, 512
    monkeypatch.setattr(roofline, "MATRICES", {"4096x4096": (n, m)})
    file = tmp_path / "record.json"
    methods = ("ours", "optax", "optax schatten")
    options = roofline.Options(chips=(chip,), works=("4096x4096",), methods=methods, json=file)
    record = roofline.main(options)
    assert json.loads(file.read_text())["rows"] == record["rows"]
    assert record["what"] == "compiled, not run"
    assert tuple(dict.fromkeys(row["method"] for row in record["rows"])) == methods
    standard = 5 * (4 * n**2 * m + 2 * n**3)
    least = standard / CHIPS[chip].flops["bfloat16"] + 2 * 2 * n * m / CHIPS[chip].hbm_rate
    for row in record["rows"]:
        assert row["bound_seconds"] == pytest.approx(least)
        if "optax" in row["method"]:  # the standard iteration
            assert row["flops"] == {"bfloat16": standard}
        assert row["estimate_seconds"] == pytest.approx(row["ratio_to_bound"] * least)
    assert "What takes longest" in capsys.readouterr().out


def test_says_what_is_not_installed(monkeypatch, capsys):
    monkeypatch.setattr(gpu, "PLUGIN", "no_such_plugin")
    record = roofline.main(roofline.Options(chips=("h100",)))
    assert record["rows"] == []
    assert "h100: Compiling for GPUs needs JAX's CUDA plugin" in record["missing"][0]
    assert "h100: Compiling for GPUs needs" in capsys.readouterr().out


@pytest.mark.parametrize("name", CHIPS)
def test_chips_are_what_their_platform_has(name):
    chip = CHIPS[name]
    assert (chip.multiprocessors is not None) == (chip.platform == "gpu")
    assert chip.flops["float32"] <= chip.flops["default"] <= chip.flops["bfloat16"]
    assert chip.sources and all(chip.sources)


@pytest.mark.parametrize("name", ["h100", "h200", "b200"])
def test_gpus_that_are_compiled_for_are_those_of_the_table(name):
    pytest.importorskip(gpu.PLUGIN, reason="make test-gpu installs it and runs this")
    device = gpu.make_mesh(f"{name}:1x1x1", data=1).devices.flat[0]
    assert device.device_kind == CHIPS[name].name
    with pytest.raises(LookupError, match="No GPU 'v5p'"):
        gpu.make_mesh("v5p:1x1x1", data=1)
