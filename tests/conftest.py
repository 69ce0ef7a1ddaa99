"""Settings shared by all tests."""

import os

# Before JAX starts: the CPU backend, whatever the machine has, unless a run says otherwise.
os.environ.setdefault("JAX_PLATFORMS", "cpu")

from hypothesis import settings

# Compilation dominates and varies, so examples have no deadline; derandomized runs repeat.
settings.register_profile("default", deadline=None, derandomize=True)
settings.load_profile("default")
