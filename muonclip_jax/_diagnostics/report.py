"""Every head in numbers: what the clip saw, what its kernels and its keys are like."""

import functools
import io
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from rich.console import Console
from rich.table import Table

from muonclip_jax._attention.max_logits import MAX_LOGITS, read_max_logits
from muonclip_jax._core.dtypes import of_product
from muonclip_jax._core.meshes import in_auto_axes
from muonclip_jax._core.paths import Path
from muonclip_jax._core.sowing import sown
from muonclip_jax._diagnostics.activations import KEYS, read_activations
from muonclip_jax._diagnostics.measures import (
    effective_rank,
    factored,
    participation_ratio,
    spectral_norm,
)
from muonclip_jax._layouts.blocks import Block, Layouts, find_blocks, module_path
from muonclip_jax._layouts.leaves import leaves_of
from muonclip_jax._layouts.roles import KEY_ROLES, QUERY_ROLES, Role
from muonclip_jax._transforms.qk_clip import QKClipState, fit_maxima, qk_clip_state

_ROLES = (*QUERY_ROLES, *KEY_ROLES, "k_rope", "q_down", "kv_down")

# A softmax over logits within ±0.1 weighs no key more than exp(0.2) = 1.2 times another.
_SILENT = 0.1


class HeadReport(NamedTuple):
    """One attention block, or a stack of them, in numbers.

    Attributes:
      max_logits: Largest logit in the batch, `[stack..., heads]`.
      gamma: The factor of the last clip, below 1 where it clipped, same shape; None without
        QK-Clip.
      query_norms: ‖W_q‖₂, same shape.
      key_norms: ‖W_k‖₂, `[stack..., key heads]`.
      ranks: Effective rank (gamma 1) of W_q W_kᵀ, which the logits are made with,
        `[stack..., heads]`; at most head_features.
      key_participation_ratios: Participation ratio (of singular values) of the keys over tokens,
        `[stack..., key heads]`; None unless keys were sown.
      exploding: bool `[stack..., heads]`: the largest logit is above the threshold, NaN or +Inf.
      dead: bool `[stack..., heads]`: the head reads all its tokens alike. Its largest logit is
        within ±0.1, and so is whatever its kernels make of inputs of RMS 1,
        `‖W_q W_kᵀ‖₂ · in / sqrt(head_features) < 0.1`.
    """

    max_logits: jax.Array
    gamma: jax.Array | None
    query_norms: jax.Array
    key_norms: jax.Array
    ranks: jax.Array
    key_participation_ratios: jax.Array | None
    exploding: jax.Array
    dead: jax.Array


class _Quantity(NamedTuple):
    """How the heads of a layer are shown: in a column, and as one scalar."""

    field: str
    header: str
    name: str
    reduce: Callable[[np.ndarray], Any]


_QUANTITIES = (
    _Quantity("max_logits", "max logit", "max_logit", np.max),
    _Quantity("gamma", "γ", "gamma", np.min),
    _Quantity("query_norms", "‖W_q‖₂", "query_norm", np.max),
    _Quantity("key_norms", "‖W_k‖₂", "key_norm", np.max),
    _Quantity("ranks", "rank of W_q W_kᵀ", "rank", np.mean),
    _Quantity("key_participation_ratios", "PR of keys", "key_participation_ratio", np.mean),
)
_FLAGS = (
    _Quantity("exploding", "exploding", "exploding", np.sum),
    _Quantity("dead", "dead", "dead", np.sum),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class AttentionReport:
    """What `attention_report` found. A pytree, so `jax.jit` may return it; outside of it,
    `print` and `rich.print` show a table of layers, and `scalars` are for a logger.

    Attributes:
      blocks: A `HeadReport` for each attention block, by path.
    """

    blocks: dict[str, HeadReport]

    def scalars(self) -> dict[str, float]:
        """Each layer in a few numbers, over its heads: `{"max_logit/layers/attn/3": 41.2, ...}`.

        Largest max logit, smallest gamma, largest norms, mean rank and participation ratio, how
        many heads explode or are dead. One transfer from the device.
        """
        return {
            f"{quantity.name}/{layer}": float(quantity.reduce(values))
            for layer, heads in self._layers()
            for quantity in (*_QUANTITIES, *_FLAGS)
            if (values := getattr(heads, quantity.field)) is not None
        }

    def __rich__(self) -> Table:
        rows = list(self._layers())
        shown = [
            q for q in _QUANTITIES if any(getattr(heads, q.field) is not None for _, heads in rows)
        ]
        table = Table(caption="lowest … highest of a layer's heads", caption_justify="left")
        table.add_column("layer", overflow="fold")
        for quantity in shown:
            table.add_column(quantity.header, justify="right")
        table.add_column("look at", overflow="fold")
        for layer, heads in rows:
            ranges = (_range(getattr(heads, quantity.field)) for quantity in shown)
            table.add_row(layer, *ranges, _flags(heads))
        return table

    def __str__(self) -> str:
        width = shutil.get_terminal_size(fallback=(10_000, 24)).columns
        console = Console(file=io.StringIO(), width=width, color_system=None)
        console.print(self)
        return console.file.getvalue().rstrip()

    def _layers(self) -> Iterator[tuple[str, HeadReport]]:
        """Every layer by itself, on the host, `[heads]`."""
        for name, block in jax.device_get(self.blocks).items():
            for index, layer in layers(name, block.max_logits.shape[:-1]):
                yield layer, HeadReport(*(None if x is None else x[index] for x in block))


def attention_report(
    params: Any,
    opt_state: Any,
    intermediates: Any,
    layout: Layouts,
    *,
    threshold: jax.typing.ArrayLike = 100.0,
) -> AttentionReport:
    """Every attention head in numbers: logits, clip, kernels, keys, and whether to worry.

    Under `jax.jit` or outside; at every N-th step of a jitted one with `jax.lax.cond`. No host
    synchronisation. In float32 (float64 for float64 parameters).

    W_q and W_k take the block's input to the head's queries and keys. Of MLA they are multiplied
    out, `W_q = q_down · [q_nope | q_rope]` and `W_k = [kv_down · k_nope | k_rope]`. Biases, norms
    on latents, QK-norm and positions are left out. W_q W_kᵀ is never formed: with `W = Q R` by
    Householder, its singular values are those of `R_q R_kᵀ`, `[head_features, head_features]`.

    Cost, with f = head_features: for each query and key head a QR of `[in, f]` and an SVD of
    `[f, f]`, and one SVD more for the product; of MLA also as much as projecting `in` tokens up.
    With keys, for each key head, a QR of `[tokens, f]` and an SVD. For layers 768 wide with 12
    heads on two CPU cores that is 0.5% of their forward and backward pass over 8192 tokens, and
    2.6% with the keys of all of these. Scanned layers are taken one by one: the memory is that of
    one.

    Args:
      params: The parameters.
      opt_state: The optimizer's state, for γ if there is a `qk_clip` in it; or None.
      intermediates: What the forward pass sowed: max logits (`sow_max_logits`), and keys, if it did
        (`sow_activations(self, keys=k)`). None, or without max logits: those of the last clip.
      layout: Where the heads are; several layouts as a list. A QK-norm is no obstacle.
      threshold: The max logit above which a head explodes; QK-Clip's default.

    Returns:
      An `AttentionReport`. On a mesh its arrays are replicated.

    Raises:
      TypeError, ValueError: What `find_blocks` and `read_max_logits` raise; a block without max
        logits; keys that belong to no block or do not fit its heads.
    """
    blocks = find_blocks(layout, params)
    clip = _clip_state(opt_state)
    gamma = clip.gamma if clip else {}
    given = (
        leaves_of(blocks, _ROLES, params),
        _max_logits(blocks, clip, intermediates),
        {block.name: gamma.get(block.name) for block in blocks},
        _keys(blocks, intermediates),
        threshold,
    )

    def report(kernels, maxima, gamma, keys, threshold):
        return {
            b.name: _head_report(
                b, kernels, maxima[b.name], gamma[b.name], keys.get(b.name), threshold
            )
            for b in blocks
        }

    return AttentionReport(in_auto_axes(report, PartitionSpec())(*given))


def _head_report(block, kernels, maxima, gamma, keys, threshold) -> HeadReport:
    roles = (part for part in block.parts if part.role in _ROLES)
    numbers = _of_kernels({part.role: part.take(kernels[part.kernel]) for part in roles})
    maxima = functools.reduce(
        jnp.maximum, (fit_maxima(block.name, block.shape, each) for each in maxima)
    )
    return HeadReport(
        max_logits=maxima,
        gamma=gamma,
        query_norms=numbers.query_norms,
        key_norms=numbers.key_norms,
        ranks=numbers.ranks,
        key_participation_ratios=None if keys is None else participation_ratio(keys),
        exploding=jnp.isnan(maxima) | (maxima > threshold),
        dead=(jnp.abs(maxima) < _SILENT) & (numbers.reach < _SILENT),
    )


class _KernelNumbers(NamedTuple):
    query_norms: jax.Array
    key_norms: jax.Array
    ranks: jax.Array
    reach: jax.Array  # how large a logit inputs of RMS 1 can make


@jax.jit
def _of_kernels(pieces: Mapping[Role, jax.Array]) -> _KernelNumbers:
    """Of pieces `[stack..., heads, in, features]`, layer by layer."""
    stack = next(iter(pieces.values())).shape[:-3]
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[-3:]), pieces)
    numbers = jax.lax.map(_of_layer, flat)
    return jax.tree.map(lambda x: x.reshape(*stack, *x.shape[1:]), numbers)


def _of_layer(pieces: Mapping[Role, jax.Array]) -> _KernelNumbers:
    queries, keys = query_key_matrices(pieces)
    (r_q, scale_q), (r_k, scale_k) = factored(queries), factored(keys)
    group = len(queries) // len(keys)
    product = _matmul(r_q, jnp.repeat(r_k, group, axis=0).mT)
    scale = scale_q * jnp.repeat(scale_k, group, axis=0)
    inputs = math.sqrt(queries.shape[-2] * keys.shape[-2])
    return _KernelNumbers(
        query_norms=spectral_norm(r_q) * scale_q[:, 0],
        key_norms=spectral_norm(r_k) * scale_k[:, 0],
        ranks=effective_rank(product),
        reach=spectral_norm(product) * scale[:, 0] * inputs / math.sqrt(queries.shape[-1]),
    )


def query_key_matrices(pieces: Mapping[Role, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """W_q `[heads, in, features]` and W_k `[key heads, in, features]` of one layer's pieces."""

    def through(down, up):
        return _matmul(pieces[down], pieces[up]) if down in pieces else pieces[up]

    queries = [through("q_down", role) for role in QUERY_ROLES if role in pieces]
    keys = [through("kv_down", role) for role in KEY_ROLES if role in pieces]
    if "k_rope" in pieces:  # all heads share it
        keys.append(jnp.repeat(pieces["k_rope"], len(keys[0]), axis=0))
    return jnp.concatenate(queries, axis=-1), jnp.concatenate(keys, axis=-1)


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, **of_product(jnp.promote_types(a.dtype, jnp.float32)))


def layers(block: str, stack: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    """Index and name of every layer of a block."""
    for index in np.ndindex(stack):
        yield index, "/".join([block, *map(str, index)])


def _clip_state(opt_state: Any) -> QKClipState | None:
    is_clip = lambda node: isinstance(node, QKClipState)  # noqa: E731
    if not any(map(is_clip, jax.tree.leaves(opt_state, is_leaf=is_clip))):
        return None
    return qk_clip_state(opt_state)


def _max_logits(
    blocks: Sequence[Block], clip: QKClipState | None, intermediates: Any
) -> dict[str, list[jax.Array]]:
    """Each block's, one array for every module in it that sowed: from the forward pass, else from
    the last clip."""
    read_before = isinstance(intermediates, Mapping) and any(
        isinstance(key, tuple) for key in intermediates
    )
    if clip is None or read_before or _sowed(intermediates, MAX_LOGITS):
        found = _by_block(blocks, read_max_logits(intermediates))
    else:
        found = {name: [maxima] for name, maxima in clip.max_logits.items()}
    for block in blocks:
        if not found.get(block.name):
            raise ValueError(
                f"attention_report: {block.name} has query and key kernels but no max logits; "
                f"there are those of {', '.join(name for name in found if found[name]) or 'none'}. "
                "Sow them in that module (sow_max_logits, or sow_weights=True for Flax's "
                "attention), or leave the block out with the layout's block= pattern."
            )
    return found


def _keys(blocks: Sequence[Block], intermediates: Any) -> dict[str, jax.Array]:
    """Of the blocks that sowed any."""
    if not _sowed(intermediates, KEYS):
        return {}
    found = _by_block(blocks, read_activations(intermediates, KEYS))
    for block in blocks:
        for keys in found[block.name]:
            if keys.shape[:-2] not in (block.shape, (*block.stack, block.kv_heads)):
                raise ValueError(
                    f"attention_report: {block.name} sowed keys of shape {keys.shape} (heads "
                    f"first), but its kernels have {block.kv_heads} key heads"
                    f"{f' in stacked layers {block.stack}' if block.stack else ''}. Sow "
                    "[batch, length, heads, features], in each layer."
                )
        if len(found[block.name]) > 1:
            raise ValueError(
                f"attention_report: {len(found[block.name])} modules in {block.name} sowed "
                f"{KEYS}; sow once, under other names what else you want to read."
            )
    keys = {name: arrays[0] for name, arrays in found.items() if arrays}
    if not keys:
        raise ValueError(
            f"attention_report: the {KEYS} sown are in no block of the layout; it has "
            f"{', '.join(found)}."
        )
    return keys


def _sowed(intermediates: Any, name: str) -> bool:
    return any(path[-1:] == (name,) for path, _ in sown(intermediates))


def _by_block(
    blocks: Sequence[Block], values: Mapping[Path, jax.Array]
) -> dict[str, list[jax.Array]]:
    """What the modules of each block sowed; the innermost block around a module has it."""
    found: dict[str, list[jax.Array]] = {block.name: [] for block in blocks}
    for path, value in values.items():
        around = [b for b in blocks if path[: len(module_path(b.path))] == module_path(b.path)]
        if around:
            found[max(around, key=lambda block: len(block.path)).name].append(value)
    return found


def _range(values: np.ndarray | None) -> str:
    if values is None:
        return ""
    ends = [f"{end:.3g}" for end in (np.min(values), np.max(values))]
    return " … ".join(dict.fromkeys(ends))


def _flags(heads: HeadReport) -> str:
    named = ((flag.header, np.flatnonzero(getattr(heads, flag.field))) for flag in _FLAGS)
    return "; ".join(f"{name}: {', '.join(map(str, which))}" for name, which in named if len(which))
