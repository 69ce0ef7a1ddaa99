"""Every Python block of the README and the docs runs, in order, after a small prelude."""

import pathlib
import re

import pytest

import muonclip_jax as mc

ROOT = pathlib.Path(__file__).parent.parent
# A block may go on from those of the same name on another page: `<!-- test: linen, after PAGE -->`.
BLOCK = re.compile(
    r"<!-- test: (?P<name>[\w-]+)(?:, after (?P<after>\S+))? -->\n```python\n(?P<code>.*?)```",
    re.DOTALL,
)

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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LONG = {"watching", "accumulation", "clips"}  # pages that train models


def blocks(page: pathlib.Path, name: str) -> list[str]:
    """The blocks of a name on a page, behind those of the page that the first one goes on from."""
    found = [match for match in BLOCK.finditer(page.read_text()) if match["name"] == name]
    assert found, f"{page} has no block {name!r}"
    before = blocks(ROOT / "docs" / found[0]["after"], name) if found[0]["after"] else []
    return before + [match["code"] for match in found]


def every_name():
    for page in PAGES:
        for name in dict.fromkeys(match["name"] for match in BLOCK.finditer(page.read_text())):
            marks = [pytest.mark.slow] if page.stem in LONG else []
            yield pytest.param(page, name, marks=marks, id=f"{page.relative_to(ROOT)}-{name}")


@pytest.mark.parametrize(("page", "name"), [*every_name()])
def test_blocks_run(page, name):
    code = [PRELUDES.get(name, ""), *blocks(page, name), EPILOGUES.get(name, "")]
    namespace = {"__name__": f"{page}:{name}"}
    for block in code:
        exec(compile(block, f"{page}:{name}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_python_block_is_left_out(page):
    text = page.read_text()
    assert text.count("```python") == len(BLOCK.findall(text))


def test_the_reference_has_every_public_name():
    text = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    entries = set(re.findall(r"^::: muonclip_jax\.([\w.]+)$", text, re.MULTILINE))
    also = {"Layout", "Schedule"}  # shown as members of layouts and schedules
    assert {name for name in entries if not name.startswith("_")} | also == set(mc.__all__)
