"""Next to `optax.contrib.muon` as it comes, on one H100: memory, bytes and products."""

import pytest

from benchmarks import roofline
from benchmarks.chips import CHIPS
from benchmarks.compiled import collectives, dots, flops
from benchmarks.gpu import CUBLAS
from benchmarks.kernels import kernels, traffic

PRODUCTS = {"triton": None, "cublas": CUBLAS}
ALMOST = 1.001  # a few sums more than a whole matrix


@pytest.fixture
def compile_both(gpu_mesh):
    """Ours and Optax's."""

    def compile(work, products):
        lowerings = roofline.lowerings(work, gpu_mesh("h100:1x1x1", data=1))
        wanted = (lowerings[roofline.OURS], lowerings[roofline.OPTAX])
        return [lower().compile(PRODUCTS[products]) for lower in wanted]

    return compile


def temporaries(compiled):
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("products", PRODUCTS)
@pytest.mark.parametrize(
    ("work", "memory", "executed"), [("4096x4096", ALMOST, 1.0), ("4096x16384", ALMOST, 0.75)]
)
def test_a_matrix(compile_both, work, memory, executed, products):
    ours, optax = compile_both(work, products)
    assert temporaries(ours) <= memory * temporaries(optax)
    assert traffic(kernels(ours)) <= 0.8 * traffic(kernels(optax))
    assert flops(dots(ours)) <= executed * flops(dots(optax))


@pytest.mark.parametrize("products", PRODUCTS)
def test_a_step(compile_both, products):
    """Its products are Muon's, in bfloat16; at the chip's peaks it takes little more than the least
    that the standard steps could take."""
    ours, optax = compile_both("step", products)
    assert {each.dtypes for each in dots(ours)} == {("bf16", "bf16")}
    assert flops(dots(ours)) <= roofline.standard_flops("step")
    assert collectives(ours) == []
    estimate = roofline.Estimate(kernels(ours), CHIPS["h100"])
    assert estimate.total_seconds <= 1.2 * roofline.bound("step", ours, CHIPS["h100"])
    assert temporaries(ours) <= temporaries(optax)
