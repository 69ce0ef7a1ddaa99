"""Steps on meshes: exported, repeated bit for bit, on odd meshes, in float64, a thousand times."""

import contextlib
import functools
import gc

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc

pytestmark = pytest.mark.contract

LAYOUT = mc.layouts.mha(heads=2, query="q", key="k", value="v", out="o")
MAXIMA = {("attn",): np.array([40.0, 1.0], np.float32)}
KINDS = ("one device", "Auto", "Explicit")
# Rounding of float32, in sums of another order, times what Newton–Schulz steps multiply it by.
TOLERANCE = 3e-5


def params_of(dtype="float32", width=8):
    rng = np.random.default_rng(0)
    kernels = {n: {"kernel": rng.normal(size=(width, width)).astype(dtype)} for n in "qkvo"}
    return {"attn": kernels, "up": {"kernel": rng.normal(size=(width, 2 * width)).astype(dtype)}}


class Setup:
    """An optimizer, parameters and a jitted step on a mesh of one axis, or on one device."""

    def __init__(self, kind, sizes=(2,), dtype="float32", width=8, wrap=None, **options):
        values = params_of(dtype, width)
        self.mesh, shardings = None, None
        if kind != "one device":
            types = (AxisType.Auto if kind == "Auto" else AxisType.Explicit,) * len(sizes)
            devices = jax.devices()[: np.prod(sizes)]
            self.mesh = jax.make_mesh(sizes, ("fsdp", "tp")[: len(sizes)], types, devices=devices)
            spec = P("fsdp", "tp") if len(sizes) == 2 else P("fsdp")
            shardings = NamedSharding(self.mesh, spec)
        self.params = jax.device_put(values, shardings)
        how = mc.NewtonSchulz(mc.schedules.polar_express(steps=2), dtype)
        options = {"threshold": 10.0, "newton_schulz": how, "layout": LAYOUT} | options
        muonclip = mc.muonclip(1e-3, shardings=shardings if kind == "Auto" else None, **options)
        self.tx = wrap(muonclip) if wrap else muonclip
        replicated = None if self.mesh is None else NamedSharding(self.mesh, P())
        self.maxima = jax.device_put(
            {path: jnp.asarray(x) for path, x in MAXIMA.items()}, replicated
        )
        with self.context():
            self.state = jax.jit(self.tx.init)(self.params)
        self.traces = 0
        self.jitted = jax.jit(self.step)

    def context(self):
        return jax.set_mesh(self.mesh) if self.mesh else contextlib.nullcontext()

    def step(self, params, state, maxima):
        self.traces += 1
        updates, state = self.tx.update(params, state, params, max_logits=maxima)
        return optax.apply_updates(params, updates), state

    def run(self, steps, start=None):
        params, state = start or (self.params, self.state)
        with self.context():
            for _ in range(steps):
                params, state = self.jitted(params, state, self.maxima)
        return params, state


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_exported(kind, dtype):
    how = mc.NewtonSchulz(mc.schedules.polar_express(steps=2), dtype)
    setup = Setup(kind, newton_schulz=how)
    with setup.context():
        arguments = setup.params, setup.state, setup.maxima
        exported = export.export(setup.jitted)(*arguments)
        found = jax.jit(exported.call)(*arguments)
        expected = setup.jitted(*arguments)
    chex.assert_trees_all_close(found[0], expected[0], atol=1e-6)
    assert "LayoutConstraint" not in exported.mlir_module()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_transferred_in_a_step(kind):
    setup = Setup(kind)
    once = setup.run(1)
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(setup.run(1, once))
    assert setup.traces == 1


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_bits_again_and_after_a_resume(kind, tmp_path):
    """Same program, seed, mesh, machine. docs/reference/promises.md says where bits may differ."""
    ocp = pytest.importorskip("orbax.checkpoint")
    wrap = functools.partial(mc.accumulate, every=2)
    first, second = Setup(kind, wrap=wrap), Setup(kind, wrap=wrap)
    expected = first.run(4)
    chex.assert_trees_all_equal(second.run(4), expected)
    middle = first.run(3)  # in the midst of a real step
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "saved", middle)
        checkpointer.wait_until_finished()
        like = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), middle
        )
        restored = checkpointer.restore(tmp_path / "saved", like)
    chex.assert_trees_all_equal(second.run(1, restored), expected)


@pytest.mark.parametrize(
    ("sizes", "width"), [((3, 2), 12), ((5,), 10), ((7,), 14), ((2, 3), 18), ((6,), 12)], ids=str
)
def test_odd_meshes(sizes, width):
    """Numbers of devices that no power of two divides, on parameters that they just divide."""
    alone, spread = Setup("one device", width=width), Setup("Explicit", sizes, width=width)
    chex.assert_trees_all_close(spread.run(2)[0], alone.run(2)[0], atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS[1:])
def test_in_float64(kind):
    with jax.enable_x64(True):
        alone = Setup("one device", dtype="float64").run(2)
        spread = Setup(kind, (2, 2), dtype="float64").run(2)
        chex.assert_trees_all_close(spread[0], alone[0], atol=1e-12)
        assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(spread[0]))


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_device_group_with_matrices_of_low_rank(rank):
    """What has no direction gets none: other singular values stay 0, as on one device."""
    rng = np.random.default_rng(1)
    low = rng.normal(size=(8, rank)) @ rng.normal(size=(rank, 16))
    grads = {
        "w": jnp.stack(
            [jnp.asarray(low, jnp.float32), jnp.asarray(rng.normal(size=(8, 16)), jnp.float32)]
        )
    }
    mesh = jax.make_mesh((4,), ("fsdp",), (AxisType.Explicit,), devices=jax.devices()[:4])
    on_mesh = jax.device_put(grads, NamedSharding(mesh, P(None, None, "fsdp")))
    how = mc.NewtonSchulz(mc.schedules.polar_express(steps=8), "float32")
    options = {"newton_schulz": how, "dimension_numbers": {"w": "... in out"}}
    tx = mc.scale_by_orthogonalization(**options, devices_per_matrix=4)
    found, _ = jax.jit(tx.update)(on_mesh, optax.EmptyState())
    expected, _ = mc.scale_by_orthogonalization(**options).update(grads, optax.EmptyState())
    assert np.isfinite(found["w"]).all()
    # Rounding leaves singular values of 1e-7, which eight steps multiply by up to 1e4.
    np.testing.assert_allclose(found["w"][1], expected["w"][1], atol=TOLERANCE)
    singular = np.linalg.svd(found["w"][0], compute_uv=False)
    np.testing.assert_allclose(singular[:rank], 1, atol=0.05)
    if rank == 0:
        assert not np.any(found["w"][0])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Explicit", "one device"])
def test_a_thousand_steps_compile_once_and_keep_nothing(kind):
    setup = Setup(kind, wrap=functools.partial(mc.accumulate, every=3))
    after, held = None, []
    for _ in range(2):
        after = setup.run(500, after)
        gc.collect()
        held.append((len(jax.live_arrays()), sum(x.nbytes for x in jax.live_arrays())))
    assert held[0] == held[1]
    assert setup.traces == 1
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
