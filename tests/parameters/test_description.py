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
