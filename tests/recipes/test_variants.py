"""Recipes by published name are their sources, over 20 steps of the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from tests.recipes import variants

STEPS, RATE, OTHER, DECAY = 20, 0.02, 0.003, 0.1
LAYERS, WIDTH, HEADS, FEATURES = 2, 16, 4, 8
LAYOUT = mc.layouts.mha()

# The source, the recipe with the numbers of the source, and Adam's (decay, b1, eps) of the rest.
RECIPES = {
    "moonlight": (
        variants.moonlight,
        lambda how: mc.moonlight(
            RATE, other_learning_rate=OTHER, weight_decay=DECAY, newton_schulz=how, layout=LAYOUT
        ),
        variants.JORDAN,
        (DECAY, 0.9, 1e-8),
    ),
    "normuon": (
        variants.normuon,
        lambda how: mc.normuon(
            RATE, other_learning_rate=OTHER, weight_decay=DECAY, newton_schulz=how, layout=LAYOUT
        ),
        variants.JORDAN,
        (DECAY, 0.9, 1e-8),
    ),
    "muonh": (
        variants.muonh,
        lambda how: mc.muonh(RATE, OTHER, newton_schulz=how, layout=LAYOUT),
        variants.JORDAN,
        (0.0, 0.9, 1e-8),
    ),
    "nanochat": (
        variants.nanochat,
        lambda how: mc.nanochat(RATE, OTHER, weight_decay=DECAY, newton_schulz=how, layout=LAYOUT),
        variants.NANOCHAT,
        (0.0, 0.8, 1e-10),
    ),
}


def arrays(rng):
    """Kernels `[in, out]`: scanned ones, tall and wide, attention with heads apart, an embedding.

    Each is `[..., in, out]` beside what it is as one matrix of the source."""
    heads = (WIDTH, HEADS, FEATURES)
    shapes = {
        "embed": {"embedding": (64, WIDTH)},
        "layers": {
            "norm": {"scale": (LAYERS, WIDTH)},
            "up": {"kernel": (LAYERS, WIDTH, 48)},
            "down": {"kernel": (LAYERS, 48, WIDTH)},
        },
        "attn": {
            **{name: {"kernel": heads} for name in ("query", "key", "value")},
            "out": {"kernel": (HEADS, FEATURES, WIDTH)},
        },
        "mix": {"kernel": (WIDTH, WIDTH)},
    }
    return jax.tree.map(rng.standard_normal, shapes, is_leaf=lambda x: isinstance(x, tuple))


def matrices(tree):
    """The source's matrices `[out, in]`, by name: heads beside each other, layers apart."""
    found = {"mix": tree["mix"]["kernel"].T}
    for name in ("query", "key", "value"):
        found[name] = tree["attn"][name]["kernel"].reshape(WIDTH, -1).T
    found["out"] = tree["attn"]["out"]["kernel"].reshape(-1, WIDTH).T
    for name in ("up", "down"):
        for layer, kernel in enumerate(tree["layers"][name]["kernel"]):
            found[f"{name} {layer}"] = kernel.T
    return {name: np.asarray(x, np.float64) for name, x in found.items()}


def start_and_gradients():
    rng = np.random.default_rng(20)
    # So large that the sources' eps beside a norm is nothing; the methods ignore the size.
    grads = [jax.tree.map(lambda x: 1e6 * x, arrays(rng)) for _ in range(STEPS)]
    # A part that stays, so that weights go somewhere and signs agree for longer than a step.
    lasting = arrays(rng)
    return arrays(rng), [jax.tree.map(lambda g, s: g + 1e6 * s, g, lasting) for g in grads]


def source(name):
    """The weights of the source after all steps: matrices, and the embedding."""
    step, _, _, (decay, b1, eps) = RECIPES[name]
    start, grads = start_and_gradients()
    weights = {key: variants.Matrix(w) for key, w in matrices(start).items()}
    for grad in grads:
        for key, g in matrices(grad).items():
            step(weights[key], g, RATE, DECAY)
    table = [g["embed"]["embedding"] for g in grads]
    embedding = variants.adam(start["embed"]["embedding"], table, OTHER, decay, b1, eps)
    return {key: p.w for key, p in weights.items()} | {"embedding": embedding}


def trained(name, dtype, mesh=None):
    """The same of the recipe."""
    _, recipe, quintics, _ = RECIPES[name]
    factor = 1.01 if name == "nanochat" else 1.0
    schedule = mc.Schedule(name, tuple(quintics), norm_factor=factor)
    tx = recipe(mc.NewtonSchulz(schedule, dtype=dtype, method="standard"))
    start, grads = jax.tree.map(lambda x: jnp.asarray(x, dtype), start_and_gradients())
    if mesh is not None:
        start, grads = (
            jax.tree.map(lambda x: jax.device_put(x, split(mesh, x)), t) for t in (start, grads)
        )

    @jax.jit
    def step(params, state, grad):
        updates, state = tx.update(grad, state, params)
        return optax.apply_updates(params, updates), state

    params, state = start, jax.jit(tx.init)(start)
    for grad in grads:
        params, state = step(params, state, grad)
    params = jax.tree.map(np.asarray, params)
    return matrices(params) | {"embedding": params["embed"]["embedding"]}


def split(mesh, x):
    """The last axis over four devices, the one before over two where it can be."""
    rows = "data" if x.ndim > 1 and x.shape[-2] % 2 == 0 else None
    return NamedSharding(mesh, P(*[None] * (x.ndim - 2), *[rows, "model"][-x.ndim :]))


def furthest(got, wanted):
    """The largest difference as a share of the largest way that an entry of the parameter went."""
    start, _ = start_and_gradients()
    first = matrices(start) | {"embedding": start["embed"]["embedding"]}
    assert got.keys() == wanted.keys()
    return max(
        np.abs(got[key] - w).max() / np.abs(w - first[key]).max() for key, w in wanted.items()
    )


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_its_source(name):
    assert furthest(trained(name, "float32"), source(name)) < 2e-5


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_its_source_in_float64(name):
    with jax.enable_x64(True):
        assert furthest(trained(name, "float64"), source(name)) < 1e-10


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_its_source_on_a_mesh(name):
    mesh = jax.make_mesh(
        (2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2
    )
    with jax.set_mesh(mesh):
        assert furthest(trained(name, "float32", mesh), source(name)) < 2e-5


def test_the_sources_are_not_each_other():
    """So that the comparison can tell one from the other."""
    found = {name: source(name)["mix"] for name in RECIPES}
    names = list(found)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            assert np.abs(found[first] - found[second]).max() > 1e-3


def test_nanochats_table_is_the_default():
    schedule = mc.published._NANOCHAT.schedule
    assert list(schedule.coefficients) == variants.NANOCHAT and schedule.norm_factor == 1.01


def test_parameters_that_get_no_updates_may_not_decay_unseen():
    """As in `mc.muon`; muonh and nanochat let no other parameter decay."""
    with pytest.raises(ValueError, match="other"):
        mc.normuon(RATE, other=optax.set_to_zero(), layout=LAYOUT)
    mc.normuon(RATE, other=optax.set_to_zero(), weight_decay=0.0, layout=LAYOUT)
