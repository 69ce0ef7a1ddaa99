"""What every model of somebody else's must do: train a step, and clip the heads it should."""

import contextlib
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from typing import Any
from unittest import mock

import chex
import einops
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from muonclip_jax._core import paths
from muonclip_jax._layouts.blocks import blocks_with_logits, module_path
from muonclip_jax._parameters.description import Description

OPTIONS = {
    "learning_rate": 1e-2,
    # One step: of five only compiling takes longer.
    "newton_schulz": mc.NewtonSchulz(mc.schedules.polar_express(steps=1)),
}


@dataclass(frozen=True)
class Model:
    """A model as its training loop sees it.

    Attributes:
      params: Its parameters, in the tree that its library makes.
      loss: From parameters to the loss and the max logits, as sown or by block path.
      heads: What `find_layout` must be told, since the kernels are flat.
    """

    params: Any
    loss: Callable[[Any], tuple[jax.Array, Any]]
    heads: int | None = None

    @functools.cached_property
    def layout(self) -> mc.layouts.Layouts:
        """Its attention: found, never written down."""
        return mc.find_layout(self.params, self.heads)

    def describe(self) -> Description:
        return mc.describe(self.params, self.layout)

    def check_matrices(self, expected: Mapping[str, str]) -> None:
        """Asserts what `mc.describe` says of some parameters, `{path: "q 4 × [in, features]"}`."""
        rows = {row.path: ", ".join(map(str, row.matrices)) for row in self.describe()}
        assert {path: rows.get(path) for path in expected} == expected


def require(package: str) -> ModuleSpec:
    """Where the package is, without importing it; skips the test module when it is nowhere."""
    try:
        spec = importlib.util.find_spec(package)
    except ModuleNotFoundError:  # what it would be in
        spec = None
    if spec is None:
        pytest.skip(
            f"{package} is not installed; `make test-models` installs what supports this Python.",
            allow_module_level=True,
        )
    return spec


def moved(params: Any) -> Any:
    """The parameters with noise on all of them, so that those that start at zero (biases, the
    kernels of some MLPs) count and heads differ."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: x + jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), params)


def cross_entropy(logits: jax.Array, tokens: jax.Array) -> jax.Array:
    """Of each next token, the mean."""
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


@contextlib.contextmanager
def stand_ins(*names: str) -> Iterator[None]:
    """Empty modules while something is imported that only names what is in them."""

    class StandIn(types.ModuleType):
        def __getattr__(self, name):
            return type(name, (), {})

    absent = [name for name in names if name not in sys.modules]
    sys.modules |= {name: StandIn(name) for name in absent}
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]


@contextlib.contextmanager
def softmax_inputs() -> Iterator[list[jax.Array]]:
    """What `jax.nn.softmax` is given meanwhile: the logits of models that do not sow theirs."""
    seen, softmax = [], jax.nn.softmax

    def spy(x, *args, **kwargs):
        seen.append(x)
        return softmax(x, *args, **kwargs)

    with mock.patch.object(jax.nn, "softmax", spy):
        yield seen


def by_path(
    logits: list[jax.Array], axes: str, block: str, soft_cap: float | None = None
) -> dict[paths.Path, jax.Array]:
    """Max logits as `qk_clip` takes them: `[heads]` of every block, by its path.

    Args:
      logits: Of every layer, masked ones far below the rest.
      axes: Which axes they have and which are the heads, `"b k g t s -> (k g)"`.
      block: The path of layer `{}`'s attention.
      soft_cap: If given, the logits went through `soft_cap * tanh(logits / soft_cap)`. Scaling a
        head scales what they were before.
    """
    maxima = [einops.reduce(each, axes, "max") for each in logits]
    if soft_cap is not None:
        maxima = [soft_cap * jnp.arctanh(each / soft_cap) for each in maxima]
    return {tuple(block.format(i).split("/")): each for i, each in enumerate(maxima)}


def check_step_and_clip(model: Model) -> None:
    """One jitted step of MuonClip with QuacK, then the clip of every layer on its own."""
    forward = jax.jit(model.loss)
    before = _by_layer(model, forward(model.params)[1])
    # Between the heads: some are clipped, some are not.
    threshold = float(np.median(np.concatenate(list(before.values()))))
    assert threshold > 0
    _check_step(model, before, threshold)
    for layer in before:
        _check_clip(model, forward, before, layer, threshold)
    check_layout(model)


def check_layout(model: Model) -> None:
    """The layout is the model's own: every piece of every block is proved."""
    proof = mc.check_layout(lambda params, _: model.loss(params), model.params, model.layout, None)
    blocks = blocks_with_logits(model.layout, model.params)
    assert proof.roles == {b.name: tuple(part.role for part in b.parts) for b in blocks}
    assert not proof.left_out


def check_qk_norm(model: Model, norm: str) -> None:
    """QK-Clip and QuacK refuse a model with a QK-norm, by its name; per-head Muon trains it."""
    for transformation in (mc.qk_clip(model.layout), mc.scale_by_quack(model.layout)):
        with pytest.raises(ValueError, match=f"{norm}.* normalises queries or keys"):
            transformation.init(model.params)
    assert {row.path for row in model.describe() if row.qk_norm} >= {norm}
    check_layout(model)
    train_step(model, mc.muon(layout=model.layout, **OPTIONS))


def train_step(model: Model, tx: optax.GradientTransformationExtraArgs) -> Any:
    """The optimizer's state after one jitted step that moved every parameter."""

    @jax.jit
    def step(params, state):
        (loss, max_logits), grads = jax.value_and_grad(model.loss, has_aux=True)(params)
        updates, state = tx.update(grads, state, params, max_logits=max_logits)
        return optax.apply_updates(params, updates), state, loss

    params, state, loss = step(model.params, tx.init(model.params))
    chex.assert_tree_all_finite((params, loss))
    chex.assert_trees_all_equal_shapes_and_dtypes(params, model.params)
    for (path, new), old in zip(paths.leaves(params), jax.tree.leaves(model.params), strict=True):
        assert (new != old).any(), f"{paths.show(path)} did not move"
    return state


def _check_step(model: Model, before: dict, threshold: float) -> None:
    direction = mc.muon_direction(layout=model.layout, newton_schulz=OPTIONS["newton_schulz"])
    quack = mc.quack(OPTIONS["learning_rate"], layout=model.layout, direction=direction)
    state = train_step(model, optax.chain(quack, mc.qk_clip(model.layout, threshold)))
    clipped = mc.qk_clip_state(state)
    gamma = _rows(clipped.gamma)
    for layer, maxima in before.items():
        # The step's own forward pass is compiled differently: float32 rounding.
        expected = threshold / np.maximum(maxima, threshold)
        np.testing.assert_allclose(gamma[layer], expected, rtol=1e-4)
    assert 0 < int(clipped.heads_clipped) < sum(map(len, before.values()))
    assert int(clipped.lost_heads) == int(clipped.nonfinite_heads) == 0


def _check_clip(model: Model, forward, before: dict, layer: tuple, threshold: float) -> None:
    """With the heads of one layer clipped, its input is what it was: its logits say all."""
    name, *index = layer
    blocks = blocks_with_logits(model.layout, model.params)
    alone = {tuple(block.name.split("/")): np.zeros(block.shape, np.float32) for block in blocks}
    alone[tuple(name.split("/"))][*index] = before[layer]
    clipped = mc.apply_qk_clip(model.params, alone, model.layout, threshold)
    for (path, new), old in zip(paths.leaves(clipped), jax.tree.leaves(model.params), strict=True):
        if not paths.show(module_path(path)).startswith(f"{name}/"):
            np.testing.assert_array_equal(new, old)

    after = _by_layer(model, forward(clipped)[1])
    layers = list(before)
    for earlier in layers[: layers.index(layer)]:
        np.testing.assert_array_equal(after[earlier], before[earlier])
    # Sums of some ten float32 products, of factors that were rounded once more.
    np.testing.assert_allclose(after[layer], np.minimum(before[layer], threshold), rtol=1e-4)


def _by_layer(model: Model, max_logits: Any) -> dict[tuple, np.ndarray]:
    """`[heads]` of every single layer, stacked ones too: `{(block name, index in the stack...)}`.

    The maxima may be sown in a sub-module of the block, with batch axes before the heads."""
    sown = {paths.show(path): np.asarray(x) for path, x in mc.read_max_logits(max_logits).items()}
    blocks = {}
    for block in blocks_with_logits(model.layout, model.params):
        (maxima,) = [x for path, x in sown.items() if f"{path}/".startswith(f"{block.name}/")]
        blocks[block.name] = maxima.max(axis=tuple(range(len(block.stack), maxima.ndim - 1)))
    return _rows(blocks)


def _rows(blocks: Mapping[str, Any]) -> dict[tuple, np.ndarray]:
    return {
        (name, *index): np.asarray(maxima)[index]
        for name, maxima in blocks.items()
        for index in np.ndindex(maxima.shape[:-1])
    }
