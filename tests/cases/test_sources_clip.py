"""QK-Clip as its source has it (Su Jianlin, "QK-Clip", spaces.ac.cn/archives/11126): its first
version, what heads share, and the pitfall that the source tells of.

Logits are computed in float64 from the parameters alone. Where the clip computes in float64 too,
its powers and products round a few times at 1e-16, so 1e-12 of the largest logit is generous.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc

WIDTH, TOKENS, LATENT, COMPRESSED = 12, 5, 7, 6
HEADS, F, NOPE, ROPE, V = 4, 3, 4, 2, 3
THRESHOLD = 10.0
MAXIMA = np.array([40.0, 10.0, 3.0, 12.5])
GAMMA = np.minimum(1, THRESHOLD / MAXIMA)
MLA = mc.layouts.mla(NOPE, ROPE, V, query="wq", out=None)
COMPRESSED_MLA = mc.layouts.mla(NOPE, ROPE, V, query=("wq_a", "wq_b"), out=None)
SHARING = mc.layouts.gqa(value=None, out=None)


def projections(shapes, biases):
    rng = np.random.default_rng(0)
    return {
        name: {"kernel": rng.normal(size=shape)}
        | ({"bias": rng.normal(size=shape[1:])} if biases else {})
        for name, shape in shapes.items()
    }


def separate(kv_heads, biases=True):
    """MHA, GQA or MQA, with head axes."""
    return projections({"query": (WIDTH, HEADS, F), "key": (WIDTH, kv_heads, F)}, biases)


def latent(compressed, biases=True):
    """MLA as DeepSeek stores it, flat."""
    queries = HEADS * (NOPE + ROPE)
    shapes = (
        {"wq_a": (WIDTH, COMPRESSED), "wq_b": (COMPRESSED, queries)}
        if compressed
        else {"wq": (WIDTH, queries)}
    )
    keys = {"wkv_a": (WIDTH, LATENT + ROPE), "wkv_b": (LATENT, HEADS * (NOPE + V))}
    return projections(shapes | keys, biases)


KINDS = {
    "MHA": (mc.layouts.mha(value=None, out=None), separate(HEADS)),
    "MHA, no biases": (mc.layouts.mha(value=None, out=None), separate(HEADS, biases=False)),
    "GQA": (SHARING, separate(2)),
    "MQA": (SHARING, separate(1)),
    "MLA": (MLA, latent(compressed=False)),
    "MLA, compressed queries": (COMPRESSED_MLA, latent(compressed=True)),
}


def project(leaf, x):
    """Tokens by a projection with its bias, `[tokens, out]`, float64."""
    kernel = np.asarray(leaf["kernel"], np.float64)
    flat = x @ kernel.reshape(len(kernel), -1)
    return flat + (np.asarray(leaf["bias"], np.float64).reshape(-1) if "bias" in leaf else 0)


def logits(attn, x):
    """`[heads, queries, keys]` of one layer's parameters, float64."""
    of_heads = lambda y, count: y.reshape(len(y), count, -1).transpose(1, 0, 2)  # noqa: E731
    if "key" in attn:
        kv_heads = attn["key"]["kernel"].shape[-2]
        q = of_heads(project(attn["query"], x), HEADS)
        k = of_heads(project(attn["key"], x), kv_heads).repeat(HEADS // kv_heads, axis=0)
        return q @ k.mT / math.sqrt(F)
    last = "wq_b" if "wq_b" in attn else "wq"
    q = of_heads(project(attn[last], project(attn["wq_a"], x) if last == "wq_b" else x), HEADS)
    down = project(attn["wkv_a"], x)
    k = of_heads(project(attn["wkv_b"], down[:, :LATENT]), HEADS)[..., :NOPE]
    return (q[..., :NOPE] @ k.mT + q[..., NOPE:] @ down[:, LATENT:].T) / math.sqrt(NOPE + ROPE)


def clipped(layout, attn, maxima, dtype=jnp.float64, **options):
    """The attention after `apply_qk_clip`."""
    with jax.enable_x64(dtype == jnp.float64):
        params = {"attn": jax.tree.map(lambda x: jnp.asarray(x, dtype), attn)}
        sown = {("attn",): jnp.asarray(maxima)}
        clip = jax.jit(lambda p: mc.apply_qk_clip(p, sown, layout, THRESHOLD, **options))
        return jax.tree.map(np.asarray, clip(params)["attn"])


def tokens():
    return np.random.default_rng(1).normal(size=(TOKENS, WIDTH))


def factor(before, after):
    """What a leaf was multiplied by, per entry."""
    return after / before


# --- the first version: all heads of a layer, the root of γ on all of W_q and W_k


def test_first_version_on_mla():
    """The case: γ = 1/4 of the layer's maximum; q_nope, q_rope, k_rope take its root."""
    before = jax.tree.map(np.float32, latent(compressed=True, biases=False))
    after = clipped(COMPRESSED_MLA, before, MAXIMA, jnp.float32, scope="layer")
    q = factor(before["wq_b"]["kernel"], after["wq_b"]["kernel"]).reshape(COMPRESSED, HEADS, -1)
    kv = factor(before["wkv_b"]["kernel"], after["wkv_b"]["kernel"]).reshape(LATENT, HEADS, -1)
    down = factor(before["wkv_a"]["kernel"], after["wkv_a"]["kernel"])
    # A rounding of the root and one of the product, 6e-8 each.
    for scaled in (q, kv[..., :NOPE], down[:, LATENT:]):
        np.testing.assert_allclose(scaled, 0.5, rtol=3e-7)
    # What values share, and what is in front of the queries' projections, keeps its bits.
    np.testing.assert_array_equal(kv[..., NOPE:], 1)
    np.testing.assert_array_equal(down[:, :LATENT], 1)
    np.testing.assert_array_equal(after["wq_a"]["kernel"], before["wq_a"]["kernel"])


@pytest.mark.parametrize("alpha", [0.5, 0.2])
@pytest.mark.parametrize("kind", KINDS)
def test_first_version_scales_all_logits_of_a_layer_alike(kind, alpha):
    layout, before = KINDS[kind]
    after = clipped(layout, before, MAXIMA, scope="layer", alpha=alpha)
    x, gamma = tokens(), GAMMA.min()
    old, new = logits(before, x), logits(after, x)
    np.testing.assert_allclose(new, gamma * old, rtol=0, atol=1e-12 * np.abs(old).max())
    # Queries γ^α and keys γ^(1-α), biases with their kernels, each in whole.
    shares = {"query": alpha, "wq": alpha, "wq_b": alpha, "key": 1 - alpha}
    for name in before.keys() & shares.keys():
        for leaf in before[name]:
            found = factor(before[name][leaf], after[name][leaf])
            np.testing.assert_allclose(found, gamma ** shares[name], rtol=1e-14)
    if "wkv_a" in before:
        for leaf in before["wkv_a"]:
            found = factor(before["wkv_a"][leaf], after["wkv_a"][leaf])
            np.testing.assert_allclose(found[..., LATENT:], gamma ** (1 - alpha), rtol=1e-14)
            np.testing.assert_array_equal(found[..., :LATENT], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_first_version_leaves_a_layer_below_the_threshold_alone(kind):
    layout, before = KINDS[kind]
    after = clipped(layout, before, MAXIMA / 40 * THRESHOLD, scope="layer")
    jax.tree.map(np.testing.assert_array_equal, after, before)


# --- what heads share is not clipped

STEPS = 50
RISING = np.array([125.0, 1.0, 1.0, 1.0], np.float32)  # one head rises by a quarter in each step


def check_no_drift(before, after, clips=STEPS):
    """Of leaves `[..., heads, features]`: the first query head fell, all else has its bits."""
    query, key = ((before[name], after[name]) for name in ("query", "key"))
    for leaf in key[0]:
        np.testing.assert_array_equal(key[1][leaf], key[0][leaf])
    for leaf, old in query[0].items():
        new = query[1][leaf]
        np.testing.assert_array_equal(new[..., 1:, :], old[..., 1:, :])
        # A float32 rounding in each step.
        np.testing.assert_allclose(new[..., 0, :], 0.8**clips * old[..., 0, :], rtol=clips * 2e-7)


def fifty(tx, params, sown):
    """The parameters after so many steps with no update but the clip's."""

    def step(_, carry):
        params, state = carry
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, state = tx.update(zeros, state, params, max_logits=sown)
        return optax.apply_updates(params, updates), state

    return jax.jit(lambda p: jax.lax.fori_loop(0, STEPS, step, (p, tx.init(p))))(params)[0]


def float32(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), tree)


@pytest.mark.parametrize("kv_heads", [2, 1], ids=["GQA", "MQA"])
def test_shared_key_does_not_drift(kv_heads):
    """The case, and its like with one key for all."""
    params = {"attn": float32(separate(kv_heads))}
    sown = {("attn",): jnp.asarray(RISING)}
    clip = lambda _, params: mc.apply_qk_clip(params, sown, SHARING)  # noqa: E731
    after = jax.jit(lambda p: jax.lax.fori_loop(0, STEPS, clip, p))(params)
    check_no_drift(params["attn"], after["attn"])


def test_shared_key_does_not_drift_in_stacked_layers_of_micro_batches():
    """Three layers by scan, in the chain of a recipe with accumulation: only one layer rises."""
    stacked = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x, jnp.float32)] * 3), separate(1))
    params = {"attn": stacked}
    sown = {("attn",): jnp.stack([jnp.ones(HEADS), jnp.asarray(RISING), jnp.ones(HEADS)])}
    after = fifty(mc.accumulate(mc.qk_clip(SHARING), 2), params, sown)["attn"]
    layer = lambda tree, i: jax.tree.map(lambda x: x[i], tree)  # noqa: E731
    for i, clips in enumerate((0, STEPS // 2, 0)):
        check_no_drift(layer(stacked, i), layer(after, i), clips)


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_shared_key_does_not_drift_on_eight_devices(axis_type):
    """The queries' heads over four devices, which all have the key; the inputs over two."""
    mesh = jax.make_mesh((2, 4), ("fsdp", "tp"), (axis_type,) * 2)
    before = {"attn": float32(separate(2, biases=False))}
    split = {"query": {"kernel": P("fsdp", "tp")}, "key": {"kernel": P("fsdp")}}
    params = jax.tree.map(
        lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), before, {"attn": split}
    )
    with jax.set_mesh(mesh):
        after = fifty(mc.qk_clip(SHARING), params, {("attn",): jnp.asarray(RISING)})
    check_no_drift(before["attn"], jax.tree.map(np.asarray, after["attn"]))


def test_a_split_key_drifts_and_the_report_tells():
    """The other rule, by its name: exact logits at each step, and after fifty an innocent query at
    265 times its weights beside a key at 0.004 of its own."""
    params = {"attn": float32(separate(2, biases=False))}
    sown = {("attn",): jnp.asarray(RISING)}
    after = fifty(mc.qk_clip(SHARING, shared_keys="split"), params, sown)
    ratio = jax.tree.map(lambda x, y: np.asarray(y / x), params, after)["attn"]
    fell = 0.8 ** (STEPS / 2)
    # A rounding of float32 in each step, of numbers that grow with the weight.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4)
    close(ratio["query"]["kernel"][:, 0], fell)
    close(ratio["query"]["kernel"][:, 1], 1 / fell)
    close(ratio["key"]["kernel"][:, 0], fell)
    assert 1 / fell > 264 and fell < 0.004
    np.testing.assert_array_equal(ratio["query"]["kernel"][:, 2:], 1)
    np.testing.assert_array_equal(ratio["key"]["kernel"][:, 1], 1)
    report = mc.attention_report(after, None, sown, SHARING).blocks["attn"]
    assert report.collapsed.tolist() == [False, True, False, False]


# --- the pitfall: a clip per head that also clips what heads share


def by_roots(block, gamma):
    """√γ on both sides, as the first version has it, but per head: wrong where heads share."""
    root = gamma**0.5
    factors = {part.role: root for part in block.queries}
    for role in ("k", "k_nope", "k_rope"):
        if part := block.part(role):
            groups = root.reshape(*block.stack, part.heads, -1)
            factors[part.role] = groups.min(-1)
    return factors


@pytest.mark.parametrize(
    ("kind", "innocent"),
    [("MLA", [1, 2]), ("MLA, compressed queries", [1, 2]), ("GQA", [1]), ("MQA", [1, 2])],
)
def test_a_clip_per_head_of_what_heads_share_hits_the_others(kind, innocent):
    """As the source tells of MLA's rope key ("innocent bystanders"); `qk_clip` does not."""
    layout, before = KINDS[kind]
    x = tokens()
    old = logits(before, x)
    wrong = mc.clip_by_signal(layout, THRESHOLD, signal="max_logits", factors=by_roots)
    with jax.enable_x64(True):
        params = jax.tree.map(jnp.asarray, {"attn": before})
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = wrong.update(
            zeros, wrong.init(params), params, max_logits={("attn",): jnp.asarray(MAXIMA)}
        )
        after = jax.tree.map(np.asarray, optax.apply_updates(params, updates)["attn"])
    hit, right = logits(after, x), logits(clipped(layout, before, MAXIMA), x)
    scale = 1e-12 * np.abs(old).max()
    assert (GAMMA[innocent] == 1).all()
    # By how much: all of a group's logits, or of MLA's the rope's share of them.
    expected = (old + logits_of_nope(before, x)) / 2 if "wkv_a" in before else old / 2
    np.testing.assert_allclose(hit[innocent], expected[innocent], rtol=0, atol=scale)
    np.testing.assert_allclose(right, GAMMA[:, None, None] * old, rtol=0, atol=scale)
    np.testing.assert_array_equal(right[innocent], old[innocent])


def logits_of_nope(attn, x):
    """The logits without the shared rope key's part."""
    kept = (np.arange(LATENT + ROPE) < LATENT).astype(np.float64)
    return logits(attn | {"wkv_a": jax.tree.map(lambda leaf: leaf * kept, attn["wkv_a"])}, x)
