"""Layouts: which entries of which parameter are whose head, on every storage of attention.

Each storage comes with slices written by hand, for one layer, one slice a head. The tests stack
layers around them.
"""

import dataclasses
import inspect
import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import unflatten_dict
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._layouts.blocks import Layout, find_blocks
from muonclip_jax._layouts.checks import refuse_qk_norm
from muonclip_jax._layouts.pieces import Part, Piece

# Lengths that cannot be taken for one another. CROSS is the width of keys' and values' input.
WIDTH, CROSS, HEADS, KV, F, OUT = 5, 8, 4, 2, 3, 7
NOPE, ROPE, V, Q_RANK, KV_RANK = 3, 2, 4, 6, 9

Heads = Callable[[np.ndarray], list[np.ndarray]]  # one layer's parameter → a matrix for each head


@dataclass(frozen=True)
class Storage:
    """One way to store attention.

    Attributes:
      layout: Its layout.
      shapes: Of the parameters of one layer.
      heads: For each role the parameter and, by hand, its heads' `[in, features]`.
      biases: For each role the bias and, by hand, its heads' `[features]`.
    """

    layout: Layout
    shapes: Mapping[str, tuple[int, ...]]
    heads: Mapping[str, tuple[str, Heads]]
    biases: Mapping[str, tuple[str, Heads]] = dataclasses.field(default_factory=dict)


def columns(start, step, count, width=F) -> Heads:
    """Heads whose features are `width` last entries, the first at `start`, the next `step` on."""
    return lambda x: [x[..., i : i + width] for i in range(start, start + count * step, step)]


def rows(count, width=F) -> Heads:
    return lambda x: [x[width * h : width * (h + 1)] for h in range(count)]


def headed(count, start=0, stop=None) -> Heads:
    """Heads on the axis before the last."""
    return lambda x: [x[..., h, start:stop] for h in range(count)]


def in_front(count) -> Heads:
    return lambda x: [x[h] for h in range(count)]


def whole(x):
    return [x]


def as_row(x):
    return [x[None]]


def separate(flat, heads=HEADS, kv=HEADS, cross=WIDTH):
    """Shapes and heads of four kernels."""
    of = lambda count: (count * F,) if flat else (count, F)  # noqa: E731
    shapes = {
        "query/kernel": (WIDTH, *of(heads)),
        "key/kernel": (cross, *of(kv)),
        "value/kernel": (cross, *of(kv)),
        "out/kernel": (*of(heads), OUT),
    }
    by_hand = lambda count: columns(0, F, count) if flat else headed(count)  # noqa: E731
    return shapes, {
        "q": ("query/kernel", by_hand(heads)),
        "k": ("key/kernel", by_hand(kv)),
        "v": ("value/kernel", by_hand(kv)),
        "o": ("out/kernel", rows(heads) if flat else in_front(heads)),
    }


def latent(flat, compressed, gains=False):
    """MLA."""
    of = lambda features: (HEADS * features,) if flat else (HEADS, features)  # noqa: E731

    def up(start, stop, features):
        if flat:
            return columns(start, features, HEADS, stop - start)
        return headed(HEADS, start, stop)

    query = "wq_b" if compressed else "wq"
    shapes = {
        f"{query}/kernel": (Q_RANK if compressed else WIDTH, *of(NOPE + ROPE)),
        "wkv_a/kernel": (WIDTH, KV_RANK + ROPE),
        "wkv_b/kernel": (KV_RANK, *of(NOPE + V)),
        "wo/kernel": (*of(V), OUT),
    }
    heads = {
        "q_nope": (f"{query}/kernel", up(0, NOPE, NOPE + ROPE)),
        "q_rope": (f"{query}/kernel", up(NOPE, NOPE + ROPE, NOPE + ROPE)),
        "k_nope": ("wkv_b/kernel", up(0, NOPE, NOPE + V)),
        "v": ("wkv_b/kernel", up(NOPE, NOPE + V, NOPE + V)),
        "kv_down": ("wkv_a/kernel", lambda x: [x[:, :KV_RANK]]),
        "k_rope": ("wkv_a/kernel", lambda x: [x[:, KV_RANK:]]),
        "o": ("wo/kernel", rows(HEADS, V) if flat else in_front(HEADS)),
    }
    if compressed:
        shapes["wq_a/kernel"] = (WIDTH, Q_RANK)
        heads["q_down"] = ("wq_a/kernel", whole)
    if gains:
        shapes |= {"q_norm/scale": (Q_RANK,), "kv_norm/scale": (KV_RANK,)}
        heads |= {"q_gain": ("q_norm/scale", as_row), "kv_gain": ("kv_norm/scale", as_row)}
    options = {"query": ("wq_a", "wq_b") if compressed else "wq"}
    if gains:
        options |= {"query_norm": "q_norm", "key_value_norm": "kv_norm"}
    return Storage(mc.layouts.mla(NOPE, ROPE, V, **options), shapes, heads)


def fused(layout, shape, q, k, v, out_shape, o, bias=None, bias_heads=None):
    shapes = {"qkv/kernel": shape, "out/kernel": out_shape}
    heads = {role: ("qkv/kernel", each) for role, each in (("q", q), ("k", k), ("v", v))}
    biases = {}
    if bias is not None:
        shapes["qkv/bias"] = bias
        given = zip("qkv", bias_heads, strict=True)
        biases = {role: ("qkv/bias", each) for role, each in given}
    return Storage(layout, shapes, heads | {"o": ("out/kernel", o)}, biases)


def with_biases(storage, shapes, biases):
    return dataclasses.replace(storage, shapes={**storage.shapes, **shapes}, biases=biases)


def gemma():
    """Query heads in front; keys and values in one kernel with an axis for the two."""
    kv = lambda role, part: Piece(  # noqa: E731
        role, "kv_einsum/w", "part heads in features", select={"part": part}
    )
    layout = Layout(
        "gemma",
        (
            Piece("q", "q_einsum/w", "heads in features"),
            kv("k", 0),
            kv("v", 1),
            Piece("o", "attn_vec_einsum/w", "heads features out"),
        ),
        shared_keys=True,
    )
    shapes = {
        "q_einsum/w": (HEADS, WIDTH, F),
        "kv_einsum/w": (2, KV, WIDTH, F),
        "attn_vec_einsum/w": (HEADS, F, OUT),
    }
    heads = {
        "q": ("q_einsum/w", in_front(HEADS)),
        "k": ("kv_einsum/w", lambda x: [x[0, 0], x[0, 1]]),
        "v": ("kv_einsum/w", lambda x: [x[1, 0], x[1, 1]]),
        "o": ("attn_vec_einsum/w", in_front(HEADS)),
    }
    return Storage(layout, shapes, heads)


def gated_query(flat):
    """Each head's query and its output gate side by side, as in Qwen3-Next."""
    axes = "in (heads features)" if flat else "in heads features"
    sizes = {"heads": HEADS, "features": 2 * F}
    parts = (("q", 0), ("gate", F))
    layout = Layout(
        "gated",
        (
            *(
                Piece(role, "q_proj", axes, sizes, {"features": (start, start + F)})
                for role, start in parts
            ),
            Piece("k", "k_proj", "in (heads features)", {"heads": KV}),
        ),
        shared_keys=True,
    )
    shapes = {
        "q_proj/kernel": (WIDTH, HEADS * 2 * F) if flat else (WIDTH, HEADS, 2 * F),
        "k_proj/kernel": (WIDTH, KV * F),
    }
    heads = {
        role: (
            "q_proj/kernel",
            columns(start, 2 * F, HEADS) if flat else headed(HEADS, start, start + F),
        )
        for role, start in parts
    }
    return Storage(layout, shapes, heads | {"k": ("k_proj/kernel", columns(0, F, KV))})


def biased(flat_kernel, flat_bias):
    """Biases beside the kernels, of `out` too, which no head owns."""
    shapes, heads = separate(flat_kernel)
    shape = (HEADS * F,) if flat_bias else (HEADS, F)
    by_hand = columns(0, F, HEADS) if flat_bias else in_front(HEADS)
    names = {"q": "query/bias", "k": "key/bias", "v": "value/bias"}
    shapes |= dict.fromkeys(names.values(), shape) | {"out/bias": (OUT,)}
    layout = mc.layouts.mha(heads=HEADS if flat_kernel else None)
    return Storage(layout, shapes, heads, {role: (name, by_hand) for role, name in names.items()})


def biases_elsewhere():
    """Haiku's or Megatron's way: weights and biases side by side in the block."""
    roles = ("q", "k", "v")
    layout = Layout("named", tuple(Piece(role, f"w_{role}", bias=f"b_{role}") for role in roles))
    shapes = {f"w_{role}": (WIDTH, HEADS, F) for role in roles}
    shapes |= {f"b_{role}": (HEADS, F) for role in roles}
    return Storage(
        layout,
        shapes,
        {role: (f"w_{role}", headed(HEADS)) for role in roles},
        {role: (f"b_{role}", in_front(HEADS)) for role in roles},
    )


def haiku():
    """`hk.MultiHeadAttention`: flat `w`, with a `b` beside it."""
    names = {"q": "query", "k": "key", "v": "value"}
    pieces = [
        Piece(role, f"{name}/w", "in (heads features)", {"heads": HEADS}, bias=f"{name}/b")
        for role, name in names.items()
    ]
    shapes = {f"{name}/w": (WIDTH, HEADS * F) for name in names.values()}
    shapes |= {f"{name}/b": (HEADS * F,) for name in names.values()}
    by_hand = columns(0, F, HEADS)
    return Storage(
        Layout("haiku", tuple(pieces)),
        shapes,
        {role: (f"{name}/w", by_hand) for role, name in names.items()},
        {role: (f"{name}/b", by_hand) for role, name in names.items()},
    )


def latent_with_biases():
    storage = latent(flat=True, compressed=True)
    shapes = {"wq_b/bias": (HEADS * (NOPE + ROPE),), "wkv_a/bias": (KV_RANK + ROPE,)}
    biases = {
        "q_nope": ("wq_b/bias", storage.heads["q_nope"][1]),
        "q_rope": ("wq_b/bias", storage.heads["q_rope"][1]),
        "kv_down": ("wkv_a/bias", lambda x: [x[:KV_RANK]]),
        "k_rope": ("wkv_a/bias", lambda x: [x[KV_RANK:]]),
    }
    return with_biases(storage, shapes, biases)


BLOCKED = [columns(part * HEADS * F, F, HEADS) for part in range(3)]
SLOTS = (HEADS // KV + 2) * F  # one key head's queries, key and value

STORAGES = {
    "headed": Storage(mc.layouts.mha(), *separate(flat=False)),
    "flat": Storage(mc.layouts.mha(heads=HEADS), *separate(flat=True)),
    "grouped, headed": Storage(mc.layouts.gqa(), *separate(flat=False, kv=KV)),
    "grouped, flat": Storage(mc.layouts.gqa(KV, heads=HEADS), *separate(flat=True, kv=KV)),
    "one key head": Storage(mc.layouts.gqa(1, heads=HEADS), *separate(flat=True, kv=1)),
    "cross-attention": Storage(mc.layouts.mha(), *separate(flat=False, cross=CROSS)),
    "heads in front": gemma(),
    "parts in front": fused(
        mc.layouts.fused_qkv(HEADS, axes="part heads in features"),
        (3, HEADS, WIDTH, F),
        *(lambda x, part=part: [x[part, h] for h in range(HEADS)] for part in range(3)),
        (HEADS, F, OUT),
        in_front(HEADS),
    ),
    "parts in the middle": fused(
        mc.layouts.fused_qkv(HEADS, axes="in part heads features"),
        (WIDTH, 3, HEADS, F),
        *(lambda x, part=part: [x[:, part, h] for h in range(HEADS)] for part in range(3)),
        (HEADS, F, OUT),
        in_front(HEADS),
        bias=(3, HEADS, F),
        bias_heads=[lambda x, part=part: list(x[part]) for part in range(3)],
    ),
    "parts behind heads": fused(
        mc.layouts.fused_qkv(HEADS, axes="in heads part features"),
        (WIDTH, HEADS, 3, F),
        *(lambda x, part=part: [x[:, h, part] for h in range(HEADS)] for part in range(3)),
        (HEADS, F, OUT),
        in_front(HEADS),
    ),
    "fused, blocked": fused(
        mc.layouts.fused_qkv(HEADS),
        (WIDTH, 3 * HEADS * F),
        *BLOCKED,
        (HEADS * F, OUT),
        rows(HEADS),
        bias=(3 * HEADS * F,),
        bias_heads=BLOCKED,
    ),
    "fused, interleaved": fused(
        mc.layouts.fused_qkv(HEADS, axes="in (heads part features)"),
        (WIDTH, HEADS * 3 * F),
        *(columns(part * F, 3 * F, HEADS) for part in range(3)),
        (HEADS * F, OUT),
        rows(HEADS),
    ),
    "fused, transposed": fused(
        mc.layouts.fused_qkv(HEADS, axes="(part heads features) in"),
        (3 * HEADS * F, WIDTH),
        *(lambda x, part=part: BLOCKED[part](x.T) for part in range(3)),
        (OUT, HEADS * F),
        lambda x: [x[:, F * h : F * (h + 1)].T for h in range(HEADS)],
        bias=(3 * HEADS * F,),
        bias_heads=BLOCKED,
    ),
    "fused, grouped, blocked": fused(
        mc.layouts.fused_qkv(HEADS, KV),
        (WIDTH, (HEADS + 2 * KV) * F),
        columns(0, F, HEADS),
        columns(HEADS * F, F, KV),
        columns((HEADS + KV) * F, F, KV),
        (HEADS * F, OUT),
        rows(HEADS),
    ),
    "fused, grouped, interleaved": fused(
        mc.layouts.fused_qkv(HEADS, KV, axes="in (heads part features)"),
        (WIDTH, KV * SLOTS),
        lambda x: [x[:, i : i + F] for i in (0, F, SLOTS, SLOTS + F)],
        columns(2 * F, SLOTS, KV),
        columns(3 * F, SLOTS, KV),
        (HEADS * F, OUT),
        rows(HEADS),
        bias=(KV * SLOTS,),
        bias_heads=[
            lambda x: [x[i : i + F] for i in (0, F, SLOTS, SLOTS + F)],
            columns(2 * F, SLOTS, KV),
            columns(3 * F, SLOTS, KV),
        ],
    ),
    "fused, grouped, transposed": fused(
        mc.layouts.fused_qkv(HEADS, KV, axes="(part heads features) in"),
        ((HEADS + 2 * KV) * F, WIDTH),
        lambda x: [x[F * h : F * (h + 1)].T for h in range(HEADS)],
        lambda x: [x[F * h : F * (h + 1)].T for h in (4, 5)],
        lambda x: [x[F * h : F * (h + 1)].T for h in (6, 7)],
        (OUT, HEADS * F),
        lambda x: [x[:, F * h : F * (h + 1)].T for h in range(HEADS)],
    ),
    "latent, headed": latent(flat=False, compressed=True),
    "latent, flat, with gains": latent(flat=True, compressed=True, gains=True),
    "latent, plain query": latent(flat=False, compressed=False),
    "latent, flat, plain query": latent(flat=True, compressed=False),
    "latent, with biases": latent_with_biases(),
    "gated query": gated_query(flat=False),
    "gated query, flat": gated_query(flat=True),
    "biases": biased(False, False),
    "flat biases of headed kernels": biased(False, True),
    "flat biases": biased(True, True),
    "biases elsewhere": biases_elsewhere(),
    "biases named in Haiku's way": haiku(),
}

# (lengths of stack axes, where they are)
STACKS = [((), 0), ((3,), 0), ((2, 3), 0), ((3,), 1), ((2, 3), 1)]

by_path = partial(unflatten_dict, sep="/")

every_storage = pytest.mark.parametrize("storage", STORAGES.values(), ids=STORAGES)
every_stack = pytest.mark.parametrize(("stack", "axis"), STACKS, ids=str)


def stacked(shape, stack, axis):
    return (*shape[:axis], *stack, *shape[axis:])


def block_of(storage, stack=(), axis=0):
    """The storage's block in a model of one, and the parameters' shapes."""
    shapes = {path: stacked(shape, stack, axis) for path, shape in storage.shapes.items()}
    layout = dataclasses.replace(storage.layout, stack_axis=axis)
    leaves = {path: jax.ShapeDtypeStruct(shape, "float32") for path, shape in shapes.items()}
    (block,) = find_blocks(layout, {"attn": by_path(leaves)})
    return block, shapes


def heads_by_hand(heads: Heads, x, stack, axis):
    """`[stack..., heads, ...]`, layer by layer."""
    layers = [np.stack(heads(x[(slice(None),) * axis + at])) for at in np.ndindex(stack)]
    return np.stack(layers).reshape(*stack, *layers[0].shape)


def positions(heads: Heads, shape, stack, axis):
    """Where each entry of each head is in the flattened parameter."""
    return heads_by_hand(heads, np.arange(math.prod(shape)).reshape(shape), stack, axis)


@every_stack
@every_storage
def test_parts_are_what_slices_by_hand_are(storage, stack, axis):
    block, shapes = block_of(storage, stack, axis)
    assert block.stack == stack
    assert {part.role for part in block.parts} == set(storage.heads)
    for role, (name, heads) in storage.heads.items():
        part = block.part(role)
        assert "/".join(part.kernel) == f"attn/{name}"
        wanted = positions(heads, shapes[name], stack, axis)
        numbered = np.arange(math.prod(shapes[name])).reshape(shapes[name])
        np.testing.assert_array_equal(part.take(numbered), wanted)
        assert (*part.stack, part.heads) == wanted.shape[:-2]
        assert part.matrix == wanted.shape[-2:]
        assert part.features == wanted.shape[-2 if role == "o" else -1]
        if role not in storage.biases:
            assert part.bias is None
            continue
        name, heads = storage.biases[role]
        assert "/".join(part.bias) == f"attn/{name}"
        numbered = np.arange(math.prod(shapes[name])).reshape(shapes[name])
        wanted = positions(heads, shapes[name], stack, axis)
        np.testing.assert_array_equal(part.take(numbered), wanted[..., None, :])


def any_bits(shape, seed=0):
    """float32 of random bits: NaNs with payloads, subnormals, negative zeros and all."""
    words = np.random.default_rng(seed).integers(0, 2**32, math.prod(shape), np.uint32)
    return words.view(np.float32).reshape(shape)


def bits(x):
    return np.asarray(x).view(np.uint32)


@pytest.mark.parametrize(("stack", "axis"), [((2, 3), 1)], ids=str)
@every_storage
def test_put_replaces_the_part_and_keeps_the_bits_of_the_rest(storage, stack, axis):
    block, shapes = block_of(storage, stack, axis)

    @jax.jit
    def put_back_and_put(arrays, values):
        same = {part.role: part.put(x, part.take(x)) for part, x in with_kernels(arrays)}
        return same, {part.role: part.put(x, values[part.role]) for part, x in with_kernels(arrays)}

    def with_kernels(arrays):
        return [(part, arrays["/".join(part.kernel[1:])]) for part in block.parts]

    arrays = {name: any_bits(shape) for name, shape in shapes.items()}
    values = {
        role: any_bits(positions(heads, shapes[name], stack, axis).shape, seed=1)
        for role, (name, heads) in storage.heads.items()
    }
    same, new = put_back_and_put(arrays, values)
    for role, (name, heads) in storage.heads.items():
        np.testing.assert_array_equal(bits(same[role]), bits(arrays[name]))
        expected = arrays[name].copy()
        expected.reshape(-1)[positions(heads, shapes[name], stack, axis)] = values[role]
        np.testing.assert_array_equal(bits(new[role]), bits(expected))


@pytest.mark.parametrize(("stack", "axis"), [((), 0), ((2, 3), 1)], ids=str)
@every_storage
def test_multipliers_reach_their_heads_and_nothing_else(storage, stack, axis):
    block, shapes = block_of(storage, stack, axis)
    rng = np.random.default_rng(0)
    factors = {
        part.role: rng.uniform(1, 2, (*stack, part.heads)).astype(np.float32)
        for part in block.parts
    }
    first = dict(list(factors.items())[:1])
    # Of all pieces, and of one while the others beside it keep their size.
    multiply = jax.jit(lambda *several: [block.multipliers(one) for one in several])
    for some, multipliers in zip((factors, first), multiply(factors, first), strict=True):
        expected = {}
        for role, factor in some.items():
            for name, heads in filter(None, (storage.heads[role], storage.biases.get(role))):
                at = positions(heads, shapes[name], stack, axis)
                full = expected.setdefault(name, np.ones(shapes[name], np.float32))
                full.reshape(-1)[at] = factor.reshape(*factor.shape, *[1] * (at.ndim - factor.ndim))
        found = {"/".join(path[1:]): x for path, x in multipliers.items()}
        assert found.keys() == expected.keys()
        for name, multiplier in found.items():
            full = np.broadcast_to(multiplier, shapes[name])
            np.testing.assert_array_equal(full, expected[name])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_put_keeps_the_dtype_of_the_parameter(dtype):
    block, shapes = block_of(STORAGES["fused, blocked"])
    part = block.part("k")
    x = jnp.ones(shapes["qkv/kernel"], dtype)
    assert part.put(x, 2 * part.take(x).astype(jnp.float32)).dtype == x.dtype


# Random axes


@st.composite
def random_storage(draw):
    """A piece with random axes, its stack, and the lengths and slices of its names."""
    heads = draw(st.lists(st.sampled_from(["heads", "part", "slot"]), unique=True, max_size=3))
    carried = draw(st.sampled_from(["in", "out"]))
    sizes = {name: draw(st.integers(1, 3)) for name in (*heads, "features", carried)}
    merged = draw(st.permutations([*heads, "features"]))
    axes, start = [], 0
    while start < len(merged):
        stop = draw(st.integers(start + 1, len(merged)))
        axes.append(tuple(merged[start:stop]))
        start = stop
    axes.insert(draw(st.integers(0, len(axes))), (carried,))
    select = {}
    for name in draw(st.sets(st.sampled_from([*heads, "features"]))):
        start = draw(st.integers(0, sizes[name] - 1))
        select[name] = (start, draw(st.integers(start + 1, sizes[name])))
    stack = tuple(draw(st.lists(st.integers(1, 3), max_size=2)))
    return axes, sizes, select, stack, draw(st.integers(0, 1)), "o" if carried == "out" else "q"


def ending(select, size, how):
    """The same slice as an index, with negative ends or with open ends, where it can be."""
    start, stop = select
    if how == "index" and stop == start + 1:
        return start
    if how == "negative":
        return start - size, stop - size if stop < size else None
    if how == "open":
        return start or None, stop if stop < size else None
    return select


class Case(NamedTuple):
    """A random piece: its part, an array of distinct numbers and, of this, the heads."""

    part: Part
    array: np.ndarray
    heads: np.ndarray


@st.composite
def cases(draw):
    axes, sizes, select, stack, stack_axis, role = draw(random_storage())
    how = draw(st.sampled_from(["plain", "index", "negative", "open"]))
    names = [name for axis in axes for name in axis]
    carried = "out" if role == "o" else "in"
    heads = [name for name in names if name not in (carried, "features")]
    canonical = [carried, *heads, "features"]
    lengths = [sizes[name] for name in canonical]
    x = np.arange(math.prod(stack) * math.prod(lengths)).reshape(*stack, *lengths)

    # Stored from `[stack..., in, head axes..., features]`, of which the heads are plain slices.
    depth = len(stack)
    stored = x.transpose(*range(depth), *(depth + canonical.index(name) for name in names))
    stored = stored.reshape(*stack, *(math.prod(sizes[name] for name in axis) for axis in axes))
    stored = np.moveaxis(stored, range(depth), range(stack_axis, stack_axis + depth))
    cuts = (slice(*select.get(name, (None,))) for name in (*heads, "features"))
    cut = x[(..., slice(None), *cuts)]
    cut = cut.reshape(*stack, sizes[carried], -1, cut.shape[-1]).swapaxes(-2, -3)

    piece = Piece(
        role,
        "w",
        " ".join(f"({' '.join(axis)})" if len(axis) > 1 else axis[0] for axis in axes),
        {name: size for name, size in sizes.items() if name != carried},
        {name: ending(cut, sizes[name], how) for name, cut in select.items()},
    )
    part = piece.fit(("w",), stored.shape, stack_axis=stack_axis)
    return Case(part, stored, cut.swapaxes(-1, -2) if role == "o" else cut)


@settings(max_examples=200)
@given(case=cases())
def test_take_with_any_order_of_axes(case):
    np.testing.assert_array_equal(case.part.take(case.array), case.heads)
    assert (*case.part.stack, case.part.heads, *case.part.matrix) == case.heads.shape


@settings(max_examples=20)  # each compiles
@given(case=cases())
def test_put_with_any_order_of_axes(case):
    replaced = jax.jit(case.part.put)(case.array, -1 - case.heads)
    expected = np.where(np.isin(case.array, case.heads), -1 - case.array, case.array)
    np.testing.assert_array_equal(replaced, expected)


@pytest.mark.parametrize(
    ("groups", "split"), [(4, ("tp", "fsdp")), (8, ("tp",))], ids=["to the end", "not to the end"]
)
def test_heads_on_two_axes_keep_the_split_that_one_axis_can_have(groups, split):
    """Of [in, 8 groups, 2 members, features], the groups on four devices, heads in a row are
    g0m0 g0m1 g1m0 g1m1 …: two groups a device, and no more than that."""
    axes = {"groups": groups, "members": 2, "features": 4}
    part = Piece("q", "w", "in groups members features", axes).fit(("w",), (8, groups, 2, 4))
    mesh = jax.sharding.AbstractMesh((2, 4), ("fsdp", "tp"))
    sharding = NamedSharding(mesh, P(None, "tp", "fsdp", None))
    assert part.split_of_heads(sharding) == P(split, None, None)


# Flax's own modules


def shapes(tree):
    """A tree of shapes as a tree of `ShapeDtypeStruct`s."""
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=is_shape
    )


def linen_params(stack_axis=None, normalize_qk=False):
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            attention = nn.MultiHeadDotProductAttention(4, name="attn", normalize_qk=normalize_qk)
            if stack_axis is None:
                return attention(x)
            scanned = nn.scan(
                lambda module, x, _: (module(x), None),
                variable_axes={"params": stack_axis},
                split_rngs={"params": True},
                length=3,
            )
            return scanned(attention, x, None)[0]

    return jax.eval_shape(lambda: Model().init(jax.random.key(0), jnp.ones((1, 2, 8))))["params"]


def nnx_params(stacked=False, **options):
    class Model(nnx.Module):
        def __init__(self, rngs):
            make = lambda rngs: nnx.MultiHeadAttention(4, 8, decode=False, rngs=rngs, **options)  # noqa: E731
            if stacked:
                self.layers = nnx.vmap(make)(rngs.split(2))
            else:
                self.layers = nnx.List([make(rngs) for _ in range(2)])

    return nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(0))), nnx.Param)


@pytest.mark.parametrize("stack_axis", [None, 0, 1])
def test_flax_linen_attention(stack_axis):
    params = linen_params(stack_axis)
    layout = dataclasses.replace(mc.layouts.mha(), stack_axis=stack_axis or 0)
    if not stack_axis:
        assert mc.find_layout(params) == layout
    (block,) = find_blocks(layout, params)
    assert block.name == "attn"
    assert block.shape == ((4,) if stack_axis is None else (3, 4))
    assert {part.bias[-2] for part in block.parts if part.bias} == {"query", "key", "value"}
    (same,) = find_blocks(layout, {"params": params})
    assert same.name == "attn" and same.path == ("params", "attn")


@pytest.mark.parametrize("stacked", [False, True])
def test_flax_nnx_attention(stacked):
    params = nnx_params(stacked)
    layout = mc.find_layout(params)
    assert layout == mc.layouts.mha()
    blocks = find_blocks(layout, params)
    assert [block.name for block in blocks] == (["layers"] if stacked else ["layers/0", "layers/1"])
    assert {block.shape for block in blocks} == {(2, 4) if stacked else (4,)}


@pytest.mark.skipif(
    "num_kv_heads" not in inspect.signature(nnx.MultiHeadAttention.__init__).parameters,
    reason="this Flax has no grouped-query attention in NNX",
)
def test_flax_nnx_grouped_attention():
    params = nnx_params(num_kv_heads=2)
    layout = mc.find_layout(params)
    assert layout == mc.layouts.gqa()
    assert {(block.heads, block.kv_heads) for block in find_blocks(layout, params)} == {(4, 2)}


def test_find_layout_sees_grouped_heads():
    block = {"query": (8, 4, 2), "key": (8, 2, 2), "value": (8, 2, 2), "out": (4, 2, 8)}
    params = shapes({"a": {name: {"kernel": shape} for name, shape in block.items()}})
    assert mc.find_layout(params) == mc.layouts.gqa()


# QK-norm and other norms


def projections(*names, shape=(16, 2, 4)):
    return {name: {"kernel": shape} for name in names}


FLAX_NAMES = ("query", "key", "value")
MHA_BLOCK = {**projections(*FLAX_NAMES), "out": {"kernel": (2, 4, 16)}}


@pytest.mark.parametrize(
    "make", [lambda: linen_params(normalize_qk=True), lambda: nnx_params(normalize_qk=True)]
)
def test_qk_norm_is_refused_where_scaling_kernels_would_do_nothing(make):
    params = make()
    layout = mc.find_layout(params)
    with pytest.raises(ValueError, match=r"key_ln/scale \(2,\) normalises queries or keys"):
        refuse_qk_norm(find_blocks(layout, params))
    sown = {"max_logits": jnp.ones(4)}
    maxima = {"attn": sown} if "attn" in params else {"layers": {"0": sown, "1": sown}}
    with pytest.raises(ValueError, match="normalises queries or keys after"):
        mc.apply_qk_clip(params, maxima, layout)
    with pytest.raises(ValueError, match="normalises queries or keys after"):
        mc.scale_by_quack(layout).init(params)


@pytest.mark.parametrize(
    "make", [lambda: linen_params(normalize_qk=True), lambda: nnx_params(normalize_qk=True)]
)
def test_muon_per_head_works_behind_qk_norm(make):
    params = make()
    numbers = mc.muon_dimension_numbers(params, layout=mc.find_layout(params))
    specs = jax.tree.leaves(numbers)
    assert {role for spec in specs for role in spec.roles} == {"q", "k", "v", "o"}


def test_qk_norm_is_known_by_its_length_whatever_its_name():
    for norm in (
        {"ln": {"scale": (4,)}},
        {"q_layernorm": {"weight": (4,)}},
        {"LayerNorm_0": {"scale": (8,), "bias": (8,)}},  # over both heads
        {"norm_q": {"gamma": (16,)}},
        {"WeightNorm_0": {"query/kernel/scale": (2, 4)}},
        {"q_scale": {"scale": (2, 4)}},  # every head its own
        {"q_norm": (4,)},  # a parameter of the block itself
    ):
        params = shapes({"a": {**MHA_BLOCK, **norm}})
        with pytest.raises(ValueError, match="normalises queries or keys after"):
            refuse_qk_norm(find_blocks(mc.layouts.mha(), params))
        (name,) = norm
        harmless = dataclasses.replace(mc.layouts.mha(), harmless=(name,))
        refuse_qk_norm(find_blocks(harmless, params))


def test_a_norm_in_front_of_the_projections_is_harmless():
    params = shapes({"a": {**MHA_BLOCK, "norm": {"scale": (16,)}}})
    refuse_qk_norm(find_blocks(mc.layouts.mha(), params))


def test_latent_norms_of_mla_are_in_front_of_the_projections():
    mla = {
        "wq_a": {"kernel": (16, 12)},
        "wq_b": {"kernel": (12, 12)},
        "wkv_a": {"kernel": (16, 6)},
        "wkv_b": {"kernel": (4, 14)},
        "wo": {"kernel": (6, 16)},
    }
    norms = {"q_norm": {"scale": (12,)}, "kv_norm": {"scale": (4,)}}  # 4 is nope as well
    refuse_qk_norm(find_blocks(mc.layouts.mla(4, 2, 3), shapes({"a": {**mla, **norms}})))
    partial = {"q_rope_norm": {"scale": (2,)}}
    blocks = find_blocks(mc.layouts.mla(4, 2, 3), shapes({"a": {**mla, **norms, **partial}}))
    with pytest.raises(ValueError, match="q_rope_norm/scale"):
        refuse_qk_norm(blocks)


@pytest.mark.parametrize("q_rank", [0, 6, 12])
@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("norm", ["k_norm", "key_layernorm", "k_head_norm", "q_head_norm"])
def test_a_head_of_mla_may_be_as_long_as_a_latent(q_rank, named, norm):
    """Then only names tell norms of heads (6 features) from those of latents (6 and q_rank)."""
    mla = {
        **({"wq_a": {"kernel": (16, q_rank)}} if q_rank else {}),
        "wq_b": {"kernel": (q_rank or 16, 12)},
        "wkv_a": {"kernel": (16, 8)},
        "wkv_b": {"kernel": (6, 14)},
        "wo": {"kernel": (6, 16)},
        "kv_norm": {"scale": (6,)},
        **({"q_norm": {"scale": (q_rank,)}} if q_rank else {}),
    }
    told = (
        {"query_norm": "q_norm" if q_rank else None, "key_value_norm": "kv_norm"} if named else {}
    )
    layout = mc.layouts.mla(4, 2, 3, query=("wq_a", "wq_b") if q_rank else "wq_b", **told)
    refuse_qk_norm(find_blocks(layout, shapes({"a": mla})))
    blocks = find_blocks(layout, shapes({"a": {**mla, norm: {"scale": (6,)}}}))
    if norm == "q_head_norm" and not named:
        return  # it may as well be on a latent: layouts that leave out the norms cannot tell
    with pytest.raises(ValueError, match=f"a/{norm}/scale \\(6,\\) normalises queries or keys"):
        refuse_qk_norm(blocks)


@pytest.mark.parametrize("axis", [0, 1])
def test_norms_of_stacked_layers(axis):
    """The stack is as long as one head, which must not be taken for the norm's own length."""
    add_stack = lambda shape: stacked(shape, (F,), axis)  # noqa: E731

    def blocks(name, norm):
        shapes_of = {**STORAGES[name].shapes, **norm}
        leaves = {path: add_stack(shape) for path, shape in shapes_of.items()}
        layout = dataclasses.replace(STORAGES[name].layout, stack_axis=axis)
        return find_blocks(layout, shapes({"attn": by_path(leaves)}))

    refuse_qk_norm(blocks("headed", {"norm/scale": (WIDTH,)}))
    refuse_qk_norm(blocks("latent, headed", {"q_norm/scale": (Q_RANK,)}))
    refuse_qk_norm(blocks("latent, flat, with gains", {}))
    with pytest.raises(ValueError, match=r"attn/ln/scale \(3, 3\) normalises"):
        refuse_qk_norm(blocks("headed", {"ln/scale": (F,)}))


# Which modules are blocks


def test_block_pattern_takes_some_blocks():
    params = nnx_params()
    (block,) = find_blocks(mc.layouts.mha(block="layers/1"), params)
    assert block.name == "layers/1"


def test_projections_in_a_sub_module():
    params = shapes({"a": {"proj": projections("q", "k")}})
    layout = mc.layouts.mha(query="proj/q", key="proj/k", value=None, out=None)
    (block,) = find_blocks(layout, params)
    assert block.name == "a" and block.heads == 2


def test_several_kinds_in_one_model():
    """A hybrid: plain attention, latent attention, and layers without any."""
    grouped = {name: {"kernel": shape[1]} for name, shape in GROUPED.items()}
    mla = by_path(STORAGES["latent, headed"].shapes)
    layers = {
        "0": {"attn": MHA_BLOCK, "mlp": {"up": {"kernel": (16, 32)}}},
        "1": {"ssm": {"in_proj": {"kernel": (16, 32)}, "conv": {"kernel": (4, 32)}}},
        "2": {"attn": grouped},
        "3": {"latent": mla},
    }
    params = shapes({"layers": layers})
    kinds = [
        mc.layouts.mha(block="layers/0/*"),
        mc.layouts.gqa(query="q_proj", key="k_proj", value="v_proj", out="o_proj"),
        mc.layouts.mla(NOPE, ROPE, V),
    ]
    blocks = find_blocks(kinds, params)
    found = {block.name: (block.layout.name, block.heads, block.kv_heads) for block in blocks}
    assert found == {
        "layers/0/attn": ("mha", 2, 2),
        "layers/2/attn": ("gqa", 4, 2),
        "layers/3/latent": ("mla", HEADS, HEADS),
    }
    assert find_blocks(tuple(kinds), params) == blocks
    without = [kinds[0], kinds[1], mc.layouts.ignore("layers/3/*")]
    assert [b.name for b in find_blocks(without, params)] == ["layers/0/attn", "layers/2/attn"]


GROUPED = {
    "q_proj": ("q", (16, 4, 4)),
    "k_proj": ("k", (16, 2, 4)),
    "v_proj": ("v", (16, 2, 4)),
    "o_proj": ("o", (4, 4, 16)),
}


def test_a_layout_twice_with_patterns_that_do_not_meet():
    """The same names, but other sizes, in encoder and decoder."""
    flat = {name: {"kernel": (16, 16)} for name in (*FLAX_NAMES, "out")}
    params = shapes({"encoder": {"attn": flat}, "decoder": {"attn": flat}})
    kinds = [
        mc.layouts.mha(heads=2, block="encoder/*"),
        mc.layouts.mha(heads=4, block="decoder/*"),
    ]
    assert [(b.name, b.heads) for b in find_blocks(kinds, params)] == [
        ("encoder/attn", 2),
        ("decoder/attn", 4),
    ]


UNKNOWN_ATTENTION = {
    "Flax": projections("query", "key"),
    "Llama": projections("q_proj", "k_proj", shape=(16, 8)),
    "GPT-2": projections("c_attn", shape=(16, 24)),
    "Gemma": {"q_einsum": {"w": (2, 16, 4)}, "kv_einsum": {"w": (2, 1, 16, 4)}},
    "DeepSeek": projections("wq_a", "wq_b", "wkv_a", "wkv_b", shape=(16, 8)),
    "GPT-NeoX": projections("query_key_value", shape=(16, 24)),
}


@pytest.mark.parametrize("unknown", UNKNOWN_ATTENTION.values(), ids=UNKNOWN_ATTENTION)
def test_attention_that_no_layout_covers_raises(unknown):
    known = {
        "wq": {"kernel": (16, 8)},
        "wk": {"kernel": (16, 8)},
    }
    params = shapes({"a": known, "b": {"other": unknown}})
    layout = mc.layouts.mha(heads=2, query="wq", key="wk", value=None, out=None)
    with pytest.raises(ValueError, match=r"b/other holds .* looks like attention"):
        find_blocks(layout, params)
    (block,) = find_blocks([layout, mc.layouts.ignore("b/*")], params)
    assert block.name == "a"
    (block,) = find_blocks(dataclasses.replace(layout, block="a"), params)  # says which, so be it
    assert block.name == "a"


def test_layouts_can_be_hashed_and_compared():
    made = [mc.layouts.gqa(2, heads=4), mc.layouts.gqa(2, heads=4), mc.layouts.gqa(4, heads=4)]
    assert len(set(made)) == 2
    pairs = itertools.combinations(STORAGES.values(), 2)
    same = [(a, b) for a, b in pairs if a.layout is not b.layout and a.layout == b.layout]
    for a, b in same:  # only storages that differ in what the layout does not say
        assert a.layout.pieces == b.layout.pieces


def test_head_counts_of_latent_kernels_follow_from_their_sizes():
    one_head = {
        "wq": {"kernel": (3, 16, 6)},
        "wkv_a": {"kernel": (3, 16, 10)},
        "wkv_b": {"kernel": (3, 8, 7)},
        "wo": {"kernel": (3, 3, 16)},
    }
    # Flat and stacked, a single head looks like three heads: it has to be told.
    layout = mc.layouts.mla(4, 2, 3, query="wq", heads=1)
    (block,) = find_blocks(layout, shapes({"a": one_head}))
    assert block.shape == (3, 1)
    assert all(isinstance(part, Part) and part.stack == (3,) for part in block.parts)
