"""`describe`: the table and the plain structure."""

import io
import json

import jax
import jax.numpy as jnp
import pytest
import rich.console

import muonclip_jax as mc


def shapes(tree):
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), tree, is_leaf=is_shape
    )


PARAMS = shapes(
    {
        "embed": {"embedding": (99, 16)},
        "attn": {
            "qkv": {"kernel": (3, 16, 32), "bias": (3, 32)},  # 4 query and 2 key heads of 4
            "o_proj": {"kernel": (3, 16, 16)},
            "q_norm": {"scale": (3, 4)},
        },
        "mlp": {"kernel": (16, 64)},
    }
)
LAYOUT = mc.layouts.fused_qkv(4, 2, out="o_proj")


def test_rows_say_what_happens_to_every_parameter():
    rows = {row.path: row for row in mc.describe(PARAMS, LAYOUT)}
    assert list(rows) == [
        "attn/o_proj/kernel",
        "attn/q_norm/scale",
        "attn/qkv/bias",
        "attn/qkv/kernel",
        "embed/embedding",
        "mlp/kernel",
    ]
    assert [str(m) for m in rows["attn/qkv/kernel"].matrices] == [
        "q 12 × [16, 4]",
        "k 6 × [16, 4]",
        "v 6 × [16, 4]",
    ]
    assert [str(m) for m in rows["attn/o_proj/kernel"].matrices] == ["o 12 × [4, 16]"]
    assert [str(m) for m in rows["mlp/kernel"].matrices] == ["1 × [16, 64]"]
    pieces = [(piece.role, piece.heads) for piece in rows["attn/qkv/bias"].attention]
    assert pieces == [("q", 4), ("k", 2), ("v", 2)]
    assert rows["attn/q_norm/scale"].qk_norm and not rows["mlp/kernel"].qk_norm
    assert {row.optimizer for row in rows.values()} == {"muon", "other"}


def test_brackets_are_shown_as_they_are(monkeypatch):
    """Neither `[in, out]` nor a name with brackets is markup to the table."""
    monkeypatch.setenv("COLUMNS", "200")
    shown = str(mc.describe({"a[/b]": {"wi": jnp.ones((8, 9))}}))
    assert "a[/b]/wi" in shown and "matrices [in, out]" in shown and "[in, out]: called" in shown


def test_a_program_reads_plain_data():
    rows = mc.describe(PARAMS, LAYOUT)
    plain = json.loads(json.dumps(rows.asdicts()))
    qkv = next(row for row in plain if row["path"] == "attn/qkv/kernel")
    assert qkv["shape"] == [3, 16, 32]
    assert qkv["optimizer"] == "muon"
    assert qkv["matrices"][0] == {"role": "q", "count": 12, "ins": 16, "outs": 4, "heads": 1}
    assert qkv["attention"][1] == {"role": "k", "heads": 2}


def test_a_narrow_terminal_folds_and_cuts_nothing_off():
    console = rich.console.Console(width=50, file=io.StringIO())
    console.print(mc.describe(PARAMS, LAYOUT))
    text = console.file.getvalue()
    assert "…" not in text
    # Every letter of every cell is there, folded inside its column.
    wide = str(mc.describe(PARAMS, LAYOUT))
    for letter in "qkvox_×":
        assert text.count(letter) >= wide.count(letter)


@pytest.mark.parametrize("columns", [60, 200])
def test_printing_keeps_to_the_terminal(columns, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    text = str(mc.describe(PARAMS, LAYOUT))
    assert max(map(len, text.splitlines())) <= columns
    if columns == 200:
        for words in ("attn/qkv/kernel", "q 12 × [16, 4]", "q ×4, k ×2, v ×2", "(3, 16, 32)"):
            assert words in text
        assert "3,328 parameters with muon" in text
        assert "QK-norm" in text


def test_layers_that_are_alike_share_a_line(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    layers = {str(i): {"mlp_0": {"kernel": (16, 64 if i == 7 else 32)}} for i in range(12)}
    rows = mc.describe(shapes({"layers": layers, "mlp": {"kernel": (16, 64)}}))
    lines = [line.split("│")[1].strip() for line in str(rows).splitlines() if "kernel" in line]
    assert lines == ["layers/{0..6,8..11}/mlp_0/kernel", "layers/7/mlp_0/kernel", "mlp/kernel"]
    assert len(rows) == 13


def test_tells_what_the_recipe_will_do():
    all_heads = mc.Granularity(heads="all")
    rows = mc.describe(PARAMS, LAYOUT, granularity=all_heads)
    (row,) = [row for row in rows if "o_proj" in row.path]
    assert [str(m) for m in row.matrices] == ["o 3 × [16, 16] of 4 heads"]
    numbers = mc.muon_dimension_numbers
    with pytest.raises(TypeError, match="granularity= are for the default routing"):
        mc.describe(PARAMS, LAYOUT, granularity=all_heads, dimension_numbers=numbers)


# --- fused kernels that no layout splits
def gpt2(layers=3):
    one = {"attn": {"c_attn": {"kernel": (16, 48)}, "c_proj": {"kernel": (16, 16)}}}
    return shapes({f"h_{i}": one for i in range(layers)})


FUSED = {
    "GPT-2": ({"c_attn": (16, 48), "c_proj": (16, 16)}, "mc.find_layout(params, heads=...)"),
    "GPT-NeoX": (
        {"query_key_value": (16, 48), "dense": (16, 16)},
        "mc.find_layout(params, heads=...)",
    ),
    "grouped": (
        {"qkv_proj": (16, 32), "o_proj": (16, 16)},
        "mc.find_layout(params, heads=..., kv_heads=...)",
    ),
    "heads by norms": (
        {"qkv_proj": (16, 32), "o_proj": (16, 16), "q_norm": (4,), "k_norm": (4,)},
        "mc.find_layout(params)",
    ),
    "PyTorch's names": (
        {"in_proj": (16, 48), "out_proj": (16, 16)},
        "mc.layouts.fused_qkv(heads=..., kernel='in_proj', axes=..., out=...)",
    ),
    "heads of their own": ({"qkv_proj": (16, 3, 4, 4), "out": (4, 4, 16)}, ""),
    "separate": ({"q_proj": (16, 16), "k_proj": (16, 16), "v_proj": (16, 16)}, ""),
}


def model(projections, module="attn"):
    leaf = lambda shape: {"kernel" if len(shape) > 1 else "scale": shape}  # noqa: E731
    return shapes({module: {name: leaf(shape) for name, shape in projections.items()}})


def hints(rows):
    return {row.path: row.hint for row in rows if row.hint}


@pytest.mark.parametrize("name", FUSED)
def test_a_fused_kernel_without_a_layout_has_the_line_that_splits_it(name):
    projections, line = FUSED[name]
    found = hints(mc.describe(model(projections)))
    assert found == ({f"attn/{next(iter(projections))}/kernel": line} if line else {})


def test_the_line_splits_it():
    params = gpt2()
    rows = mc.describe(params, mc.find_layout(params, heads=4))
    assert [str(m) for m in rows[0].matrices] == ["q 4 × [16, 4]", "k 4 × [16, 4]", "v 4 × [16, 4]"]
    assert not hints(rows)


def test_who_has_decided_gets_no_hint():
    """By a rule, by dimension numbers, by a layout that leaves it out, by freezing; nor has what is
    called so outside of attention."""
    params, glob = gpt2(1), "*/c_attn/*"
    assert hints(mc.describe(params))
    assert not hints(mc.describe(params, rules={glob: "in out"}))
    assert not hints(mc.describe(params, frozen=glob))
    assert not hints(mc.describe(params, dimension_numbers=mc.muon_dimension_numbers))
    other = model({"query": (16, 4, 4), "key": (16, 4, 4), "value": (16, 4, 4), "out": (4, 4, 16)})
    leaves_out = [mc.layouts.mha(), mc.layouts.ignore("h_0/attn")]
    assert not hints(mc.describe(params | other, leaves_out))
    assert not hints(mc.describe(model({"in_proj": (16, 48), "out_proj": (16, 16)}, "mixer")))


def test_layers_that_are_alike_share_a_hint(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = " ".join(str(mc.describe(gpt2())).split())
    told = "h_{0..2}/attn/c_attn/kernel holds several projections of attention as one matrix; "
    assert shown.count("several projections") == 1
    assert f"{told}layout=mc.find_layout(params, heads=...) splits it into heads" in shown
