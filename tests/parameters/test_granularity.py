"""Which heads make one matrix: published recipes, groups, pieces together, in many storages.

What a recipe orthogonalizes is transcribed on one canonical model, a head a matrix `[heads, in,
features]`, in float64 with an SVD. A storage only permutes its entries.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._core.axes import GROUPS
from muonclip_jax._layouts.blocks import Layout
from muonclip_jax._layouts.pieces import Piece
from muonclip_jax._layouts.roles import Role
from muonclip_jax._parameters.matrices import spec_of_parts

WIDTH, F, OUT, HEADS, LAYERS = 10, 3, 7, 4, 2
NOPE, ROPE, V, Q_RANK, KV_RANK = 4, 2, 3, 5, 6


def plain(heads, kv_heads):
    shapes = {"q": (heads, WIDTH, F), "k": (kv_heads, WIDTH, F), "v": (kv_heads, WIDTH, F)}
    return {**shapes, "o": (heads, F, OUT)}


MODELS = {
    "MHA": plain(HEADS, HEADS),
    "GQA": plain(12, 2),
    "MLA": {
        "q_down": (WIDTH, Q_RANK),
        "q_up": (HEADS, Q_RANK, NOPE + ROPE),
        "kv_down": (WIDTH, KV_RANK + ROPE),
        "kv_up": (HEADS, KV_RANK, NOPE + V),
        "o": (HEADS, V, OUT),
    },
}

# A recipe, transcribed: for each kernel its pieces, which of its features and how many heads a
# matrix. 0: all heads share it.
EVERY = slice(None)
Transcript = dict[str, list[tuple[slice, int]]]


def of_plain(q, k, v, o) -> Transcript:
    return {name: [(EVERY, heads)] for name, heads in zip("qkvo", (q, k, v, o), strict=True)}


def of_latent(q, kv, down, o) -> Transcript:
    return {"q_down": [(EVERY, 0)], "q_up": q, "kv_up": kv, "kv_down": down, "o": [(EVERY, o)]}


def apart(at, heads):
    return [(slice(0, at), heads), (slice(at, None), heads)]


DOWN = [(EVERY, 0)]
RECIPES = {
    "default": (
        mc.Granularity(),
        {
            "MHA": of_plain(1, 1, 1, 1),
            "GQA": of_plain(1, 1, 1, 1),
            "MLA": of_latent(apart(NOPE, 1), apart(NOPE, 1), apart(KV_RANK, 0), 1),
        },
    ),
    "Kimi K2": (
        mc.Granularity.kimi_k2(),
        {
            "MHA": of_plain(4, 4, 4, 4),
            "GQA": of_plain(12, 2, 2, 12),
            "MLA": of_latent([(EVERY, 4)], [(EVERY, 4)], DOWN, 4),
        },
    ),
    "Kimi K3": (
        mc.Granularity.kimi_k3(),
        {
            "MHA": of_plain(1, 1, 1, 4),
            "GQA": of_plain(1, 1, 1, 12),
            "MLA": of_latent([(EVERY, 1)], [(EVERY, 1)], DOWN, 4),
        },
    ),
    "GLM-5": (
        mc.Granularity.glm_5(),
        {"MLA": of_latent([(EVERY, 1)], apart(NOPE, 1), DOWN, 4)},
    ),
    "Group Muon": (
        mc.Granularity(heads=2),
        {
            "MHA": of_plain(2, 2, 2, 2),
            "GQA": of_plain(2, 2, 2, 2),
            "MLA": of_latent(apart(NOPE, 2), apart(NOPE, 2), apart(KV_RANK, 0), 2),
        },
    ),
    # Six queries a key head: groups within these, across them, and of all that read one key.
    **{
        f"queries by {size}": (
            mc.Granularity(heads={"q": size, "o": size, "v": "all"}),
            {"GQA": of_plain(size, 1, 2, size)},
        )
        for size in (3, 4, 6)
    },
    "all of a role": (mc.Granularity(heads="all"), {"GQA": of_plain(12, 2, 2, 12)}),
    "by role": (
        mc.Granularity(heads={"q": 4, "k": 2}, together=(("q_nope", "q_rope"),)),
        {"MLA": of_latent([(EVERY, 4)], [(slice(0, NOPE), 2), (slice(NOPE, None), 1)],
                          apart(KV_RANK, 0), 1)},
    ),
}  # fmt: skip


def msign(x):
    """U Vᵀ of every matrix, of the size that `match_adam` gives it."""
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt * 0.2 * max(x.shape[-2:]) ** 0.5


def neighbours(x, heads):
    """`msign` of so many heads `[heads, in, features]` side by side."""
    n, ins, features = x.shape
    rows = x.reshape(n // heads, heads, ins, features).swapaxes(1, 2)
    done = msign(rows.reshape(n // heads, ins, heads * features))
    return done.reshape(n // heads, ins, heads, features).swapaxes(1, 2).reshape(x.shape)


def transcribed(recipe: Transcript, model):
    """The update of one layer."""
    update = {name: np.full_like(x, np.nan) for name, x in model.items()}
    for name, pieces in recipe.items():
        for features, heads in pieces if name in model else ():
            x = model[name].swapaxes(-1, -2) if name == "o" else model[name]
            done = msign(x[..., features]) if heads == 0 else neighbours(x[..., features], heads)
            update[name][..., features] = done.swapaxes(-1, -2) if name == "o" else done
    return update


# Storages: one layer of the canonical model → its kernels


def separate(pattern, back):
    def store(w):
        return {**{r: rearrange(w[r], pattern) for r in "qkv"}, "o": rearrange(w["o"], back)}

    return store


def blocked(w):
    qkv = [rearrange(w[role], "h i f -> i (h f)") for role in "qkv"]
    return {"qkv": np.concatenate(qkv, -1), "o": rearrange(w["o"], "h f o -> (h f) o")}


def interleaved(w):
    """For each key head its queries, the key and the value."""
    queries = rearrange(w["q"], "(g h) i f -> g h i f", g=len(w["k"]))
    slots = np.concatenate([queries, w["k"][:, None], w["v"][:, None]], 1)
    o = rearrange(w["o"], "h f o -> (h f) o")
    return {"qkv": rearrange(slots, "g s i f -> i (g s f)"), "o": o}


def parts_in_front(w):
    return {"qkv": np.stack([w[role] for role in "qkv"]), "o": w["o"]}


def latent(up, back, down="i f -> i f"):
    def store(w):
        ups = {"wq_b": w["q_up"], "wkv_b": w["kv_up"]}
        downs = {"wkv_a": w["kv_down"]} | ({"wq_a": w["q_down"]} if "q_down" in w else {})
        return {
            **{name: rearrange(x, up) for name, x in ups.items()},
            **{name: rearrange(x, down) for name, x in downs.items()},
            "wo": rearrange(w["o"], back),
        }

    return store


class Storage(NamedTuple):
    """How one layer is stored, and on which axis layers are stacked (None: one layer)."""

    store: Callable[[Mapping[str, np.ndarray]], Any]
    layout: Layout
    stack_axis: int | None = None


QKV: tuple[Role, ...] = ("q", "k", "v")
NAMES = {"query": "q", "key": "k", "value": "v", "out": "o"}
HEADED = separate("h i f -> i h f", "h f o -> h f o")
FLAT = separate("h i f -> i (h f)", "h f o -> (h f) o")
TURNED = separate("h i f -> (h f) i", "h f o -> o (h f)")
MLA = mc.layouts.mla(NOPE, ROPE, V)
STORAGES = {
    "MHA": {
        "headed, scanned on axis 1": Storage(HEADED, mc.layouts.mha(**NAMES), 1),
        "flat": Storage(FLAT, mc.layouts.mha(heads=4, **NAMES), 0),
        "[out, in]": Storage(TURNED, mc.layouts.mha(heads=4, transposed=True, **NAMES)),
        "fused": Storage(blocked, mc.layouts.fused_qkv(4, out="o")),
        "fused, parts in front": Storage(
            parts_in_front, mc.layouts.fused_qkv(4, axes="part heads in features", out="o"), 0
        ),
    },
    "GQA": {
        "headed": Storage(HEADED, mc.layouts.gqa(**NAMES)),
        "flat": Storage(FLAT, mc.layouts.gqa(2, heads=12, **NAMES), 0),
        "fused": Storage(blocked, mc.layouts.fused_qkv(12, 2, out="o"), 1),
        "fused, by groups": Storage(
            interleaved, mc.layouts.fused_qkv(12, 2, axes="in (heads part features)", out="o"), 0
        ),
    },
    "MLA": {
        "headed": Storage(latent("h i f -> i h f", "h f o -> h f o"), MLA, 1),
        "flat": Storage(latent("h i f -> i (h f)", "h f o -> (h f) o"), MLA, 0),
        "[out, in]": Storage(
            latent("h i f -> (h f) i", "h f o -> o (h f)", "i f -> f i"),
            mc.layouts.mla(NOPE, ROPE, V, transposed=True),
        ),
        "without wq_a": Storage(
            latent("h i f -> i (h f)", "h f o -> (h f) o"),
            mc.layouts.mla(NOPE, ROPE, V, query="wq_b"),
        ),
    },
}


def model_of(kind, storage, seed=0):
    """A layer of the canonical model."""
    normal = np.random.default_rng(seed).normal
    model = {name: normal(size=shape) for name, shape in MODELS[kind].items()}
    if storage == "without wq_a":
        model.pop("q_down")
    return model


def stored(storage, layers):
    """The parameters of one layer, or of all in a stack."""
    kernels = [storage.store(layer) for layer in layers]
    if storage.stack_axis is None:
        return {"attn": {name: {"kernel": x} for name, x in kernels[0].items()}}
    stack = lambda *leaves: np.stack(leaves, storage.stack_axis)  # noqa: E731
    return {"attn": {name: {"kernel": x} for name, x in jax.tree.map(stack, *kernels).items()}}


def layout_of(storage):
    return dataclasses.replace(storage.layout, stack_axis=storage.stack_axis or 0)


CASES = [
    (recipe, kind, storage)
    for recipe, (_, kinds) in RECIPES.items()
    for kind in kinds
    for storage in STORAGES[kind]
    # Of a fused kernel K2 makes one matrix: tests/parameters/test_whole_kernels.py.
    if not (recipe == "Kimi K2" and "fused" in storage)
]


@pytest.mark.parametrize(("recipe", "kind", "storage"), CASES, ids=map(" - ".join, CASES))
def test_recipes_are_as_transcribed_in_every_storage(recipe, kind, storage):
    granularity, transcripts = RECIPES[recipe]
    layers = [model_of(kind, storage, seed) for seed in range(LAYERS)]
    updates = [transcribed(transcripts[kind], layer) for layer in layers]
    how = STORAGES[kind][storage]
    params, expected = stored(how, layers), stored(how, updates)
    numbers = mc.muon_dimension_numbers(params, layout=layout_of(how), granularity=granularity)
    for name, kernel in params["attn"].items():
        spec = numbers["attn"][name]["kernel"]
        for view, (count, ins, outs) in zip(spec.views, spec.shapes, strict=True):
            taken, wanted = (
                view.take(x).reshape(count, ins, outs)
                for x in (kernel["kernel"], expected["attn"][name]["kernel"])
            )
            # Everything in float64.
            np.testing.assert_allclose(msign(taken), wanted, rtol=0, atol=1e-12)


CONVERGED = mc.NewtonSchulz(mc.schedules.polar_express(12), dtype="float32", method="standard")
# Rounding of float32, enlarged a tenfold or two where singular values are small; updates are of
# size 0.2 sqrt(36) at most.
TOLERANCE = 5e-5


# Milliseconds of run time: compiling fast is all that counts.
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.mark.parametrize(
    ("recipe", "kind", "storage"),
    [("queries by 4", "GQA", "fused, by groups"), ("Kimi K3", "MLA", "[out, in]")],
)
def test_muon_takes_these_matrices_and_puts_them_back(recipe, kind, storage):
    """The whole direction, with the size by the joined matrix; groups across those of the keys."""
    granularity, transcripts = RECIPES[recipe]
    how, layers = STORAGES[kind][storage], [model_of(kind, storage, seed) for seed in range(LAYERS)]
    expected = stored(how, [transcribed(transcripts[kind], layer) for layer in layers])
    grads = jax.tree.map(jnp.float32, stored(how, layers))
    tx = mc.muon_direction(
        momentum=0.0, newton_schulz=CONVERGED, layout=layout_of(how), granularity=granularity
    )
    updates = quick_jit(tx.update)(grads, tx.init(grads))[0]
    jax.tree.map(lambda u, x: np.testing.assert_allclose(u, x, atol=TOLERANCE), updates, expected)


MESH = jax.make_mesh((8,), ("tp",), axis_types=(AxisType.Explicit,))


def test_heads_of_a_group_on_several_devices():
    """Eight heads on eight devices, of one kernel flat: two of them make a matrix, or four."""
    x = np.random.default_rng(0).normal(size=(8, 16, 4))
    patterns = {"query": ("i (h f)", P(None, "tp")), "key": ("i h f", P(None, "tp", None))}
    pieces = (Piece("q", "query", "in (heads features)", {"heads": 8}), Piece("k", "key"))
    grads = {
        name: {
            "kernel": jax.device_put(
                jnp.asarray(rearrange(x, f"h i f -> {pattern}"), jnp.float32),
                NamedSharding(MESH, spec),
            )
        }
        for name, (pattern, spec) in patterns.items()
    }
    numbers = mc.muon_dimension_numbers(
        {"attn": grads},
        layout=Layout("mixed", pieces),
        granularity=mc.Granularity({"q": 2, "k": 4}),
    )
    tx = mc.scale_by_orthogonalization(CONVERGED, dimension_numbers=numbers)
    with jax.set_mesh(MESH):
        updates = quick_jit(tx.update)({"attn": grads}, tx.init({"attn": grads}))[0]["attn"]
    for name, heads in (("query", 2), ("key", 4)):
        pattern, spec = patterns[name]
        done = updates[name]["kernel"]
        assert done.sharding.spec == spec
        wanted = rearrange(neighbours(x, heads) / (0.2 * 16**0.5), f"h i f -> {pattern}")
        np.testing.assert_allclose(np.asarray(done), wanted, atol=TOLERANCE)


def test_groups_that_lie_on_one_device_stay_there():
    """Four key heads' queries, 3 each, on four devices: groups of 3 stay, those of 6 span two
    devices; all 12 are one matrix whose columns are split."""
    layout = mc.layouts.fused_qkv(12, 4, axes="in (heads part features)", out=None)
    params = {"attn": {"qkv": {"kernel": jax.ShapeDtypeStruct((16, 4 * 5 * 2), jnp.float32)}}}
    sharding = NamedSharding(jax.sharding.AbstractMesh((4,), ("tp",)), P(None, "tp"))
    for heads, spec in {
        1: P("tp", None, None, None),
        3: P("tp", None, None, None),
        6: P(None, None, None, None),
        12: P(None, "tp", None, None),
    }.items():
        granularity = mc.Granularity({"q": heads})
        numbers = mc.muon_dimension_numbers(params, layout=layout, granularity=granularity)
        assert numbers["attn"]["qkv"]["kernel"].views[0].spec(sharding) == spec, heads


def texts(params, layout, granularity):
    rows = mc.describe(params, layout, granularity=granularity)
    return {row.path.split("/")[1]: [str(kind) for kind in row.matrices] for row in rows}


def test_describe_says_what_one_matrix_is():
    how = STORAGES["MLA"]["flat"]
    params = stored(how, [model_of("MLA", "flat")] * 3)
    assert texts(params, how.layout, mc.Granularity.kimi_k3()) == {
        "wq_a": ["q_down 3 × [10, 5]"],
        "wq_b": ["q_nope + q_rope 12 × [5, 6]"],
        "wkv_a": ["kv_down + k_rope 3 × [10, 8]"],
        "wkv_b": ["k_nope + v 12 × [6, 7]"],
        "wo": ["o 3 × [12, 7] of 4 heads"],
    }
    groups = texts(params, how.layout, mc.Granularity(heads=2))
    assert groups["wq_b"] == ["q_nope 6 × [5, 8] of 2 heads", "q_rope 6 × [5, 4] of 2 heads"]
    assert groups["wo"] == ["o 6 × [6, 7] of 2 heads"]
    how = STORAGES["GQA"]["fused"]
    params = stored(how._replace(stack_axis=None), [model_of("GQA", "fused")])
    # Not as many key heads as query heads: no one number.
    assert texts(params, how.layout, mc.Granularity.kimi_k2())["qkv"] == ["q + k + v 1 × [10, 48]"]


def test_queries_keys_and_values_of_a_head_may_share_a_matrix():
    """Where a fused kernel has an axis for the three: of each head, of two, of all."""
    how = STORAGES["MHA"]["fused"]
    model = model_of("MHA", "fused")
    kernel = stored(how, [model])["attn"]["qkv"]["kernel"]
    params = {"attn": {"qkv": {"kernel": kernel}}}
    layout = mc.layouts.fused_qkv(4, out=None)
    of_heads = np.stack([model[role] for role in "qkv"], 2)  # [heads, in, 3, features]
    for heads, number in ((1, 1), (2, 2), ("all", 4)):
        granularity = mc.Granularity(heads, together=(("q", "k", "v"),))
        numbers = mc.muon_dimension_numbers(params, layout=layout, granularity=granularity)
        (view,) = numbers["attn"]["qkv"]["kernel"].views
        taken = view.take(kernel).reshape(4 // number, WIDTH, -1)
        expected = rearrange(of_heads, "(n m) i p f -> n i (m p f)", m=number)
        np.testing.assert_array_equal(np.sort(taken), np.sort(expected))  # in any order of columns


def route(kind, storage, *options, **named):
    how = STORAGES[kind][storage]
    params = stored(how._replace(stack_axis=None), [model_of(kind, storage)])
    granularity = mc.Granularity(*options, **named)
    return mc.muon_dimension_numbers(params, layout=how.layout, granularity=granularity)


MISTAKES = {
    "heads that do not divide": (
        lambda: route("MHA", "flat", heads=3),
        ["attn/k/kernel of shape (10, 12)", "heads=3", "k has 4", "heads={'k': 'all', ...}"],
    ),
    "more heads than there are keys": (
        lambda: route("GQA", "headed", heads=4),
        ["attn/k/kernel of shape (10, 2, 3)", "matrices of 4 heads", "k has 2"],
    ),
    "MLA's roles in plain attention": (
        lambda: route("GQA", "flat", together=(("q_nope", "q_rope"),)),
        ["q_nope or q_rope", "no attention block", "k, o, q, v"],
    ),
    "roles of different parameters": (
        lambda: route("MHA", "headed, scanned on axis 1", together=(("q", "k"),)),
        ["q and k", "q in attn/q/kernel (10, 4, 3)", "k in attn/k/kernel (10, 4, 3)", "together="],
    ),
    "roles with another between them": (
        lambda: route("MHA", "fused", together=(("q", "v"),)),
        ["attn/qkv/kernel of shape (10, 36)", "q + v", "side by side", "together="],
    ),
    "six queries and one key": (
        lambda: route("GQA", "fused, by groups", together=(("q", "k"),)),
        ["attn/qkv/kernel of shape (10, 48)", "q + k", "side by side"],
    ),
    "two numbers for one matrix": (
        lambda: route("MLA", "flat", {"q_nope": 2}, together="pairs"),
        ["attn/wq_b/kernel of shape (5, 24)", "q_nope + q_rope", "different numbers of heads"],
    ),
    "a kernel by heads": (
        lambda: mc.Granularity(heads=2, together="kernel"),
        ["together='kernel'", "all heads", 'heads="all"'],
    ),
    "heads of what they share": (
        lambda: mc.Granularity(heads={"kv_down": 2}),
        ["kv_down", "all heads share"],
    ),
    "one role in two groups": (
        lambda: mc.Granularity(together=(("k_nope", "v"), ("q", "v"))),
        ["v twice in together"],
    ),
    "a group that is none": (
        lambda: mc.Granularity(together=("q_nope", "q_rope")),
        ["together must be groups of roles", "(('q_nope', 'q_rope'), ('k_nope', 'v'))"],
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize(("do", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(do, words):
    with pytest.raises((ValueError, TypeError)) as caught:
        do()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


def test_pieces_of_one_pair_in_two_parameters():
    """K3's pairs cannot be made; each piece by itself can."""
    queries = [
        Piece(role, name, "in (heads features)", sizes={"heads": 4})
        for role, name in (("q_nope", "q_c"), ("q_rope", "q_r"))
    ]
    layout = Layout("mine", (*queries, *MLA.pieces[2:]))
    how = STORAGES["MLA"]["flat"]
    params = stored(how._replace(stack_axis=None), [model_of("MLA", "flat")])
    params["attn"] |= {"q_c": {"kernel": jnp.ones((5, 16))}, "q_r": {"kernel": jnp.ones((5, 8))}}
    del params["attn"]["wq_b"]
    with pytest.raises(
        ValueError, match=r"q_nope in attn/q_c/kernel \(5, 16\).*q_rope in attn/q_r"
    ):
        mc.muon_dimension_numbers(params, layout=layout, granularity=mc.Granularity.kimi_k3())
    apart = mc.Granularity({"o": "all"}, together=(("k_nope", "v"), ("kv_down", "k_rope")))
    found = texts(params, layout, apart)
    assert found["q_r"] == ["q_rope 4 × [5, 2]"] and found["wkv_b"] == ["k_nope + v 4 × [6, 7]"]


def test_attention_without_positions_has_fewer_pairs():
    params = {"wq": (10, 16), "wkv_a": (10, 6), "wkv_b": (6, 28), "wo": (12, 10)}
    params = {"attn": {name: {"kernel": jnp.ones(shape)} for name, shape in params.items()}}
    layout = mc.layouts.mla(NOPE, 0, V, query="wq")
    assert texts(params, layout, mc.Granularity.kimi_k3()) == {
        "wq": ["q_nope 4 × [10, 4]"],
        "wkv_a": ["kv_down 1 × [10, 6]"],
        "wkv_b": ["k_nope + v 4 × [6, 7]"],
        "wo": ["o 1 × [12, 10] of 4 heads"],
    }


@pytest.mark.parametrize(
    ("lengths", "followed"),
    [((4, 4), ("tp", "fsdp")), ((8, 2), ("tp",))],
    ids=["to the end", "not"],
)
def test_pairs_of_heads_on_two_axes_keep_the_split_that_a_row_of_them_can_have(lengths, followed):
    """Heads [a, b] in a row are a0b0 a0b1 … a1b0 …: where a device has two of `a`, a split of `b`
    is no split of the row. Pairs of 16 heads are 8 matrices."""
    a, b = lengths
    piece = Piece("q", "w", "in a b features", {"a": a, "b": b, "features": 4})
    part = piece.fit(("w",), (8, a, b, 4))
    view = spec_of_parts([part], mc.Granularity(2)).views[0]
    mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tp"))
    split = view.split(NamedSharding(mesh, P(None, "tp", "fsdp", None)))
    assert split[GROUPS] == followed


def test_pieces_that_lie_apart_along_two_axes_share_no_matrix():
    """Queries and keys stand in opposite corners of [part, features]."""
    corners = {"q": (0, 0), "v": (0, 2), "gate": (1, 0), "k": (1, 2)}
    pieces = tuple(
        Piece(role, "w", "part in heads features", select={"part": p, "features": (f, f + 2)})
        for role, (p, f) in corners.items()
    )
    params = {"attn": {"w": {"kernel": jnp.ones((2, 10, 3, 4))}}}
    with pytest.raises(ValueError, match="do not lie side by side"):
        texts(params, Layout("odd", pieces), mc.Granularity(together=(("q", "k"),)))


def test_a_granularity_is_a_value():
    by_role = mc.Granularity({"q": 2, "o": "all"}, (("q_nope", "q_rope"),))
    assert by_role == mc.Granularity({"o": "all", "q": 2}, (("q_nope", "q_rope"),))
    assert len({by_role, dataclasses.replace(by_role), mc.Granularity(), mc.Granularity(1)}) == 2
    assert repr(by_role).startswith("Granularity(heads={'o': 'all', 'q': 2}, together=")
    assert eval(repr(by_role), {"Granularity": mc.Granularity}) == by_role


def test_streams_share_matrices_each_for_itself():
    """Two fused kernels with queries, keys and values of one attention: a head's three in each."""
    pieces = [
        Piece(role, name, "part in heads features", select={"part": part})
        for name in ("qkv", "qkv_txt")
        for part, role in enumerate(QKV)
    ]
    params = {"attn": {name: {"kernel": jnp.ones((3, 10, 4, 3))} for name in ("qkv", "qkv_txt")}}
    found = texts(params, Layout("streams", tuple(pieces)), mc.Granularity(together=(QKV,)))
    assert [*found.values()] == [["q + k + v 4 × [10, 9]"]] * 2
