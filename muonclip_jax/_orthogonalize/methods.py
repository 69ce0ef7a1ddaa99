"""How a schedule is carried out: by which iteration, and by which products."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar, get_args

import jax.numpy as jnp
from jax import lax

from muonclip_jax._core.options import check_choice, check_count, check_flag

Iteration = Literal["standard", "gram"]
Kernel = Literal["xla", "pallas"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Method:
    """How the steps of a schedule are computed.

    It changes the cost, and the result by rounding; in 16 bits also by the margins of `"gram"`.

    Attributes:
      iteration: `"standard"` multiplies the matrix `[n, m]`, n <= m, at every step: 4n²m + 2n³
        FLOPs. `"gram"` multiplies polynomials of its Gram matrix XXᵀ, which is smaller, and the
        matrix itself at restarts, every two steps: 8n³ FLOPs a step, and 4n²m - 6n³ a
        restart (see `iterations`). A cubic step, c = 0, takes 2n³ less in both.
      smallest_block: Symmetric products compute only blocks on and below the diagonal, cut in
        halves of at least so many rows. None: they compute both sides of it.
      row_major: Copy factors that are transposed views before multiplying them.
      kernel: What computes symmetric products. `"pallas"`: on TPU (v5 and newer) a Pallas
        kernel that leaves out the half above the diagonal, in every dtype but float64; elsewhere as
        `"xla"`. It has been compiled, but not yet timed. On several devices it needs
        `jax.shard_map`, which Muon uses wherever it knows how parameters are split.
      chunk_entries: The chunk size: of a stack, as many matrices at a time as have so many entries.
      lean: Move and keep fewer bytes, for GPUs, whose products memory holds up. Products are
        rounded to the dtype of their factors as they are written, instead of afterwards. Where
        matrices are many or large, most polynomials are a square and two diagonals, without sums
        of whole matrices. Steps are written out, since a loop copies X: that takes longer to
        compile. Matrices of 2²⁴ entries and more are written over once; where they are at least
        twice as wide as high, XXᵀ is computed by half twice.

    Raises:
      TypeError: `row_major` or `lean` is neither True nor False.
      ValueError: Another iteration or kernel, or a number below 1; `lean` with `smallest_block`,
        `row_major` or `kernel="pallas"`, which it has no use for.

    Example:
      >>> method = mc.Method("gram", smallest_block=256)
      >>> mc.orthogonalize(jnp.ones((4, 8)), method=method).shape
      (4, 8)
    """

    iteration: Iteration
    smallest_block: int | None = None
    row_major: bool = False
    kernel: Kernel = "xla"
    chunk_entries: int = 2**24
    lean: bool = False

    def __post_init__(self):
        check_choice("Method: iteration", self.iteration, get_args(Iteration))
        check_choice("Method: kernel", self.kernel, get_args(Kernel))
        check_flag("Method: row_major", self.row_major)
        check_flag("Method: lean", self.lean)
        check_count("Method: chunk_entries", self.chunk_entries)
        if self.smallest_block is not None:
            check_count("Method: smallest_block", self.smallest_block)
        if self.lean and (self.smallest_block or self.row_major or self.kernel != "xla"):
            raise ValueError(
                f"Method: lean=True goes with whole products by XLA, found {self}; leave out "
                "smallest_block, row_major and kernel"
            )


DENSE = Method("standard")  # whole products by XLA

MethodName = Iteration | Literal["auto"]
Backend = Literal["cpu", "gpu", "tpu"]


@dataclass(frozen=True)
class MethodOn:
    """A method by name, in a program for some backends: for the others nothing is traced."""

    name: MethodName
    backends: tuple[Backend, ...]


# The least m/n at which "auto" takes the Gram iteration, on every backend, so that all give the
# same numbers. By FLOPs it wins from 1.2 on where the halves of symmetric products are left out,
# and from 1.5 on where they are not; of cubic steps from 1 and 1.5 on.
_GRAM_FROM = 1.5
# The least n. The standard iteration needs no margins, and of fewer rows it costs little.
_GRAM_ROWS = 64

# What else "auto" goes by, for each backend. That of CPU is measured:
# `python -m benchmarks.methods` does it again.
_CPU = Method(
    "standard",
    # Smaller halves are slower by more than what they save.
    smallest_block=384,
    # One matrix of 768 rows at a time: three are slower by 5%, a whole stack by up to 80%.
    chunk_entries=2**20,
)
# Not measured. The blocks' transposes and joins become copies that cost more than is saved,
# as XLA's own estimates tell (docs/log.md).
_TPU = Method("standard", chunk_entries=2**24)
# Not measured. What it saves is read off the compiled programs (`python -m benchmarks.roofline`).
_GPU = Method("standard", chunk_entries=2**26, lean=True)


def iteration_for(method: MethodName | Method | MethodOn, n: int, m: int) -> Iteration:
    """The iteration for matrices [n, m], n <= m."""
    if isinstance(method, Method):
        return method.iteration
    if isinstance(method, MethodOn):
        method = method.name
    if method == "auto":
        return "gram" if n >= _GRAM_ROWS and m >= _GRAM_FROM * n else "standard"
    return method


def check_method(owner: str, method: Any) -> None:
    """Raises TypeError for what is neither a `Method` nor the name of one."""
    if not isinstance(method, Method | MethodOn) and method not in ("auto", *get_args(Iteration)):
        raise TypeError(
            f'{owner}: method={method!r}; use "auto", "standard", "gram" or a muonclip_jax.Method'
        )


def on_each_backend(
    run: Callable[..., _Result],
    x: Any,
    sides: Sequence[int],
    method: MethodName | Method | MethodOn,
    dtype: jnp.dtype,
) -> _Result:
    """Calls `run(x, method=)` with the method for the backend that it will be compiled for.

    Args:
      run: What is to be compiled.
      x: An array, or a tree of them.
      sides: Of its matrices, either first.
      method: The method, or how to choose it.
      dtype: In which they are iterated.
    """
    if isinstance(method, Method):
        return run(x, method=method)
    backends = method.backends if isinstance(method, MethodOn) else get_args(Backend)
    iteration = iteration_for(method, *sorted(sides))
    # XLA's bfloat16 product on CPU takes row-major factors. It converts others to float32.
    cpu = replace(_CPU, row_major=dtype == jnp.bfloat16)
    # Each is traced, whatever it is compiled for: GPUs of all makers share one.
    runs = {
        backend: functools.partial(run, method=replace(each, iteration=iteration))
        for backend, each in (("cpu", cpu), ("tpu", _TPU), ("gpu", _GPU))
        if backend in backends
    }
    if len(runs) == 1:
        [only] = runs.values()
        return only(x)
    return lax.platform_dependent(x, default=runs.pop("gpu"), **runs)


def only_on(method: MethodName | Method | MethodOn, *backends: Backend) -> Method | MethodOn:
    """The same, in a program for these backends."""
    return MethodOn(method, backends) if isinstance(method, str) else method
