"""Plans: who works on what, what it costs, and that the costs are those of the compiled program."""

import itertools
import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from optax.contrib import MuonDimensionNumbers

import muonclip_jax as mc
from benchmarks.compiled import collectives, dots, flops, totals
from muonclip_jax._spread.machine import UNKNOWN, Machine, machine_of
from muonclip_jax._spread.plan import MatrixStack, choose

POD = (("fsdp", 64), ("tp", 8))
STEPS = 5
MIXED = mc.Schedule(
    "mixed", ((1.5, -0.5, 0.0),) + ((2.0, -1.5, 0.5),) * 2 + ((1.5, -0.5, 0.0),) * 2
)


def test_few_large_matrices_are_shared_by_device_groups():
    """61 matrices on 512 devices: 64 groups of 8, of which 61 have work."""
    plan = choose(MatrixStack(61, 7168, 18432, POD, ("rows", "cols")), STEPS)
    assert (plan.devices_per_matrix, plan.matrices_per_device) == (8, 1)
    assert plan.ratio_to_even_share == pytest.approx(64 / 61)


def test_many_matrices_are_whole():
    """4608 experts on 512 devices: nine each, and nothing but there and back."""
    plan = choose(MatrixStack(4 * 384 * 3, 2048, 7168, POD, ("stack", "cols")), STEPS)
    assert (plan.devices_per_matrix, plan.matrices_per_device) == (1, 9)
    assert plan.ratio_to_even_share == 1
    assert plan.bytes_sent == 2 * 9 * 2048 * 7168 * 2  # there and back, in bfloat16
    assert plan.collectives == 3  # and one to tell the largest entries


def test_part_of_an_axis_can_be_a_device_group():
    """A mesh of one axis: FSDP, as most have it."""
    plan = choose(MatrixStack(61, 7168, 18432, (("fsdp", 512),), ("rows",)), STEPS)
    assert plan.devices_per_matrix == 8
    assert [(f.size, f.working) for f in plan.factors] == [(64, "stack"), (8, "cols")]


def test_small_replicated_stacks_stay():
    plan = choose(MatrixStack(8, 64, 64, (("data", 8),), ("replicated",)), STEPS)
    assert (plan.collectives, plan.matrices_per_device, plan.ratio_to_even_share) == (0, 8, 8)


@pytest.mark.parametrize("devices", [8, 512])
@pytest.mark.parametrize("places", [("rows", "cols"), ("stack", "cols"), ("cols", "stack")])
def test_many_matrices_travel_with_few_zeros(devices, places):
    """Whatever their number, from 20 for each device on."""
    mesh = (("fsdp", devices // 2), ("tp", 2))
    held = math.prod(n for (_, n), place in zip(mesh, places, strict=True) if place == "stack")
    for more in range(0, 2 * devices, held):
        stack = MatrixStack(20 * devices + more, 1024, 4096, mesh, places)
        shard = stack.count * stack.n * stack.m * 2 / devices
        assert choose(stack, STEPS).bytes_sent <= 1.05 * 2 * shard


# Eight GPUs share a switch, and what goes beyond it is a hundred times slower.
SLOW_NETWORK = Machine("cluster", 1e15, near=400e9, far=4e9, domain=8)


def test_device_groups_stay_near():
    """Two hosts: one matrix is split by columns between them, and by rows within. In a group its
    products are summed at every step, which is worth bringing the columns together first."""
    stack = MatrixStack(8, 8192, 8192, (("host", 2), ("gpu", 8)), ("cols", "rows"))
    near = choose(stack, STEPS, 2, machine=SLOW_NETWORK)
    assert [(f.size, f.working) for f in near.factors] == [(2, "stack"), (4, "stack"), (2, "cols")]
    alike = choose(stack, STEPS, 2)
    assert [(f.size, f.working) for f in alike.factors] == [(2, "cols"), (8, "stack")]
    assert near.seconds < alike.__class__(stack, alike.factors, STEPS, 0, SLOW_NETWORK).seconds


def test_a_slow_network_is_paid_for():
    """An exchange between 16 devices, half of which are beyond the network."""
    stack = MatrixStack(16, 1024, 1024, (("fsdp", 16),), ("rows",))
    plan = choose(stack, STEPS, 1, machine=SLOW_NETWORK)
    half = plan.bytes_sent / 2
    waiting = plan.collectives * SLOW_NETWORK.latency
    assert plan.seconds_of_sending == pytest.approx(half / 400e9 + half / 4e9 + waiting)
    assert plan.seconds_of_products == plan.flops / 1e15
    # All get the same from each other domain once, a share for each of their links.
    shared = choose(
        MatrixStack(16, 2**13, 2**13, (("data", 16),), ("replicated",)), 5, 1, machine=SLOW_NETWORK
    )
    sent = shared.bytes_sent
    waiting = shared.collectives * SLOW_NETWORK.latency
    assert shared.seconds_of_sending == pytest.approx(sent / 400e9 + sent / 16 / 4e9 + waiting)


def test_on_a_torus_what_is_sent_passes_links_on_its_way():
    torus = Machine("torus", 1e15, near=100e9, torus=3)
    stack = MatrixStack(512, 1024, 1024, (("fsdp", 64), ("tp", 8)), ("rows", "cols"))
    plan = choose(stack, STEPS, 1, machine=torus)
    waiting = plan.collectives * torus.latency
    # Sides of 8, on which the mean way is of 2 links.
    assert plan.seconds_of_sending == pytest.approx(2 * plan.bytes_sent / 100e9 + waiting)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", None),  # without a switch
        ("TPU v5", "TPU v5p"),
        ("TPU v5 lite", "TPU v5e"),
        ("cpu", None),
    ],
)
def test_machines_by_their_kind(kind, name):
    device = jax.sharding.AbstractDevice(device_kind=kind, num_cores=1, platform="gpu")
    mesh = AbstractMesh((8,), ("fsdp",), abstract_device=device)
    machine = machine_of(mesh)
    assert machine.name == name if name else machine is UNKNOWN
    assert machine_of(None) is UNKNOWN


def test_one_device():
    plan = choose(MatrixStack(3, 64, 128), STEPS)
    assert (plan.factors, plan.devices_per_matrix, plan.matrices_per_device) == ((), 1, 3)
    assert (plan.bytes_sent, plan.collectives, plan.ratio_to_even_share) == (0, 0, 1)


@pytest.mark.parametrize(
    "places", list(itertools.product(("stack", "rows", "cols", "replicated"), repeat=2))
)
@pytest.mark.parametrize("count", [4, 24, 100])
def test_every_device_has_work_or_a_reason(places, count):
    """Whatever the plan, the matrices all have a place, and device groups are whole."""
    mesh = (("a", 4), ("b", 6))
    held = math.prod(n for (_, n), place in zip(mesh, places, strict=True) if place == "stack")
    stack = MatrixStack(count * held, 720, 1440, mesh, places)
    for devices in (1, 2, 3, 4, 6, 8, 12, 24):
        plan = choose(stack, STEPS, devices)
        repeated = math.prod(f.size for f in plan.factors if f.working == "replicated")
        groups = 24 // devices // repeated
        assert plan.matrices_per_device * groups >= stack.count
        assert plan.matrices_per_device <= -(-count // groups) * held
        assert plan.ratio_to_even_share >= 1


def test_forced_by_shape():
    stack = MatrixStack(61, 7168, 18432, POD, ("rows", "cols"))
    for shape in ((7168, 18432), (18432, 7168)):
        assert choose(stack, STEPS, {shape: 32}).devices_per_matrix == 32
    assert choose(stack, STEPS, {(1, 2): 32}).devices_per_matrix == 8


@pytest.mark.parametrize("devices_per_matrix", [1, 2, 8])
@pytest.mark.parametrize("schedule", [mc.schedules.polar_express(5), MIXED], ids=lambda s: s.name)
def test_costs_are_those_of_the_compiled_program(devices_per_matrix, schedule):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(mesh, P(None, "fsdp", "tp"))
    grads = {"w": jax.ShapeDtypeStruct((8, 256, 512), jnp.float32, sharding=sharding)}
    options = {
        "dimension_numbers": {"w": MuonDimensionNumbers(-2, -1)},
        "shardings": sharding,
        "devices_per_matrix": devices_per_matrix,
        "newton_schulz": mc.NewtonSchulz(schedule, "float32", mc.Method("standard")),
    }
    tx = mc.scale_by_muon(**options)
    compiled = jax.jit(tx.update).lower(grads, jax.eval_shape(tx.init, grads)).compile()
    (plan,) = mc.describe(grads, **options).stacks
    assert flops(dots(compiled)) == plan.flops
    found = totals(collectives(compiled))
    small = found.pop("all-reduce")  # of norms, which the plan does not count
    assert small.bytes < 0.01 * plan.bytes_sent
    assert sum(total.bytes for total in found.values()) == plan.bytes_sent


def test_describe_prints_the_plan(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    shape = jax.ShapeDtypeStruct((8192, 28672), jnp.float32)
    params = {f"layer_{i}": {"mlp": {"kernel": shape}} for i in range(3)}
    rows = mc.describe(params, shardings=NamedSharding(mesh, P("fsdp", "tp")))
    (plan,) = rows.stacks
    assert (plan.stack.count, plan.stack.split) == (3, {"fsdp": "rows", "tp": "cols"})
    assert plan.devices_per_matrix == 2 and plan.matrices_per_device == 1
    text = str(rows)
    assert "3 × [8192, 28672]" in text and "fsdp: rows, tp: cols" in text and "1.33" in text
    assert "times by a TPU v5p's peaks, for want of theirs" in text
    assert f"{plan.seconds_of_products * 1e3:.2g}" in text
    assert f"{plan.seconds_of_sending * 1e3:.2g}" in text
    assert "devices" not in str(mc.describe(params))  # one device: no plan to print


def test_describe_tells_what_nobody_knows(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        rows = mc.describe({"mlp": {"kernel": jax.ShapeDtypeStruct((64, 64), jnp.float32)}})
    assert "fsdp: unknown, tp: unknown" in str(rows)
    assert rows.stacks[0].ratio_to_even_share == 8
