"""However a model is stored, it trains alike: Muon per head, QuacK and QK-Clip together.

The forward pass reads one canonical tree; a storage only permutes its entries.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from einops import rearrange
from optax.contrib import MuonDimensionNumbers

import muonclip_jax as mc
from muonclip_jax._layouts.blocks import Layout
from muonclip_jax._layouts.pieces import Piece

LAYERS, WIDTH, HEADS, KV, F, HIDDEN = 2, 8, 4, 2, 4, 12
NOPE, ROPE, V, Q_RANK, KV_RANK = 4, 2, 3, 5, 6
STEPS, BATCH, LENGTH = 10, 4, 6
LEARNING_RATE = 0.02

# Float32 rounds at 6e-8, and the storages sum in different orders. Newton–Schulz enlarges such a
# difference most where a gradient's singular values are smallest: by its slope at zero, 1e3, times
# the learning rate; on Gram matrices up to three times as much. 10 steps later parameters of size 1
# are still equal to 3e-5 (measured: 1.2e-5).
TOLERANCE = 3e-5

# Milliseconds of run time: compiling fast is all that counts.
quick_jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


# The model. Kernels carry their bias as the last input row: [layers, heads, in + 1, features].


def gqa_model(seed=0, kv=KV):
    normal = np.random.default_rng(seed).normal
    kernel = lambda *shape: normal(size=shape) / np.sqrt(shape[-2])  # noqa: E731
    return {
        "q": 2 * kernel(LAYERS, HEADS, WIDTH + 1, F),
        "k": 2 * kernel(LAYERS, kv, WIDTH + 1, F),
        "v": kernel(LAYERS, kv, WIDTH + 1, F),
        "o": kernel(LAYERS, HEADS, F, WIDTH),
        **mlp_model(kernel),
    }


def mla_model(seed=0):
    normal = np.random.default_rng(seed).normal
    kernel = lambda *shape: normal(size=shape) / np.sqrt(shape[-2])  # noqa: E731
    return {
        "q_down": 2 * kernel(LAYERS, WIDTH, Q_RANK),
        "q_up": 2 * kernel(LAYERS, HEADS, Q_RANK, NOPE + ROPE),
        "kv_down": kernel(LAYERS, WIDTH, KV_RANK + ROPE),
        "kv_up": 2 * kernel(LAYERS, HEADS, KV_RANK, NOPE + V),
        "o": kernel(LAYERS, HEADS, V, WIDTH),
        **mlp_model(kernel),
    }


def mlp_model(kernel):
    return {
        "up": kernel(LAYERS, WIDTH, HIDDEN),
        "down": kernel(LAYERS, HIDDEN, WIDTH),
        "norm": np.ones((LAYERS, WIDTH)),
    }


def forward(model, x):
    """Outputs and the max logits `[layers, heads]`."""

    def layer(x, weights):
        y = x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6) * weights["norm"]
        q, k, v = (mla_heads if "q_down" in weights else gqa_heads)(weights, y)
        logits = jnp.einsum("bhtf,bhsf->bhts", q, k) / np.sqrt(q.shape[-1])
        logits = jnp.where(np.tri(LENGTH, dtype=bool), logits, -jnp.inf)
        mixed = jnp.einsum("bhts,bhsf->bhtf", jax.nn.softmax(logits), v)
        x = x + jnp.einsum("bhtf,hfi->bti", mixed, weights["o"])
        return x + jax.nn.gelu(x @ weights["up"]) @ weights["down"], logits.max((0, 2, 3))

    return jax.lax.scan(layer, x, model)


@quick_jit
@functools.partial(jax.grad, has_aux=True)
def gradients(model, x, y):
    """Of the squared error; and the max logits."""
    outputs, maxima = forward(model, x)
    return jnp.square(outputs - y).mean(), maxima


def gqa_heads(weights, x):
    project = lambda w: jnp.einsum("bti,hif->bhtf", x, w[:, :-1]) + w[:, None, -1]  # noqa: E731
    q, k, v = (project(weights[name]) for name in "qkv")
    k, v = (jnp.repeat(each, HEADS // each.shape[1], axis=1) for each in (k, v))
    return rotate(q), rotate(k), v


def mla_heads(weights, x):
    q = jnp.einsum("bti,hif->bhtf", x @ weights["q_down"], weights["q_up"])
    down = x @ weights["kv_down"]
    kv = jnp.einsum("bti,hif->bhtf", down[..., :KV_RANK], weights["kv_up"])
    k_rope = jnp.broadcast_to(rotate(down[:, None, :, KV_RANK:]), (*kv.shape[:-1], ROPE))
    q = jnp.concatenate([q[..., :NOPE], rotate(q[..., NOPE:])], -1)
    return q, jnp.concatenate([kv[..., :NOPE], k_rope], -1), kv[..., NOPE:]


def rotate(x):
    """RoPE; without positions the keys' biases would have no gradient but rounding."""
    angles = np.arange(LENGTH)[:, None] / 10.0 ** np.arange(x.shape[-1] // 2)
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate(
        [a * np.cos(angles) - b * np.sin(angles), a * np.sin(angles) + b * np.cos(angles)], -1
    )


# The storages: one layer of the canonical tree → the attention's parameters, in NumPy


def projection(w, pattern):
    """`[heads, in + 1, features]` as a kernel and, the pattern without `i`, a bias."""
    stored = {"kernel": rearrange(w[:, :-1], pattern)}
    return {**stored, "bias": rearrange(w[:, -1], pattern.replace("i ", ""))}


def headed(w):
    names = {"query": "q", "key": "k", "value": "v"}
    attention = {name: projection(w[role], "h i f -> i h f") for name, role in names.items()}
    return {**attention, "out": {"kernel": w["o"]}}


def flat(w):
    names = {"query": "q", "key": "k", "value": "v"}
    attention = {name: projection(w[role], "h i f -> i (h f)") for name, role in names.items()}
    return {**attention, "out": {"kernel": rearrange(w["o"], "h f o -> (h f) o")}}


def blocked(w):
    each = [projection(w[role], "h i f -> i (h f)") for role in "qkv"]
    return fused(
        {name: np.concatenate([one[name] for one in each], -1) for name in ("kernel", "bias")}, w
    )


def interleaved(w):
    """For each key head its queries, the key and the value."""
    queries = rearrange(w["q"], "(g h) i f -> g h i f", g=len(w["k"]))
    slots = np.concatenate([queries, w["k"][:, None], w["v"][:, None]], 1)
    return fused(projection(rearrange(slots, "g s i f -> (g s) i f"), "h i f -> i (h f)"), w)


def fused(qkv, w):
    return {"qkv": qkv, "out": {"kernel": rearrange(w["o"], "h f o -> (h f) o")}}


def parts_in_front(w):
    rows = np.stack([w[role] for role in "qkv"])
    qkv = {"kernel": rows[..., :-1, :], "bias": rows[..., -1, :]}
    return {"qkv": qkv, "out": {"kernel": w["o"]}}


def heads_in_front(w):
    """Gemma's, with biases beside the weights in the block."""
    kv = np.stack([w["k"], w["v"]])
    return {
        "q_einsum": {"w": w["q"][:, :-1]},
        "q_bias": w["q"][:, -1],
        "kv_einsum": {"w": kv[..., :-1, :]},
        "kv_bias": kv[..., -1, :],
        "attn_vec_einsum": {"w": w["o"]},
    }


HEADS_IN_FRONT = Layout(
    "gemma",
    (
        Piece("q", "q_einsum/w", "heads in features", bias="q_bias"),
        *(
            Piece(
                role,
                "kv_einsum/w",
                "part heads in features",
                select={"part": part},
                bias="kv_bias",
            )
            for part, role in enumerate("kv")
        ),
        Piece("o", "attn_vec_einsum/w", "heads features out"),
    ),
    shared_keys=True,
)


def latent_headed(w):
    return latent(w, "h i f -> i h f", "h f o -> h f o")


def latent_flat(w):
    return latent(w, "h i f -> i (h f)", "h f o -> (h f) o")


def latent(w, up, out):
    return {
        "wq_a": {"kernel": w["q_down"]},
        "wq_b": {"kernel": rearrange(w["q_up"], up)},
        "wkv_a": {"kernel": w["kv_down"]},
        "wkv_b": {"kernel": rearrange(w["kv_up"], up)},
        "wo": {"kernel": rearrange(w["o"], out)},
    }


class Storage(NamedTuple):
    """How attention is stored and what the layers are stacked on (None: a module each)."""

    attention: Callable[[Mapping[str, np.ndarray]], Any]
    layout: Layout
    stack_axis: int | None = None


def store(model, storage: Storage):
    layers = []
    for i in range(LAYERS):
        w = {name: leaf[i] for name, leaf in model.items()}
        layers.append(
            {
                "attn": storage.attention(w),
                "mlp": {"up": {"kernel": w["up"]}, "down": {"kernel": w["down"]}},
                "norm": {"scale": w["norm"]},
            }
        )
    if storage.stack_axis is None:
        return {"layers": {str(i): layer for i, layer in enumerate(layers)}}
    stack = lambda *leaves: np.stack(leaves, min(storage.stack_axis, leaves[0].ndim))  # noqa: E731
    return {"layers": jax.tree.map(stack, *layers)}


def reader(model, storage: Storage):
    """The function back from stored parameters to the canonical tree."""
    leaves, tree = jax.tree.flatten(model)
    ends = np.cumsum([leaf.size for leaf in leaves])
    numbered = [
        np.arange(end - x.size, end).reshape(x.shape) for end, x in zip(ends, leaves, strict=True)
    ]
    stored = jax.tree.leaves(store(jax.tree.unflatten(tree, numbered), storage))
    order = np.argsort(np.concatenate([x.ravel() for x in stored]))

    def read(params):
        flat = np.concatenate([np.ravel(x) for x in jax.tree.leaves(params)])[order]
        parts = np.split(flat, ends[:-1])
        shaped = [part.reshape(x.shape) for part, x in zip(parts, leaves, strict=True)]
        return jax.tree.unflatten(tree, shaped)

    return read


def sow(maxima, storage: Storage):
    if storage.stack_axis is not None:
        return {"layers": {"attn": {"max_logits": maxima}}}
    return {"layers": {str(i): {"attn": {"max_logits": maxima[i]}} for i in range(LAYERS)}}


class Run(NamedTuple):
    """A trained model.

    Attributes:
      model: The parameters after the last step, as the canonical tree.
      clipped: How many heads QK-Clip clipped in each step.
      factors: QuacK's factors of the last step, of all blocks, sorted.
    """

    model: Any
    clipped: list[int]
    factors: np.ndarray


def train(model, storage: Storage, threshold=2.0, **routing) -> Run:
    layout = dataclasses.replace(storage.layout, stack_axis=storage.stack_axis or 0)
    if storage.stack_axis == 1:  # which the routing of other parameters than attention's refuses
        routing["rules"] = {"*/mlp/*": MuonDimensionNumbers(0, 2)}
    numbers = functools.partial(mc.muon_dimension_numbers, layout=layout, **routing)
    tx = optax.chain(
        mc.quack(
            LEARNING_RATE,
            layout=layout,
            direction=mc.muon_direction(
                dimension_numbers=numbers,
                newton_schulz=mc.NewtonSchulz(dtype="float32"),
                other=optax.identity(),  # Adam would make steps of gradients that are rounding only
            ),
        ),
        mc.qk_clip(layout, threshold),
    )
    read = reader(model, storage)

    @quick_jit
    def step(params, state, grads, maxima):
        updates, state = tx.update(grads, state, params, max_logits=maxima)
        return optax.apply_updates(params, updates), state

    params = store(jax.tree.map(np.float32, model), storage)
    state, clipped = quick_jit(tx.init)(params), []
    for batch in np.random.default_rng(1).normal(size=(STEPS, 2, BATCH, LENGTH, WIDTH)):
        grads, maxima = jax.tree.map(np.asarray, gradients(read(params), *np.float32(batch)))
        # The storage permutes entries, and so it does their gradient.
        params, state = step(params, state, store(grads, storage), sow(maxima, storage))
        clipped.append(int(mc.qk_clip_state(state).heads_clipped))
    factors = jax.tree.leaves(mc.quack_state(state).factors)
    return Run(read(params), clipped, np.sort(np.concatenate([np.ravel(x) for x in factors])))


def distance(a: Run, b: Run):
    """The largest difference between two models' parameters, whose size is about 1."""
    return max(
        float(np.abs(x - y).max())
        for x, y in zip(jax.tree.leaves(a.model), jax.tree.leaves(b.model), strict=True)
    )


GROUPED = {
    "unrolled": Storage(headed, mc.layouts.gqa()),
    "flat": Storage(flat, mc.layouts.gqa(KV, heads=HEADS), stack_axis=0),
    "headed, scanned on axis 1": Storage(headed, mc.layouts.gqa(), stack_axis=1),
    "fused, blocked": Storage(blocked, mc.layouts.fused_qkv(HEADS, KV), stack_axis=0),
    "fused, interleaved": Storage(
        interleaved,
        mc.layouts.fused_qkv(HEADS, KV, axes="in (heads part features)"),
        stack_axis=0,
    ),
    "heads in front": Storage(heads_in_front, HEADS_IN_FRONT, stack_axis=0),
}
PARTS_IN_FRONT = Storage(
    parts_in_front, mc.layouts.fused_qkv(HEADS, axes="part heads in features"), stack_axis=0
)
PLAIN = {
    "parts in front": PARTS_IN_FRONT,
    "fused, unrolled": Storage(blocked, mc.layouts.fused_qkv(HEADS)),
}
MLA = mc.layouts.mla(NOPE, ROPE, V)
LATENT = {
    "scanned, flat": Storage(latent_flat, MLA, stack_axis=0),
    "unrolled": Storage(latent_headed, MLA),
}
KINDS = {
    "grouped": (gqa_model(), Storage(headed, mc.layouts.gqa(), stack_axis=0), GROUPED),
    "plain": (gqa_model(kv=HEADS), Storage(headed, mc.layouts.mha(), stack_axis=0), PLAIN),
    "latent": (mla_model(), Storage(latent_headed, MLA, stack_axis=0), LATENT),
}


@functools.cache
def scanned(kind: str) -> Run:
    """The run that all others are compared to."""
    model, storage, _ = KINDS[kind]
    return train(model, storage)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        # Of each kind the storage that is the least like the first.
        pytest.param(kind, name, marks=[] if name == others[-1] else pytest.mark.slow)
        for kind, others in ((kind, list(others)) for kind, (_, _, others) in KINDS.items())
        for name in others
    ],
)
def test_storages_train_alike(kind, name):
    model, _, others = KINDS[kind]
    run = train(model, others[name])
    chex.assert_trees_all_close(run.model, scanned(kind).model, atol=TOLERANCE, rtol=0)
    assert run.clipped == scanned(kind).clipped
    chex.assert_trees_all_close(run.factors, scanned(kind).factors, rtol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_everything_took_part(kind):
    """Heads were clipped, not all; QuacK's factors moved, each its own way; so did the model."""
    run = scanned(kind)
    assert 0 < sum(run.clipped) < STEPS * LAYERS * HEADS
    assert np.abs(run.factors - 1).min() > 0.005 and np.ptp(run.factors) > 0.1
    for name, start in KINDS[kind][0].items():
        assert np.abs(run.model[name] - start).max() > 1000 * TOLERANCE, name


def swapped(layout, a, b):
    """The layout with two roles exchanged."""
    names = {a: b, b: a}
    pieces = [dataclasses.replace(p, role=names.get(p.role, p.role)) for p in layout.pieces]
    return dataclasses.replace(layout, pieces=tuple(pieces))


WRONG = {
    "Muon on whole projections": (PARTS_IN_FRONT, {"granularity": mc.Granularity(heads="all")}),
    "keys for values": (
        PARTS_IN_FRONT._replace(layout=swapped(PARTS_IN_FRONT.layout, "k", "v")),
        {},
    ),
    "heads by the wrong stride": (
        Storage(interleaved, mc.layouts.fused_qkv(HEADS), stack_axis=0),
        {},
    ),
    "no clip": (PARTS_IN_FRONT, {"threshold": 1e9}),
}


@pytest.mark.parametrize(
    ("storage", "options"),
    [
        pytest.param(*wrong, marks=() if name == "keys for values" else pytest.mark.slow, id=name)
        for name, wrong in WRONG.items()
    ],
)
def test_a_wrong_reading_trains_otherwise(storage, options):
    """The comparison above can fail: by far more than its tolerance."""
    run = train(KINDS["plain"][0], storage, **options)
    assert distance(run, scanned("plain")) > 1000 * TOLERANCE


@pytest.mark.parametrize("kind", KINDS)
def test_storages_hold_the_same_entries(kind):
    model, reference, others = KINDS[kind]
    for storage in (reference, *others.values()):
        read = reader(model, storage)(store(model, storage))
        jax.tree.map(np.testing.assert_array_equal, read, model)
