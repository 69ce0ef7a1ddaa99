"""normalize_rms against MuonEq's, Muon+'s and NorMuon's formulas in float64 NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from tests.transforms.matrix_trees import NUMBERS, assert_close, on_each, sharded, tree

KINDS = ["matrix", "inputs", "outputs", "both"]
# Where a kind takes its sums, of [count, in, out].
AXES = {"matrix": (1, 2), "inputs": (2,), "outputs": (1,)}


def size(x, axes):
    return np.sqrt((x**2).mean(axes, keepdims=True))


def reference(x, of, rms=1.0):
    """The definition, without a thought for rounding."""
    if of == "both":
        x = x / (size(x, (1,)) * size(x, (2,)))
        of = "matrix"
    return rms * x / size(x, AXES[of])


def updated(tx, updates):
    return jax.jit(tx.update)(updates, tx.init(updates))[0]


@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 1e-6), ("float64", 1e-14)])
def test_every_storage_has_the_rms(of, dtype, rtol):
    tx = mc.normalize_rms(0.2, of=of, dimension_numbers=NUMBERS)
    with jax.enable_x64(dtype == "float64"), jax.numpy_dtype_promotion("strict"):
        updates = tree(dtype=dtype)
        found = updated(tx, updates)
        assert all(x.dtype == dtype for x in found.values())
        wanted = on_each(functools.partial(reference, of=of, rms=0.2), updates)
        assert_close(found, wanted, rtol)


@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_the_same_on_eight_devices(of, kind):
    updates = tree()
    mesh, placed = sharded(updates, kind)
    shardings = jax.tree.map(lambda x: x.sharding, placed) if kind == "Auto" else None
    tx = mc.normalize_rms(0.2, of=of, dimension_numbers=NUMBERS, shardings=shardings)
    with jax.set_mesh(mesh):
        found = updated(tx, placed)
    assert_close(found, on_each(functools.partial(reference, of=of, rms=0.2), updates), 1e-6)
    if kind == "Explicit":
        for name, x in found.items():
            assert jax.typeof(x).sharding.spec == jax.typeof(placed[name]).sharding.spec


# What the sources write, for PyTorch's [out, in], with their ε.


def muoneq(g, mode):
    """The code of 2603.28254, `_normalize_muon_update`."""
    rows = 1 / np.sqrt((g**2).sum(1, keepdims=True) + 1e-8)
    cols = 1 / np.sqrt((g**2).sum(0, keepdims=True) + 1e-8)
    return {"row": g * rows, "col": g * cols, "rowcol": g * rows * cols}[mode]


@pytest.mark.parametrize(
    ("mode", "of"), [("row", "outputs"), ("col", "inputs"), ("rowcol", "both")]
)
def test_muoneq(mode, of):
    """msign ignores the size, so both are brought to one norm."""
    g = tree()["wide"]
    theirs = muoneq(np.float64(g).T, mode).T
    ours = updated(mc.normalize_rms(of=of), {"w": g})["w"]
    unit = lambda x: np.float64(x) / np.linalg.norm(np.float64(x))  # noqa: E731
    # Relative to sums of squares above 0.1 their ε of 1e-8 is a relative 5e-8.
    np.testing.assert_allclose(unit(ours), unit(theirs), atol=1e-6)


def muon_plus(u, mode, eps):
    """The code of 2602.21545, `apply_post_polar_norm`, and its factor of the shape."""
    for side in mode.split("_"):
        axis = {"col": 0, "row": 1}[side]
        u = u / np.sqrt((u**2).sum(axis, keepdims=True) + eps)
    outs, ins = u.shape
    return u * np.sqrt(outs / ins)


@pytest.mark.parametrize("mode", ["col", "row", "col_row", "row_col"])
def test_muon_plus(mode):
    links = {"col": "inputs", "row": "outputs"}
    sizes = {  # as in the docstring
        "row": lambda ins, outs: outs**0.5 / ins,
        "col": lambda ins, outs: outs**-0.5 * (outs / ins) ** 0.5,
    }
    sides = mode.split("_")
    tx = optax.chain(
        *(mc.normalize_rms(of=links[side]) for side in sides),
        mc.scale_by_update_rms(sizes[sides[-1]]),
    )
    u = tree()["wide"]
    ours = updated(tx, {"w": u})["w"]
    np.testing.assert_allclose(ours, muon_plus(np.float64(u).T, mode, 0).T, rtol=1e-6)
    # Their ε of 1e-7 is small beside sums of squares above 1e-3, which these are.
    np.testing.assert_allclose(ours, muon_plus(np.float64(u).T, mode, 1e-7).T, rtol=1e-4)


def test_it_is_the_match_of_normuon_and_adamuon():
    o = tree()["wide"]
    theirs = 0.2 * np.sqrt(o.size) * np.float64(o) / np.linalg.norm(np.float64(o))
    np.testing.assert_allclose(updated(mc.normalize_rms(0.2), {"w": o})["w"], theirs, rtol=1e-6)


# Numbers


@pytest.mark.parametrize("of", KINDS)
@pytest.mark.parametrize("scale", [1e-32, 1e32])
def test_tiny_and_huge_updates(of, scale):
    updates = tree(scale=scale)
    found = updated(mc.normalize_rms(0.2, of=of, dimension_numbers=NUMBERS), updates)
    assert_close(found, on_each(functools.partial(reference, of=of, rms=0.2), updates), 1e-6)


def test_rows_of_very_different_sizes():
    x = np.float32(10.0 ** np.array([[30], [0], [-30], [-35]])) * np.ones((4, 2), np.float32)
    for of in ("inputs", "both"):
        np.testing.assert_allclose(updated(mc.normalize_rms(of=of), {"w": x})["w"], 1, rtol=1e-6)


@pytest.mark.parametrize("of", KINDS)
def test_zeros_stay_zeros(of):
    x = np.array(tree()["wide"])
    x[2], x[:, 3] = 0, 0
    tx = mc.normalize_rms(of=of, dimension_numbers={"w": "in out", "zeros": "in out"})
    found = updated(tx, {"w": x, "zeros": np.zeros_like(x)})
    assert not found["zeros"].any() and not found["w"][2].any() and not found["w"][:, 3].any()
    assert np.isfinite(found["w"]).all() and found["w"].any(1).sum() == 7


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("of", KINDS)
def test_what_is_not_finite_stays_in_its_own_group(bad, of):
    x = np.array(tree()["layers"])
    x[1, 2, 3] = bad
    found = updated(mc.normalize_rms(of=of, dimension_numbers={"w": "layers in out"}), {"w": x})
    hit = np.isnan(found["w"])
    wanted = np.zeros_like(hit)
    group = {"inputs": np.s_[1, 2], "outputs": np.s_[1, :, 3]}.get(of, np.s_[1])
    wanted[group] = True
    np.testing.assert_array_equal(hit, wanted)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_sums_in_float32(dtype):
    x = jnp.full((64, 1024), 0.1, dtype)
    found = updated(mc.normalize_rms(0.25), {"w": x})["w"]
    assert found.dtype == dtype
    np.testing.assert_array_equal(np.float32(found), 0.25)


def test_the_rms_can_be_injected():
    x = {"w": tree()["wide"]}
    tx = optax.inject_hyperparams(mc.normalize_rms)(rms=0.2)
    state = tx.init(x)
    state.hyperparams["rms"] = jnp.asarray(0.5)
    found, _ = jax.jit(tx.update)(x, state)
    np.testing.assert_allclose(size(np.float64(found["w"]), None), 0.5, rtol=1e-6)


def test_a_zero_row_has_a_derivative():
    x = jnp.zeros((2, 4)).at[0].set(1.0)
    tx = mc.normalize_rms(of="inputs")
    grads = jax.grad(lambda x: tx.update({"w": x}, tx.init({"w": x}))[0]["w"].sum())(x)
    assert np.isfinite(grads).all()


def test_wrong_calls_raise():
    for rms in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="rms must be above 0 and finite"):
            mc.normalize_rms(rms)
    with pytest.raises(ValueError, match='of must be one of "matrix", "inputs", "outputs", "both"'):
        mc.normalize_rms(of="rows")
    with pytest.raises(TypeError, match=r"normalize_rms: up \(8, 16\) is int32"):
        mc.normalize_rms().init({"up": jnp.ones((8, 16), int)})
    with pytest.raises(ValueError, match=r"bias of shape \(16,\) is no matrix"):
        mc.normalize_rms().init({"bias": jnp.ones(16)})
    assert mc.normalize_rms(dimension_numbers=NUMBERS).init(tree()) == optax.EmptyState()
