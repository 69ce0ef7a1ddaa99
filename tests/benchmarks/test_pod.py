"""The pod benchmark's programs and yardsticks, on simulated devices; tests/tpu has the rest."""

import importlib.util

import jax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import dots, flops
from benchmarks.pod import CASES, Leaf, compile_optax, compile_ours, even_share, local_shard_bytes
from benchmarks.tpu import make_mesh

MODEL = {"experts": Leaf((2, 8, 64, 256), P(None, "fsdp", None, "tp"))}


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((4, 2), ("fsdp", "tp"), (jax.sharding.AxisType.Auto,) * 2)


def test_yardsticks(mesh):
    assert even_share(MODEL, mesh) == 5 * 16 * (4 * 64**2 * 256 + 2 * 64**3) / 8
    assert local_shard_bytes(MODEL, mesh) == 4 * 2 * 8 * 64 * 256 / 8


def test_cases_are_those_of_the_claim():
    shapes = {case: [leaf.shape for leaf in model.values()] for case, model in CASES.items()}
    assert shapes["a"] == [(7168, 18432)] * 61
    assert shapes["b"] == [(4, 384, 7168, 2048)] * 2 + [(4, 384, 2048, 7168)]


@pytest.mark.parametrize("compile", [compile_ours, compile_optax])
def test_both_sides_keep_the_shardings_and_donate_the_momentum(mesh, compile):
    compiled = compile(MODEL, mesh)
    split = NamedSharding(mesh, MODEL["experts"].spec)
    for tree in (compiled.input_shardings[0], compiled.output_shardings):
        large = [each for each in jax.tree.leaves(tree) if not each.is_fully_replicated]
        assert [each.is_equivalent_to(split, 4) for each in large] == [True, True]
    assert compiled.memory_analysis().alias_size_in_bytes >= local_shard_bytes(MODEL, mesh)


def test_ours_has_less_than_an_even_share_of_the_standard_iteration(mesh):
    """Matrices 64 × 256 are iterated by their Gram matrices: 5 steps of 8n³, and 4n²m - 6n³ for
    each of 3 restarts, instead of 5 times 2n³ + 4n²m."""
    n, m = 64, 256
    saved = (5 * 8 * n**3 + 3 * (4 * n**2 * m - 6 * n**3)) / (5 * (2 * n**3 + 4 * n**2 * m))
    assert flops(dots(compile_ours(MODEL, mesh))) == saved * even_share(MODEL, mesh)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'jax\[tpu\]'"):
        make_mesh("v5e:2x2", data=4)
