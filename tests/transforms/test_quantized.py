"""Momentum in 8 bits against its formula (arXiv 2509.23106, linear, by blocks) in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks import overhead
from benchmarks.compiled import collectives
from muonclip_jax._core.states import states_of
from muonclip_jax._transforms.momentum import momentum_trace
from muonclip_jax._transforms.quantized import QuantizedTrace, dequantized, quantized
from tests.transforms.matrix_trees import NUMBERS, assert_close, sharded, tree

LONG = {"w": (4, 300), "heads": (6, 3, 64), "stack": (2, 8, 256)}


def grads(seed, dtype="float32"):
    rng = np.random.default_rng(seed)
    sizes = lambda shape: np.exp(rng.normal(size=shape[-1]))  # noqa: E731
    return {k: (rng.normal(size=s) * sizes(s)).astype(dtype) for k, s in LONG.items()}


def rounded(x):
    """`Q(x) = ‖x‖∞ / 127 round(127 x / ‖x‖∞)` of each block of 128 along the last axis."""
    out = np.zeros_like(x)
    for start in range(0, x.shape[-1], 128):
        block = x[..., start : start + 128]
        largest = np.abs(block).max(-1, keepdims=True)
        out[..., start : start + 128] = largest / 127 * np.round(127 * block / largest)
    return out


def reference(every, decay, nesterov):
    """The updates of momentum that is stored rounded and used as it is."""
    stored = {k: np.zeros(s) for k, s in LONG.items()}
    updates = []
    for each in every:
        new = {k: decay * stored[k] + np.float64(g) for k, g in each.items()}
        ahead = {k: np.float64(g) + decay * new[k] for k, g in each.items()}
        updates.append(ahead if nesterov else new)
        stored = {k: rounded(x) for k, x in new.items()}
    return updates, stored


def run(tx, every):
    state = jax.jit(tx.init)(every[0])
    step, updates = jax.jit(tx.update), []
    for each in every:
        new, state = step(each, state)
        updates.append(new)
    return updates, state


@pytest.mark.parametrize("nesterov", [False, True])
def test_twenty_steps_are_the_formula(nesterov):
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        every = [grads(i, "float64") for i in range(20)]
        updates, state = run(momentum_trace(0.95, nesterov, mu_dtype="int8"), every)
        wanted, stored = reference(every, 0.95, nesterov)
        assert_close(updates[-1], wanted[-1], 1e-10)
        assert_close(dequantized(state.trace), stored, 1e-10)


def test_float32_differs_where_a_rounding_turns():
    every = [grads(i) for i in range(20)]
    updates, state = run(momentum_trace(0.95, True, mu_dtype="int8"), every)
    wanted, stored = reference(every, 0.95, True)
    assert_close(updates[0], wanted[0], 1e-6)  # nothing was rounded yet
    assert_close(dequantized(state.trace), stored, 1.01 / 127)
    same = [
        np.isclose(np.float64(x), y, rtol=1e-5, atol=0).mean()
        for x, y in zip(jax.tree.leaves(updates[-1]), jax.tree.leaves(wanted[-1]), strict=True)
    ]
    assert min(same) > 0.95


def test_the_state_and_its_size():
    state = momentum_trace(0.9, True, mu_dtype="int8").init(grads(0)).trace
    assert {k: (x.shape, x.dtype) for k, x in state.values.items()} == {
        k: (shape, jnp.int8) for k, shape in LONG.items()
    }
    assert {k: x.shape for k, x in state.scales.items()} == {
        "w": (4, 3),
        "heads": (6, 3, 1),
        "stack": (2, 8, 2),
    }
    assert all(x.dtype == jnp.float32 for x in state.scales.values())


def test_a_decoders_state_is_a_quarter():
    params = overhead.decoder(overhead.Options(layers=12, width=768, heads=12))
    size = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))  # noqa: E731

    def state_of(mu_dtype):
        tx = mc.muon(1e-3, layout=mc.layouts.mha(), mu_dtype=mu_dtype, other=optax.identity())
        return size(jax.eval_shape(tx.init, params))

    assert state_of("int8") / state_of("float32") < 0.26


def test_rounding_is_half_a_step_and_zeros_stay():
    x = {**grads(3), "zeros": np.zeros((2, 200), np.float32)}
    found = dequantized(quantized(jax.tree.map(jnp.asarray, x)))
    assert not found["zeros"].any()
    for start in (0, 128, 256):
        block = x["w"][:, start : start + 128]
        error = np.abs(found["w"][:, start : start + 128] - block).max(-1)
        assert (error <= np.abs(block).max(-1) * (0.5 / 127 + 1e-6)).all() and error.max() > 0


@pytest.mark.parametrize("scale", [1e-35, 1e37])
def test_tiny_and_huge(scale):
    x = {"w": grads(3)["w"]}
    once = dequantized(quantized(jax.tree.map(jnp.asarray, x)))["w"]
    scaled = dequantized(quantized({"w": jnp.asarray(x["w"] * np.float32(scale))}))["w"]
    np.testing.assert_allclose(
        np.float64(scaled) / scale, once, atol=1.01 / 127 * np.abs(once).max()
    )
    assert np.isfinite(scaled).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_nan_in_its_block(bad):
    x = np.array(grads(3)["w"])
    x[1, 130] = bad
    found = dequantized(quantized({"w": jnp.asarray(x)}))["w"]
    wanted = np.zeros(x.shape, bool)
    wanted[1, 128:256] = True
    np.testing.assert_array_equal(np.isnan(found), wanted)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_the_same_on_eight_devices(kind):
    every = [tree(i) for i in range(3)]
    wanted, alone = run(momentum_trace(0.9, True, mu_dtype="int8"), every)
    mesh, first = sharded(every[0], kind)
    shardings = jax.tree.map(lambda x: x.sharding, first) if kind == "Auto" else None
    tx = momentum_trace(0.9, True, mu_dtype="int8", shardings=shardings)
    with jax.set_mesh(mesh):
        start = jax.jit(tx.init)(first)
        found, state = run(tx, [sharded(each, kind)[1] for each in every])
    assert_close(found[-1], wanted[-1], 1e-6)
    for ours, theirs in zip(jax.tree.leaves(state), jax.tree.leaves(alone), strict=True):
        np.testing.assert_allclose(np.float64(ours), np.float64(theirs), rtol=1e-6, atol=0)
    for x, y in zip(jax.tree.leaves(start), jax.tree.leaves(state), strict=True):
        assert x.sharding.is_equivalent_to(y.sharding, x.ndim)
    for name, x in state.trace.values.items():
        assert x.sharding.is_equivalent_to(first[name].sharding, x.ndim)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_blocks_that_stay_on_a_device_cost_no_collective(kind):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=types)
    shapes = {
        "up": ((64, 512), P("fsdp", "tp")),
        "down": ((64, 1024), P("tp", "fsdp")),
        "query": ((64, 8, 64), P("fsdp", "tp")),
        "layers": ((8, 16, 100), P("fsdp", "tp")),
        "stack": ((2, 8, 256), P(None, "fsdp", "tp")),
    }
    split = {k: jax.NamedSharding(mesh, spec) for k, (_, spec) in shapes.items()}
    with jax.set_mesh(mesh):
        params = {
            k: jax.device_put(np.ones(s, np.float32), split[k]) for k, (s, _) in shapes.items()
        }
        tx = momentum_trace(0.9, True, mu_dtype="int8", shardings=split if kind == "Auto" else None)
        state = jax.jit(tx.init)(params)
        assert state.trace.scales["up"].sharding.spec == P("fsdp", "tp")
        assert state.trace.scales["down"].sharding.spec == P("tp", "fsdp")
        assert state.trace.scales["stack"].sharding.spec == P(None, "fsdp", "tp")
        assert collectives(jax.jit(tx.init).lower(params).compile()) == []
        step = jax.jit(tx.update, donate_argnums=1).lower(params, state).compile()
        assert collectives(step) == []
        # Given away, the state is written in its place.
        held = sum(x.nbytes for x in jax.tree.leaves(state)) // 8
        assert step.memory_analysis().alias_size_in_bytes == held


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_scales_of_blocks_that_devices_share_are_on_all_of_them(kind):
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=types)
    split = jax.NamedSharding(mesh, P("fsdp", "tp"))
    every = [{"w": np.float32(np.random.default_rng(i).normal(size=(8, 192)))} for i in range(3)]
    wanted, _ = run(momentum_trace(0.9, True, mu_dtype="int8"), every)
    with jax.set_mesh(mesh):
        tx = momentum_trace(
            0.9, True, mu_dtype="int8", shardings={"w": split} if kind == "Auto" else None
        )
        found, state = run(tx, [jax.device_put(each, split) for each in every])
    scales = state.trace.scales["w"]
    assert scales.sharding.is_equivalent_to(jax.NamedSharding(mesh, P("fsdp")), 2)
    assert_close(found[-1], wanted[-1], 1e-6)


def test_muon_in_8_bits_stays_near():
    """What the docstring of `scale_by_muon` says: 20 steps, gradients with a signal and noise."""

    def moved(mu_dtype):
        tx = mc.muon(0.02, mu_dtype=mu_dtype, weight_decay=0.0)
        params = {"up": {"kernel": jnp.zeros((128, 256))}}
        signal = jax.random.normal(jax.random.key(0), (128, 256))

        def step(carry, key):
            noise = jax.random.normal(key, signal.shape)
            g = jax.tree.map(lambda _: signal + noise, carry[0])
            updates, state = tx.update(g, carry[1], carry[0])
            return (optax.apply_updates(carry[0], updates), state), None

        keys = jax.random.split(jax.random.key(1), 20)
        (params, _), _ = jax.lax.scan(step, (params, tx.init(params)), keys)
        return params["up"]["kernel"]

    exact, in_bits, half = moved("float32"), moved("int8"), moved("bfloat16")
    distance = lambda x: float(jnp.linalg.norm(x - exact) / jnp.linalg.norm(exact))  # noqa: E731
    assert distance(half) < distance(in_bits) < 0.01


def test_states_from_elsewhere_come_in_8_bits():
    params = {"up": jnp.ones((8, 300))}
    tx = mc.scale_by_muon(mu_dtype="int8", bias_correction=True)
    momentum = {"up": grads(5)["w"].repeat(2, 0)}
    old = {"count": jnp.array(3), "momentum": momentum}
    new, _ = mc.upgrade_state(old, like=tx.init(params))
    assert int(new.step) == 3
    np.testing.assert_allclose(dequantized(new.trace)["up"], rounded(momentum["up"]), rtol=1e-6)
    again, _ = mc.upgrade_state((new, optax.EmptyState()), like=tx.init(params))
    jax.tree.map(np.testing.assert_array_equal, again, new)
    floats = mc.scale_by_muon().init(params)
    back, _ = mc.upgrade_state(floats, like=mc.scale_by_muon(mu_dtype="int8").init(params))
    assert back.trace.values["up"].dtype == jnp.int8

    kernels = {"up": {"kernel": jnp.asarray(momentum["up"])}}
    theirs = optax.contrib.muon(1e-3)
    state = theirs.update(kernels, theirs.init(kernels), kernels)[1]
    ours = mc.from_optax_muon(state, mc.muon(1e-3, mu_dtype="int8").init(kernels), beta=0.95)
    (trace,) = states_of(ours, QuantizedTrace)
    (found,) = jax.tree.leaves(dequantized(trace))
    np.testing.assert_allclose(found, rounded(momentum["up"]), rtol=1e-5)


def test_a_state_of_the_other_kind_raises():
    params = {"up": jnp.ones((8, 16))}
    floats, bits = mc.scale_by_muon(), mc.scale_by_muon(mu_dtype="int8")
    with pytest.raises(ValueError, match='momentum in floats, and mu_dtype= asks for "int8"'):
        bits.update(params, floats.init(params))
    with pytest.raises(ValueError, match='momentum in "int8", and mu_dtype= asks for floats'):
        floats.update(params, bits.init(params))
    with pytest.raises(ValueError, match=r"up has momentum of shape \(8, 16\).*\(16, 8\)"):
        bits.update({"up": jnp.ones((16, 8))}, bits.init(params))
    with pytest.raises(ValueError, match=r"bias of shape \(\) is no matrix"):
        bits.init({"bias": jnp.ones(())})


def test_copies_of_the_parameters_are_the_values_alone():
    params = {"up": jnp.ones((8, 300))}
    tx = momentum_trace(0.9, True, mu_dtype="int8")
    seen = optax.tree_map_params(
        tx, lambda _: "param", tx.init(params), transform_non_params=lambda _: "other"
    )
    assert seen.trace.values == {"up": "param"} and seen.trace.scales == "other"


def test_half_precision_and_every_storage_train():
    params = tree(dtype="bfloat16")
    tx = mc.scale_by_muon(mu_dtype="int8", dimension_numbers=NUMBERS)
    updates, state = jax.jit(tx.update)(params, tx.init(params))
    assert all(x.dtype == jnp.bfloat16 for x in updates.values())
    assert all(x.dtype == jnp.float32 for x in state[0].trace.scales.values())
