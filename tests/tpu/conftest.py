"""Nothing here runs on a TPU: libtpu compiles for one on a machine that has none."""

import pytest

from benchmarks.tpu import make_mesh


@pytest.fixture
def tpu_mesh():
    """`benchmarks.tpu.make_mesh`; without libtpu, or with one that knows no such TPU, a skip."""
    pytest.importorskip("libtpu", reason="make test-tpu installs libtpu and runs this")

    def make(topology, **axes):
        try:
            return make_mesh(topology, **axes)
        except LookupError as unknown:
            pytest.skip(str(unknown))

    return make
