"""A type checker sees what users get wrong; `make lint` runs it over package and examples."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
CHECKER = shutil.which("basedpyright", path=str(pathlib.Path(sys.executable).parent))
WRONG = """
import muonclip_jax as mc

layout = mc.layouts.mha()
mc.muon(1e-3, layout=layout, granularity=mc.Granularity({"query": 2}))  # no role
mc.muonclip(1e-3, layout=layout, treshold=30.0)  # no such option
mc.muonclip(1e-3)  # where are the heads?
mc.kimi_muonclip(1e-3, layout=layout, nesterov=True)  # the source has none
mc.muon(1e-3, layout=layout, rules=[("*/kernel", None)])  # rules are a mapping
mc.quack(1e-3, layout=layout, scale_weight_decay="no")  # yes, no, or as the rule has it
mc.qk_clip(layout, scope="heads")  # no scope
mc.muon(1e-3, newton_schulz=mc.schedules.jordan())  # a schedule is not all of it
mc.NewtonSchulz(method="gramm")  # no method
mc.quack(1e-3, layout=layout, rule="papers")  # no rule
mc.layouts.Piece("queries", "query")  # no role
"""
RIGHT = """
import jax
import optax

import muonclip_jax as mc

layout = [mc.layouts.mha(block="*/local"), mc.layouts.mla(128, 64, 128, block="*/global")]
how = mc.NewtonSchulz(mc.schedules.jordan(), dtype="float32", method="gram")
rules = {"*/experts/kernel": "experts in out", "*/patch/kernel": None}
by_axes = {("*/experts/*", 3): "experts in out"}
mc.describe({}, rules=by_axes)
mc.describe({}, rules={**by_axes, **rules})
tx: optax.GradientTransformation = mc.muonclip(
    optax.cosine_decay_schedule(1e-3, 100), layout=layout, rules=rules,
    granularity=mc.Granularity({"q": 2, "o": "all"}, (("q_nope", "q_rope"),)),
    newton_schulz=how, threshold=30.0,
)
out, maxima = mc.dot_product_attention(*jax.random.normal(jax.random.key(0), (3, 2, 16, 4, 8)))
largest: jax.Array = maxima.max()
mc.describe({}, layout, granularity=mc.Granularity.kimi_k2(), rules=rules)
published: optax.GradientTransformation = mc.kimi_muonclip(1e-3, layout=layout, rules=rules)
mc.quack(1e-3, layout=layout, rule="fixed", scale_weight_decay=None)
"""


def findings(tmp_path, code):
    """The lines at which the checker finds an error."""
    file = tmp_path / "user.py"
    file.write_text(code, encoding="utf-8")
    config = {"typeCheckingMode": "standard", "extraPaths": [str(ROOT)], "include": ["user.py"]}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config), encoding="utf-8")
    command = [str(CHECKER), "--outputjson", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = json.loads(done.stdout)["generalDiagnostics"]
    return {each["range"]["start"]["line"] for each in found if each["severity"] == "error"}


@pytest.mark.slow
@pytest.mark.skipif(CHECKER is None, reason="basedpyright is not installed: make lint installs it")
def test_wrong_options_are_flagged(tmp_path):
    wrong = {i for i, line in enumerate(WRONG.splitlines()) if "#" in line}
    assert findings(tmp_path, WRONG) == wrong
    assert findings(tmp_path, RIGHT) == set()
