"""Where sown values meet attention blocks: whose value it is, and in which shape."""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax._core import paths
from muonclip_jax._core.maxima import largest
from muonclip_jax._core.paths import Path
from muonclip_jax._core.sowing import MAX_LOGITS
from muonclip_jax._layouts.blocks import (
    Block,
    Layouts,
    left_out,
    module_path,
    outside_patterns,
)


@dataclass(frozen=True)
class Pairing:
    """Which modules sowed for which block.

    Attributes:
      modules: By the block's name, the paths of the modules in it that sowed.
      strays: Modules that sowed and are in no block, though a layout's pattern admits them.
    """

    modules: dict[str, list[Path]]
    strays: list[Path]


def pair(layout: Layouts, blocks: Sequence[Block], params: Any, sown: Iterable[Path]) -> Pairing:
    """For every module that sowed, its block: the innermost attention at its path or above it.

    Where the layouts leave that attention out, by `ignore` or a `block` pattern, the value belongs
    to nobody, also when another block stands around it:

        layout   [mha(block="attn"), ignore("attn/inner")]
        sown     attn            → block attn
                 attn/core       → block attn, the innermost attention above it
                 attn/inner      → nobody
                 attn/inner/core → nobody

    What a block sowed that is frozen whole is nobody's either.

    Args:
      layout: The layouts.
      blocks: The blocks that they find in `params`.
      params: The parameters; only paths and shapes are read.
      sown: The paths of the modules that sowed.
    """
    found = Pairing({block.name: [] for block in blocks if not block.is_frozen}, [])
    own = {block.path for block in blocks}
    excluded = [module_path(path) for path in left_out(layout, params) if path not in own]
    for path in sown:
        around = [block for block in blocks if _is_inside(path, module_path(block.path))]
        block = max(around, key=lambda block: len(block.path), default=None)
        depth = len(module_path(block.path)) if block else 0
        if any(_is_inside(path, other) and len(other) >= depth for other in excluded):
            continue
        if block is not None:
            found.modules.get(block.name, []).append(path)
        elif not outside_patterns(layout, path):
            found.strays.append(path)
    return found


def fit(block: str, shape: tuple[int, ...], sown: jax.Array, signal: str) -> jax.Array:
    """What a module of a block sowed, as `[stack..., heads]`, the block's shape: axes that its
    kernels do not have (a batch, a vmapped call) are reduced by the maximum. One number for all
    heads, `[..., 1]`, is that of each; not of max logits, which every head has.

    Args:
      block: The block's name.
      shape: The block's shape.
      sown: The value.
      signal: The name of what was sown, for messages.

    Raises:
      ValueError: It has other heads or another stack, or does not tell which axis is the stack.
    """
    *stack, heads = shape
    if sown.shape[-1:] == (1,) and signal != MAX_LOGITS:
        sown = jnp.broadcast_to(sown, (*sown.shape[:-1], heads))
    depth, extra = len(stack), sown.ndim - len(shape)
    after_stack = sown.shape[:depth] == shape[:-1]
    before_stack = sown.shape[extra:-1] == shape[:-1] if extra >= 0 else False
    one_for_all = "" if signal == MAX_LOGITS else ", or one for all, [..., 1]"
    if sown.shape[-1:] != (heads,) or extra < 0 or not (after_stack or before_stack):
        raise ValueError(
            f"{block} sowed {signal} of shape {sown.shape}, but its kernels have "
            f"{heads} query heads{f' in stacked layers {shape[:-1]}' if depth else ''}: "
            f"expected {shape}. "
            f"Sow one maximum per query head{one_for_all}, and check the layout's heads= (flat "
            "kernels need it)."
        )
    if depth and extra and after_stack and before_stack and max(sown.shape[:-1]) > 1:
        raise ValueError(
            f"{block} sowed {signal} of shape {sown.shape}: which axis is the stack "
            f"{shape[:-1]} is ambiguous. Reduce the others first, here or where they are sown: "
            f"jax.tree.map(lambda s: s.max(axis=...), read_signal(intermediates, {signal!r}))."
        )
    axes = range(depth, depth + extra) if after_stack else range(extra)
    return largest(sown, tuple(axes))


@dataclass(frozen=True)
class Observed:
    """A signal that a link reads, as it says in its `init` and `update`.

    Attributes:
      signal: The signal's name, which is that of `update`'s argument.
      shapes: By the block's name, the shape of one number per head, `[stack..., heads]`.
      pair: From the paths of the modules that sowed to whose they are; see `pair`.
    """

    signal: str
    shapes: dict[str, tuple[int, ...]]
    pair: Callable[[Iterable[Path]], Pairing]


_listeners: ContextVar[tuple[list[Observed], ...]] = ContextVar("listeners", default=())


def observe(signal: str, layout: Layouts, blocks: Sequence[Block], params: Any) -> None:
    """Says that a link reads a signal. Every link that does calls this in its `init` and
    `update`."""
    shapes = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), paths.dtype_of(leaf)), params
    )
    pair_with = functools.partial(pair, layout, blocks, shapes)
    shapes_of = {block.name: block.shape for block in blocks if not block.is_frozen}
    for listener in _listeners.get():
        listener.append(Observed(signal, shapes_of, pair_with))


@contextmanager
def observations() -> Iterator[list[Observed]]:
    """Hears what the links observe whose `init` or `update` is called inside. `accumulate` learns
    it so of a chain that it cannot see into."""
    heard: list[Observed] = []
    token = _listeners.set((*_listeners.get(), heard))
    try:
        yield heard
    finally:
        _listeners.reset(token)


def _is_inside(path: Path, module: Path) -> bool:
    return path[: len(module)] == module


def names(modules: Iterable[Path]) -> str:
    """For messages."""
    return ", ".join(map(paths.show, modules)) or "nothing"
