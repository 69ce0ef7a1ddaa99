"""Hyperball: against its formula in float64, on stacks, heads, meshes, and what has no norm."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives

NUMBERS = functools.partial(
    mc.muon_dimension_numbers,
    layout=mc.layouts.mha(),
    rules={"up": "in out", "down": "in out", "layers/up": "layers in out"},
)
SHAPES = {
    "up": (8, 16),
    "down": (16, 8),
    "layers/up": (2, 8, 16),
    "attn/query/kernel": (8, 4, 4),
    "attn/key/kernel": (8, 4, 4),
    "attn/value/kernel": (8, 4, 4),
    "attn/out/kernel": (4, 4, 8),
}
# Along which axis another index is another matrix: layers, heads.
APART = {"layers/up": 0, **{f"attn/{name}/kernel": 1 for name in ("query", "key", "value")}}
APART["attn/out/kernel"] = 0
SPECS = {
    "up": P("fsdp", "tp"),
    "down": P(None, "tp"),
    "layers/up": P("tp", "fsdp"),
    "attn/query/kernel": P("fsdp", "tp"),
    "attn/key/kernel": P(None, "tp", "fsdp"),
    "attn/out/kernel": P("tp", None, "fsdp"),
}


def drawn(seed, dtype=np.float32, scale=1.0):
    rng = np.random.default_rng(seed)
    return {path: np.asarray(scale * rng.normal(size=s), dtype) for path, s in SHAPES.items()}


def nested(flat):
    tree = {}
    for path, leaf in flat.items():
        *modules, name = path.split("/")
        inside = functools.reduce(lambda node, key: node.setdefault(key, {}), modules, tree)
        inside[name] = leaf
    return tree


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def by_matrix(fn, path, *arrays):
    """`fn` of each matrix of a parameter, put together again."""
    axis = APART.get(path)
    if axis is None:
        return fn(*arrays)
    each = zip(*(np.moveaxis(x, axis, 0) for x in arrays), strict=True)
    return np.moveaxis(np.stack([fn(*some) for some in each]), 0, axis)


def published(start, weights, direction, rate):
    """Equation 1 of arXiv 2606.16899, one matrix, float64."""
    norm = np.linalg.norm
    radius = norm(start)
    moved = weights - rate * radius * direction / norm(direction)
    return radius * moved / norm(moved)


def trained(tx, params, directions):
    state = tx.init(params)
    for direction in directions:
        updates, state = tx.update(direction, state, params)
        params = optax.apply_updates(params, updates)
    return params, state


RATES = [0.3, 0.1, 0.02]
STEPS = range(1, 4)


def schedule(step):
    return jnp.asarray(RATES)[step]


def expected():
    start = drawn(0, np.float64)
    weights = start
    for seed, rate in zip(STEPS, RATES, strict=True):
        direction = drawn(seed, np.float64)
        step = functools.partial(published, rate=rate)
        weights = {p: by_matrix(step, p, start[p], w, direction[p]) for p, w in weights.items()}
    return weights


def assert_close(ours, wanted, rtol):
    for path, x in flat(ours).items():
        error = np.abs(np.float64(x) - wanted[path]).max()
        assert error <= rtol * np.abs(wanted[path]).max(), path


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 1e-6), (np.float64, 1e-10)])
def test_as_published(dtype, rtol):
    """Three steps of a schedule; float64 draws are rounded to float32 there, by up to 6e-8."""
    with jax.enable_x64(dtype is np.float64):
        params, *directions = (
            jax.tree.map(jnp.asarray, nested(drawn(seed, dtype))) for seed in (0, *STEPS)
        )
        found, state = trained(
            mc.hyperball(schedule, dimension_numbers=NUMBERS), params, directions
        )
        assert {x.dtype for x in jax.tree.leaves(found)} == {np.dtype(dtype)}
        assert {x.dtype for x in jax.tree.leaves(state.radii)} == {np.dtype(dtype)}
    assert_close(found, expected(), rtol)
    assert int(state.step) == 3
    norms = np.linalg.norm(drawn(0)["attn/out/kernel"], axis=(1, 2))  # [heads, features, out]
    np.testing.assert_allclose(state.radii["attn/out/kernel"][0], norms, rtol=1e-6)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_the_same_on_eight_devices(kind):
    mesh = jax.make_mesh(
        (4, 2), ("fsdp", "tp"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2
    )
    placed = lambda tree: nested(  # noqa: E731
        {p: jax.device_put(x, NamedSharding(mesh, SPECS.get(p, P()))) for p, x in tree.items()}
    )
    with jax.set_mesh(mesh):
        params, *directions = (placed(drawn(seed)) for seed in (0, *STEPS))
        told = (
            {} if kind == "Explicit" else {"shardings": jax.tree.map(lambda x: x.sharding, params)}
        )
        tx = mc.hyperball(schedule, dimension_numbers=NUMBERS, **told)
        found, _ = jax.jit(functools.partial(trained, tx))(params, directions)
    # jit cannot look at values, and finds them usable.
    assert_close(found, expected(), 1e-6)
    if kind == "Explicit":
        assert jax.typeof(found["up"]).sharding.spec == P("fsdp", "tp")


def test_numbers_alone_travel():
    """A kernel that two axes of a mesh split is neither gathered nor moved."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P("fsdp", "tp"))
    params = {"up": jax.device_put(jnp.ones((64, 64)), sharding)}
    tx = mc.hyperball(0.1, shardings={"up": sharding})
    moved = collectives(jax.jit(tx.update).lower(params, tx.init(params), params).compile())
    # Three numbers, maybe over one axis of the mesh after the other.
    assert 0 < sum(one.times * one.bytes for one in moved) <= 3 * 4 * 2, moved


def test_any_direction_of_any_size():
    params = nested(drawn(0))
    directions = [nested(drawn(1))]
    tx = mc.hyperball(0.1, dimension_numbers=NUMBERS)
    wanted, _ = trained(tx, params, directions)
    times = lambda number, tree: jax.tree.map(lambda x: number * x, tree)  # noqa: E731
    for scale in (np.float32(1e-30), np.float32(1e30)):
        found, _ = trained(tx, params, times(scale, directions))
        assert_close(found, flat(wanted), 1e-6)
        found, _ = trained(tx, times(scale, params), directions)
        assert_close(times(1 / scale, found), flat(wanted), 1e-6)


def test_adamh_and_muonh():
    """Every step turns the weights, by an angle of about the rate, and keeps their norm."""
    params = {"up": jnp.asarray(drawn(0)["up"])}
    for direction in (optax.scale_by_adam(), mc.scale_by_muon()):
        tx = optax.chain(direction, mc.hyperball(0.1))
        found, _ = trained(tx, params, [{"up": jnp.asarray(drawn(1)["up"])}])
        start, end = np.float64(params["up"]), np.float64(found["up"])
        np.testing.assert_allclose(np.linalg.norm(end), np.linalg.norm(start), rtol=1e-6)
        cosine = (start * end).sum() / np.linalg.norm(start) ** 2
        assert 0.05 < np.arccos(cosine) < 0.12
        assert (end * drawn(1)["up"]).sum() < (start * drawn(1)["up"]).sum()  # it descends


def test_only_the_turn_of_one_matrix():
    """Zeros stay, NaN is that of its own layer alone."""
    tx = mc.hyperball(0.1, dimension_numbers={"layers": "layers in out"})
    params = {"layers": jnp.asarray(drawn(0)["layers/up"])}
    found, _ = trained(tx, params, [{"layers": jnp.zeros((2, 8, 16))}])
    np.testing.assert_allclose(found["layers"], params["layers"], rtol=1e-6)
    nan = {"layers": jnp.ones((2, 8, 16)).at[0, 0, 0].set(jnp.nan)}
    found, state = trained(tx, params, [nan])
    assert np.isnan(found["layers"][0]).all() and np.isfinite(found["layers"][1]).all()
    assert np.isfinite(state.radii["layers"][0]).all()


@pytest.mark.parametrize(("dtype", "off"), [("float32", 2e-6), ("bfloat16", 3e-4)])
def test_the_norm_does_not_drift(dtype, off):
    """What 32×32 entries that are rounded to 8 bits, or their sum in float32, move the norm by: not
    more with more steps, since the radius is the state's."""
    start = jax.random.normal(jax.random.key(0), (32, 32)).astype(dtype)
    tx = mc.hyperball(0.05)

    def step(carry, key):
        params, state = carry
        updates, state = tx.update(jax.random.normal(key, (32, 32)).astype(dtype), state, params)
        assert updates.dtype == dtype
        params = optax.apply_updates(params, updates)
        return (params, state), params

    keys = jax.random.split(jax.random.key(1), 300)
    _, every = jax.lax.scan(step, (start, tx.init(start)), keys)
    norms = np.linalg.norm(np.float64(every), axis=(1, 2))
    assert np.abs(norms / np.linalg.norm(np.float64(start)) - 1).max() < off


def test_strict_promotion_and_injected_rates():
    params = {name: jnp.asarray(drawn(0)[name]) for name in ("up", "down")}
    directions = [jax.tree.map(lambda x: x[::-1], params)]
    injected = optax.inject_hyperparams(mc.hyperball)(0.1)
    with jax.numpy_dtype_promotion("strict"):
        plain, _ = trained(mc.hyperball(0.1), params, directions)
        found, _ = trained(injected, params, directions)
        mixed = {"up": params["up"].astype("bfloat16"), "down": params["down"]}
        tx = mc.hyperball(0.1)
        updates, _ = tx.update(directions[0], tx.init(mixed), mixed)
    jax.tree.map(np.testing.assert_array_equal, plain, found)
    assert jax.tree.map(lambda x: x.dtype.name, updates) == {"up": "float32", "down": "float32"}


def test_what_starts_at_zero_raises_or_is_nan():
    tx = mc.hyperball(0.1, dimension_numbers={"layers": "layers in out"})
    params = {"layers": jnp.asarray(drawn(0)["layers/up"]).at[1].set(0)}
    with pytest.raises(
        ValueError, match=r"layers of shape \(2, 8, 16\) starts with a norm of 0.0 in 1"
    ):
        tx.init(params)
    with pytest.raises(ValueError, match="norm of nan in 2"):
        tx.init({"layers": jnp.full((2, 8, 16), jnp.nan)})
    state = jax.jit(tx.init)(params)
    assert np.isnan(state.radii["layers"][0]).tolist() == [False, True]
    updates, _ = tx.update(params, state, params)
    assert np.isnan(updates["layers"][1]).all() and np.isfinite(updates["layers"][0]).all()


def test_in_a_partition():
    params = {"up": jnp.ones((4, 8)), "scale": jnp.ones(8)}
    chains = {"matrices": mc.hyperball(0.1), "others": optax.sgd(0.5)}
    tx = optax.partition(chains, {"up": "matrices", "scale": "others"})
    found, _ = trained(tx, params, [{"up": jnp.eye(4, 8), "scale": jnp.ones(8)}])
    np.testing.assert_allclose(np.linalg.norm(found["up"]), 32**0.5, rtol=1e-6)
    np.testing.assert_allclose(found["scale"], 0.5)


def test_wrong_calls_raise():
    tx = mc.hyperball(0.1)
    params = {"up": jnp.ones((4, 8))}
    with pytest.raises(ValueError, match="hyperball acts on weights: call"):
        tx.update(params, tx.init(params))
    with pytest.raises(ValueError, match=r"scale of shape \(8,\) is no matrix"):
        tx.init({"scale": jnp.ones(8)})
    with pytest.raises(ValueError, match=r"up/0 has radii of shape \(\) in this state"):
        tx.update({"down": jnp.ones((8, 4))}, tx.init(params), {"down": jnp.ones((8, 4))})
    with pytest.raises(TypeError, match=r"hyperball: up .* is int32"):
        tx.init({"up": jnp.ones((4, 8), int)})
    with pytest.raises(ValueError, match="learning_rate must be a finite number of at least 0"):
        mc.hyperball(-0.1)
