"""Every Python block of the README and the docs runs, in order, after a small prelude."""

import pathlib
import re

import pytest

import muonclip_jax as mc

ROOT = pathlib.Path(__file__).parent.parent
REFERENCE = ROOT / "docs" / "reference.md"
BLOCK = re.compile(r"<!-- test: ([\w-]+) -->\n```python\n(.*?)```", re.DOTALL)

# What "an existing train step" already has.
PRELUDES = {
    "readme-linen": """
import flax.linen as nn, jax, jax.numpy as jnp, optax
import muonclip_jax as mc
class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(16, name="mlp")(x)
        return nn.MultiHeadDotProductAttention(
            4, attention_fn=mc.attention_fn)(x, sow_weights=True)
model, batch = Model(), jnp.ones((2, 5, 16))
params = model.init(jax.random.key(0), batch)["params"]
loss = lambda logits, batch: ((logits - batch) ** 2).mean()
""",
    "readme-nnx": """
import jax, jax.numpy as jnp
from flax import nnx
import muonclip_jax as mc
class Model(nnx.Module):
    def __init__(self, rngs):
        self.attn = nnx.MultiHeadAttention(
            4, 16, decode=False, attention_fn=mc.attention_fn, rngs=rngs)
    def __call__(self, x):
        return self.attn(x, sow_weights=True)
model, batch = Model(nnx.Rngs(0)), jnp.ones((2, 5, 16))
loss = lambda logits, batch: ((logits - batch) ** 2).mean()
""",
}
EPILOGUES = {
    "readme-linen": "params, opt_state, value = train_step(params, opt_state, batch)",
    "readme-nnx": "value = train_step(model, optimizer, batch)",
}


def pages():
    found = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for name, code in BLOCK.findall(page.read_text()):
            found.setdefault((page.name, name), []).append(code)
    return found


LONG = {("guide.md", "linen"), ("guide.md", "heads"), ("guide.md", "kernels")}  # train models


@pytest.mark.parametrize(
    ("page", "name"),
    [pytest.param(*key, marks=[pytest.mark.slow] if key in LONG else []) for key in pages()],
    ids=lambda part: part,
)
def test_blocks_run(page, name):
    code = [PRELUDES.get(name, ""), *pages()[page, name], EPILOGUES.get(name, "")]
    namespace = {"__name__": f"{page}:{name}"}
    for block in code:
        exec(compile(block, f"{page}:{name}", "exec"), namespace)


def test_no_python_block_is_left_out():
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = page.read_text()
        assert len(re.findall(r"```python", text)) == len(BLOCK.findall(text)), page.name


def test_the_reference_has_every_public_name():
    entries = set(re.findall(r"^::: muonclip_jax\.([\w.]+)$", REFERENCE.read_text(), re.MULTILINE))
    also = {"Layout", "Schedule"}  # shown as members of layouts and schedules
    assert {name for name in entries if not name.startswith("_")} | also == set(mc.__all__)
