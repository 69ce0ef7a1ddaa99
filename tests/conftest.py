"""Settings shared by all tests."""

import os

# Before JAX starts: the CPU backend, whatever the machine has, unless a run says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
from hypothesis import settings

# Sharding is tested on simulated devices. Not by XLA_FLAGS, which subprocesses would inherit.
jax.config.update("jax_num_cpu_devices", 8)

# Compilation dominates and varies, so examples have no deadline; derandomized runs repeat.
settings.register_profile("default", deadline=None, derandomize=True)
settings.register_profile("few", settings.get_profile("default"), max_examples=15)
settings.load_profile("default")
