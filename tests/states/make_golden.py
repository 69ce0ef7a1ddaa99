"""Writes golden checkpoints: optimizer states after three steps, and where two more steps lead.

    python -m tests.states.make_golden tests/states/golden-<version>

A released checkpoint is never written again. `golden-0.1` was made by the code of the last commit
before Muon became two links (with the options as they were called then, `OLD` below).
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax

import muonclip_jax as mc

OLD = not hasattr(mc, "NewtonSchulz")  # of version 0.1.0
LAYOUT = mc.layouts.mha()
STEPS, MORE = 3, 2


def chains():
    """Float32 throughout: nothing but the order of sums may differ between machines."""
    if OLD:
        options = {"dtype": "float32"}
        quack = mc.quack(1e-2, layout=LAYOUT, **options)
    else:
        options = {"newton_schulz": mc.NewtonSchulz(dtype="float32")}
        direction = mc.muon_direction(layout=LAYOUT, **options)
        quack = mc.quack(1e-2, layout=LAYOUT, direction=direction)
    muonclip = mc.muonclip(1e-2, layout=LAYOUT, threshold=5.0, **options)
    return {
        "muon": mc.muon(1e-2, layout=LAYOUT, **options),
        "muonclip": muonclip,
        "quack": quack,
        "accumulate": mc.accumulate(muonclip, 2),  # three micro-batches: in the midst of a step
        "bias_correction": mc.scale_by_muon(bias_correction=True, **options),
    }


def inputs(name):
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    if name == "bias_correction":
        tree = lambda: {"up": normal(4, 6)}  # noqa: E731
    else:
        tree = lambda: {  # noqa: E731
            "attn": {
                **{key: {"kernel": normal(4, 2, 3)} for key in ("query", "key", "value")},
                "out": {"kernel": normal(2, 3, 4)},
            },
            "norm": {"scale": normal(4)},
        }
    batches = [(tree(), 10 * abs(normal(2))) for _ in range(STEPS + MORE)]
    return tree(), batches


def advance(tx, params, state, batches):
    update = jax.jit(optax.with_extra_args_support(tx).update)
    for grads, maxima in batches:
        maxima = {("attn",): jnp.asarray(maxima)}
        updates, state = update(grads, state, params, max_logits=maxima)
        params = optax.apply_updates(params, updates)
    return params, state


def main(folder):
    import orbax.checkpoint as ocp
    from flax import serialization

    folder.mkdir(parents=True, exist_ok=True)
    for name, tx in chains().items():
        params, batches = inputs(name)
        params, state = advance(tx, params, tx.init(params), batches[:STEPS])
        after, _ = advance(tx, params, state, batches[STEPS:])
        content = {"state": state, "params": params, "after": after}
        plain = jax.tree.map(np.asarray, serialization.to_state_dict(content))
        (folder / f"{name}.msgpack").write_bytes(serialization.msgpack_serialize(plain))
        if name == "accumulate":
            with ocp.PyTreeCheckpointer() as checkpointer:
                saved = (folder / f"{name}.orbax").absolute()
                checkpointer.save(saved, state)
                # Orbax writes down where that was.
                note = f"Checkpoint commit was successful to {folder.name}/{saved.name}"
                (saved / "commit_success.txt").write_text(note)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
