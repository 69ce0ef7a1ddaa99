"""Block-periodic orthogonalization: against polar factors in float64, and what devices send."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from benchmarks.compiled import collectives, dots, flops, totals
from benchmarks.hlo import parse

# Steps enough that what comes out is the polar factor, to rounding.
ACCURATE = {
    name: mc.NewtonSchulz(mc.schedules.polar_express(12), dtype=name, method="standard")
    for name in ("float32", "float64")
}
NUMBERS = {"up": "in out", "down": "in out", "layers": "layers in out", "heads": "in heads out"}
NUMBERS["heads"] = "in heads out -> heads in out"
SHAPES = {"up": (8, 16), "down": (16, 8), "layers": (2, 8, 16), "heads": (16, 2, 8)}
SPECS = {
    "up": P("tp", "fsdp"),
    "down": P("fsdp"),
    "layers": P(None, "tp", "fsdp"),
    "heads": P("fsdp", "tp"),
}
MESH = {"fsdp": 4, "tp": 2}


def drawn(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: np.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def polar(x):
    u, _, vt = np.linalg.svd(np.float64(x), full_matrices=False)
    return u @ vt


def published(x, rows, cols, scale=1.0):
    """A block step of arXiv 2510.16981 on `[in, out]`, at the RMS of the whole: float64."""
    new = np.zeros(x.shape)
    b, c = x.shape[0] // rows, x.shape[1] // cols
    for i in range(rows):
        for j in range(cols):
            here = np.s_[i * b : (i + 1) * b, j * c : (j + 1) * c]
            new[here] = scale * np.sqrt(max(b, c) / max(x.shape)) * polar(x[here])
    return new


def on_each(fn, name, x):
    """`fn` of each matrix, of layers and heads by themselves."""
    if x.ndim == 2:
        return fn(x)
    axis = {"layers": 0, "heads": 1}[name]
    return np.moveaxis(np.stack([fn(one) for one in np.moveaxis(x, axis, 0)]), 0, axis)


def expected(grids, scale=1.0):
    """Of a grid for each parameter, or of one for all."""
    of = grids if isinstance(grids, dict) else dict.fromkeys(SHAPES, grids)
    return {
        name: on_each(lambda m, grid=of[name]: published(m, *grid, scale), name, x)
        for name, x in drawn(np.float64).items()
    }


def steps(tx, updates, count):
    """What each of so many steps makes of the same updates."""
    state, found = tx.init(updates), []
    for _ in range(count):
        new, state = tx.update(updates, state)
        found.append(new)
    return found


def assert_close(ours, wanted, atol):
    assert ours.keys() == wanted.keys()
    for name, x in ours.items():
        np.testing.assert_allclose(np.float64(x), wanted[name], rtol=0, atol=atol, err_msg=name)


def on_mesh(kind, specs=SPECS, **options):
    mesh = jax.make_mesh(tuple(MESH.values()), tuple(MESH), axis_types=(kind,) * 2)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in specs.items()}
    given = jax.device_put({name: drawn()[name] for name in specs}, shardings)
    numbers = {name: NUMBERS[name] for name in specs}
    told = shardings if kind == AxisType.Auto else None
    tx = mc.scale_by_periodic_orthogonalization(
        2, ACCURATE["float32"], dimension_numbers=numbers, shardings=told, **options
    )
    return tx, given


@pytest.mark.parametrize(("dtype", "atol"), [("float32", 1e-6), ("float64", 1e-10)])
def test_as_published(dtype, atol):
    """Two steps of a period of two, by a grid."""
    with jax.enable_x64(dtype == "float64"):
        updates = jax.tree.map(jnp.asarray, drawn(dtype))
        tx = mc.scale_by_periodic_orthogonalization(
            2, ACCURATE[dtype], blocks=(2, 4), block_scale=0.5, dimension_numbers=NUMBERS
        )
        whole, blocks, again = jax.jit(functools.partial(steps, tx, count=3))(updates)
    assert_close(whole, expected((1, 1)), atol)
    assert_close(blocks, expected((2, 4), scale=0.5), atol)
    assert_close(again, expected((1, 1)), atol)
    assert {x.dtype.name for x in jax.tree.leaves(blocks)} == {dtype}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_blocks_are_what_a_device_holds(kind):
    """heads lie whole heads on tp, and their inputs on fsdp; down is replicated over tp."""
    tx, given = on_mesh(kind)
    whole, blocks = jax.jit(functools.partial(steps, tx, count=2))(given)
    assert_close(whole, expected((1, 1)), 1e-6)
    grids = {"up": (2, 4), "down": (4, 1), "layers": (2, 4), "heads": (4, 1)}
    assert_close(blocks, expected(grids), 1e-6)
    for name, spec in SPECS.items():
        wanted = NamedSharding(given[name].sharding.mesh, spec)
        assert blocks[name].sharding.is_equivalent_to(wanted, blocks[name].ndim), name


def sent(compiled):
    """Bytes that a device sends, as if every branch were taken."""
    return sum(total.bytes for total in totals(collectives(compiled)).values())


def by_branch(compiled):
    """The program's text with each branch of its only condition in the place of its entry."""
    text = compiled.as_text()
    operations = [op for each in parse(text).program.values() for op in each.operations.values()]
    (condition,) = [op for op in operations if op.code == "conditional"]
    inside = text.replace("ENTRY ", "", 1)
    return [
        re.sub(rf"^%{re.escape(branch.name)} ", r"ENTRY \g<0>", inside, flags=re.MULTILINE)
        for branch in condition.called(
            "branch_computations", "true_computation", "false_computation"
        )
    ]


def test_what_devices_send():
    """Blocks: nothing. So over one period as much as one full step sends."""
    tx, given = on_mesh(AxisType.Auto)
    once = mc.scale_by_orthogonalization(
        ACCURATE["float32"],
        dimension_numbers=NUMBERS,
        shardings=jax.tree.map(lambda x: x.sharding, given),
    )
    full = sent(jax.jit(once.update).lower(given, optax.EmptyState()).compile())
    compiled = jax.jit(tx.update).lower(given, tx.init(given)).compile()
    assert full > 0 and sent(compiled) == full
    assert sorted(map(sent, by_branch(compiled))) == [0, full]


def test_blocks_take_fewer_products():
    """A square matrix in two columns, of each step: 4·8·4² + 2·4³ FLOPs twice; whole, 6·8³."""
    updates = {"w": jnp.ones((8, 8))}
    tx = mc.scale_by_periodic_orthogonalization(2, ACCURATE["float32"], blocks=(1, 2))
    compiled = jax.jit(tx.update).lower(updates, tx.init(updates)).compile()
    once = 12 * (6 * 8**3 + 2 * (4 * 8 * 4**2 + 2 * 4**3))
    assert flops(dots(compiled)) == once


@pytest.mark.parametrize(
    "specs",
    [
        {"up": P("fsdp", "tp")},
        {"up": P(("fsdp", "tp"))},
        {"up": P(None, ("tp", "fsdp"))},
        {"layers": P("tp", "fsdp"), "heads": P(None, "tp", "fsdp")},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_grid_is_the_same_on_every_mesh(kind, specs):
    tx, given = on_mesh(kind, specs, blocks=(2, 4))
    whole, blocks = jax.jit(functools.partial(steps, tx, count=2))(given)
    some = lambda tree: {name: tree[name] for name in specs}  # noqa: E731
    assert_close(whole, some(expected((1, 1))), 1e-6)
    assert_close(blocks, some(expected((2, 4))), 1e-6)


def test_a_grid_that_lies_on_devices_sends_nothing():
    tx, given = on_mesh(AxisType.Auto, {"up": P("tp", "fsdp")}, blocks=(2, 4))
    compiled = jax.jit(tx.update).lower(given, tx.init(given)).compile()
    assert min(map(sent, by_branch(compiled))) == 0


def test_halves_of_blocks_are_exchanged():
    """Eight blocks [2, 8] of [16, 8], whose outputs tp splits: each device has two halves, and
    gets a whole one, with one all-to-all there and one back; none is gathered."""
    tx, given = on_mesh(AxisType.Auto, {"down": P("fsdp", "tp")}, blocks=(8, 1))
    compiled = jax.jit(tx.update).lower(given, tx.init(given)).compile()
    found = [totals(collectives(branch)) for branch in by_branch(compiled)]
    # The largest entry of each of two blocks; two halves [2, 4] in float32, there and back.
    assert {"all-reduce": (1, 2 * 4), "all-to-all": (2, 2 * 2 * 2 * 4 * 4)} in found


def test_alone_a_block_is_the_whole_matrix():
    tx = mc.scale_by_periodic_orthogonalization(
        3, ACCURATE["float32"], dimension_numbers=NUMBERS, block_scale=0.5
    )
    whole, second, third, again = steps(tx, jax.tree.map(jnp.asarray, drawn()), 4)
    half = jax.tree.map(lambda x: 0.5 * x, whole)
    jax.tree.map(np.testing.assert_array_equal, second, half)
    jax.tree.map(np.testing.assert_array_equal, third, half)
    jax.tree.map(np.testing.assert_array_equal, again, whole)


@pytest.mark.parametrize("check_vma", [False, True])
def test_in_shard_map_each_device_has_its_own(check_vma):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = mc.scale_by_periodic_orthogonalization(2, ACCURATE["float32"], blocks=(1, 2))
    local = jax.shard_map(
        lambda x: steps(tx, x, 2),
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
        check_vma=check_vma,
    )
    x = drawn()["up"]
    of_each = {"w": jnp.concatenate([x * (1 + i) for i in range(8)])}
    whole, blocks = jax.jit(local)(of_each)
    np.testing.assert_allclose(whole["w"], np.tile(polar(x), (8, 1)), atol=1e-6)
    np.testing.assert_allclose(blocks["w"], np.tile(published(x, 1, 2), (8, 1)), atol=1e-6)


def test_what_nobody_knows_is_whole():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    given = {"w": jax.device_put(drawn()["down"], NamedSharding(mesh, P("data")))}
    tx = mc.scale_by_periodic_orthogonalization(2, ACCURATE["float32"])
    with jax.set_mesh(mesh), pytest.warns(UserWarning, match="periodic_orthogonalization cannot"):
        _, blocks = jax.jit(functools.partial(steps, tx, count=2))(given)
    np.testing.assert_allclose(blocks["w"], polar(drawn()["down"]), atol=1e-6)


def test_half_precision_zeros_and_sizes():
    x = drawn()["up"]
    tx = mc.scale_by_periodic_orthogonalization(2, blocks=(1, 2))
    zero = np.where(np.arange(16) < 8, 0, x)  # the first block
    _, found = steps(tx, {"w": jnp.asarray(zero, "bfloat16")}, 2)
    assert found["w"].dtype == jnp.bfloat16
    assert not found["w"][:, :8].any()
    wanted = published(x, 1, 2)[:, 8:]
    error = np.float64(found["w"][:, 8:]) - wanted
    assert np.linalg.norm(error) < 0.2 * np.linalg.norm(wanted)  # five steps in bfloat16
    nan = {"w": jnp.asarray(x).at[0, 0].set(jnp.nan)}
    _, found = steps(tx, nan, 2)
    assert np.isnan(found["w"][:, :8]).all() and np.isfinite(found["w"][:, 8:]).all()
    exact = mc.scale_by_periodic_orthogonalization(2, ACCURATE["float32"], blocks=(1, 2))
    for size in (1e-30, 1e30):
        _, found = steps(exact, {"w": jnp.float32(size) * x}, 2)
        np.testing.assert_allclose(found["w"], published(x, 1, 2), atol=1e-6)


def test_injected_and_strict():
    injected = optax.inject_hyperparams(
        mc.scale_by_periodic_orthogonalization, static_args=("period",)
    )(2, ACCURATE["float32"], blocks=(1, 2), block_scale=0.5)
    with jax.numpy_dtype_promotion("strict"):
        _, found = steps(injected, {"w": jnp.asarray(drawn()["up"])}, 2)
    np.testing.assert_allclose(found["w"], published(drawn()["up"], 1, 2, 0.5), atol=1e-6)


def test_what_does_not_fit_raises():
    tx = mc.scale_by_periodic_orthogonalization(2, blocks=(1, 3))
    words = r"blocks=\(1, 3\) does not divide the matrices \[in=4, out=8\] of up \(4, 8\)"
    with pytest.raises(ValueError, match=words):
        tx.init({"up": jnp.ones((4, 8))})
    with pytest.raises(TypeError, match=r"period must be known.*static_args=\('period',\)"):
        optax.inject_hyperparams(mc.scale_by_periodic_orthogonalization)(5).init(
            {"up": jnp.ones((4, 8))}
        )
    with pytest.raises(ValueError, match=r"scale of shape \(8,\) is no matrix"):
        tx.init({"scale": jnp.ones(8)})
