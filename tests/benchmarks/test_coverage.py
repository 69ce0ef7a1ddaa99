"""`benchmarks.coverage` tells right readings from wrong ones, and counts what Optax misroutes."""

import dataclasses
from fnmatch import fnmatchcase

import pytest

from benchmarks import coverage, known_models

LAYER = {
    "pre_self_attention_layer_norm/scale": (10, 5),
    "self_attention/query/kernel": (10, 5, 4, 3),
    "self_attention/key/kernel": (10, 5, 2, 3),
    "self_attention/value/kernel": (10, 5, 2, 3),
    "self_attention/out/kernel": (4, 5, 3, 10),
    "MoeBlock_0/gate/kernel": (10, 5, 6),
    "MoeBlock_0/wi_0": (6, 5, 10, 7),
    "MoeBlock_0/wo": (6, 5, 7, 10),
}
MIXTRAL = {
    **{f"decoder/layers/{path}": shape for path, shape in LAYER.items()},
    "token_embedder/embedding": (11, 10),
    "decoder/logits_dense/kernel": (10, 11),
}


def test_a_model_as_its_source_has_it():
    found = coverage.judge("maxtext", "tiny", "mixtral", MIXTRAL)
    assert found.right and found.layout == "found"
    assert found.clips == {"blocks": 1, "behind a QK-norm": 0}
    # Optax: everything of three axes to Adam, everything of two to Muon.
    assert found.optax == {"attention": 4, "embedding": 1, "unembedding": 1}


@pytest.mark.parametrize(
    ("glob", "axes"),
    [
        ("*/query/kernel", "heads in features"),  # other axes
        ("*/query/kernel", None),  # other optimizer
        ("*/wo", "experts out in"),  # the other way round
        ("*/logits_dense/kernel", "in out"),
    ],
)
def test_readings_that_differ_from_the_table_are_told(glob, axes, monkeypatch):
    own = known_models.MAXTEXT
    wrong = dataclasses.replace(own, entries=((glob, axes, ""), *own.entries))
    monkeypatch.setitem(known_models.TABLES, "maxtext", wrong)
    found = coverage.judge("maxtext", "tiny", "mixtral", MIXTRAL)
    (path,) = found.wrong
    assert fnmatchcase(path, glob) and not found.right


def test_a_model_that_stores_a_parameter_in_its_own_way_has_its_own_table():
    """The MLP of gemma's Gemma 2 2B is [in, hidden], that of all others [hidden, in]."""
    shapes = {"layer_0/norm/scale": (10,), "layer_0/mlp/linear": (40, 10)}
    mlp = "layer_0/mlp/gating_einsum"
    assert coverage.judge("gemma", "Gemma2_2B", "gemma2", {**shapes, mlp: (2, 10, 40)}).right
    assert coverage.judge("gemma", "Gemma2_9B", "gemma2", {**shapes, mlp: (2, 40, 10)}).right
    assert coverage.judge("gemma", "Gemma2_9B", "gemma2", {**shapes, mlp: (2, 10, 40)}).wrong == [
        mlp
    ]


def test_a_matrix_of_all_outputs():
    mixed = ("layer_0/altup/prediction_coefs", (4, 3, 3), known_models.GEMMA)
    assert known_models.expected(*mixed) == ((frozenset({0}), frozenset({1, 2})), "")


def test_what_raises_and_what_was_not_made_are_exceptions():
    odd = {path: shape for path, shape in MIXTRAL.items() if "gate" not in path}
    found = [
        coverage.judge("maxtext", "odd", "mixtral", odd),
        coverage.Judgement("maxtext", "absent", "engram", error="KeyError: token", unmade=True),
        coverage.judge("maxtext", "tiny", "mixtral", MIXTRAL),
    ]
    record = coverage.summary(found)
    assert record["libraries"]["maxtext"]["configurations"] == 2
    assert record["libraries"]["maxtext"]["right"] == 1
    assert record["exceptions"].keys() == {"maxtext: odd", "maxtext: absent"}
    assert "decoder/layers/MoeBlock_0/wo" in record["exceptions"]["maxtext: odd"]["error"]


def test_a_parameter_that_the_table_lacks_is_no_pass():
    with pytest.raises(
        ValueError, match=r"no entry for decoder/layers/strange of shape \(3, 5, 4\)"
    ):
        coverage.judge(
            "maxtext", "tiny", "mixtral", {**MIXTRAL, "decoder/layers/strange": (3, 5, 4)}
        )
