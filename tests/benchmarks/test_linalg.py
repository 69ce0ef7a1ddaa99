"""What is counted and compared of the functions of a matrix."""

import json

import pytest

from benchmarks import linalg
from benchmarks.linalg import Options, main


@pytest.mark.usefixtures("quick_compilation")
def test_every_function_has_a_row(tmp_path, capsys, monkeypatch):
    some = {name: linalg.functions()[name] for name in ("msign", "msign, svd", "solve_sylvester")}
    monkeypatch.setattr(linalg, "functions", lambda: some)
    file = tmp_path / "record.json"
    rows = main(Options(sizes=(8,), dtypes=("float32",), repeats=1, json=file))["rows"]
    assert json.loads(file.read_text())["rows"] == rows
    assert [row["function"] for row in rows] == list(some)
    sign, exact, sylvester = rows
    assert sign["products_of_value"] % 3 == 0  # three a step, of a square matrix
    assert sign["products_of_derivative"] > sign["products_of_value"]
    assert exact["products_of_value"] == 1  # U Vᵀ
    assert sylvester["products_of_value"] is None  # as many steps as the data asks
    assert all(row["value_over_svd"] > 0 for row in rows)
    assert "as data asks" in capsys.readouterr().out
