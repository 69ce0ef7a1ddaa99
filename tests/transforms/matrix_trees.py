"""Parameters that hold their matrices in every way: plain, stacked, by heads, cut by a mesh."""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

import muonclip_jax as mc


@dataclass(frozen=True)
class Stored:
    """One parameter: how it is read, its split on a mesh of 4 × 2, and in NumPy its `[count, in,
    out]` and the way back."""

    shape: tuple[int, ...]
    pattern: str | mc.MatrixPattern
    split: P
    take: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


def _same(x):
    return x


def _heads(ins, heads, features, split):
    """Kernels that hold their heads side by side."""
    pattern = mc.MatrixPattern("in (heads features) -> heads in features", {"heads": heads})
    return Stored(
        (ins, heads * features),
        pattern,
        split,
        lambda x: x.reshape(ins, heads, features).swapaxes(0, 1),
        lambda x: x.swapaxes(0, 1).reshape(ins, heads * features),
    )


STORED = {
    "wide": Stored((8, 16), "in out", P("fsdp", "tp"), lambda x: x[None], lambda x: x[0]),
    "tall": Stored((16, 8), "in out", P(None, "tp"), lambda x: x[None], lambda x: x[0]),
    "layers": Stored((4, 8, 16), "layers in out", P("fsdp"), _same, _same),
    "query": Stored(
        (8, 2, 4),
        "in heads features -> heads in features",
        P("fsdp", "tp"),
        lambda x: x.swapaxes(0, 1),
        lambda x: x.swapaxes(0, 1),
    ),
    "out": Stored((2, 4, 8), "heads features out", P("tp", None, "fsdp"), _same, _same),
    "flat": _heads(8, 8, 4, P(None, "fsdp")),
    "cut": _heads(16, 4, 8, P(None, ("fsdp", "tp"))),  # half a head on each device
    "whole": Stored(
        (8, 4, 4),
        "in heads features -> in (heads features)",
        P("tp", "fsdp"),
        lambda x: x.reshape(1, 8, 16),
        lambda x: x.reshape(8, 4, 4),
    ),
}
NUMBERS = {name: stored.pattern for name, stored in STORED.items()}


def tree(seed=0, scale=1.0, dtype="float32"):
    """Random matrices whose rows, and whose columns, differ in size."""
    rng = np.random.default_rng(seed)

    def one(stored):
        x = stored.take(rng.standard_normal(stored.shape))
        _, ins, outs = x.shape
        sizes = rng.uniform(0.1, 10, (ins, 1)) * rng.uniform(0.1, 10, outs)
        return stored.back(scale * sizes * x).astype(dtype)

    return {name: one(stored) for name, stored in STORED.items()}


def on_each(fn, tree, *rest):
    """`fn` of the matrices `[count, in, out]` of every parameter in float64, in its place."""

    def of(name, stored):
        return stored.back(fn(*(stored.take(np.float64(each[name])) for each in (tree, *rest))))

    return {name: of(name, stored) for name, stored in STORED.items()}


def sharded(tree, kind):
    """A mesh of 4 × 2 with such axes, and the tree on it."""
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=types)
    split = {name: jax.NamedSharding(mesh, stored.split) for name, stored in STORED.items()}
    return mesh, {name: jax.device_put(x, split[name]) for name, x in tree.items()}


def assert_close(found, wanted, rtol):
    """Relative to each parameter's largest entry."""
    assert found.keys() == wanted.keys()
    for name, x in wanted.items():
        x = np.float64(x)
        error = np.abs(np.float64(found[name]) - x).max() / np.abs(x).max()
        assert error <= rtol, f"{name}: {error:.1e}"
