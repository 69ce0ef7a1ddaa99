"""What JAX's device computes against float64: the kernel, attention, a step of MuonClip.

    python -m benchmarks.numerics --json PATH

Each row has an error and how large it may be; one that is larger ends the run with an error. On
the CPU the tests hold much more than this. Here it is the device's own products, roots and
reductions that are looked at, in each dtype that it has.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich import box
from rich.table import Table

import muonclip_jax as mc
from benchmarks import timing

# Dtype → the eps by which orthogonalized matrices and attention may be off, some three times what
# they are on a CPU. In 16 bits sums are wider than factors; in float32 it is the sums that round.
DTYPES = {"bfloat16": 6, "float16": 6, "float32": 250}
ATTENTION = {"bfloat16": 2, "float16": 2, "float32": 30}
CPU = jax.devices("cpu")[0]


@dataclass(frozen=True)
class Options:
    """How far this device's results are from float64."""

    json: Path | None = None
    """Write the figures there as well."""


def row(what: str, dtype: str, found: Any, expected: Any, allowed: float) -> dict[str, Any]:
    """The largest error, of the largest entry that is expected; `allowed` in eps of the dtype."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    error = np.abs(found - expected).max() / np.abs(expected).max()
    return {
        "what": what,
        "dtype": dtype,
        "error": float(error),
        "allowed": allowed * float(jnp.finfo(dtype).eps),
    }


def orthogonalized() -> Iterator[dict[str, Any]]:
    """Every iteration, and on TPU its kernel, against U p(S) Vᵀ. The default schedule enlarges a
    small singular value, and what is rounded beside it, some 20 times in the first steps."""
    kernels = ("xla", "pallas") if jax.default_backend() == "tpu" else ("xla",)
    schedule = mc.schedules.polar_express(8)  # all but exact, whatever margins the method takes
    for shape, dtype in itertools.product(((256, 256), (256, 1024)), DTYPES):
        x = _with_spectrum(np.geomspace(1, 0.05, min(shape)), shape)
        u, _, vt = np.linalg.svd(x, full_matrices=False)
        for iteration, kernel in itertools.product(("standard", "gram"), kernels):
            method = mc.Method(iteration, kernel=kernel)
            found = mc.orthogonalize(
                jnp.asarray(x, "float32"), schedule, method=method, dtype=dtype
            )
            what = f"orthogonalize {shape[0]}×{shape[1]}, {iteration}, {kernel}"
            yield row(what, dtype, found, u @ vt, DTYPES[dtype])


def _with_spectrum(sigma: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.normal(size=shape), full_matrices=False)
    return (u * sigma) @ vt


def attended() -> Iterator[dict[str, Any]]:
    """The outputs, the largest logits and the queries' gradients, causal."""
    rng = np.random.default_rng(0)
    operands = [rng.normal(size=(2, 512, heads, 64)) for heads in (8, 2, 2)]

    def attend(query, key, value):
        out, largest = mc.dot_product_attention(query, key, value, is_causal=True)
        return jnp.sum(out.astype(jnp.float32) ** 2), (out, largest)

    def all_of(operands):
        (_, (out, largest)), gradient = jax.value_and_grad(attend, has_aux=True)(*operands)
        return {"output": out, "largest logits": largest, "gradient": gradient}

    for dtype in DTYPES:
        rounded = [np.asarray(jnp.asarray(x, dtype), np.float64) for x in operands]
        expected = _in_float64(all_of, rounded)
        found = jax.jit(all_of)([jnp.asarray(x, dtype) for x in operands])
        for name in expected:
            yield row(f"attention, {name}", dtype, found[name], expected[name], ATTENTION[dtype])


def stepped() -> Iterator[dict[str, Any]]:
    """MuonClip's update of an attention block, one of whose heads is over the threshold."""
    rng = np.random.default_rng(0)
    shapes = {
        "query": (256, 4, 64),
        "key": (256, 4, 64),
        "value": (256, 4, 64),
        "out": (4, 64, 256),
    }
    params, gradient = (
        {"attn": {name: {"kernel": rng.normal(size=shape)} for name, shape in shapes.items()}}
        for _ in range(2)
    )

    def step(inputs, dtype):
        params, gradient, largest = inputs
        how = mc.NewtonSchulz(mc.schedules.polar_express(8), dtype)
        layout = mc.find_layout(params)
        tx = mc.muonclip(0.1, layout=layout, threshold=10.0, newton_schulz=how)
        sown = {"attn": {"max_logits": largest}}
        return tx.update(gradient, tx.init(params), params, max_logits=sown)[0]

    inputs = (params, gradient, np.array([5.0, 20.0, 8.0, 9.0]))
    expected = _in_float64(lambda inputs: step(inputs, "float64"), inputs)
    for dtype in DTYPES:
        found = jax.jit(lambda inputs, dtype=dtype: step(inputs, dtype))(
            jax.tree.map(lambda x: jnp.asarray(x, "float32"), inputs)
        )
        for name in shapes:
            pair = (tree["attn"][name]["kernel"] for tree in (found, expected))
            yield row(f"MuonClip's step, {name}", dtype, *pair, DTYPES[dtype])


def _in_float64(function: Any, inputs: Any) -> Any:
    """By the CPU, whose results the tests hold against NumPy."""
    with jax.enable_x64(True), jax.default_device(CPU):
        return jax.tree.map(np.asarray, jax.jit(function)(inputs))


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title=f"Errors on {timing.device()}, relative", box=box.SIMPLE_HEAD)
    table.add_column("")
    table.add_column("dtype")
    for header in ("error", "allowed"):
        table.add_column(header, justify="right")
    for each in rows:
        color = "bold red" if each["error"] > each["allowed"] else "default"
        error = f"[{color}]{each['error']:.1e}[/]"
        table.add_row(each["what"], each["dtype"], error, f"{each['allowed']:.1e}")
    timing.console().print(table)


def main(options: Options) -> dict[str, Any]:
    rows = [*orthogonalized(), *attended(), *stepped()]
    show(rows)
    record = timing.record(options, rows)
    timing.write(record, options.json)
    if wrong := [each for each in rows if not each["error"] <= each["allowed"]]:
        raise SystemExit(f"{len(wrong)} of {len(rows)} errors are larger than allowed")
    return record


if __name__ == "__main__":
    main(tyro.cli(Options))
