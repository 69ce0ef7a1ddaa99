"""docs/tutorials/newcomer.md: its changes, applied to the installed libraries' files, train."""

import ast
import contextlib
import importlib
import inspect
import pathlib
import re
from collections.abc import Iterator
from unittest import mock

import numpy as np
import pytest
from flax import linen

import muonclip_jax as mc
from tests.models.checks import require, stand_ins

PAGE = pathlib.Path(__file__).parents[2] / "docs/tutorials/newcomer.md"
# What must be installed, the module whose attention is changed, and the row of the page's table.
MODELS = {
    "gpt2": ("transformers", "transformers.models.gpt2.modeling_flax_gpt2", "GPT-2"),
    "gemma": ("gemma", "gemma.gm.nn._modules", "Gemma"),
    "llama": ("tunix", None, "Llama 3"),
}
IMPORT = "import muonclip_jax as mc"


def diffs(mark: str) -> list[list[str]]:
    """The lines of each diff under a mark of the page."""
    marked = rf"<!-- models: {mark} -->\n((?:```diff\n.*?```\n)+)"
    texts = re.findall(marked, PAGE.read_text(), re.DOTALL)
    found = [diff for text in texts for diff in re.findall(r"```diff\n(.*?)```", text, re.DOTALL)]
    return [diff.splitlines() for diff in found]


def without(sign: str, diff: list[str]) -> str:
    return "\n".join(line[1:] for line in diff if not line.startswith(sign))


def what_differs(before: str, after: str) -> ast.Module:
    """The definitions that a change touches. The others stay the objects that other modules have
    imported: an enum that was defined anew would no longer equal theirs."""
    same = {ast.dump(node) for node in ast.parse(before).body}
    tree = ast.parse(after)
    tree.body = [
        node
        for node in tree.body
        if ast.dump(node) not in same or getattr(node, "module", None) == "__future__"
    ]
    return tree


@contextlib.contextmanager
def changed(name: str | None, hunks: list[list[str]]) -> Iterator[None]:
    """The module of somebody else's, as the page changes it, until this is left."""
    if name is None:
        yield
        return
    module = importlib.import_module(name)
    before, was = inspect.getsource(module), dict(module.__dict__)
    text = before
    for hunk in hunks:
        assert text.count(without("+", hunk)) == 1, f"{name} is no longer as the page says: {hunk}"
        text = text.replace(without("+", hunk), without("-", hunk))
    exec(compile(what_differs(before, text), module.__file__, "exec"), module.__dict__)
    try:
        yield
    finally:
        module.__dict__.clear()
        module.__dict__.update(was)


@contextlib.contextmanager
def importable(library: str) -> Iterator[None]:
    """Gemma replaces everybody's `param`, and names types of TensorFlow."""
    require(library)
    if library != "gemma":
        yield
        return
    with stand_ins("tensorflow"), mock.patch.object(linen.Module, "param", linen.Module.param):
        from gemma import gm

        assert gm.nn.Transformer  # imported when first asked for
        yield


@pytest.mark.parametrize("name", MODELS)
def test_it_trains_and_clips(name):
    library, module, _ = MODELS[name]
    (loop,) = diffs(f"{name} loop")
    code = without("-", loop).replace("threshold=100.0", "threshold=1e-3")  # models this small
    scope = {"__name__": name}
    with importable(library), changed(module, diffs(f"{name} attention")):
        exec(compile(code, str(PAGE), "exec"), scope)
    state = mc.qk_clip_state(scope["opt_state"])
    maxima = np.concatenate([np.ravel(each) for each in state.max_logits.values()])
    assert maxima.shape == (2 * 4,) and len(np.unique(maxima)) == 8 and np.isfinite(maxima).all()
    assert int(state.heads_clipped) > 0 and int(state.nonfinite_heads) == 0
    if name != "llama":  # whose trainer keeps its losses
        assert scope["losses"][-1] < scope["losses"][0]


@pytest.mark.parametrize("name", MODELS)
def test_the_lines_are_counted(name):
    """At most three for the optimizer, two in the attention; the table says how many."""

    def written(mark):
        lines = [line for diff in diffs(mark) for line in diff if line.startswith("+")]
        return [line for line in lines if line[1:] != IMPORT]

    loop, attention = written(f"{name} loop"), written(f"{name} attention")
    optimizer = [line for line in loop if re.search(r"\bmc\.|max_logits=", line)]
    counted = len(optimizer), len(attention), len(loop) - len(optimizer)
    row = re.search(rf"^\| {MODELS[name][2]}.*$", PAGE.read_text(), re.MULTILINE)[0]
    assert tuple(map(int, row.split("|")[2:5])) == counted
    assert counted[0] <= 3 and counted[1] <= 2
