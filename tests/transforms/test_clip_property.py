"""The property that defines QK-Clip: on any input, every head's logits scale by its own γ.

Queries and keys are recomputed here with plain einsums, from the parameters alone.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import muonclip_jax as mc

# b batch, t query position, s key position, i input, o output, h heads, f head features
WIDTH, LENGTH, BATCH = 5, 4, 2


def heads_of(kernel, bias, x, heads):
    y = np.einsum("bti,io->bto", x, kernel.reshape(WIDTH, -1)) + bias.reshape(-1)
    return y.reshape(*y.shape[:-1], heads, -1)


def grouped_logits(block, x, y, heads, kv_heads):
    """`[b, heads, t, s]` of one layer of MHA, GQA or MQA: queries from x, keys from y."""
    q = heads_of(block["query"]["kernel"], block["query"]["bias"], x, heads)
    k = heads_of(block["key"]["kernel"], block["key"]["bias"], y, kv_heads)
    k = np.repeat(k, heads // kv_heads, axis=2)
    return np.einsum("bthf,bshf->bhts", q, k) / math.sqrt(q.shape[-1])


def latent_logits(block, x, y, heads, nope, rope, v):
    """`[b, heads, t, s]` of one layer of MLA; x is the query latent, y the block's input."""
    q = np.einsum("bti,io->bto", x, block["query"]["kernel"].reshape(x.shape[-1], -1))
    q = q.reshape(*q.shape[:-1], heads, nope + rope)
    down = np.einsum("bsi,io->bso", y, block["wkv_a"]["kernel"])
    latent, k_rope = down[..., :-rope], down[..., -rope:]
    kv = np.einsum("bsi,io->bso", latent, block["wkv_b"]["kernel"].reshape(latent.shape[-1], -1))
    k_nope = kv.reshape(*kv.shape[:-1], heads, nope + v)[..., :nope]
    logits = np.einsum("bthf,bshf->bhts", q[..., :nope], k_nope)
    logits += np.einsum("bthf,bsf->bhts", q[..., nope:], k_rope)
    return logits / math.sqrt(nope + rope)


@st.composite
def attention_case(draw):
    kind = draw(st.sampled_from(["mha", "gqa", "mqa", "mla"]))
    kv_heads = 1 if kind == "mqa" else draw(st.integers(1, 3))
    group = draw(st.integers(2, 3)) if kind in ("gqa", "mqa") else 1
    return {
        "kind": kind,
        "kv_heads": kv_heads,
        "heads": kv_heads * group,
        "group": group,
        "features": draw(st.integers(1, 4)),
        "rope": draw(st.integers(1, 3)),
        "v": draw(st.integers(1, 3)),
        "layers": draw(st.sampled_from([None, 1, 3])),
        "flat": draw(st.booleans()),
        "alpha": draw(st.sampled_from([0.0, 0.3, 0.5, 1.0])),
        "shared_keys": draw(st.sampled_from(["untouched", "split"])),
        "scope": draw(st.sampled_from(["head", "head", "layer"])),
        "quantile": draw(st.floats(0.05, 1.2)),
        "seed": draw(st.integers(0, 2**16)),
    }


def make_params(case, rng):
    """The block's parameters in float64, stacked when there are layers."""
    stack = () if case["layers"] is None else (case["layers"],)
    heads, kv_heads, features = case["heads"], case["kv_heads"], case["features"]

    def kernel(ins, heads, features):
        shape = (heads * features,) if case["flat"] else (heads, features)
        return rng.normal(size=(*stack, ins, *shape))

    def bias(heads, features):
        shape = (heads * features,) if case["flat"] else (heads, features)
        return rng.normal(size=(*stack, *shape))

    if case["kind"] == "mla":
        return {
            "query": {"kernel": kernel(WIDTH, heads, features + case["rope"])},
            "wkv_a": {"kernel": rng.normal(size=(*stack, WIDTH, 3 + case["rope"]))},
            "wkv_b": {"kernel": kernel(3, heads, features + case["v"])},
        }
    return {
        "query": {"kernel": kernel(WIDTH, heads, features), "bias": bias(heads, features)},
        "key": {"kernel": kernel(WIDTH, kv_heads, features), "bias": bias(kv_heads, features)},
    }


def layout_of(case):
    if case["kind"] == "mla":
        heads = case["heads"] if case["flat"] else None
        sizes = case["features"], case["rope"], case["v"]
        return mc.layouts.mla(*sizes, query="query", heads=heads, out=None)
    heads = case["heads"] if case["flat"] else None
    if case["kind"] == "mha":
        return mc.layouts.mha(heads=heads, value=None, out=None)
    return mc.layouts.gqa(case["kv_heads"], heads=heads, value=None, out=None)


def logits_of(case, params, x, y):
    """`[layers, b, heads, t, s]` in float64."""
    layers = case["layers"] or 1
    stacked = params if case["layers"] else jax.tree.map(lambda leaf: leaf[None], params)
    per_layer = []
    for layer in range(layers):
        block = jax.tree.map(lambda leaf: np.asarray(leaf[layer], np.float64), stacked)  # noqa: B023
        per_layer.append(
            latent_logits(block, x, y, case["heads"], case["features"], case["rope"], case["v"])
            if case["kind"] == "mla"
            else grouped_logits(block, x, y, case["heads"], case["kv_heads"])
        )
    return np.stack(per_layer)


# float64: the factors' powers and products round a few times at 1e-16.
# float32: weights round once after the clip and logits sum up to ~10 such terms that may cancel,
# so errors are measured against the sum of magnitudes, bounded by the largest logit.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (np.float32, 1e-5),
        pytest.param(np.float64, 1e-12, marks=pytest.mark.slow),
    ],
)
@settings(max_examples=20)
@given(case=attention_case())
def test_logits_scale_by_gamma_on_any_input(dtype, tolerance, case):
    rng = np.random.default_rng(case["seed"])
    with jax.enable_x64(dtype is np.float64):
        params = {"attn": jax.tree.map(lambda a: jnp.asarray(a, dtype), make_params(case, rng))}
        x, y = rng.normal(size=(2, BATCH, LENGTH, WIDTH))
        before = logits_of(case, params["attn"], x, y)
        maxima = before.max(axis=(1, 3, 4))  # [layers, heads]
        threshold = float(max(np.quantile(maxima, min(case["quantile"], 1)), 1e-3)) * (
            max(case["quantile"], 1)
        )
        sown = jnp.asarray(maxima if case["layers"] else maxima[0], dtype)
        clipped = mc.apply_qk_clip(
            params,
            {"attn": {"max_logits": sown}},
            layout_of(case),
            threshold,
            alpha=case["alpha"],
            shared_keys=case["shared_keys"],
            scope=case["scope"],
        )
        after = logits_of(case, clipped["attn"], x, y)
        gamma = np.where(maxima > threshold, threshold / np.where(maxima > 0, maxima, 1), 1)
        if case["scope"] == "layer":
            gamma = np.broadcast_to(gamma.min(-1, keepdims=True), gamma.shape)

        expected = before * gamma[:, None, :, None, None]
        size = np.abs(before).max(axis=(1, 3, 4), keepdims=True) * gamma[:, None, :, None, None]
        assert np.all(np.abs(after - expected) <= tolerance * size)
        assert np.all(after.max(axis=(1, 3, 4)) <= np.maximum(threshold, 0) * (1 + 1e-5))

        # The same relation on an input the maxima never saw.
        x, y = 7 * rng.normal(size=(2, BATCH, LENGTH, WIDTH))
        fresh = logits_of(case, params["attn"], x, y)
        scaled = fresh * gamma[:, None, :, None, None]
        size = np.abs(fresh).max(axis=(1, 3, 4), keepdims=True) * gamma[:, None, :, None, None]
        assert np.all(np.abs(logits_of(case, clipped["attn"], x, y) - scaled) <= tolerance * size)

        if not drags_along(case):
            check_untouched_heads_keep_their_bits(case, params["attn"], clipped["attn"], gamma)


def drags_along(case):
    """Whether a head that is not clipped moves, because one with which it shares a key is."""
    shares = case["kind"] in ("gqa", "mqa") and case["shared_keys"] == "split"
    return shares and case["scope"] == "head" and case["alpha"] < 1


def check_untouched_heads_keep_their_bits(case, before, after, gamma):
    for name, heads in (
        ("query", case["heads"]),
        ("key", case["kv_heads"]),
        ("wkv_b", case["heads"]),
    ):
        for leaf in before.get(name, {}):
            old, new = (per_head(case, leaf, tree[name][leaf], heads) for tree in (before, after))
            kept = (old == new).all(axis=(1, 3))  # [layers, heads]
            untouched = case["scope"] == "head" and case["shared_keys"] == "untouched"
            if name == "key" and (case["alpha"] == 1.0 or (untouched and case["group"] > 1)):
                assert kept.all()
            else:
                unclipped = (gamma == 1).reshape(len(gamma), heads, -1).all(-1)
                assert kept[unclipped].all()


def per_head(case, leaf, values, heads):
    """A kernel or bias as `[layers, in, heads, features]`."""
    layers = case["layers"] or 1
    ins = values.shape[1 if case["layers"] else 0] if leaf == "kernel" else 1
    return np.asarray(values).reshape(layers, ins, heads, -1)
