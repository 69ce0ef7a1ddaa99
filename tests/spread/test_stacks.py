"""Stacks of matrices on eight simulated devices: same result as on one, and what moves for it."""

import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import muonclip_jax as mc
from benchmarks.compiled import collectives, totals
from muonclip_jax._spread import exchange, stacks

AXIS_TYPES = (AxisType.Auto, AxisType.Explicit)
MATRIX = MuonDimensionNumbers(-2, -1)
# Heads as in a Flax kernel [in, heads, features]: a batch of [in, features].
NUMBERS = {
    "wide": MATRIX,
    "tall": MATRIX,
    "odd": MATRIX,  # whose sides the devices do not divide
    "square": MATRIX,
    "layers": MATRIX,
    "experts": MATRIX,
    "heads": MuonDimensionNumbers(0, 2),
    "output": MuonDimensionNumbers((0, 1), 2),  # [heads, features, out] as one matrix
}
SHAPES = {
    "wide": (16, 32),
    "tall": (32, 16),
    "odd": (9, 14),
    "square": (16, 16),
    "layers": (3, 16, 32),
    "experts": (2, 8, 16, 32),
    "heads": (16, 8, 6),
    "output": (8, 4, 16),
}
SPECS = {
    "both": dict(
        wide=P("fsdp", "tp"),
        tall=P("tp", "fsdp"),
        odd=P(None, "tp"),
        square=P("fsdp", "tp"),
        layers=P(None, "fsdp", "tp"),
        experts=P(None, "fsdp", None, "tp"),
        heads=P("fsdp", "tp"),
        output=P("tp", None, "fsdp"),
    ),
    "rows": dict(
        wide=P(("fsdp", "tp")),
        tall=P(None, ("fsdp", "tp")),
        odd=P(),
        square=P(("tp", "fsdp")),
        layers=P(None, ("fsdp", "tp")),
        experts=P("tp", None, "fsdp"),
        heads=P(("fsdp", "tp")),
        output=P(("fsdp", "tp")),
    ),
    "columns": dict(
        wide=P(None, ("fsdp", "tp")),
        tall=P(("tp", "fsdp")),
        odd=P(None, "tp"),
        square=P(None, "tp"),
        layers=P(None, None, "tp"),
        experts=P(None, "tp", None, "fsdp"),
        heads=P(None, None, "tp"),
        output=P(None, "fsdp", "tp"),
    ),
    "replicated": dict.fromkeys(SHAPES, P()),
}


# Float32 rounds at 6e-8, and a mesh sums in another order. Five steps grow that by their slope, 1e3
# at most, where singular values are small, and the Gram iteration adds up three steps' (measured:
# 1.3e-5 of entries up to 1).
FLOAT32 = mc.NewtonSchulz(dtype="float32")
FLOAT16 = mc.NewtonSchulz(dtype="float16")
TOLERANCE = 3e-5


def mesh_of(axis_type, sizes=(4, 2)):
    return jax.make_mesh(sizes, ("fsdp", "tp"), axis_types=(axis_type,) * 2)


@functools.cache
def gradients(dtype="float32"):
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=shape), dtype) for name, shape in SHAPES.items()}


def muon(**options):
    options = {"dimension_numbers": NUMBERS, "newton_schulz": FLOAT32} | options
    return mc.scale_by_muon(**options)


def step(tx, grads, state):
    return jax.jit(tx.update, donate_argnums=1)(grads, state)


@functools.cache
def on_one_device():
    tx = muon()
    return step(tx, gradients(), tx.init(gradients()))


def on_mesh(mesh, specs, **options):
    """The transformation, gradients and state on the mesh."""
    shardings = {name: NamedSharding(mesh, specs[name]) for name in specs}
    grads = jax.device_put({name: gradients()[name] for name in specs}, shardings)
    auto = mesh.axis_types[0] == AxisType.Auto
    tx = muon(shardings=shardings if auto else None, **options)
    return tx, grads, tx.init(grads)


@pytest.mark.parametrize(
    ("specs", "axis_type", "devices_per_matrix"),
    [
        ("both", AxisType.Auto, 2),
        ("columns", AxisType.Explicit, 4),
        ("replicated", AxisType.Auto, 8),
        *(
            pytest.param(*each, marks=pytest.mark.slow)
            for each in [
                ("rows", AxisType.Auto, 1),
                ("both", AxisType.Auto, 1),
                ("both", AxisType.Explicit, 4),
                ("rows", AxisType.Auto, 8),
                ("rows", AxisType.Explicit, 4),
                ("columns", AxisType.Auto, 2),
                ("replicated", AxisType.Auto, 2),
            ]
        ),
    ],
)
def test_as_on_one_device(specs, axis_type, devices_per_matrix):
    mesh = mesh_of(axis_type)
    tx, grads, state = on_mesh(mesh, SPECS[specs], devices_per_matrix=devices_per_matrix)
    directions, state = step(tx, grads, state)
    expected, expected_state = on_one_device()
    # Five steps in float32 multiply rounding by up to their slope at small singular values.
    chex.assert_trees_all_close(directions, expected, atol=TOLERANCE)
    chex.assert_trees_all_close(state, expected_state, rtol=1e-6)
    for name, spec in SPECS[specs].items():
        wanted = NamedSharding(mesh, spec)
        for array in (directions[name], state[0].trace[name]):
            assert array.sharding.is_equivalent_to(wanted, array.ndim), name


def moved(tx, grads, state):
    """What the devices send each other in one update: {kind: (how many times, bytes)}."""
    compiled = jax.jit(tx.update).lower(grads, state).compile()
    found = totals(collectives(compiled)).items()
    return {kind: (total.count, total.bytes) for kind, total in found}


LAYER_BYTES = 8 * 32 * 64 * 4  # eight matrices [32, 64], float32
PER_DEVICE = LAYER_BYTES // 8


@pytest.mark.parametrize(
    ("specs", "axis_type", "devices_per_matrix"),
    [
        ("both", AxisType.Auto, None),
        pytest.param("columns", AxisType.Explicit, 2, marks=pytest.mark.slow),
        pytest.param("replicated", AxisType.Auto, 4, marks=pytest.mark.slow),
    ],
)
def test_parts_of_stacks_take_turns(specs, axis_type, devices_per_matrix, monkeypatch):
    """Stacks cut as far as they can be: all other parts are on their way meanwhile."""
    monkeypatch.setattr(exchange, "_SMALLEST_PART", 1)
    monkeypatch.setattr(exchange, "_PARTS", 1000)
    test_as_on_one_device(specs, axis_type, devices_per_matrix)


def test_parts_move_as_much_as_whole_stacks(monkeypatch):
    """21 matrices on 8 devices, in parts of 8, 8 and 5. The first goes back while the last comes,
    in one exchange; the others are alone. Only the last part travels with zeros."""
    monkeypatch.setattr(exchange, "_SMALLEST_PART", 1)
    sharding = NamedSharding(mesh_of(AxisType.Auto), P(None, "fsdp", "tp"))
    grads = {"w": jax.ShapeDtypeStruct((21, 32, 64), jnp.float32, sharding=sharding)}
    tx = mc.scale_by_muon(
        dimension_numbers={"w": MATRIX},
        newton_schulz=FLOAT32,
        shardings=sharding,
        devices_per_matrix=1,
    )
    found = moved(tx, grads, jax.eval_shape(tx.init, grads))
    assert found["all-to-all"] == (5, 2 * 24 * 32 * 64 * 4 // 8)


@pytest.mark.parametrize("least", [1, 4])
def test_stacks_are_limited_to_multiples_of_the_devices(least, monkeypatch):
    monkeypatch.setattr(stacks, "_LARGEST_STACK", 100)
    sizes = [jax.ShapeDtypeStruct((2, 5, 5), jnp.float32)] * 7  # of 50 entries each
    groups = list(stacks._limited(range(7), sizes, least))
    assert [len(group) for group in groups] == [2, 2, 2, 1]
    sizes[0] = jax.ShapeDtypeStruct((1, 5, 5), jnp.float32)
    groups = list(stacks._limited(range(7), sizes, least))
    assert [len(group) for group in groups] == ([2, 2, 2, 1] if least == 1 else [7])


@pytest.mark.slow
@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize(
    ("spec", "scanned", "expected"),
    [
        # The largest entries of split matrices. Then there and back.
        (P("fsdp", "tp"), False, {"all-reduce": (1, 32), "all-to-all": (2, 2 * PER_DEVICE)}),
        (P(("fsdp", "tp")), False, {"all-reduce": (1, 32), "all-to-all": (2, 2 * PER_DEVICE)}),
        (P(None, "fsdp", "tp"), True, {"all-reduce": (1, 32), "all-to-all": (2, 2 * PER_DEVICE)}),
        # Where each device has whole matrices of its own, nothing moves.
        (P(("fsdp", "tp")), True, {}),
        (P("fsdp", "tp"), True, {"all-reduce": (1, 8), "all-to-all": (2, 2 * PER_DEVICE)}),
        # Work this small is done by all devices, each for itself.
        (P(), False, {}),
        (P("fsdp"), True, {}),
    ],
    ids=str,
)
def test_what_moves(spec, scanned, expected, axis_type):
    """Eight matrices on eight devices: each orthogonalizes one."""
    shapes = {"w": (8, 32, 64)} if scanned else {str(i): (32, 64) for i in range(8)}
    sharding = NamedSharding(mesh_of(axis_type), spec)
    shardings = dict.fromkeys(shapes, sharding)
    grads = jax.device_put({k: jnp.ones(shape) for k, shape in shapes.items()}, shardings)
    tx = mc.scale_by_muon(
        dimension_numbers=dict.fromkeys(shapes, MATRIX),
        newton_schulz=FLOAT32,
        shardings=shardings,
        devices_per_matrix=1,
    )
    assert moved(tx, grads, tx.init(grads)) == expected


def test_replicated_stacks_share_large_work():
    """Each of eight devices orthogonalizes two of sixteen matrices, and all get the results."""
    sharding = NamedSharding(mesh_of(AxisType.Auto), P())
    matrices = {"w": jax.ShapeDtypeStruct((16, 1024, 1024), jnp.float32, sharding=sharding)}
    tx = mc.scale_by_muon(
        dimension_numbers={"w": MATRIX}, newton_schulz=FLOAT16, shardings=sharding
    )
    state = jax.eval_shape(tx.init, matrices)
    assert moved(tx, matrices, state) == {"all-gather": (1, 16 * 1024 * 1024 * 2)}
    (plan,) = mc.describe(matrices, dimension_numbers={"w": MATRIX}, shardings=sharding).stacks
    assert (plan.stack.split, plan.matrices_per_device) == (
        {"fsdp": "replicated", "tp": "replicated"},
        2,
    )


def test_device_groups_move_gram_matrices_only():
    """One [32, 64] on eight devices: what each step sums and shows is n², not n m."""
    sharding = NamedSharding(mesh_of(AxisType.Auto), P(None, ("fsdp", "tp")))
    grads = {"w": jax.device_put(jnp.ones((32, 64)), sharding)}
    schedule = mc.schedules.polar_express(steps=5)
    tx = mc.scale_by_muon(
        newton_schulz=mc.NewtonSchulz(schedule, "float32"), shardings=sharding, devices_per_matrix=8
    )
    gram = 32 * 32 * 4
    assert moved(tx, grads, tx.init(grads)) == {
        "all-reduce": (2, 8),
        "reduce-scatter": (5, 5 * gram),
        "all-gather": (10, 10 * gram),
    }


def test_matrices_travel_in_the_dtype_of_the_iteration():
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("fsdp", "tp"))
    grads = {str(i): jax.device_put(jnp.ones((32, 64)), sharding) for i in range(8)}
    tx = mc.scale_by_muon(newton_schulz=FLOAT16, shardings=sharding, devices_per_matrix=1)
    assert moved(tx, grads, tx.init(grads))["all-to-all"] == (2, PER_DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_half_precision_as_on_one_device(dtype):
    """Norms are taken before anything is rounded, so scale does not matter on the way either."""
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("fsdp", "tp"))
    how = mc.NewtonSchulz(dtype=dtype)
    alone = mc.scale_by_muon(newton_schulz=how)
    spread = mc.scale_by_muon(newton_schulz=how, shardings=sharding, devices_per_matrix=2)
    on_one, on_eight = jax.jit(alone.update), jax.jit(spread.update)
    for scale in (1e-30, 1.0, 1e30):
        grads = {str(i): scale * gradients()["layers"][i] for i in range(3)}
        expected, _ = on_one(grads, alone.init(grads))
        grads = jax.device_put(grads, sharding)
        directions, _ = on_eight(grads, spread.init(grads))
        # Sums in another order round differently in few entries, by a spacing of the dtype each
        # step.
        for name, value in directions.items():
            difference = jnp.linalg.norm(value - expected[name]) / jnp.linalg.norm(expected[name])
            assert difference < 8 * jnp.finfo(dtype).eps


@pytest.mark.slow
@pytest.mark.parametrize("devices_per_matrix", [1, 2, 8])
def test_hard_matrices(devices_per_matrix):
    """Zero stays zero, rank one becomes its singular vectors, NaN and Inf stay in their matrix."""
    outer = jnp.outer(jnp.arange(1.0, 17), jnp.ones(32))
    grads = {
        "zero": jnp.zeros((16, 32)),
        "rank one": outer,
        "nan": outer.at[3, 4].set(jnp.nan),
        "inf": outer.at[15, 31].set(jnp.inf),
        "healthy": gradients()["wide"],
    }
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("fsdp", "tp"))
    how = mc.NewtonSchulz(mc.schedules.polar_express(steps=8), "float32")
    tx = mc.scale_by_muon(
        nesterov=False,
        newton_schulz=how,
        shardings=sharding,
        devices_per_matrix=devices_per_matrix,
    )
    grads = jax.device_put(grads, sharding)
    directions, _ = step(tx, grads, tx.init(grads))
    assert not directions["zero"].any()
    np.testing.assert_allclose(directions["rank one"], outer / jnp.linalg.norm(outer), atol=1e-5)
    assert jnp.isnan(directions["nan"]).all() and jnp.isnan(directions["inf"]).all()
    whole = mc.orthogonalize(gradients()["wide"], how.schedule, dtype="float32")
    np.testing.assert_allclose(directions["healthy"], whole, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("fsdp", "tp"), P("tp", "fsdp")], ids=str)
@pytest.mark.parametrize("name", ["wide", "square"])
def test_aol_in_device_groups(name, spec):
    """Its norm is one of rows, so that which side counts as rows must not depend on the mesh."""
    schedule = mc.schedules.aol()
    grads = {"w": gradients()[name]}
    sharding = NamedSharding(mesh_of(AxisType.Auto), spec)
    tx = mc.scale_by_muon(
        nesterov=False,
        newton_schulz=mc.NewtonSchulz(schedule, "float32"),
        shardings=sharding,
        devices_per_matrix=4,
    )
    on_devices = jax.device_put(grads, sharding)
    directions, _ = step(tx, on_devices, tx.init(on_devices))
    expected = mc.orthogonalize(grads["w"], schedule, dtype="float32")
    np.testing.assert_allclose(directions["w"], expected, atol=TOLERANCE)


def test_a_device_groups_norm_is_of_all_its_columns():
    """Half of the columns are 40 orders of magnitude smaller, and are on other devices: what is
    scaled by their largest entry overflows, and norms of one device's columns are no norm."""
    x = gradients()["wide"]
    far = jnp.concatenate([1e15 * x[:, ::2], 1e-25 * x[:, 1::2]], axis=1)
    sharding = NamedSharding(mesh_of(AxisType.Auto), P(None, ("fsdp", "tp")))
    schedule = mc.schedules.jordan()
    tx = mc.scale_by_orthogonalization(
        mc.NewtonSchulz(schedule, "float32"), shardings=sharding, devices_per_matrix=2
    )
    grads = {"w": jax.device_put(far, sharding)}
    directions, _ = jax.jit(tx.update)(grads, tx.init(grads))
    expected = mc.orthogonalize(far, schedule, dtype="float32")
    np.testing.assert_allclose(directions["w"], expected, atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize("specs", [P(), P("fsdp", "tp")], ids=str)
def test_results_share_a_kernel(specs):
    """On CPU a slice at a constant place would be a kernel for each parameter."""

    def constant_slices(parameters):
        sharding = NamedSharding(mesh_of(AxisType.Auto), specs)
        matrix = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=sharding)
        grads = {str(i): matrix for i in range(parameters)}
        tx = mc.scale_by_muon(newton_schulz=FLOAT32, shardings=sharding, devices_per_matrix=1)
        compiled = jax.jit(tx.update).lower(grads, jax.eval_shape(tx.init, grads)).compile()
        return compiled.as_text().count(" slice(")

    assert constant_slices(16) == constant_slices(8)


# Where shardings come from

FEW = ("wide", "experts", "heads")


def few(**options):
    return muon(dimension_numbers={name: NUMBERS[name] for name in FEW}, **options)


def check_few(tx, grads):
    directions, _ = step(tx, grads, tx.init(grads))
    expected = {name: on_one_device()[0][name] for name in FEW}
    chex.assert_trees_all_close(directions, expected, atol=TOLERANCE)


@pytest.mark.slow
def test_arrays_at_hand_tell_themselves():
    """Outside of jit nothing has to be given, on Auto meshes either."""
    sharding = NamedSharding(mesh_of(AxisType.Auto), SPECS["both"]["wide"])
    grads = {"wide": jax.device_put(gradients()["wide"], sharding)}
    tx = mc.scale_by_muon(newton_schulz=FLOAT32, devices_per_matrix=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        directions, _ = tx.update(grads, tx.init(grads))
    np.testing.assert_allclose(directions["wide"], on_one_device()[0]["wide"], atol=TOLERANCE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "given",
    [
        lambda mesh: {name: SPECS["both"][name] for name in FEW},
        lambda mesh: lambda params: {name: SPECS["both"][name] for name in params},
        lambda mesh: {name: NamedSharding(mesh, SPECS["both"][name]) for name in FEW},
    ],
    ids=["specs", "function", "shardings"],
)
def test_forms_of_shardings(given):
    mesh = mesh_of(AxisType.Auto)
    with jax.set_mesh(mesh):
        shardings = {name: NamedSharding(mesh, SPECS["both"][name]) for name in FEW}
        grads = jax.device_put({name: gradients()[name] for name in FEW}, shardings)
        tx = few(shardings=given(mesh), devices_per_matrix=1)
        assert set(moved(tx, grads, tx.init(grads))) == {"all-reduce", "all-to-all"}


def test_arrays_that_are_not_on_the_mesh_yet():
    sharding = NamedSharding(mesh_of(AxisType.Auto), P("fsdp", "tp"))
    params = {"on": jax.device_put(jnp.ones((16, 32)), sharding), "off": jnp.ones((16, 32))}
    tx = mc.scale_by_muon(shardings={"on": sharding, "off": P()})
    assert tx.init(params)[0].trace["on"].sharding == sharding


@pytest.mark.slow
def test_wrong_shardings_cost_moves_only():
    mesh = mesh_of(AxisType.Auto)
    grads = on_mesh(mesh, SPECS["both"])[1]
    shardings = {name: NamedSharding(mesh, SPECS["rows"][name]) for name in FEW}
    check_few(few(shardings=shardings), {name: grads[name] for name in FEW})


def test_unknown_shardings_are_told():
    grads = on_mesh(mesh_of(AxisType.Auto), SPECS["both"])[1]
    with pytest.warns(UserWarning, match=r"how experts is split .* Auto axes.*Pass shardings="):
        check_few(few(), {name: grads[name] for name in FEW})


def test_momentum_is_placed_inside_jit():
    mesh = mesh_of(AxisType.Auto)
    tx, grads, _ = on_mesh(mesh, SPECS["both"])
    state = jax.jit(tx.init)(grads)
    for name, momentum in state[0].trace.items():
        assert momentum.sharding.is_equivalent_to(grads[name].sharding, momentum.ndim)


def test_in_shard_map_each_device_has_its_own():
    """Data parallel by hand: the same matrices, and work, on every device."""
    mesh = mesh_of(AxisType.Auto)
    grads = {"wide": gradients()["wide"]}
    tx = mc.scale_by_muon(newton_schulz=FLOAT32)
    local = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[0],
        mesh=mesh,
        in_specs=P(),
        out_specs=P(),
        check_vma=False,
    )
    found = jax.jit(local)(grads)
    expected, _ = tx.update(grads, tx.init(grads))
    chex.assert_trees_all_close(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize("spec", [P(None, None, "tp"), P("fsdp", None, "tp")], ids=str)
@pytest.mark.parametrize("axis_type", AXIS_TYPES)
def test_in_shard_map_over_some_axes(axis_type, spec):
    """Along those each device has matrices of its own, which no plan may mix up."""
    mesh = mesh_of(axis_type)
    grads = {"w": gradients()["experts"][0, :4]}
    tx = mc.scale_by_muon(
        dimension_numbers=MATRIX,
        newton_schulz=FLOAT32,
        nesterov=False,
        shardings=spec,
        devices_per_matrix=2,
    )
    local = jax.shard_map(
        lambda g: tx.update(g, tx.init(g))[0],
        mesh=mesh,
        in_specs=P("fsdp"),
        out_specs=P("fsdp"),
        axis_names={"fsdp"},
        check_vma=False,
    )
    with jax.set_mesh(mesh):
        found = jax.jit(local)(jax.device_put(grads, NamedSharding(mesh, P("fsdp", None, "tp"))))
    schedule = mc.schedules.polar_express(steps=5)
    expected = mc.orthogonalize(grads["w"], schedule, dtype="float32")
    np.testing.assert_allclose(found["w"], expected, atol=TOLERANCE)


def test_mixed_meshes_are_told_by_shardings():
    """The types of arrays on meshes of both kinds tell half."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit, AxisType.Auto))
    sharding = NamedSharding(mesh, P("fsdp", "tp"))
    grads = {str(i): jax.device_put(jnp.ones((32, 64)), sharding) for i in range(8)}
    tx = mc.scale_by_muon(newton_schulz=FLOAT32, shardings=sharding, devices_per_matrix=1)
    assert moved(tx, grads, tx.init(grads))["all-to-all"] == (2, 2 * PER_DEVICE)
    untold = mc.scale_by_muon(newton_schulz=FLOAT32)
    with pytest.warns(UserWarning, match="Pass shardings="):
        jax.jit(untold.update).lower(grads, untold.init(grads))


@pytest.mark.slow
@pytest.mark.parametrize("spec", [P("fsdp", "tp"), P(("fsdp", "tp")), P("tp", "fsdp")], ids=str)
def test_momentum_stays_on_mixed_meshes(spec):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Explicit, AxisType.Auto))
    sharding = NamedSharding(mesh, spec)
    grads = {"w": jax.device_put(jnp.ones((32, 64)), sharding)}
    tx = mc.scale_by_muon(newton_schulz=FLOAT32, shardings=sharding)
    with jax.set_mesh(mesh):
        state = jax.jit(tx.init)(grads)
        assert state[0].trace["w"].sharding.is_equivalent_to(sharding, 2)
        _, state = jax.jit(tx.update)(grads, state)
        assert state[0].trace["w"].sharding.is_equivalent_to(sharding, 2)


# Errors


def one_matrix(shardings, **options):
    tx = mc.scale_by_muon(shardings=shardings, **options)
    grads = {"mlp": {"kernel": jnp.ones((16, 32))}}
    return jax.jit(lambda g: tx.update(g, tx.init(g)))(grads)


@pytest.mark.parametrize(
    ("shardings", "error", "message"),
    [
        ({"mlp": {"bias": P()}}, ValueError, r"says nothing about mlp/kernel \(16, 32\)"),
        ({"mlp": {"kernel": "fsdp"}}, TypeError, "'fsdp' for mlp/kernel; it must be"),
        (P("fsdp"), ValueError, "mlp/kernel .* on no mesh: call jax.set_mesh"),
    ],
)
def test_wrong_shardings_raise(shardings, error, message):
    with pytest.raises(error, match=message):
        one_matrix(shardings)


def test_shardings_of_explicit_axes_for_parameters_on_auto_ones_raise():
    auto, explicit = (
        NamedSharding(jax.make_mesh((8,), ("fsdp",), axis_types=(kind,)), P("fsdp"))
        for kind in (AxisType.Auto, AxisType.Explicit)
    )
    grads = {"mlp": {"kernel": jax.device_put(jnp.ones((16, 32)), auto)}}
    tx = mc.scale_by_muon(shardings=explicit)
    with pytest.raises(ValueError, match=r"mlp/kernel .* axes fsdp are Explicit, and in "):
        jax.jit(tx.init)(grads)


@pytest.mark.parametrize("spec", [P(None, None, "tp"), P("three")], ids=str)
def test_shardings_that_do_not_fit_raise(spec):
    mesh = jax.make_mesh((3, 2), ("three", "tp"), axis_types=(AxisType.Auto,) * 2)
    message = (
        r"gives mlp/kernel \(16, 32\) the sharding .* on the mesh .*, which does not divide it"
    )
    with pytest.raises(ValueError, match=message):
        one_matrix(NamedSharding(mesh, spec))


def test_shardings_on_another_mesh_raise():
    other = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    with jax.set_mesh(mesh_of(AxisType.Auto)):
        with pytest.raises(ValueError, match=r"mlp/kernel .* mesh \{'data': 8\}, and .* 'tp': 2"):
            one_matrix(NamedSharding(other, P("data")))
        with pytest.raises(ValueError, match="mlp/kernel partly unconstrained"):
            one_matrix(P(P.UNCONSTRAINED, "tp"))


@pytest.mark.parametrize("value", [0, True, 2.0, {8: 2}, {(8, 8): 0}, {(8, 8, 8): 2}])
def test_what_is_no_number_of_devices_raises(value):
    with pytest.raises(TypeError, match=r"devices_per_matrix must be a whole number .*static_args"):
        mc.scale_by_muon(devices_per_matrix=value)


def test_shapes_that_no_matrix_has_raise():
    message = r"names matrices \[16, 31\], and there are none; there are \[16, 32\]"
    with pytest.raises(ValueError, match=message):
        one_matrix(None, devices_per_matrix={(16, 31): 2})


def test_one_device_makes_no_device_groups():
    directions, _ = one_matrix(None, devices_per_matrix=8)
    chex.assert_trees_all_equal(directions, one_matrix(None)[0])


@pytest.mark.parametrize(
    ("second", "error"),
    [
        (jnp.ones((16, 32), "complex64"), TypeError),
        (jnp.ones((16, 32), "int32"), TypeError),
        (jnp.ones((0, 16, 32)), ValueError),
    ],
)
def test_every_matrix_of_a_stack_is_checked(second, error):
    grads = {"first": jnp.ones((16, 32)), "second": second}
    tx = mc.scale_by_muon(dimension_numbers=MATRIX)
    with pytest.raises(error, match="Muon's second: x "):
        tx.init(grads)
    params = {"first": jnp.ones((16, 32)), "second": jnp.ones((16, 32))}
    with pytest.raises(error, match="Muon's second: x "):
        tx.update(grads, tx.init(params))


def test_device_groups_that_the_mesh_does_not_have_raise():
    sharding = NamedSharding(mesh_of(AxisType.Auto), P())
    message = r"=3 .*\[16, 32\].* device group .* fsdp=4 × tp=2; choose from \[1, 2, 4, 8\]"
    with pytest.raises(ValueError, match=message):
        one_matrix(sharding, devices_per_matrix=3)
