"""Which methods are compared, and what is made of their times."""

import json

import pytest

from benchmarks import methods
from benchmarks.methods import Options, main


@pytest.mark.usefixtures("quick_compilation")
def test_every_method_of_a_cell_has_a_row(tmp_path, capsys):
    file, picture = tmp_path / "record.json", tmp_path / "picture.png"
    options = Options(
        shapes=((2, 8, 8),),
        dtypes=("float32",),
        chunk_entries=(64,),
        repeats=1,
        json=file,
        picture=picture,
    )
    rows = main(options)["rows"]
    assert json.loads(file.read_text())["rows"] == json.loads(json.dumps(rows))
    assert picture.stat().st_size > 0
    assert [(row["method"], row.get("chunk_entries")) for row in rows] == [
        ("auto", None),
        *((method, entries) for method in ("standard", "gram") for entries in (64, 128)),
    ]
    assert min(row["over_fastest"] for row in rows) == 1
    assert all(row["seconds_median"] > 0 for row in rows)
    assert "at a time" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("n", "blocks"), [(1024, {None, 512, 256}), (768, {None, 384, 192}), (256, {None})]
)
def test_blocks_are_halves(n, blocks):
    for dtype, row_major in (("bfloat16", {False, True}), ("float32", {False})):
        found = methods.candidates((1, 4 * n, n), dtype, Options())
        assert len(found) == len(set(found)) == 2 * len(blocks) * len(row_major)
        assert {method.iteration for method in found} == {"standard", "gram"}
        assert {method.smallest_block for method in found} == blocks
        assert {method.row_major for method in found} == row_major
        assert {method.chunk_entries for method in found} == {4 * n * n}


def test_stacks_are_taken_in_slices_and_whole():
    found = methods.candidates((8, 768, 3072), "bfloat16", Options())
    assert {method.chunk_entries for method in found} == {2**20, 2**21, 2**24, 8 * 768 * 3072}
    assert all(method.row_major for method in found)


def test_the_best_of_each_iteration_is_kept():
    def row(method, seconds, **fields):
        common = {"shape": (1, 8, 8), "dtype": "float32"}
        return {**common, "method": method, "seconds_median": seconds, **fields}

    rows = [
        row("auto", 2.0),
        row("gram", 3.0, iteration="gram"),
        row("gram, blocks 4", 1.0, iteration="gram"),
        row("standard", 4.0, iteration="standard"),
    ]
    (cell,) = methods.best(rows).values()
    assert {name: each["method"] for name, each in cell.items()} == {
        "auto": "auto",
        "gram": "gram, blocks 4",
        "standard": "standard",
    }
