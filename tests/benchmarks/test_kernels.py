"""What `benchmarks.kernels` reads from a program is what memory the program needs."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks import gpu, tpu
from benchmarks.compiled import dots, flops
from benchmarks.kernels import kernels, traffic

N = 1024
MATRIX = 4 * N * N  # bytes, float32


@pytest.fixture(scope="module", params=["gpu", "tpu"])
def compile_for(request):
    """Compiles a function of float32 matrices for one device, or several that do the same."""
    if request.param == "gpu":
        pytest.importorskip(gpu.PLUGIN, reason="make test-gpu installs it and runs this")
        mesh = gpu.make_mesh("h100:1x1x1", data=1)
    else:
        pytest.importorskip("libtpu", reason="make test-tpu installs libtpu and runs this")
        mesh = tpu.make_mesh("v5p:2x2x1", data=4)
    sharding = NamedSharding(mesh, P())

    def compile(function, *shapes, **how):
        arguments = (jax.ShapeDtypeStruct(s, jnp.float32, sharding=sharding) for s in shapes)
        return jax.jit(function, out_shardings=sharding, **how).lower(*arguments).compile()

    return compile


def test_a_fusion_reads_and_writes_once(compile_for):
    found = kernels(compile_for(lambda x, y: x * y + jnp.sin(x), (N, N), (N, N)))
    assert [(each.read, each.written) for each in found] == [(2 * MATRIX, MATRIX)]


def test_loops_multiply_and_products_are_their_kernels(compile_for):
    def program(x):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.tanh(x) @ x, x)

    compiled = compile_for(program, (8 * N, 8 * N))  # more than VMEM holds
    found = kernels(compiled)
    assert sum(flops(each.dots) * each.times for each in found) == flops(dots(compiled))
    # tanh apart from the product or not, and at most a copy of the argument.
    assert 7 * 2 * 64 * MATRIX <= traffic(found) <= (7 * 5 + 3) * 64 * MATRIX


def test_slices_count_as_much_as_is_taken(compile_for):
    def program(x, start):
        part = jax.lax.dynamic_slice_in_dim(x, jnp.int32(start), N // 8)
        return part * 2 + x[: N // 8] + x[-N // 8 :]

    found = kernels(compile_for(program, (64 * N, N), ()))
    assert 3 / 8 * MATRIX <= sum(each.read for each in found) <= 1.01 * 3 / 8 * MATRIX + 2 * MATRIX
    assert sum(each.written for each in found) <= 3 / 8 * MATRIX


def test_a_slice_updated_in_place_is_all_that_is_written(compile_for):
    def program(x, y):
        return x.at[N : 2 * N].set(jnp.sin(y))

    found = kernels(compile_for(program, (64 * N, N), (N, N), donate_argnums=0))
    assert traffic(found) == 2 * MATRIX


def test_a_scan_reads_a_slice_a_time(compile_for):
    def program(stack):
        return jax.lax.map(lambda x: jnp.sin(x) * 2, stack)

    found = kernels(compile_for(program, (64, N, N)))
    # GPU's compiler fills the result with zeros before.
    assert 64 * 2 * MATRIX <= traffic(found) <= 1.01 * 64 * 3 * MATRIX


HEAD = """
%fused (a: f32[64,8], i: s32[]) -> f32[64,8] {
  %a = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %zero = s32[] constant(0)
  %old = f32[2,8]{1,0} dynamic-slice(%a, %i, %zero), dynamic_slice_sizes={2,8}
  %new = f32[2,8]{1,0} sine(%old)
  %turned = f32[64,8]{1,0} bitcast(%a)
  ROOT %update = f32[64,8]{1,0} dynamic-update-slice(%turned, %new, %i, %zero)
}

%set (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  ROOT %q = f32[] parameter(1)
}

%scattered (a: f32[64,64], n: f32[64]) -> f32[64,64] {
  %a = f32[64,64]{1,0} parameter(0)
  %n = f32[64]{0} parameter(1)
  %places = s32[64,2]{1,0} iota(), iota_dimension=0
  ROOT %updated = f32[64,64]{1,0} scatter(%a, %places, %n), update_window_dims={}, to_apply=%set
}

%product (a: f32[64,8]) -> (f32[32,64], s8[4194304]) {
  %a = f32[64,8]{1,0} parameter(0)
  %half = f32[32,8]{1,0} slice(%a), slice={[32:64], [0:8]}
  ROOT %c = (f32[32,64]{1,0}, s8[4194304]{0}) custom-call(%half, %a), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
}

"""


@pytest.mark.parametrize(
    ("body", "read", "written"),
    [
        # A slice of %x and the index; the slice.
        ("ROOT %k = f32[64,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused", 68, 64),
        # The same array under two names, once.
        (
            """%y = f32[8,64]{0,1} bitcast(%x)
  ROOT %k = f32[64,64]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}""",
            64 * 8 * 4,
            64 * 64 * 4,
        ),
        # Of a tuple's elements, those that are taken.
        (
            """%t = (f32[64,8]{1,0}, s32[]) tuple(%x, %i)
  %x2 = f32[64,8]{1,0} get-tuple-element(%t), index=0
  ROOT %k = f32[64,8]{1,0} add(%x, %x2)""",
            64 * 8 * 4,
            64 * 8 * 4,
        ),
        # To VMEM and there: the copy reads, the sine does nothing, as to this memory.
        (
            """%s = (f32[64,8]{1,0:S(1)}, f32[64,8]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %v = f32[64,8]{1,0:T(8,128)S(1)} copy-done(%s)
  ROOT %k = f32[64,8]{1,0:T(8,128)S(1)} sine(%v)""",
            64 * 8 * 4,
            0,
        ),
        # A library's product adds to an array that it gets, and has a workspace.
        (
            """%k = (f32[64,64]{1,0}, s8[4194304]{0}) custom-call(%x, %x, %z), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}
  ROOT %r = f32[64,64]{1,0} get-tuple-element(%k), index=0""",
            64 * 8 * 4 + 64 * 64 * 4,
            64 * 64 * 4,
        ),
        # In a fusion, of some rows: no more than all of the array.
        (
            """%k = (f32[32,64]{1,0}, s8[4194304]{0}) fusion(%x), kind=kCustom, calls=%product
  ROOT %r = f32[32,64]{1,0} get-tuple-element(%k), index=0""",
            64 * 8 * 4,
            32 * 64 * 4,
        ),
        # Entries of %z and the new ones; these.
        (
            """%d = f32[64]{0} constant({...})
  ROOT %k = f32[64,64]{1,0} fusion(%z, %d), kind=kInput, calls=%scattered""",
            2 * 64 * 4,
            64 * 4,
        ),
        # An asynchronous one, where it is done.
        (
            """%s = ((f32[64,8]{1,0}, s32[]), f32[64,8]{1,0}, u32[]) fusion-start(%x, %i), \
kind=kLoop, calls=%fused
  ROOT %k = f32[64,8]{1,0} fusion-done(%s)""",
            68,
            64,
        ),
    ],
)
def test_the_rule(body, read, written):
    text = f"""{HEAD}ENTRY %main (x: f32[64,8], i: s32[], z: f32[64,64]) -> f32[64,8] {{
  %x = f32[64,8]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %z = f32[64,64]{{1,0}} parameter(2)
  {body}
}}
"""
    found = kernels(text)
    assert (sum(k.read for k in found), sum(k.written for k in found)) == (read, written)


def test_an_update_that_is_not_in_place_writes_all():
    text = HEAD.replace("%turned, %new", "%filled, %new").replace(
        "  ROOT", "  %filled = f32[64,8]{1,0} broadcast(%zero), dimensions={}\n  ROOT"
    )
    text += """ENTRY %main (x: f32[64,8], i: s32[]) -> f32[64,8] {
  %x = f32[64,8]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %k = f32[64,8]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
}
"""
    [found] = kernels(text)
    assert found.written == 64 * 8 * 4
