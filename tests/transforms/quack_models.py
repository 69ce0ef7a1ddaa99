"""Small attention blocks for the tests of QuacK, with their matrices cut out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax import layouts
from muonclip_jax._transforms.quack import scale_by_quack

WIDTH, HEADS, FEATURES = 6, 4, 3
NOPE, ROPE, V, Q_RANK, KV_RANK = 4, 2, 3, 5, 4
TAU = 0.7

MHA, GQA = layouts.mha(), layouts.gqa()
MLA = layouts.mla(NOPE, ROPE, V)
MLA_WITH_GAINS = layouts.mla(NOPE, ROPE, V, query_norm="q_norm", key_value_norm="kv_norm")
MLA_PLAIN_QUERY = layouts.mla(NOPE, ROPE, V, query="wq", key_value_norm="kv_norm")

# Where each role is: the module, and which features of its last axis.
EVERY = slice(None)
ATTENTION = {"q": ("query", EVERY), "k": ("key", EVERY)}
LATENT = {
    "q_down": ("wq_a", EVERY),
    "q_gain": ("q_norm", EVERY),
    "q_nope": ("wq_b", slice(0, NOPE)),
    "q_rope": ("wq_b", slice(NOPE, None)),
    "kv_down": ("wkv_a", slice(0, KV_RANK)),
    "k_rope": ("wkv_a", slice(KV_RANK, None)),
    "kv_gain": ("kv_norm", EVERY),
    "k_nope": ("wkv_b", slice(0, NOPE)),
}
LATENT_PLAIN_QUERY = {
    role: ("wq" if module == "wq_b" else module, features)
    for role, (module, features) in LATENT.items()
    if role not in ("q_down", "q_gain")
}


def attention(rng, stack=(), heads=HEADS, kv_heads=HEADS, features=FEATURES):
    """One block at `attn` with biases, and a kernel that is none of QuacK's business."""

    def projection(heads):
        return {
            "kernel": rng.normal(size=(*stack, WIDTH, heads, features)),
            "bias": rng.normal(size=(*stack, heads, features)),
        }

    return {
        "attn": {
            "query": projection(heads),
            "key": projection(kv_heads),
            "value": projection(kv_heads),
            "out": {"kernel": rng.normal(size=(*stack, heads, features, WIDTH))},
        },
        "mlp": {"kernel": rng.normal(size=(*stack, WIDTH, WIDTH))},
    }


def latent(rng, stack=(), compressed=True):
    """MLA, with norms on the latents and biases on the down-projections."""

    def normal(*shape):
        return rng.normal(size=(*stack, *shape))

    block = {
        "wkv_a": {"kernel": normal(WIDTH, KV_RANK + ROPE), "bias": normal(KV_RANK + ROPE)},
        "kv_norm": {"scale": normal(KV_RANK)},
        "wkv_b": {"kernel": normal(KV_RANK, HEADS, NOPE + V)},
        "wo": {"kernel": normal(HEADS, V, WIDTH)},
    }
    if compressed:
        block["wq_a"] = {"kernel": normal(WIDTH, Q_RANK), "bias": normal(Q_RANK)}
        block["q_norm"] = {"scale": normal(Q_RANK)}
        block["wq_b"] = {"kernel": normal(Q_RANK, HEADS, NOPE + ROPE)}
    else:
        block["wq"] = {"kernel": normal(WIDTH, HEADS, NOPE + ROPE)}
    return {"attn": block}


def matrices(places, params, at=()):
    """The matrices of the layer at this place in the stack: {role: [one for each head]}."""
    found = {}
    for role, (module, features) in places.items():
        leaves = {name: np.float64(x)[at] for name, x in params["attn"][module].items()}
        if "scale" in leaves:
            found[role] = [np.diag(leaves["scale"])]
            continue
        rows = [leaves["kernel"][..., features]]
        if "bias" in leaves:
            rows.append(leaves["bias"][None, ..., features])
        matrix = np.concatenate(rows)
        shared = matrix.ndim == 2
        found[role] = [matrix] if shared else list(matrix.swapaxes(0, 1))
    return found


def scaled_by_hand(places, updates, factors):
    """Unstacked updates times the factors, {role: [one for each head]}."""
    updates = jax.tree.map(np.array, updates)
    for role, of_heads in factors.items():
        module, features = places[role]
        for leaf in updates["attn"][module].values():
            for head, factor in enumerate(of_heads):
                heads = EVERY if len(of_heads) == 1 else head
                part = leaf[..., features] if leaf.ndim == 1 else leaf[..., heads, features]
                part *= float(factor)
    return updates


def as_jax(tree, dtype=None):
    """Float arrays of this dtype; None is JAX's default, float64 under `jax.enable_x64`."""
    return jax.tree.map(lambda x: jnp.asarray(x, dtype or float), tree)


@functools.cache
def compiled(layout, **options):
    """`scale_by_quack`'s init and update with τ = TAU, compiled once for all tests."""
    tx = scale_by_quack(layout, TAU, **options)
    return jax.jit(tx.init), jax.jit(tx.update)
