"""scale_by_neuron_rms against NorMuon's and nanochat's formulas in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.transforms.matrix_trees import NUMBERS, STORED, assert_close, on_each, sharded, tree

B2, EPS = 0.9, 1e-3
STEPS = [tree(seed) for seed in range(3)]


def axis_of_the_mean(of, ins, outs):
    """Of `[count, in, out]`; PyTorch's [out, in] has in last."""
    if of == "longer":
        of = "outputs" if outs >= ins else "inputs"
    return {"outputs": 1, "inputs": 2}[of]


def reference(*updates, of="outputs", keep_rms=False):
    """The last of these updates, scaled: Algorithm 1 of 2510.05491."""
    v = 0
    for o in updates:
        axis = axis_of_the_mean(of, *o.shape[1:])
        v = B2 * v + (1 - B2) * (o**2).mean(axis, keepdims=True)
        new = o / (np.sqrt(v) + EPS)
        if keep_rms:
            norm = lambda x: np.sqrt((x**2).sum((1, 2), keepdims=True))  # noqa: E731
            new = new * norm(o) / norm(new)
    return new


def steps_of(tx, updates, jit=jax.jit):
    state = jit(tx.init)(updates[0])
    for each in updates:
        new, state = jit(tx.update)(each, state)
    return new, state


def places(state):
    """How v of every parameter is split; what is not split at the end is left out."""

    def place(v):
        entries = [*v.sharding.spec]
        while entries and entries[-1] is None:
            entries.pop()
        return tuple(entries)

    return {name: place(v) for name, (v,) in state.nu.items()}


@pytest.mark.parametrize("of", ["outputs", "inputs", "longer"])
@pytest.mark.parametrize("keep_rms", [False, True])
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("float64", 1e-12)])
def test_every_storage_against_the_paper(of, keep_rms, dtype, rtol):
    tx = mc.scale_by_neuron_rms(B2, EPS, of=of, keep_rms=keep_rms, dimension_numbers=NUMBERS)
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        updates = [tree(seed, dtype=dtype) for seed in range(3)]
        found, state = steps_of(tx, updates)
        assert all(x.dtype == dtype for x in found.values())
        assert all(x.dtype == dtype for x in jax.tree.leaves(state))
        wanted = on_each(functools.partial(reference, of=of, keep_rms=keep_rms), *updates)
        assert_close(found, wanted, rtol)


@pytest.mark.parametrize("of", ["outputs", "longer"])
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_the_same_on_eight_devices(of, kind):
    mesh, _ = sharded(STEPS[0], kind)
    placed = [sharded(each, kind)[1] for each in STEPS]
    shardings = jax.tree.map(lambda x: x.sharding, placed[0]) if kind == "Auto" else None
    tx = mc.scale_by_neuron_rms(B2, EPS, of=of, dimension_numbers=NUMBERS, shardings=shardings)
    with jax.set_mesh(mesh):
        first = jax.jit(tx.init)(placed[0])
        found, state = steps_of(tx, placed)
    assert_close(found, on_each(functools.partial(reference, of=of), *STEPS), 1e-6)
    # v is split as the neurons are, from the first step on.
    assert places(first) == places(state)
    assert places(state)["layers"] == ("fsdp",)
    assert places(state)["tall"] == (("tp",) if of == "outputs" else ())
    assert places(state)["query"] == (("tp",) if of == "outputs" else ("tp", "fsdp"))


def test_the_state_is_one_number_a_neuron():
    tx = mc.scale_by_neuron_rms(dimension_numbers=NUMBERS)
    state = tx.init(STEPS[0])
    shapes = {name: tuple(v.shape for v in few) for name, few in state.nu.items()}
    assert shapes == {
        "wide": ((16,),),
        "tall": ((8,),),
        "layers": ((4, 16),),
        "query": ((2, 4),),
        "out": ((2, 8),),
        "flat": ((8, 4),),
        "cut": ((4, 8),),
        "whole": ((4, 4),),
    }
    abstract = jax.eval_shape(tx.init, STEPS[0])
    assert jax.tree.map(lambda x: x.shape, abstract) == jax.tree.map(lambda x: x.shape, state)
    for name, stored in STORED.items():
        ins = stored.take(STEPS[0][name]).shape[1]
        assert state.nu[name][0].nbytes * ins == STEPS[0][name].nbytes


def nanochat(g, v, b2):
    """`muon_step_fused` of nanochat behind its Polar Express, for one [out, in]."""
    axis = -1 if g.shape[-2] >= g.shape[-1] else -2
    mean = (g**2).mean(axis, keepdims=True)
    norm = np.sqrt(mean.sum() * g.shape[axis])
    v = v + (1 - b2) * (mean - v)
    step = 1 / np.sqrt(np.maximum(v, 1e-10))
    new = np.sqrt((mean * g.shape[axis] * step**2).sum())
    return g * step * norm / np.maximum(new, 1e-10), v


@pytest.mark.parametrize("name", ["wide", "tall"])
def test_nanochat(name):
    tx = mc.scale_by_neuron_rms(0.9, 1e-10, of="longer", keep_rms=True)
    found, _ = steps_of(tx, [{"w": each[name]} for each in STEPS])
    v = 0
    for each in STEPS:
        wanted, v = nanochat(np.float64(each[name]).T, v, 0.9)
    np.testing.assert_allclose(found["w"], wanted.T, rtol=1e-6, atol=1e-6 * np.abs(wanted).max())


@pytest.mark.parametrize("keep_rms", [False, True])
def test_zeros_stay_zeros(keep_rms):
    x = np.array(STEPS[0]["wide"])
    x[:, 3] = 0
    for eps in (0.0, 1e-8):
        tx = mc.scale_by_neuron_rms(eps=eps, keep_rms=keep_rms)
        found, state = steps_of(tx, [{"w": x, "zeros": np.zeros_like(x)}] * 2)
        assert not found["zeros"].any() and not found["w"][:, 3].any()
        assert np.isfinite(found["w"]).all() and found["w"].any(0).sum() == 15
        assert not state.nu["zeros"][0].any() and state.nu["w"][0][3] == 0
        if keep_rms:  # neurons of zeros are no part of a norm
            np.testing.assert_allclose(np.linalg.norm(found["w"]), np.linalg.norm(x), rtol=1e-6)
        grads = jax.grad(lambda x, s=state, tx=tx: tx.update({"w": x}, s)[0]["w"].sum())
        del state.nu["zeros"]
        assert np.isfinite(grads(jnp.asarray(x))).all()


@pytest.mark.parametrize("keep_rms", [False, True])
def test_nan_stays_in_its_neuron_or_its_matrix(keep_rms):
    x = np.array(STEPS[0]["layers"])
    x[1, 2, 3] = np.nan
    tx = mc.scale_by_neuron_rms(keep_rms=keep_rms, dimension_numbers={"w": "layers in out"})
    found, state = steps_of(tx, [{"w": x}])
    wanted = np.zeros(x.shape, bool)
    wanted[1, :, slice(None) if keep_rms else 3] = True
    np.testing.assert_array_equal(np.isnan(found["w"]), wanted)
    assert np.isnan(state.nu["w"][0]).sum() == 1 and np.isnan(state.nu["w"][0][1, 3])


def test_half_precision_keeps_its_dtype_and_a_float32_state():
    x = jnp.full((4096, 2), 0.01, jnp.bfloat16)
    found, state = steps_of(mc.scale_by_neuron_rms(0.0, 0.0), [{"w": x}])
    assert found["w"].dtype == jnp.bfloat16 and state.nu["w"][0].dtype == jnp.float32
    np.testing.assert_array_equal(np.float32(found["w"]), 1)
    np.testing.assert_allclose(state.nu["w"][0], np.float64(x[0]) ** 2, rtol=1e-6)


def test_wrong_calls_raise():
    for options, words in (
        ({"b2": 1.0}, r"b2 must be in \[0, 1\)"),
        ({"eps": -1e-8}, "eps must be at least 0"),
        ({"of": "rows"}, 'of must be one of "outputs", "inputs", "longer"'),
    ):
        with pytest.raises(ValueError, match=words):
            mc.scale_by_neuron_rms(**options)
    with pytest.raises(TypeError, match="keep_rms must be True or False"):
        mc.scale_by_neuron_rms(keep_rms="yes")
    with pytest.raises(TypeError, match=r"scale_by_neuron_rms: up \(8, 16\) is int32"):
        mc.scale_by_neuron_rms().init({"up": jnp.ones((8, 16), int)})
    x = {"up": jnp.ones((4, 8))}
    state = mc.scale_by_neuron_rms(of="inputs").init(x)
    with pytest.raises(ValueError, match=r"up/0 has mean squares of shape \(4,\).*\(8,\)"):
        mc.scale_by_neuron_rms().update(x, state)


def test_tree_map_params_finds_no_parameters_in_the_state():
    x = {"up": jnp.ones((4, 8))}
    tx = mc.scale_by_neuron_rms()
    seen = optax.tree_map_params(
        tx, lambda p: "param", tx.init(x), transform_non_params=lambda _: 0
    )
    assert jax.tree.leaves(seen) == [0]
