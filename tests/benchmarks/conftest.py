"""Settings of the benchmarks' tests."""

import jax
import pytest


@pytest.fixture
def quick_compilation():
    """For tests of what a benchmark makes of its measurements, at tiny sizes: nearly all of their
    time is XLA's, so let it do less."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
