"""Settings shared by all tests."""

import ctypes
import gc
import importlib.metadata
import os
import pathlib

# Before JAX starts: the CPU backend, whatever the machine has, unless a run says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a test's time is compiling, and without these optimizations of the machine code it takes a
# third. Only for a jaxlib that knows the flags: others would stop the process. On the newest, tests
# compile as users do.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    os.environ.setdefault(
        "XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    )

import jax
import pytest
from hypothesis import settings

# Failed assertions in shared checks show their values; said before anything imports these.
pytest.register_assert_rewrite("tests.models.checks")

# Sharding is tested on simulated devices. Not by XLA_FLAGS, which subprocesses would inherit.
jax.config.update("jax_num_cpu_devices", 8)

# Compilation dominates and varies, so examples have no deadline; derandomized runs repeat.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("few", settings.get_profile("default"), max_examples=15)
settings.load_profile("default")


@pytest.fixture(scope="session", autouse=True)
def _one_kind_of_processor():
    """On every machine the defaults are those of a CPU with AMX: bfloat16, as on accelerators.
    What other kinds get is told by rates that a test declares (orthogonalize/test_rates.py)."""
    from muonclip_jax._orthogonalize import rates

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rates, "processor_flags", lambda: frozenset(("amx_tile", "amx_bf16")))
        yield


# What runs again on the newest Python, with the newest JAX, Flax and Optax: files in which we use
# what changes between their versions. All else computes with `jax.numpy`, which does not.
VERSIONS = {
    "types that carry shardings, shard_map, meshes": [
        "core",
        "spread/test_sharded_step.py",
        "spread/test_stacks.py",
        "transforms/test_clip_in_shard_map.py",
        "transforms/test_sharded_clip.py",
    ],
    "Flax: sow, capture, variables, names of parameters": [
        "attention/test_flax.py",
        "attention/test_max_logits.py",
        "diagnostics/test_activations.py",
        "layouts/test_layouts.py",
        "models",
    ],
    "Optax: wrappers, masks, its own Muon": [
        "transforms/test_accumulate.py",
        "transforms/test_muon.py",
    ],
    "Pallas, and promotion of dtypes around it": [
        "attention/test_attention_kernels.py",
        "orthogonalize/test_symmetric_pallas.py",
    ],
    "texts: errors around those of JAX, signatures, examples": [
        "test_docs.py",
        "test_docstrings.py",
        "test_errors.py",
        "test_imports.py",
        "test_surface.py",
    ],
}


# What tests no code that a user imports or runs, and many cells of a kind: last in `.ci/run`.
ASIDE = ["benchmarks", "contract", "studies"]


def pytest_collection_modifyitems(items):
    tests = pathlib.Path(__file__).parent
    chosen = [tests / place for places in VERSIONS.values() for place in places]
    aside = [tests / place for place in ASIDE]
    for item in items:
        if any(item.path.is_relative_to(place) for place in chosen):
            item.add_marker(pytest.mark.versions)
        if any(item.path.is_relative_to(place) for place in aside):
            item.add_marker(pytest.mark.slow)
            item.add_marker(pytest.mark.aside)


def pytest_collection_finish():
    """What was imported stays: the collector need not look through it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory):
    """A folder of this session that all its workers see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session", autouse=True)
def compile_once(shared_folder):
    """All workers, and modules whose programs were released, share what was compiled."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(shared_folder / "xla"))
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
