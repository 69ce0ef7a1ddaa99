"""What "auto" is on a CPU follows from its rates alone, and is one program in all processes."""

import dataclasses
import json
import socket
import subprocess
import sys

import jax
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc
from muonclip_jax._orthogonalize import orthogonalize
from muonclip_jax._orthogonalize import rates as module
from muonclip_jax._orthogonalize.rates import processor_flags

SLOW_BFLOAT16 = mc.Rates(bfloat16=165, float32=291)
IN_FLOAT32 = mc.NewtonSchulz(rates=SLOW_BFLOAT16)

# Three kinds of processor that were met, two cores each: their rates, and what both dtypes then
# took, in ms, by shape. The second is benchmarks/records/2026-11-22-orthogonalize.json; the others
# are of docs/performance.md.
MET = {
    "avx512_bf16, no AMX": (
        SLOW_BFLOAT16,
        {"1024×1024": (180, 117), "2048×8192": (2457, 1737)},
    ),
    "bfloat16 twice as fast": (
        mc.Rates(bfloat16=811, float32=415),
        {"1024×1024": (37.2, 77.3), "1024×4096": (77.1, 175.0), "2048×8192": (564, 1283)},
    ),
    "full AMX": (
        mc.Rates(bfloat16=1470, float32=290),
        {"2048×8192": (1 / 7.9, 1 / 2.3)},  # of Optax's seconds
    ),
}


@pytest.mark.parametrize("kind", MET)
def test_the_dtype_is_never_the_slower_one(kind):
    rates, met = MET[kind]
    chosen = mc.NewtonSchulz(rates=rates).on("cpu").dtype
    for bfloat16, float32 in met.values():
        took = {"bfloat16": bfloat16, "float32": float32}
        assert took[chosen] <= 1.05 * min(took.values())


def test_what_is_said_is_kept_and_accelerators_take_bfloat16():
    for dtype in ("bfloat16", "float16", "float32", None):
        how = mc.NewtonSchulz(dtype=dtype, rates=SLOW_BFLOAT16)
        assert how.on("cpu") == how.on("tpu") == how and how.dtype == dtype
    assert [IN_FLOAT32.on(x).dtype for x in ("cpu", "gpu", "tpu")] == [
        "float32",
        "bfloat16",
        "bfloat16",
    ]


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [
        ({"avx512_bf16", "amx_tile", "amx_bf16"}, "bfloat16"),
        ({"avx512_bf16", "amx_tile"}, "float32"),
        ({"avx512_bf16"}, "float32"),
        ({"avx2"}, "float32"),
        (set(), "float32"),
    ],
)
def test_a_processor_declares_its_kind(flags, dtype, monkeypatch):
    monkeypatch.setattr(module, "processor_flags", lambda: frozenset(flags))
    assert mc.NewtonSchulz().on("cpu").dtype == dtype
    assert mc.NewtonSchulz().settled().rates == mc.declared_rates()
    assert mc.NewtonSchulz(rates=SLOW_BFLOAT16).settled().rates == SLOW_BFLOAT16


def test_flags_are_those_that_linux_lists(monkeypatch, tmp_path):
    listed = tmp_path / "cpuinfo"
    listed.write_text("processor : 0\nflags\t\t: fpu amx_bf16 amx_tile\n\nprocessor : 1\n")
    monkeypatch.setattr(module, "Path", lambda _: listed)
    for machine, flags in (("x86_64", {"fpu", "amx_bf16", "amx_tile"}), ("aarch64", set())):
        monkeypatch.setattr(module.platform, "machine", lambda machine=machine: machine)
        assert processor_flags.__wrapped__() >= flags
        assert bool(processor_flags.__wrapped__()) == bool(flags)
    listed.unlink()
    monkeypatch.setattr(module.platform, "machine", lambda: "x86_64")
    assert processor_flags.__wrapped__() == frozenset()


def trees():
    """Parameters of two shapes, and a gradient."""
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = {"a": (64, 128), "b": (128, 64), "c": (48, 48)}
    return {
        name: {"kernel": jax.random.normal(key, shape)}
        for (name, shape), key in zip(shapes.items(), keys, strict=True)
    }


def direction(how):
    tx, grads = mc.scale_by_muon(newton_schulz=how), trees()
    return jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])(grads)


def test_numbers_are_those_of_the_dtype_that_is_chosen():
    chosen = direction(IN_FLOAT32)
    jax.tree.map(np.testing.assert_array_equal, chosen, direction(mc.NewtonSchulz(dtype="float32")))
    other = direction(mc.NewtonSchulz(rates=mc.Rates(291, 165)))  # in the same process
    jax.tree.map(np.testing.assert_array_equal, other, direction(mc.NewtonSchulz(dtype="bfloat16")))
    differ = jax.tree.leaves(jax.tree.map(lambda x, y: bool((x != y).any()), chosen, other))
    assert all(differ)


@pytest.mark.parametrize(("platform", "bfloat16"), [("cpu", False), ("tpu", True), ("cuda", True)])
def test_the_dtype_is_that_of_the_backend_it_is_compiled_for(platform, bfloat16):
    tx, grads = mc.scale_by_muon(newton_schulz=IN_FLOAT32), trees()
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
    text = step.trace(grads).lower(lowering_platforms=(platform,)).as_text()
    assert ("bf16" in text) == bfloat16
    assert (
        "bf16" in jax.export.export(step, platforms=[platform])(grads).mlir_module()
    ) == bfloat16


@pytest.mark.parametrize("how", [IN_FLOAT32, mc.NewtonSchulz(dtype="bfloat16")])
def test_every_backend_is_traced_once(how, monkeypatch):
    """Not in the dtypes of the others, too: tracing is a part of what compiling a step takes."""
    traced, original = [], orthogonalize.iterate

    def iterate(x, schedule, method):
        traced.append((method.lean, x.dtype.name))
        return original(x, schedule, method)

    monkeypatch.setattr(orthogonalize, "iterate", iterate)
    jax.clear_caches()
    tx, grads = mc.scale_by_muon(newton_schulz=how), {"dense": {"kernel": np.ones((8, 16))}}
    jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0]).lower(grads)
    on_cpu = how.on("cpu").dtype
    assert sorted(traced) == sorted([(False, on_cpu), (False, "bfloat16"), (True, "bfloat16")])


def test_an_export_for_two_backends_has_both_dtypes():
    tx, grads = mc.scale_by_muon(newton_schulz=IN_FLOAT32), trees()
    step = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
    exported = jax.export.export(step, platforms=["cpu", "tpu"])(grads)
    assert "bf16" in exported.mlir_module()
    jax.tree.map(np.testing.assert_array_equal, exported.call(grads), step(grads))


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
def test_on_a_mesh_the_numbers_are_the_same(axis_type):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(axis_type,))
    sharding = NamedSharding(mesh, P("fsdp"))
    grads = jax.tree.map(lambda x: jax.device_put(x, sharding), trees())
    tx = mc.scale_by_muon(
        newton_schulz=IN_FLOAT32, shardings=jax.tree.map(lambda x: x.sharding, grads)
    )
    with jax.set_mesh(mesh):
        step = jax.jit(lambda grads: tx.update(grads, tx.init(grads))[0])
        found, text = step(grads), step.lower(grads).as_text()
    assert "bf16" not in text
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), found, direction(IN_FLOAT32)
    )


def test_of_one_matrix_and_with_a_gradient():
    x = trees()["a"]["kernel"]
    in_float32 = lambda x: mc.orthogonalize(x, dtype="float32").sum()  # noqa: E731
    as_it_comes = lambda x: mc.linalg.msign(x, by=IN_FLOAT32).sum()  # noqa: E731
    np.testing.assert_array_equal(as_it_comes(x), in_float32(x))
    found = jax.jit(jax.grad(lambda x: direction_of(x).sum()))(x)
    np.testing.assert_allclose(found, jax.grad(in_float32)(x), atol=1e-5)


def direction_of(x):
    tx = mc.scale_by_orthogonalization(IN_FLOAT32)
    return tx.update({"x": x}, tx.init({"x": x}))[0]["x"]


def test_under_inject_hyperparams():
    grads = trees()
    tx = optax.inject_hyperparams(mc.muon)(learning_rate=1.0, newton_schulz=IN_FLOAT32)
    plain = mc.muon(1.0, newton_schulz=IN_FLOAT32)
    found, expected = (
        jax.jit(lambda grads, tx=tx: tx.update(grads, tx.init(grads), grads)[0])(grads)
        for tx in (tx, plain)
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected)


def test_rates_survive_json():
    saved = json.loads(json.dumps(dataclasses.asdict(mc.NewtonSchulz().settled().rates)))
    assert mc.NewtonSchulz(rates=mc.Rates(**saved)) == mc.NewtonSchulz().settled()


def test_describe_says_what_was_chosen():
    shown = mc.describe(trees(), newton_schulz=IN_FLOAT32)
    assert shown.newton_schulz == IN_FLOAT32.on("cpu")
    said = " ".join(str(shown).split())
    assert "in float32, as a CPU does with products of 165 GFLOP/s in bfloat16 and 291" in said


def test_rates_can_be_measured():
    rates = mc.measured_rates(n=32, repeats=3)
    assert rates.bfloat16 > 0 and rates.float32 > 0


DIFFERENT = """
import sys, jax
jax.config.update("jax_platforms", "cpu")
from muonclip_jax._orthogonalize import rates
import muonclip_jax as mc
address, process, early = sys.argv[1], int(sys.argv[2]), sys.argv[3]
flags = [{"amx_tile", "amx_bf16"}, set()][process]
rates.processor_flags = lambda: frozenset(flags)
print(mc.NewtonSchulz().on("cpu").dtype)
jax.distributed.initialize(address, 2, process, initialization_timeout=60)
if early == "in jit":
    try:
        jax.jit(lambda x: mc.orthogonalize(x))(jax.numpy.eye(4))
    except RuntimeError as error:
        print(error)
else:
    mc.muon(1e-3)
    jax.jit(lambda x: mc.orthogonalize(x))(jax.numpy.eye(4))
    print(mc.NewtonSchulz().on("cpu").dtype, mc.declared_rates() == rates.WITH_AMX)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("early", "said"), [("built", "bfloat16 True"), ("in jit", "cannot agree on them inside")]
)
def test_processes_on_different_processors_take_the_rates_of_the_first(early, said):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", DIFFERENT, address, str(i), early],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(said in output for output in outputs), outputs
