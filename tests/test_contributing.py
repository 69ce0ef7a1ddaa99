"""CONTRIBUTING's four worked examples are executed: what a newcomer copies works."""

import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BLOCK = re.compile(r"<!-- example: (\w+) -->\n```python\n(.*?)```", re.DOTALL)
# What the file that the code is put into has already.
AROUND = {
    "schedule": "from muonclip_jax._orthogonalize.schedules import Schedule",
    "layout": (
        "import jax.numpy as jnp\n"
        "from muonclip_jax._layouts.blocks import Layout, find_blocks\n"
        "from muonclip_jax._layouts.kinds import fused_qkv"
    ),
    "link": "",
    "signal": "import jax, jax.numpy as jnp",
}


def blocks(name):
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    return [code for found, code in BLOCK.findall(text) if found == name]


@pytest.mark.parametrize("name", AROUND)
def test_worked_example(name):
    source, test = blocks(name)
    namespace = {"__name__": f"contributing_{name}"}
    for code in (AROUND[name], source, test):
        exec(compile(code, f"CONTRIBUTING.md: {name}", "exec"), namespace)


def test_named_files_are_there():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = re.findall(r"`((?:muonclip_jax|tests)/[\w/.]+)`", text)
    new = {
        "muonclip_jax/_transforms/renormalization.py",
        "muonclip_jax/_transforms/max_value_clip.py",
    }
    assert len(named) >= 10
    missing = [path for path in named if path not in new and not (ROOT / path).exists()]
    assert not missing
