"""The attention benchmark at a tiny size."""

import json

import jax
import pytest

from benchmarks import attention
from benchmarks.attention import AUTO, JAX_NN, LOGSUMEXP, MEASURED, Options, main

TINY = {"lengths": (8,), "batch_sizes": (2,), "heads": 2, "head_size": 4, "repeats": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("attention")
    files = {"json": folder / "record.json", "picture": folder / "picture.png"}
    options = Options(
        **TINY,
        **files,
        dtypes=("float32",),
        causal=(True,),
        chunk_sizes=(4,),
        memory_lengths=(8,),
    )
    return main(options), options


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_record(run):
    record, options = run
    assert json.loads(options.json.read_text()) == json.loads(json.dumps(record))
    assert options.picture.stat().st_size > 0
    assert {"date", "device", "versions", "load_average_before", "memory"} <= record.keys()
    names = [row["implementation"] for row in record["rows"]]
    assert names == [AUTO, "chunked, 4", LOGSUMEXP, MEASURED, JAX_NN]
    for row in record["rows"]:
        assert (row["shape"], row["dtype"], row["causal"]) == ((2, 8, 2, 4), "float32", True)
        for figure in ("seconds_median", "ratio_vs_without_max_logits", "ratio_vs_jax_nn"):
            assert row[figure] > 0
        assert row["temp_bytes"] > 0
    assert record["rows"][-1]["ratio_vs_jax_nn"] == 1
    memory = [(row["shape"], row["implementation"]) for row in record["memory"]]
    assert memory == [((1, 8, 2, 4), AUTO), ((1, 8, 2, 4), JAX_NN)]


@pytest.mark.slow
def test_both_passes_are_in_the_program():
    """Outputs, maxima where there are some, and three gradients."""
    operands = [jax.ShapeDtypeStruct((2, 8, 2, 4), "float32")] * 4
    case = attention.Case(2, 8, "float32", causal=True)
    found = attention.entries(Options(**TINY))
    for label, leaves in {AUTO: 5, LOGSUMEXP: 5, MEASURED: 5, JAX_NN: 4}.items():
        compiled = attention.compile_both_passes(found[label].attend, case, operands)
        assert len(jax.tree.leaves(compiled.out_info)) == leaves
    without = attention.compile_both_passes(found[AUTO].without, case, operands)
    assert len(jax.tree.leaves(without.out_info)) == 4


def test_what_is_asked():
    def row(length, implementation=AUTO, **figures):
        shape = (1, length, 8, 64)
        about = {"shape": shape, "dtype": "float32", "causal": False}
        return about | {"implementation": implementation} | figures

    slow = {"ratio_vs_jax_nn": 1.5, "ratio_vs_without_max_logits": 1.5}
    fast = {"ratio_vs_jax_nn": 0.5, "ratio_vs_without_max_logits": 1.01}
    rows = [row(512, **slow), row(2048, **fast), row(2048, JAX_NN, **slow)]
    memory = [row(2048, temp_bytes=10), row(4096, temp_bytes=20), row(8192, temp_bytes=80)]
    asked = attention.asked(rows, [*memory, row(2048, JAX_NN, temp_bytes=999)])
    assert [target.holds for target in asked] == [False, True, True, True, False]
    assert [target.asked for target in asked] == [1.0, 1.0, 1.03, 2.2, 2.2]
