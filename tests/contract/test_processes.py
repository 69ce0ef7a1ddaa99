"""The contract's core in two processes of four devices each, which meet on this machine."""

import os
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import muonclip_jax as mc
from tests.contract import in_processes

pytest.importorskip("orbax.checkpoint")
pytestmark = [pytest.mark.contract, pytest.mark.slow]

LIMIT = 300  # seconds that nothing here comes near
# After one process raised: what was set for JAX's coordination, and the machine's own delays.
GRACE = 60 + in_processes.HEARTBEAT + in_processes.SHUTDOWN


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What two processes wrote, said and returned, and how long one went on without the other."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    cache = {"JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    environment = {name: x for name, x in os.environ.items() if name != "XLA_FLAGS"} | cache
    program = [sys.executable, "-m", "tests.contract.in_processes", address, "2"]
    said = [(folder / f"said-{i}").open("w+") for i in range(2)]
    processes = [
        subprocess.Popen(
            [*program, str(i), str(folder)], env=environment, stdout=said[i], stderr=said[i]
        )
        for i in range(2)
    ]
    try:
        processes[1].wait(LIMIT)
        raised = time.monotonic()
        processes[0].wait(GRACE)
        alone = time.monotonic() - raised
    finally:
        for process in processes:
            process.kill()
            process.wait()
    for file in said:
        file.seek(0)
    return folder, [process.returncode for process in processes], [f.read() for f in said], alone


def test_numbers_are_those_of_one_process(ended):
    """Through a save and a restore across the processes, which one process does not make."""
    folder, _, said, _ = ended
    assert (folder / "after.npz").exists(), said
    params, state, _ = in_processes.train(in_processes.mesh_of_all())
    found = np.load(folder / "after.npz")
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        before = in_processes.tree(0)
        expected, name = np.asarray(leaf), jax.tree_util.keystr(path)
        # The same program and devices, whose sums over processes may come in another order.
        np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
        start = dict(
            (jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(before)
        )[name]
        assert np.abs(expected - start).max() > 1e-3
    assert int(found["clipped"]) == int(mc.qk_clip_state(state).heads_clipped) > 0


def test_nothing_hangs_when_one_raises(ended):
    """The other ends with an error as well, in the time that was set."""
    _, (first, second), (of_first, of_second), alone = ended
    assert second != 0 and "this process cannot go on" in of_second
    assert first != 0 and alone < GRACE, of_first
    assert "Traceback" in of_first or "coordination service" in of_first, of_first
