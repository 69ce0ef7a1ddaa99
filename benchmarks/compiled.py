"""What a compiled program does on each device, read from XLA's text of it.

    compiled = jax.jit(step).lower(...).compile()
    totals(collectives(compiled))   # {"all-gather": Total(count=4, bytes=2097152), ...}
    flops(dots(compiled))           # of the matrix products that run

`benchmarks.kernels` has the bytes of memory that it needs.

Why not `compiled.cost_analysis()`: on CPU and on TPU alike its `flops`, `bytes accessed` and
`optimal_seconds` count the body of a loop once, however often the loop runs; on GPU there is none.
Here each operation comes with the number of its executions, read from the loops' counters.
"""

import math
import re
from collections.abc import Iterable
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.hlo import Operation, executed

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)


class Collective(NamedTuple):
    """One collective operation; an asynchronous one is its start and its done together.

    Attributes:
      kind: one of `KINDS`.
      bytes: on one device, of one execution: the size of its result there, of a reduce-scatter
        that of its operand, which is larger. A device's own part is included, though it does not
        travel.
      shapes: what `bytes` is the size of, such as `("bf16[7168,2304]",)`.
      times: how often it executes in one run of the program.
      conditional: it is in a branch, and executes only when that is taken.
    """

    kind: str
    bytes: int
    shapes: tuple[str, ...]
    times: int
    conditional: bool


class Dot(NamedTuple):
    """One matrix product; TPU's compiler calls them convolutions, GPU's may call cuBLAS.

    Attributes:
      flops: on one device, of one execution: two for each product of two numbers.
      dtypes: of its two operands, such as `("bf16", "bf16")`.
      shape: of its result, such as `"f32[256,256]"`.
      times: how often it executes in one run of the program.
      conditional: it is in a branch, and executes only when that is taken.
      precision: `"highest"`, `"high"`, or `"default"`, with which GPUs round float32 operands to
        TF32, and TPUs to bfloat16.
    """

    flops: int
    dtypes: tuple[str, str]
    shape: str
    times: int
    conditional: bool
    precision: str


class Total(NamedTuple):
    """Executions, and their bytes on one device."""

    count: int
    bytes: int


def collectives(compiled: jax.stages.Compiled | str) -> list[Collective]:
    """The collective operations of a compiled program, or of its text.

    Raises:
      ValueError: one is in a loop whose number of executions depends on data.
    """
    return [
        Collective(kind_of(op), sum(map(bytes_of, shapes)), shapes, times, conditional)
        for op, times, conditional in executed(text_of(compiled), kind_of)
        for shapes in [transferred(op)]
    ]


def dots(compiled: jax.stages.Compiled | str) -> list[Dot]:
    """The matrix products of a compiled program, or of its text.

    Raises:
      ValueError: one is in a loop whose number of executions depends on data, or in a kernel that
        is not XLA's own.
    """
    return [dot(*each) for each in executed(text_of(compiled), multiplies)]


def totals(ops: Iterable[Collective]) -> dict[str, Total]:
    """Executions and bytes of each kind, as if every branch were taken."""
    found: dict[str, Total] = {}
    for op in ops:
        count, size = found.get(op.kind, (0, 0))
        found[op.kind] = Total(count + op.times, size + op.times * op.bytes)
    return found


def flops(ops: Iterable[Dot]) -> int:
    """Executed floating-point operations, as if every branch were taken."""
    return sum(op.times * op.flops for op in ops)


def text_of(compiled: jax.stages.Compiled | str) -> str:
    """XLA's text of a program."""
    return compiled if isinstance(compiled, str) else compiled.as_text()


# One operation.

# TPU's compiler repeats a collective in each fusion that it runs along with, all but the first time
# with the numbers of the flags that it waits for.
CONTINUES = re.compile(r'"async_collective_fusion_config":\{"flag_start":"\d')


def kind_of(op: Operation) -> str | None:
    """Of a collective where its result is: at the done of an asynchronous one."""
    kind = op.code.removesuffix("-done")
    wrapped = kind != op.code and op.operands[0].called("calls")  # its own text follows there
    if kind not in KINDS or wrapped or CONTINUES.search(op.rest):
        return None
    sliced = op.computation.name.startswith("all-reduce-scatter")  # TPU's fusion of the two
    return "reduce-scatter" if sliced else kind


def transferred(op: Operation) -> tuple[str, ...]:
    if not op.code.startswith("reduce-scatter"):
        return op.shapes
    start = op.operands[0] if op.code.endswith("-done") else op
    return _operand_shapes(start)


def multiplies(op: Operation) -> bool:
    """Whether it is a product, or a library's or a foreign kernel, in which there may be some."""
    return op.code in ("dot", "convolution") or bool(FOREIGN.search(target(op)))


FOREIGN = re.compile("tpu_custom_call|mosaic|triton|gemm|matmul|cudnn|cublas", re.IGNORECASE)
CUBLAS = re.compile(r"__cublas\$(gemm|lt\$matmul)")


def target(op: Operation) -> str:
    """What a custom call calls."""
    return op.attribute("custom_call_target") or ""


def dot(op: Operation, times: int, conditional: bool) -> Dot:
    """Of an operation that multiplies.

    Raises:
      ValueError: It is a kernel that is neither XLA's nor cuBLAS's.
    """
    found = _flops(op)  # first, to raise
    lhs, rhs, *_ = map(_dtype, _operand_shapes(op))
    return Dot(found, (lhs, rhs), op.shapes[0], times, conditional, _precision(op))


def _flops(op: Operation) -> int:
    if op.code == "convolution":
        return 2 * _convolution_products(op)
    if op.code == "dot":
        contracted = op.attribute("lhs_contracting_dims") or ""
    elif CUBLAS.match(target(op)):
        contracted = _configured(op, "lhs_contracting_dimensions")
    else:
        raise ValueError(f"The products in %{op.name}, a {target(op)}, cannot be counted")
    lhs = sizes(_operand_shapes(op)[0])
    inner = math.prod(lhs[int(axis)] for axis in re.findall(r"\d+", contracted))
    return 2 * math.prod(sizes(op.shapes[0])) * inner


def _precision(op: Operation) -> str:
    """Of the operand that is given more."""
    said = op.attribute("operand_precision") or _configured(op, "operand_precision")
    return next((name for name in ("highest", "high") if name in said.lower()), "default")


def _configured(op: Operation, name: str) -> str:
    """A list in the configuration of a call of cuBLAS."""
    found = re.search(rf'"{name}":\[(.*?)\]', op.rest)
    return found[1] if found else ""


def _convolution_products(op: Operation) -> int:
    """As XLA's cost analysis counts them: without those with padding and with dilation's holes.
    TPU's compiler turns the batch of a batched product into a window where these are all but one
    in a batch."""
    lhs, kernel = map(sizes, _operand_shapes(op))
    lhs_labels, kernel_labels, out_labels = re.split("_|->", op.attribute("dim_labels"))
    out = dict(zip(out_labels, sizes(op.shapes[0]), strict=True))
    lhs = dict(zip(lhs_labels, lhs, strict=True))
    kernel = dict(zip(kernel_labels, kernel, strict=True))
    window = dict(part.split("=") for part in (op.attribute("window") or "").split())

    def numbers(name: str, default: str) -> list[str]:
        return window[name].split("x") if name in window else [default] * len(axes)

    axes = sorted(label for label in out if label.isdigit())
    taps = 1
    for axis, stride, pad, lhs_dilate, rhs_dilate in zip(
        axes,
        numbers("stride", "1"),
        numbers("pad", "0_0"),
        numbers("lhs_dilate", "1"),
        numbers("rhs_dilate", "1"),
        strict=True,
    ):
        position = (
            np.arange(out[axis])[:, None] * int(stride)
            + np.arange(kernel[axis])[None, :] * int(rhs_dilate)
            - int(pad.split("_")[0])
        )
        entry, hole = np.divmod(position, int(lhs_dilate))
        taps *= int(np.sum((hole == 0) & (entry >= 0) & (entry < lhs[axis])))
    batch = lhs["b"] // int(op.attribute("batch_group_count") or 1)
    return kernel["i"] * out["f"] * batch * taps


def _operand_shapes(op: Operation) -> tuple[str, ...]:
    return tuple(shape for operand in op.operands for shape in operand.shapes)


def _dtype(shape: str) -> str:
    return shape.split("[")[0]


def sizes(shape: str) -> list[int]:
    """Of an array's axes."""
    return [int(size) for size in re.findall(r"\d+", shape.split("[")[1])]


def bytes_of(shape: str) -> int:
    """Of an array such as `"f32[256,256]"`."""
    bits = re.search(r"\d+", _dtype(shape))  # none: pred, token
    return math.prod(sizes(shape)) * (int(bits[0]) if bits else 8) // 8
