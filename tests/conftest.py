"""Settings shared by all tests."""

import ctypes
import gc
import os
import pathlib

# Before JAX starts: the CPU backend, whatever the machine has, unless a run says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from hypothesis import settings

# Sharding is tested on simulated devices. Not by XLA_FLAGS, which subprocesses would inherit.
jax.config.update("jax_num_cpu_devices", 8)

# Compilation dominates and varies, so examples have no deadline; derandomized runs repeat.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("few", settings.get_profile("default"), max_examples=15)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory):
    """All workers, and modules whose programs were released, share what was compiled."""
    if jax.config.jax_compilation_cache_dir is None:
        base = tmp_path_factory.getbasetemp()
        shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(shared) / "xla"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="module", autouse=True)
def release_programs():
    """Keeps memory flat: a module's compiled programs go with it."""
    yield
    jax.clear_caches()
    gc.collect()
    if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)  # glibc keeps what was freed unless told
