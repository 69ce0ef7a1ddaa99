"""AdaMuon (arXiv 2507.11005) is a chain of links that are there: 20 steps against the paper."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc

RATE, BETA, EPS, DECAY = 0.02, 0.95, 1e-8, 0.1
SHAPES = {"wide": (16, 48), "layers": (2, 16, 48), "heads": (32, 2, 8)}
NUMBERS = {
    "wide": "in out",
    "layers": "layers in out",
    "heads": "in heads features -> heads in features",
}
SPLIT = {"wide": P("fsdp", "tp"), "layers": P("tp", "fsdp"), "heads": P("fsdp", "tp")}


def adamuon(dtype, shardings=None):
    """Algorithm 1, of links that Optax has and two of ours."""
    how = mc.NewtonSchulz(mc.schedules.polar_express(12), dtype, "standard")
    read = {"dimension_numbers": NUMBERS, "shardings": shardings}
    return optax.chain(
        optax.trace(BETA),
        optax.scale_by_sign(),
        mc.scale_by_orthogonalization(how, **read),
        optax.scale_by_rms(BETA, EPS, eps_in_sqrt=False),
        mc.normalize_rms(0.2, **read),
        optax.add_decayed_weights(DECAY),
        optax.scale_by_learning_rate(RATE),
    )


def on_matrices(fn, name, x):
    """`fn` of `[..., in, out]`: heads have the middle axis."""
    if name == "heads":
        return fn(x.swapaxes(0, 1)).swapaxes(0, 1)
    return fn(x)


def msign(x):
    u, _, vt = np.linalg.svd(x, full_matrices=False)
    return u @ vt


def published(weights, grads):
    """The weights after as many steps as there are gradients, in float64."""
    w = {name: np.float64(x) for name, x in weights.items()}
    m = {name: np.zeros_like(x) for name, x in w.items()}
    v = {name: np.zeros_like(x) for name, x in w.items()}
    for g in grads:
        for name in w:
            m[name] = BETA * m[name] + np.float64(g[name])
            o = on_matrices(msign, name, np.sign(m[name]))
            v[name] = BETA * v[name] + (1 - BETA) * o**2
            o = o / (np.sqrt(v[name]) + EPS)

            def aligned(x):
                n, m = x.shape[-2:]
                norm = np.linalg.norm(x, axis=(-2, -1), keepdims=True)
                return 0.2 * np.sqrt(n * m) / norm * x

            w[name] -= RATE * (on_matrices(aligned, name, o) + DECAY * w[name])
    return w


def random(seed, dtype):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in SHAPES.items()}


@pytest.mark.parametrize("place", ["one device", "Auto", "Explicit"])
@pytest.mark.parametrize(("dtype", "atol"), [("float32", 2e-5), ("float64", 1e-10)])
def test_twenty_steps(place, dtype, atol):
    with jax.enable_x64(dtype == "float64"):
        weights, grads = random(0, dtype), [random(i, dtype) for i in range(1, 21)]
        mesh, put, shardings = None, lambda tree: jax.tree.map(jnp.asarray, tree), None
        if place != "one device":
            types = (getattr(jax.sharding.AxisType, place),) * 2
            mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=types)
            split = {name: jax.NamedSharding(mesh, spec) for name, spec in SPLIT.items()}
            put = lambda tree: jax.tree.map(jax.device_put, tree, split)  # noqa: E731
            shardings = split if place == "Auto" else None
        tx = adamuon(dtype, shardings)

        def train(weights, grads):
            def step(carry, g):
                updates, state = tx.update(g, carry[1], carry[0])
                return (optax.apply_updates(carry[0], updates), state), None

            stacked = jax.tree.map(lambda *xs: jnp.stack(xs), *grads)
            return jax.lax.scan(step, (weights, tx.init(weights)), stacked)[0][0]

        with jax.set_mesh(mesh) if mesh else contextlib.nullcontext():
            found = jax.jit(train)(put(weights), [put(g) for g in grads])
        wanted = published(weights, grads)
    for name, x in wanted.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=atol, err_msg=name)
