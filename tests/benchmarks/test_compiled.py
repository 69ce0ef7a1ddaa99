"""What `benchmarks.compiled` reads from a program is what the program was written to do."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import gpu, tpu
from benchmarks.compiled import Collective, Total, collectives, dots, flops, totals

ROWS, COLUMNS = 256, 1024  # on each device; a TPU reduce-scatters less by another operation
SHARD = 4 * ROWS * COLUMNS  # bytes, float32
AXES = {"a": 4, "b": 2}
RING = [(i, (i + 1) % 4) for i in range(4)]  # along a


@pytest.fixture(scope="module", params=["cpu", "gpu", "tpu"])
def mesh(request):
    """Of simulated devices, and of devices to compile for."""
    match request.param:
        case "cpu":
            auto = (jax.sharding.AxisType.Auto,) * len(AXES)
            return jax.make_mesh(tuple(AXES.values()), tuple(AXES), auto)
        case "gpu":
            pytest.importorskip(gpu.PLUGIN, reason="make test-gpu installs it and runs this")
            return gpu.make_mesh("h100:1x1x8", **AXES)
        case "tpu":
            pytest.importorskip("libtpu", reason="make test-tpu installs libtpu and runs this")
            return tpu.make_mesh("v5p:2x2x2", **AXES)


@pytest.fixture
def mesh_with_analysis(mesh):
    """Where XLA counts FLOPs itself, and convolutions are no library's."""
    if "NVIDIA" in mesh.devices.flat[0].device_kind:
        pytest.skip("GPU's compiler has no cost analysis")
    return mesh


def on_each_device(mesh, function):
    """Compiled for 8 devices, each with float32 [ROWS, COLUMNS]."""
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b"), check_vma=False
    )
    sharding = NamedSharding(mesh, P("a", "b"))
    x = jax.ShapeDtypeStruct((4 * ROWS, 2 * COLUMNS), jnp.float32, sharding=sharding)
    return jax.jit(mapped).lower(x).compile()


def replicated(mesh, function, *shapes, options=None):
    """Compiled for devices that all do the same."""
    sharding = NamedSharding(mesh, P())
    arguments = (jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding) for shape in shapes)
    return jax.jit(function, out_shardings=sharding).lower(*arguments).compile(options)


@pytest.mark.parametrize(
    ("kind", "function", "size"),
    [
        ("all-gather", lambda x: jax.lax.all_gather(x, "a").sum(0), 4 * SHARD),
        ("all-reduce", lambda x: jax.lax.psum(x, "b"), SHARD),
        # The operand, four times the result.
        ("reduce-scatter", lambda x: jax.lax.psum_scatter(x, "a", tiled=True), SHARD),
        ("all-to-all", lambda x: jax.lax.all_to_all(x, "b", 0, 1, tiled=True), SHARD),
        ("collective-permute", lambda x: jax.lax.ppermute(x, "a", RING), SHARD),
    ],
)
def test_each_kind_and_its_bytes(mesh, kind, function, size):
    assert totals(collectives(on_each_device(mesh, function))) == {kind: Total(1, size)}


def test_the_parts_of_a_tuple_add_up(mesh):
    def both(x):
        rows, columns = jax.lax.psum((x.sum(0), x.sum(1)), "b")
        return rows + columns[:, None]

    found = totals(collectives(on_each_device(mesh, both)))
    assert found["all-reduce"].bytes == 4 * (ROWS + COLUMNS)


def test_loops_multiply(mesh):
    """Nested, and counting down by two."""

    def body(_, x):
        x = jax.lax.fori_loop(0, 3, lambda _, x: jnp.sin(jax.lax.ppermute(x, "a", RING)), x)
        return jnp.tanh(jax.lax.psum(x, "b"))

    def program(x):
        x = jax.lax.fori_loop(2, 7, body, x)
        _, x = jax.lax.while_loop(
            lambda carry: carry[0] > 0,
            lambda carry: (carry[0] - 2, jnp.sin(jax.lax.all_to_all(carry[1], "b", 0, 0))),
            (20, x.reshape(2, -1)),
        )
        return x.reshape(ROWS, COLUMNS)

    found = totals(collectives(on_each_device(mesh, program)))
    assert found == {
        "collective-permute": Total(5 * 3, 5 * 3 * SHARD),
        "all-reduce": Total(5, 5 * SHARD),
        "all-to-all": Total(10, 10 * SHARD),
    }


def test_branches_are_marked_and_not_dropped(mesh):
    def program(x):
        x = jax.lax.psum(x, "b")
        return jax.lax.fori_loop(
            0,
            4,
            lambda i, x: jax.lax.cond(
                jnp.max(x) > i, lambda x: jax.lax.ppermute(x, "a", RING), jnp.sin, x
            ),
            x,
        )

    assert set(collectives(on_each_device(mesh, program))) == {
        Collective("all-reduce", SHARD, (f"f32[{ROWS},{COLUMNS}]",), 1, False),
        Collective("collective-permute", SHARD, (f"f32[{ROWS},{COLUMNS}]",), 4, True),
    }


def test_branches_that_the_counter_chooses_count_as_often_as_they_are_taken(mesh):
    """Two of nine, of which the others take the other branch."""

    def program(x):
        def body(i, x):
            step = lambda x: jax.lax.ppermute(jnp.sin(x), "a", RING)  # noqa: E731
            return jax.lax.cond(i < 2, step, lambda x: jax.lax.psum(jnp.cos(x), "b"), x)

        return jax.lax.fori_loop(0, 9, body, x)

    found = collectives(on_each_device(mesh, program))
    assert totals(found) == {
        "collective-permute": Total(2, 2 * SHARD),
        "all-reduce": Total(7, 7 * SHARD),
    }
    assert not any(each.conditional for each in found)


def test_a_loop_as_long_as_the_data_says_is_refused_only_when_it_matters(mesh):
    def until_large(step, x):
        return jax.lax.while_loop(lambda x: jnp.max(x) < 9.0, step, x)

    with pytest.raises(
        ValueError, match=r"a (dot|convolution|custom-call), .* as often as the data says"
    ):
        dots(replicated(mesh, partial(until_large, lambda x: x @ x), (8, 8)))
    assert dots(replicated(mesh, partial(until_large, lambda x: x * 2), (8, 8))) == []


def test_a_collective_that_decides_about_a_loop_is_refused(mesh):
    def program(x):
        return jax.lax.while_loop(lambda x: jax.lax.pmax(x[0, 0], "a") < 4, lambda x: x * 2, x)

    with pytest.raises(ValueError, match="as often as the data says"):
        collectives(on_each_device(mesh, program))


@pytest.mark.parametrize(
    ("subscripts", "shapes", "multiplications"),
    [
        ("ij,jk->ik", [(16, 8), (8, 32)], 16 * 8 * 32),
        ("ji,kj->ik", [(8, 16), (32, 8)], 16 * 8 * 32),
        ("bij,bjk->bik", [(5, 16, 8), (5, 8, 32)], 5 * 16 * 8 * 32),
        ("ijk,jkl->il", [(16, 8, 3), (8, 3, 32)], 16 * 8 * 3 * 32),
    ],
)
def test_flops_of_products(mesh, subscripts, shapes, multiplications):
    [dot] = dots(replicated(mesh, partial(jnp.einsum, subscripts), *shapes))
    assert (dot.flops, dot.dtypes, dot.times) == (2 * multiplications, ("f32", "f32"), 1)


@pytest.mark.parametrize(
    ("subscripts", "shapes", "multiplications"),
    [
        ("ij,jk->ik", [(64, 32), (32, 128)], 64 * 32 * 128),
        ("ji,kj->ik", [(32, 64), (128, 32)], 64 * 32 * 128),
        ("bij,bjk->bik", [(5, 64, 32), (5, 32, 128)], 5 * 64 * 32 * 128),
    ],
)
@pytest.mark.parametrize("triton", [True, False])
@pytest.mark.parametrize("times", [1, 7])
def test_flops_of_products_that_are_tritons_or_cublass(
    subscripts, shapes, multiplications, triton, times
):
    pytest.importorskip(gpu.PLUGIN, reason="make test-gpu installs it and runs this")

    def program(x, y):
        product = partial(jnp.einsum, subscripts, precision="highest")
        return jax.lax.map(lambda z: product(x * z, y), jnp.arange(float(times)))

    mesh = gpu.make_mesh("h100:1x1x1", data=1)
    compiled = replicated(mesh, program, *shapes, options={} if triton else gpu.CUBLAS)
    assert triton or "__cublas" in compiled.as_text()
    [dot] = dots(compiled)
    assert dot.times * dot.flops == times * 2 * multiplications
    assert (dot.dtypes, dot.precision) == (("f32", "f32"), "highest")


@pytest.mark.parametrize(
    "options",
    [
        dict(window_strides=(1, 1), padding="VALID"),
        dict(window_strides=(2, 1), padding="SAME"),
        dict(window_strides=(1, 2), padding=((1, 2), (3, 0)), lhs_dilation=(2, 3)),
        dict(window_strides=(1, 1), padding="SAME", rhs_dilation=(2, 3)),
        dict(window_strides=(1, 1), padding="SAME", feature_group_count=2),
    ],
)
def test_flops_of_convolutions_are_those_of_xla(mesh_with_analysis, options):
    """TPU's compiler makes convolutions of batched products, with dilation and padding."""
    groups = options.get("feature_group_count", 1)
    program = replicated(
        mesh_with_analysis,
        partial(jax.lax.conv_general_dilated, **options),
        (2, 6, 7, 9),
        (4, 6 // groups, 3, 2),
    )
    assert flops(dots(program)) == program.cost_analysis()["flops"]


def test_loops_of_products_multiply_where_xlas_analysis_counts_one(mesh_with_analysis):
    def program(x, y):
        return jax.lax.scan(lambda x, y: (jnp.tanh(x @ y), None), x, y)[0]

    compiled = replicated(mesh_with_analysis, program, (16, 16), (50, 16, 16))
    assert flops(dots(compiled)) == 50 * 2 * 16**3
    assert compiled.cost_analysis()["flops"] < 2 * 2 * 16**3  # or drop the docstrings' warning


def test_asynchronous_operations_count_once():
    """The forms that the compilers for TPU and GPU print."""
    text = (Path(__file__).parent / "asynchronous.hlo").read_text()
    assert totals(collectives(text)) == {
        "all-gather": Total(2, 4 * 16 * 4 + 4 * 32),
        "collective-permute": Total(1, 4 * 8 * 4),
        "reduce-scatter": Total(3, 2 * 4 * 8 * 4 + 2 * 8 * 4),
    }


def test_products_in_foreign_kernels_are_not_overlooked():
    text = """
ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0} parameter(0)
  ROOT %k = f32[8,4]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"
}
"""
    with pytest.raises(ValueError, match="%k, a tpu_custom_call, cannot be counted"):
        dots(text)
    assert collectives(text) == []
