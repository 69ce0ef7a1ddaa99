"""One optimizer step on eight simulated devices is the step on one, however the parameters lie.

The tree is mixed: dense and scanned kernels, experts, multi-head and multi-head latent attention,
an embedding; the chain is all of it: Muon, QuacK, weight decay and QK-Clip.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import muonclip_jax as mc
from benchmarks.compiled import collectives, totals
from muonclip_jax._core import paths

WIDTH, LAYERS, HEADS, F, RANK, EXPERTS, THRESHOLD = 16, 4, 4, 4, 8, 8, 2.0
SHAPES = {
    "embed/embedding": (64, WIDTH),
    "dense/kernel": (WIDTH, 32),
    "dense/bias": (32,),
    "layers/norm/scale": (LAYERS, WIDTH),
    "layers/attn/query/kernel": (LAYERS, WIDTH, HEADS, F),
    "layers/attn/key/kernel": (LAYERS, WIDTH, HEADS, F),
    "layers/attn/key/bias": (LAYERS, HEADS, F),
    "layers/attn/value/kernel": (LAYERS, WIDTH, HEADS, F),
    "layers/attn/out/kernel": (LAYERS, HEADS, F, WIDTH),
    "layers/mlp/kernel": (LAYERS, WIDTH, 32),
    "experts/up/kernel": (EXPERTS, WIDTH, 32),
    "experts/down/kernel": (EXPERTS, 32, WIDTH),
    "mla/wq_a/kernel": (WIDTH, RANK),
    "mla/wq_b/kernel": (RANK, HEADS * (F + 2)),
    "mla/wkv_a/kernel": (WIDTH, RANK + 2),
    "mla/wkv_b/kernel": (RANK, HEADS * 2 * F),
    "mla/wo/kernel": (HEADS * F, WIDTH),
}
LAYOUT = [
    mc.layouts.mha(block="layers/attn"),
    mc.layouts.mla(F, 2, F, heads=HEADS, block="mla"),
]
RULES = {"experts/*": MuonDimensionNumbers(-2, -1)}

QUERY_KEY_VALUE = [f"layers/attn/{name}/kernel" for name in ("query", "key", "value")]

# Every parameter's specification by its path; what is not named is whole on every device.
LAYOUTS = {
    "data parallel": {},
    "fsdp": {
        "embed/embedding": P("fsdp"),
        "dense/kernel": P("fsdp"),
        "dense/bias": P("fsdp"),
        **dict.fromkeys(
            QUERY_KEY_VALUE,
            P(None, "fsdp"),
        ),
        "layers/attn/out/kernel": P(None, None, None, "fsdp"),
        "layers/mlp/kernel": P(None, "fsdp"),
        "experts/up/kernel": P(None, "fsdp"),
        "experts/down/kernel": P(None, None, "fsdp"),
        "mla/wq_a/kernel": P("fsdp"),
        "mla/wq_b/kernel": P("fsdp"),
        "mla/wkv_a/kernel": P("fsdp"),
        "mla/wkv_b/kernel": P("fsdp"),
        "mla/wo/kernel": P(None, "fsdp"),
    },
    "fsdp and tp": {
        "embed/embedding": P("tp", "fsdp"),
        "dense/kernel": P("fsdp", "tp"),
        "dense/bias": P("tp"),
        **dict.fromkeys(
            QUERY_KEY_VALUE,
            P(None, "fsdp", "tp"),
        ),
        "layers/attn/key/bias": P(None, "tp"),
        "layers/attn/out/kernel": P(None, "tp", None, "fsdp"),
        "layers/mlp/kernel": P(None, "fsdp", "tp"),
        "experts/up/kernel": P(None, "fsdp", "tp"),
        "experts/down/kernel": P(None, "tp", "fsdp"),
        "mla/wq_a/kernel": P("fsdp", "tp"),
        "mla/wq_b/kernel": P("fsdp", "tp"),
        "mla/wkv_a/kernel": P("fsdp", "tp"),
        "mla/wkv_b/kernel": P("fsdp", "tp"),
        "mla/wo/kernel": P("tp", "fsdp"),
    },
    "experts and layers": {
        "layers/norm/scale": P("fsdp"),
        **{path: P("fsdp", None, "tp") for path in (*QUERY_KEY_VALUE, "layers/mlp/kernel")},
        "layers/attn/key/bias": P("fsdp", "tp"),
        "layers/attn/out/kernel": P("fsdp", "tp"),
        "experts/up/kernel": P(("fsdp", "tp")),
        "experts/down/kernel": P("fsdp", "tp"),
        "dense/kernel": P(("fsdp", "tp")),
    },
    "head features": {
        "layers/attn/query/kernel": P(None, None, None, "fsdp"),
        "layers/attn/key/kernel": P(None, "tp", None, "fsdp"),
        "layers/attn/key/bias": P(None, None, "tp"),
        "layers/attn/value/kernel": P(None, None, "fsdp", "tp"),
        "layers/attn/out/kernel": P(None, "tp", "fsdp"),
        "mla/wq_b/kernel": P(None, ("fsdp", "tp")),
        "mla/wkv_b/kernel": P(None, ("tp", "fsdp")),
        "mla/wo/kernel": P(("fsdp", "tp")),
    },
    "columns": {
        "embed/embedding": P(None, ("fsdp", "tp")),
        "dense/kernel": P(None, ("fsdp", "tp")),
        "layers/attn/query/kernel": P("tp", None, "fsdp"),
        "layers/attn/out/kernel": P(None, None, None, ("tp", "fsdp")),
        "layers/mlp/kernel": P("tp", None, "fsdp"),
        "experts/up/kernel": P("tp", None, "fsdp"),
        "mla/wkv_a/kernel": P(None, "tp"),
        "mla/wq_a/kernel": P(None, ("tp", "fsdp")),
    },
}
# Two for each stack of matrices that lie on several devices, and for each parameter that is split
# across its matrices; less those in which one stack comes while another goes, between the same
# devices.
ALL_TO_ALLS = {
    "data parallel": 0,
    "fsdp": 8,
    "fsdp and tp": 13,
    "experts and layers": 4,
    "head features": 16,
    "columns": 13,
}


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        functools.reduce(lambda node, key: node.setdefault(key, {}), parents, tree)[name] = leaf
    return tree


def chain(shardings=None):
    return optax.chain(
        mc.quack(
            1e-2,
            layout=LAYOUT,
            direction=mc.muon_direction(
                layout=LAYOUT,
                rules=RULES,
                newton_schulz=mc.NewtonSchulz(dtype="float32"),
                shardings=shardings,
            ),
        ),
        mc.qk_clip(LAYOUT, THRESHOLD),
    )


@functools.cache
def inputs():
    """Parameters that have moved since `init`, gradients, and maxima of which half are clipped."""
    rng = np.random.default_rng(1)
    some = lambda: nested(  # noqa: E731
        {path: rng.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}
    )
    first, grads = some(), some()
    params = jax.tree.map(lambda p, g: p + 0.3 * g, first, some())
    maxima = {
        ("layers", "attn"): rng.uniform(1, 3, (LAYERS, HEADS)).astype(np.float32),
        ("mla",): rng.uniform(1, 3, HEADS).astype(np.float32),
    }
    return first, params, grads, maxima


def step(tx, state, params, grads, maxima):
    updates, state = tx.update(grads, state, params, max_logits=maxima)
    return optax.apply_updates(params, updates), state


@functools.cache
def on_one_device():
    first, params, grads, maxima = jax.tree.map(jnp.asarray, inputs())
    tx = chain()
    return jax.jit(functools.partial(step, tx))(tx.init(first), params, grads, maxima)


@pytest.mark.parametrize(
    ("name", "axis_type"),
    [
        ("experts and layers", AxisType.Explicit),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                ("fsdp and tp", AxisType.Auto),
                ("data parallel", AxisType.Explicit),
                ("fsdp", AxisType.Auto),
                ("fsdp and tp", AxisType.Explicit),
                ("experts and layers", AxisType.Auto),
                ("head features", AxisType.Explicit),
                ("head features", AxisType.Auto),
                ("columns", AxisType.Auto),
            ]
        ),
    ],
)
def test_as_on_one_device(name, axis_type):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(axis_type,) * 2)
    specs = {path: LAYOUTS[name].get(path, P()) for path in SHAPES}
    assert set(LAYOUTS[name]) <= set(SHAPES)
    shardings = nested({path: NamedSharding(mesh, spec) for path, spec in specs.items()})
    first, params, grads, maxima = inputs()
    first, params, grads = (jax.device_put(tree, shardings) for tree in (first, params, grads))
    maxima = jax.device_put(maxima, NamedSharding(mesh, P()))

    tx = chain(shardings if axis_type == AxisType.Auto else None)
    run = jax.jit(functools.partial(step, tx), donate_argnums=(0, 1))
    state = tx.init(first)
    compiled = run.lower(state, params, grads, maxima).compile()
    new, state = compiled(state, params, grads, maxima)

    expected, expected_state = on_one_device()
    clip = mc.qk_clip_state(expected_state)
    assert 0 < int(clip.heads_clipped) < (LAYERS + 1) * HEADS
    # float32: rounding of sums in another order, times the slope of five Newton–Schulz steps.
    chex.assert_trees_all_close(new, expected, rtol=1e-5, atol=1e-5)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-5, atol=1e-5)

    # Only Muon moves matrices: what each device has of them, there and back.
    found = {kind: total for kind, total in totals(collectives(compiled)).items()}
    exchanged = found.pop("all-to-all", None)
    assert (exchanged.count if exchanged else 0) == ALL_TO_ALLS[name]
    # The rest is norms and factors.
    parameter_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    assert sum(total.bytes for total in found.values()) < parameter_bytes / 5

    is_muon = lambda node: isinstance(node, optax.TraceState)  # noqa: E731
    (muon,) = filter(is_muon, jax.tree.leaves(state, is_leaf=is_muon))
    placed = [muon.trace] if axis_type == AxisType.Auto else [muon.trace, new]
    for path, leaf in [each for tree in placed for each in paths.leaves(tree)]:
        wanted = NamedSharding(mesh, specs["/".join(path)])
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), path
