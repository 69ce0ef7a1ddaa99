"""`find_layout`: what it asks for, what it leaves out, and what it says of attention unknown."""

import re

import jax
import jax.numpy as jnp
import pytest

import muonclip_jax as mc
from muonclip_jax.layouts import find_blocks

WIDTH, HEADS, KV, F = 16, 4, 2, 6


def attention(names="q_proj k_proj v_proj o_proj", flat=True, heads=HEADS, kv=KV, f=F, width=WIDTH):
    of = lambda n: (n * f,) if flat else (n, f)  # noqa: E731
    inputs = [(width, *of(n)) for n in (heads, kv, kv)]
    shapes = zip(names.split(), [*inputs, (*of(heads), width)], strict=True)
    return {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes}


def sized(*shape, name="scale"):
    return {name: jax.ShapeDtypeStruct(shape, jnp.float32)}


def found(params, **told):
    blocks = find_blocks(mc.find_layout(params, **told), params)
    return {block.name: (block.layout.name, block.heads, block.kv_heads) for block in blocks}


def error(params, **told):
    with pytest.raises(ValueError) as caught:
        mc.find_layout(params, **told)
    return str(caught.value)


# How many heads


@pytest.mark.parametrize(
    "told", [{"heads": HEADS}, {"kv_heads": KV}, {"heads": HEADS, "kv_heads": KV}]
)
def test_one_number_is_enough(told):
    assert found({"a": attention()}, **told) == {"a": ("gqa", HEADS, KV)}


def test_asks_for_the_numbers_that_are_missing():
    message = error({"layers": {"0": attention(), "1": attention()}})
    assert "layers/0 has 24 query and 12 key features in all its heads" in message
    assert "find_layout(params, heads=..., kv_heads=...)" in message
    assert "find_layout(params, heads=...)." in error({"a": attention(kv=HEADS)})


@pytest.mark.parametrize(
    "told",
    [{"heads": 5}, {"heads": 16}, {"kv_heads": 5}, {"heads": 4, "kv_heads": 4}, {"heads": 48}],
)
def test_numbers_that_do_not_fit_raise(told):
    message = error({"a": attention()}, **told)
    assert "24 query and 12 key features" in message and "Correct the numbers" in message


@pytest.mark.parametrize("heads", [0, 2.0, True])
def test_a_number_is_a_whole_one(heads):
    with pytest.raises(ValueError, match="find_layout: heads must be a whole number"):
        mc.find_layout({"a": attention()}, heads=heads)


def test_what_tells_the_heads():
    norms = {"q_norm": sized(F), "k_norm": sized(F)}
    assert found({"a": attention() | norms}) == {"a": ("gqa", HEADS, KV)}
    sinks = {"sinks": jax.ShapeDtypeStruct((HEADS,), jnp.float32)}
    assert found({"a": attention() | sinks}) == {"a": ("gqa", HEADS, KV)}
    table = {"relative_attention_bias": sized(32, HEADS, name="embedding")}
    t5 = {"0": attention("q k v o", kv=HEADS) | table, "1": attention("q k v o", kv=HEADS)}
    assert found({"block": t5}) == dict.fromkeys(["block/0", "block/1"], ("mha", HEADS, HEADS))


@pytest.mark.parametrize(
    "beside",
    [
        {"q_norm": sized(HEADS * F), "k_norm": sized(KV * F)},  # over all heads, as in OLMo 2
        {"q_norm": sized(F), "k_norm": sized(2)},
        {"q_norm": sized(5), "k_norm": sized(5)},
        {"q_norm": sized(F), "sinks": jax.ShapeDtypeStruct((2,), jnp.float32)},  # which is it?
        {"input_norm": sized(WIDTH)},
    ],
    ids=str,
)
def test_what_does_not_tell_the_heads_is_no_guess(beside):
    assert "find_layout(params, heads=..., kv_heads=...)" in error({"a": attention() | beside})


def test_norms_of_as_many_key_heads_over_all_heads_tell_nothing():
    beside = {"q_norm": sized(HEADS * F), "k_norm": sized(HEADS * F)}
    assert "heads=..." in error({"a": attention(kv=HEADS) | beside})


def test_towers_of_several_widths_are_not_told_by_one_number():
    """8 heads would divide both, and be wrong for one of them."""
    params = {
        "text": {"0": attention(heads=8, kv=2, f=8, width=64)},
        "vision": {"0": attention("q_proj k_proj v_proj out_proj", heads=16, kv=16, f=4)},
    }
    message = error(params, heads=8)
    assert "query='q_proj', key='k_proj', value='v_proj', out='o_proj', block='text/0')" in message
    lines = re.search(r"Fill in the numbers: (\[.*\])\.$", message)[1]
    for numbers in ("kv_heads=2, heads=8", "heads=16"):
        lines = re.sub(r"(kv_heads=\.\.\., )?\bheads=\.\.\.", numbers, lines, count=1)
    blocks = {block.name: block for block in find_blocks(eval(lines, {"mc": mc}), params)}
    assert blocks["text/0"].part("k").matrix == (64, 8)
    assert blocks["vision/0"].part("k").matrix == (16, 4)


# Several kinds, and what is none


def test_kinds_that_share_names_get_patterns():
    """Local and global attention: numbers do not tell them apart, so paths do."""
    norms = lambda f: {"q_norm": sized(f), "k_norm": sized(f)}  # noqa: E731
    layers = {str(i): {"self_attn": attention() | norms(F)} for i in range(6)}
    layers["5"] = {"self_attn": attention(heads=4, kv=1, f=12) | norms(12)}
    params = {"layers": layers, "vision": {"0": attention("query key value out", flat=False)}}
    layouts = mc.find_layout(params)
    assert found(params) == {
        **{f"layers/{i}/self_attn": ("gqa", HEADS, KV) for i in range(5)},
        "layers/5/self_attn": ("gqa", 4, 1),
        "vision/0": ("gqa", HEADS, KV),
    }
    assert [one.block for one in layouts][-1] is None  # nothing else has its names


def test_a_pattern_with_stars_where_that_suffices():
    own, other = attention(), attention(heads=2, kv=1, f=8)
    own, other = own | {"q_norm": sized(F)}, other | {"q_norm": sized(8)}
    towers = {
        "text": {str(i): own for i in range(3)},
        "image": {str(i): other for i in range(3)},
    }
    assert {one.block for one in mc.find_layout(towers)} == {"text/*", "image/*"}
    assert found({"0": own, "1": {"0": other}}) == {"0": ("gqa", HEADS, KV), "1/0": ("gqa", 2, 1)}
    assert found({"a[1]": own, "a*": other}).keys() == {"a[1]", "a*"}


def test_encoder_decoder_and_cross_attention_are_one_layout():
    params = {
        "encoder": {"self": attention("query key value out", flat=False, kv=HEADS)},
        "decoder": {
            "self": attention("query key value out", flat=False, kv=HEADS),
            "cross": attention("query key value out", flat=False, kv=HEADS),
        },
    }
    params["decoder"]["cross"] |= {
        name: {"kernel": jax.ShapeDtypeStruct((9, HEADS, F), jnp.float32)}
        for name in ("key", "value")
    }
    assert mc.find_layout(params) == mc.layouts.mha()
    assert len(found(params)) == 3


@pytest.mark.parametrize(
    "other",
    [
        {"q_proj": {"kernel": jax.ShapeDtypeStruct((8, 9), jnp.float32)}},
        {
            "q_proj": {"kernel": jax.ShapeDtypeStruct((16, 24), jnp.float32)},
            "o_proj": {"kernel": jax.ShapeDtypeStruct((24, 16), jnp.float32)},
        },
        {"indexer": attention()},
        {
            "my_Indexer_0": {
                "q_proj": sized(8, 9, name="kernel"),
                "k_proj": sized(8, 9, name="kernel"),
            }
        },
    ],
    ids=["a lone projection", "keys of another layer", "indexer", "indexer of other shapes"],
)
def test_what_is_no_attention_of_its_own_is_left_out(other):
    params = {"a": attention(), "b": other}
    assert found(params, heads=HEADS) == {"a": ("gqa", HEADS, KV)}
    sown = {("a",): jnp.ones(HEADS)}
    params = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    mc.apply_qk_clip(params, sown, mc.find_layout(params, heads=HEADS), 0.5)


def test_an_indexer_inside_the_block_does_not_hinder_clips():
    indexer = {"wq_b": sized(8, 12, name="kernel"), "k_norm": sized(12), **attention()}
    params = {"a": attention() | {"indexer": indexer}}
    layout = mc.find_layout(params, heads=HEADS)
    params = jax.tree.map(lambda x: jnp.ones(x.shape), params)
    after = mc.apply_qk_clip(params, {("a",): jnp.full(HEADS, 2.0)}, layout, 1.0)
    assert float(after["a"]["q_proj"]["kernel"].max()) < 1
    assert (after["a"]["indexer"]["q_proj"]["kernel"] == 1).all()


def test_keys_alone_raise():
    lone = {"k_proj": {"kernel": jax.ShapeDtypeStruct((16, 12), jnp.float32)}}
    assert "b looks like attention" in error({"a": attention(), "b": lone}, heads=HEADS)


def test_keys_of_no_known_place_are_not_taken_for_another_layers():
    """Queries and outputs as in the layer before, but with keys of their own beside them."""
    shapes = {"q_einsum": (4, 16, 6), "kv_einsum": (2, 2, 16, 6), "attn_vec_einsum": (4, 6, 16)}
    known = {name: sized(*shape, name="w") for name, shape in shapes.items()}
    other = {name: known[name] for name in ("q_einsum", "attn_vec_einsum")}
    assert found({"a": known, "b": other}) == {"a": ("gemma", 4, 2)}
    own_keys = other | {"k_einsum": sized(2, 16, 6, name="w")}
    assert "b looks like attention" in error({"a": known, "b": own_keys})


# What is not known


@pytest.mark.parametrize(
    ("names", "flat", "line"),
    [
        ("query key value attn_output", False, "mc.layouts.gqa(out='attn_output')"),
        ("my_q my_k my_v my_o", False,
         "mc.layouts.gqa(query='my_q', key='my_k', value='my_v', out='my_o')"),
        ("q k v proj", True,
         "mc.layouts.gqa(kv_heads=..., heads=..., query='q', key='k', value='v', out='proj')"),
    ],
)  # fmt: skip
def test_the_error_has_the_line_that_fits(names, flat, line):
    params = {"layers": {"0": {"attn": attention(names, flat=flat), "mlp": attention("a b c d")}}}
    message = error(params)
    assert "layers/0/attn looks like attention, but of no known model" in message
    assert f"{names.split()[-1]}/kernel (" in message
    assert f"This fits: {line}." in message
    numbers = line.replace("kv_heads=...", f"kv_heads={KV}").replace(
        " heads=...", f" heads={HEADS}"
    )
    (block,) = find_blocks(eval(numbers, {"mc": mc}), params)
    assert (block.heads, block.kv_heads) == (HEADS, KV)


def test_the_error_says_what_differs_from_the_nearest():
    message = error({"attn": attention("query key value attn_output", flat=False)})
    assert "Nearest is Flax's attention" in message
    assert "here out is called attn_output" in message


def test_fused_kernels_of_unknown_order_are_not_read():
    out = {"to_out": sized(24, 16, name="kernel")}
    assert "no attention of a known" in error({"attn": out | {"joint": sized(16, 72, name="w")}})
    message = error({"attn": out | {"qkv": sized(16, 72, name="kernel")}})
    assert "no shape tells" in message and "fused_qkv(heads=..., kernel='qkv', axes=..." in message


def test_weights_of_either_orientation_are_not_read():
    """Square ones: PyTorch's and Equinox's are [out, in], others' need not be."""
    square = {f"{side}_proj": sized(24, 24, name="weight") for side in "qkvo"}
    message = error({"attn": square}, heads=HEADS)
    assert "mc.layouts.mha(heads=..., query='q_proj/weight'" in message
    assert "transposed=..." in message
    grouped = square | {name: sized(12, 24, name="weight") for name in ("k_proj", "v_proj")}
    assert found({"attn": grouped}, heads=HEADS) == {"attn": ("gqa", HEADS, KV)}


def test_shapes_that_fit_no_reading_are_unknown():
    odd = attention(flat=False)
    odd["o_proj"] = sized(7, 8, 9, name="kernel")
    assert "attn looks like attention" in error({"attn": odd})
