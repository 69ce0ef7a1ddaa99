"""One of several processes that train together, and what one process does alone.

    python -m tests.contract.in_processes HOST:PORT PROCESSES PROCESS FOLDER

Takes micro-steps, saves, restores and goes on; the first process writes what came of it. Then the
last process raises, while the others go on.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc

DEVICES_EACH = 4
# Seconds. JAX's own are 100 and 300: a process that waits for one that is gone ends after these.
HEARTBEAT, SHUTDOWN = 10, 10
MICRO_STEPS, SAVED_AT = 4, 3  # saved in the midst of a real step

LAYOUT = mc.layouts.mha(heads=4, query="q", key="k", value="v", out="o")
SPECS = {"q": P("fsdp", "tp"), "k": P("fsdp", "tp"), "v": P("fsdp", "tp"), "o": P("tp", "fsdp")}
SHAPE = (16, 16)


def tree(seed):
    rng = np.random.default_rng(seed)
    kernels = {n: {"kernel": rng.normal(size=SHAPE).astype(np.float32)} for n in SPECS}
    return {"attn": kernels, "up": {"kernel": rng.normal(size=(16, 32)).astype(np.float32)}}


def optimizer():
    newton_schulz = mc.NewtonSchulz(mc.schedules.polar_express(steps=3), "float32")
    muonclip = mc.muonclip(1e-2, layout=LAYOUT, threshold=5.0, newton_schulz=newton_schulz)
    return mc.accumulate(muonclip, 2)


def placed(mesh, values):
    """The values on the mesh; every process has all of them at hand."""

    def place(path, x):
        names = [str(key.key) for key in path]
        spec = SPECS.get(names[1], P()) if names[0] == "attn" else P("fsdp")
        return jax.device_put(x, NamedSharding(mesh, spec))

    return jax.tree_util.tree_map_with_path(place, values)


def train(mesh, folder=None):
    """Parameters after all micro-steps, with a save and a restore between them if there is a
    folder, and a function that takes one more."""
    with jax.set_mesh(mesh):
        tx, params = optimizer(), placed(mesh, tree(0))
        state = jax.jit(tx.init)(params)

        @jax.jit
        def step(params, state, grads, maxima):
            updates, state = tx.update(grads, state, params, max_logits={("attn",): maxima})
            return optax.apply_updates(params, updates), state

        def take(i, params, state):
            maxima = 10 * np.abs(np.random.default_rng(i).normal(size=4)).astype(np.float32)
            replicated = jax.device_put(maxima, NamedSharding(mesh, P()))
            return step(params, state, placed(mesh, tree(i)), replicated)

        for i in range(1, MICRO_STEPS + 1):
            params, state = take(i, params, state)
            if folder is not None and i == SAVED_AT:
                params, state = saved_and_restored(folder / "checkpoint", (params, state))
        return params, state, lambda: take(MICRO_STEPS + 1, params, state)


def saved_and_restored(folder, values):
    import orbax.checkpoint as ocp

    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, values)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), values
        )
        return checkpointer.restore(folder, abstract)


def mesh_of_all():
    return jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit,) * 2)


def main(address, processes, process, folder):
    from jax.experimental import multihost_utils

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES_EACH)
    jax.distributed.initialize(
        address,
        processes,
        process,
        initialization_timeout=60,
        heartbeat_timeout_seconds=HEARTBEAT,
        shutdown_timeout_seconds=SHUTDOWN,
    )
    folder = pathlib.Path(folder)
    params, state, again = train(mesh_of_all(), folder)
    whole = multihost_utils.process_allgather(params, tiled=True)
    clipped = int(jax.device_get(mc.qk_clip_state(state).heads_clipped.addressable_data(0)))
    if process == 0:
        leaves = {jax.tree_util.keystr(p): x for p, x in jax.tree_util.tree_leaves_with_path(whole)}
        np.savez(folder / "after.npz", clipped=jnp.asarray(clipped), **leaves)
    multihost_utils.sync_global_devices("written")
    if process == processes - 1:
        raise RuntimeError("this process cannot go on")
    with jax.set_mesh(mesh_of_all()):
        while True:
            jax.block_until_ready(again())


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:4]), sys.argv[4])
