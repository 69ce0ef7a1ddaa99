"""Spectral control of weights: mclip, a cap on the norm, decay of the largest singular value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc

RNG = np.random.default_rng(0)


def with_values(values, ins, outs):
    """`[in, out]` with these singular values, float64."""
    n = len(values)
    left = np.linalg.qr(RNG.normal(size=(ins, n)))[0]
    right = np.linalg.qr(RNG.normal(size=(outs, n)))[0]
    return (left * values) @ right.T


SPECTRUM = np.array([9.0, 3.0, 1.0001, 0.9999, 0.5, 1e-4, 0.0, 0.0])
WIDE, TALL = with_values(SPECTRUM, 8, 16), with_values(SPECTRUM, 12, 8)
LAYOUT = mc.layouts.mha()


def model():
    """A wide and a tall kernel, a stack, attention by heads, and what is no matrix."""
    heads = np.stack([with_values(SPECTRUM[:4] * scale, 8, 4) for scale in (1, 0.1)], axis=1)
    kernels = {
        "up": WIDE,
        "down": TALL,
        "layers/up": np.stack([WIDE, 0.1 * WIDE]),
        "attn/query": heads,
        "attn/key": heads[:, ::-1],
        "attn/value": heads,
        "attn/out": np.moveaxis(heads, 0, 2),
    }
    params = {"norm": {"scale": jnp.full(8, 5.0)}}
    for path, kernel in kernels.items():
        *modules, name = path.split("/")
        inside = params
        for module in modules:
            inside = inside.setdefault(module, {})
        inside[name] = {"kernel": jnp.float32(kernel)}
    params["embed"] = {"embedding": 9 * jnp.ones((50, 16))}
    return params


NUMBERS = functools.partial(
    mc.muon_dimension_numbers, layout=LAYOUT, rules={"layers/up/kernel": "layers in out"}
)


def applied(tx, params, updates=None, state=None):
    updates = jax.tree.map(jnp.zeros_like, params) if updates is None else updates
    state = tx.init(params) if state is None else state
    updates, state = tx.update(updates, state, params)
    return optax.apply_updates(params, updates), state


def on_each(fn, params):
    """`fn` of every matrix in float64, with heads as matrices; what is none as it is."""

    def of(path, x):
        name, x = jax.tree_util.keystr(path), np.float64(x)
        if "norm" in name or "embedding" in name:
            return x
        axis = 0 if "out" in name else 1
        if "attn" in name:
            each = np.moveaxis(x, axis, 0)
            return np.moveaxis(np.stack([fn(head) for head in each]), 0, axis)
        return fn(x) if x.ndim == 2 else np.stack([fn(one) for one in x])

    return jax.tree_util.tree_map_with_path(of, params)


def changed(x, new_values):
    u, s, vt = np.linalg.svd(x, full_matrices=False)
    return (u * new_values(s)) @ vt


def assert_close(ours, expected, rtol=0.0, atol=0.0):
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(x, y, rtol, atol, err_msg=jax.tree_util.keystr(path))


def test_singular_values_above_the_limit_become_the_limit():
    params = model()
    found, state = applied(mc.clip_singular_values(1.0, dimension_numbers=NUMBERS), params)
    expected = on_each(lambda x: changed(x, lambda s: np.minimum(s, 1)), params)
    assert_close(found, expected, atol=1e-5)  # the iteration's own error, at nine times the limit
    assert state == optax.EmptyState()


def test_limits_by_shape_and_traced():
    params = {"up": {"kernel": jnp.float32(WIDE)}}
    by_shape = mc.clip_singular_values(lambda ins, outs: (outs / ins) ** 0.5)
    expected = changed(WIDE, lambda s: np.minimum(s, 2**0.5))
    assert_close(applied(by_shape, params)[0], {"up": {"kernel": expected}}, atol=2e-5)
    injected = optax.inject_hyperparams(mc.clip_singular_values)(2.0)
    expected = changed(WIDE, lambda s: np.minimum(s, 2))
    assert_close(applied(injected, params)[0], {"up": {"kernel": expected}}, atol=2e-5)


def test_the_clip_is_of_what_the_step_arrives_at():
    params = {"up": {"kernel": jnp.float32(0.5 * WIDE)}}
    tx = optax.chain(optax.sgd(1.0), mc.clip_singular_values(1.0))
    found, _ = applied(tx, params, updates=jax.tree.map(lambda x: -x, params))
    assert_close(found, {"up": {"kernel": changed(WIDE, lambda s: np.minimum(s, 1))}}, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-20, 1e15])
def test_tiny_and_huge_weights(scale):
    params = {"up": {"kernel": jnp.float32(scale * WIDE)}}
    found, _ = applied(mc.clip_singular_values(scale), params)
    expected = scale * changed(WIDE, lambda s: np.minimum(s, 1))
    assert_close(found, {"up": {"kernel": expected}}, atol=1e-5 * scale)
    found, _ = applied(mc.cap_spectral_norm(scale), params)
    assert_close(found, {"up": {"kernel": scale * WIDE / 9}}, rtol=1e-5, atol=1e-6 * scale)


def test_the_norm_is_capped_and_small_matrices_keep_every_bit():
    params = model()
    found, state = applied(mc.cap_spectral_norm(2.0, dimension_numbers=NUMBERS), params)
    norm = lambda x: np.linalg.norm(x, 2)  # noqa: E731
    expected = on_each(lambda x: x * min(1, 2 / norm(x)), params)
    assert_close(found, expected, rtol=2e-6, atol=2e-6)  # `init` iterates until float32 is reached
    np.testing.assert_allclose(state.norms["up/kernel"][0], 9, rtol=1e-6)
    np.testing.assert_allclose(state.norms["layers/up/kernel"][0], [9, 0.9], rtol=1e-6)
    np.testing.assert_allclose(state.norms["attn/out/kernel"][0], [9, 0.9], rtol=1e-6)
    np.testing.assert_array_equal(
        found["layers"]["up"]["kernel"][1], params["layers"]["up"]["kernel"][1]
    )


def test_the_largest_singular_value_alone_decays():
    params = model()
    found, _ = applied(mc.decay_spectral_norm(0.25, dimension_numbers=NUMBERS), params)

    def largest(s):
        return s * np.where(np.arange(len(s)) == 0, 0.75, 1)

    assert_close(found, on_each(lambda x: changed(x, largest), params), atol=1e-5)


def test_rates_may_be_schedules():
    params = {"up": {"kernel": jnp.float32(WIDE)}}
    tx = mc.decay_spectral_norm(lambda step: jnp.where(step == 0, 0.5, 0.0))
    once, state = applied(tx, params)
    twice, state = applied(tx, once, state=state)
    assert_close(twice, once)
    assert int(state.step) == 2


def test_one_iteration_a_step_follows_training():
    """Weights that Muon moves at a rate of 0.02, from random ones, of which many singular values
    are nearly the largest: some steps later the norm is known."""
    params = {"up": {"kernel": 0.1 * jax.random.normal(jax.random.key(0), (32, 48))}}
    tx = optax.chain(mc.muon(0.02, weight_decay=0.0), mc.cap_spectral_norm(1.2))
    goal = jax.random.normal(jax.random.key(1), (32, 48))

    @jax.jit
    def step(carry, key):
        params, state = carry
        noise = jax.random.normal(key, (32, 48))
        grads = jax.tree.map(lambda x: x - goal + noise, params)
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        return (params, state), jnp.linalg.norm(params["up"]["kernel"], 2)

    keys = jax.random.split(jax.random.key(2), 200)
    _, norms = jax.lax.scan(step, (params, tx.init(params)), keys)
    assert (norms > 1.19).sum() > 50  # the cap holds, and something is there to be held
    assert norms.max() < 1.2 * 1.05 and norms[50:].max() < 1.2 * 1.006


def test_zero_and_nonfinite_weights():
    zeros = {"up": {"kernel": jnp.zeros((4, 8))}}
    for tx in (
        mc.clip_singular_values(1.0),
        mc.cap_spectral_norm(1.0),
        mc.decay_spectral_norm(0.5),
    ):
        assert_close(applied(tx, zeros)[0], zeros)
    tx = mc.cap_spectral_norm(1.0)
    state = tx.init(zeros)
    nans = jax.tree.map(lambda x: x.at[0, 0].set(jnp.nan), zeros)
    _, after = applied(tx, nans, state=state)
    assert_close(after.vectors, state.vectors)
    assert np.isnan(after.norms["up/kernel"][0])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_keep_their_dtype(dtype):
    params = {"up": {"kernel": jnp.asarray(WIDE, dtype)}}
    for tx, new in (
        (mc.clip_singular_values(1.0), lambda s: np.minimum(s, 1)),
        (mc.cap_spectral_norm(1.0), lambda s: s / 9),
        (mc.decay_spectral_norm(0.5), lambda s: s * np.where(np.arange(len(s)) == 0, 0.5, 1)),
    ):
        found = applied(tx, params)[0]["up"]["kernel"]
        assert found.dtype == dtype
        # Weights up to 4 and their updates are each rounded to 8 bits.
        np.testing.assert_allclose(np.float64(found), changed(WIDE, new), atol=0.05)


LINKS = {
    "clip": mc.clip_singular_values(1.0, dimension_numbers=NUMBERS),
    "cap": mc.cap_spectral_norm(1.0, dimension_numbers=NUMBERS),
    "decay": mc.decay_spectral_norm(0.5, dimension_numbers=NUMBERS),
}


@pytest.mark.parametrize("link", LINKS)
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_the_same_on_a_mesh(link, kind):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=types)
    params = model()
    specs = {"up": P("fsdp", "tp"), "down": P(None, "tp"), "query": P("fsdp"), "key": P(None, "tp")}
    expected, _ = applied(LINKS[link], params)

    def place(path, x):
        names = [key.key for key in path]
        spec = P("fsdp") if "layers" in names else specs.get(names[-2], P())
        return jax.device_put(x, jax.NamedSharding(mesh, spec))

    with jax.set_mesh(mesh):
        sharded = jax.tree_util.tree_map_with_path(place, params)
        tx = LINKS[link]
        if kind == "Auto":
            shardings = jax.tree.map(lambda x: x.sharding, sharded)
            build = {
                "clip": functools.partial(mc.clip_singular_values, 1.0),
                "cap": functools.partial(mc.cap_spectral_norm, 1.0),
                "decay": functools.partial(mc.decay_spectral_norm, 0.5),
            }[link]
            tx = build(dimension_numbers=NUMBERS, shardings=shardings)
        found, _ = jax.jit(functools.partial(applied, tx))(sharded)
    assert_close(found, expected, atol=1e-5)  # sums in another order
    if kind == "Explicit":
        assert jax.typeof(found["up"]["kernel"]).sharding.spec == P("fsdp", "tp")


@pytest.mark.parametrize(
    ("build", "error", "words"),
    [
        (lambda: mc.clip_singular_values(0.0), ValueError, r"limit must be above 0 \(a singular"),
        (lambda: mc.cap_spectral_norm("1"), TypeError, "limit must be one number"),
        (lambda: mc.cap_spectral_norm(1.0, iterations=0), ValueError, "iterations must be a whole"),
        (lambda: mc.decay_spectral_norm(-0.1), ValueError, "rate must be a finite number"),
        (lambda: mc.clip_singular_values(1.0, newton_schulz=5), TypeError, "newton_schulz"),
    ],
)
def test_wrong_options_raise_when_built(build, error, words):
    with pytest.raises(error, match=words):
        build()


def test_iterations_are_no_hyper_parameter():
    params = {"up": {"kernel": jnp.ones((4, 8))}}
    with pytest.raises(TypeError, match=r"iterations must be known.*static_args=\('iterations',\)"):
        optax.inject_hyperparams(mc.cap_spectral_norm)(1.0).init(params)


def test_wrong_calls_raise():
    tx = mc.cap_spectral_norm(1.0)
    params = {"up": {"kernel": jnp.ones((4, 8))}}
    with pytest.raises(ValueError, match="cap_spectral_norm acts on weights: call"):
        tx.update(params, tx.init(params))
    other = {"up": {"kernel": jnp.ones((8, 8))}}
    with pytest.raises(ValueError, match=r"up/kernel/0 has vectors of shape \(4,\).*\(8,\)"):
        tx.update(other, tx.init(params), other)
