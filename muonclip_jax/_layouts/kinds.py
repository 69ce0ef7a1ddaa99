"""The kinds of attention that models are built of, as layouts.

A projection is named by its path inside the attention block: a module with a `kernel`
(`q_proj`), or the parameter itself (`q_proj/w`).
"""

import itertools
import re
from typing import Any

from muonclip_jax._core.options import check_count, check_flag, check_pattern, check_text
from muonclip_jax._layouts.blocks import BlockPattern, Layout
from muonclip_jax._layouts.pieces import Piece
from muonclip_jax._layouts.roles import Role

# One projection, or those of several streams.
Projections = str | tuple[str, ...]


def mha(
    *,
    heads: int | None = None,
    query: Projections = "query",
    key: Projections | None = "key",
    value: Projections | None = "value",
    out: Projections | None = "out",
    transposed: bool | None = None,
    block: BlockPattern | None = None,
) -> Layout:
    """Multi-head attention: every query head has a key head of its own.

    Kernels are Flax's `[stack..., in, heads, features]`, or `[stack..., in, heads*features]` when
    `heads` is given; `out` is `[stack..., heads, features, out]`, or the first two flattened. The
    defaults fit `flax.linen.MultiHeadDotProductAttention` and `flax.nnx.MultiHeadAttention`.

    Args:
      heads: Number of heads, for flat kernels only.
      query: The query projection inside the block; of several streams that attend to one another
        all of them, as a tuple.
      key: The key projection, or several; None where the keys are another layer's: the queries then
        take all of a clip.
      value: The value projection, or several, or None to leave it to Muon's general routing.
      out: The projection back from the heads, likewise.
      transposed: Whether flat kernels are stored `[out, in]`, as `weight` in Equinox and PyTorch.
        None: they are `[in, out]`, and one called `weight` raises.
      block: Glob over block paths, several, or a function of a path, to take only some of the
        model's attention blocks.

    Raises:
      ValueError: A number of heads that is no whole number of at least 1.

    Example:
      >>> layout = mc.layouts.mha()  # Flax's own names
      >>> flat = mc.layouts.mha(heads=16, query="q_proj", key="k_proj", value="v_proj", out="o_proj")
      >>> both = mc.layouts.mha(query=("q", "q_txt"), key=("k", "k_txt"), value=None, out=None)
      >>> mc.layouts.find_blocks(layout, params)[0].heads
      2
    """  # noqa: E501
    _check_counts("mha", heads, heads)
    pieces = _separate("mha", query, key, value, out, heads, heads, transposed)
    return Layout("mha", pieces, block=block)


def gqa(
    kv_heads: int | None = None,
    *,
    heads: int | None = None,
    query: Projections = "query",
    key: Projections | None = "key",
    value: Projections | None = "value",
    out: Projections | None = "out",
    transposed: bool | None = None,
    block: BlockPattern | None = None,
) -> Layout:
    """Grouped-query attention; with `kv_heads=1`, multi-query attention.

    Query head `h` reads key head `h // (heads // kv_heads)`.

    Args:
      kv_heads: Number of key heads (the groups). None reads it from the key kernel's head
        axis; flat kernels need it.
      heads: Number of query heads, for flat kernels `[stack..., in, heads*features]` only.
      query: The query projection inside the block; of several streams that attend to one another
        all of them, as a tuple.
      key: The key projection, or several; None where the keys are another layer's: the queries then
        take all of a clip.
      value: The value projection, or several, or None to leave it to Muon's general routing.
      out: The projection back from the heads, likewise.
      transposed: Whether flat kernels are stored `[out, in]`, as `weight` in Equinox and PyTorch.
        None: they are `[in, out]`, and one called `weight` raises.
      block: Glob over block paths, several, or a function of a path, to take only some of the
        model's attention blocks.

    Raises:
      ValueError: Counts that do not go together.

    Example:
      >>> layout = mc.layouts.gqa(2, heads=8, query="q", key="k", value=None, out=None)
      >>> attn = {"q": {"kernel": jnp.ones((64, 8 * 16))}, "k": {"kernel": jnp.ones((64, 2 * 16))}}
      >>> block, = mc.layouts.find_blocks(layout, {"attn": attn})
      >>> block.heads, block.kv_heads
      (8, 2)
    """
    _check_counts("gqa", heads, kv_heads)
    if heads and not kv_heads and key is not None:
        raise ValueError(
            f"layouts.gqa: flat kernels (heads={heads}) do not tell how many key heads there are; "
            "give kv_heads=."
        )
    pieces = _separate("gqa", query, key, value, out, heads, kv_heads, transposed)
    return Layout("gqa", pieces, shared_keys=True, block=block)


def mla(
    nope: int,
    rope: int,
    v: int,
    *,
    heads: int | None = None,
    query: str | tuple[str, str] = ("wq_a", "wq_b"),
    key_value: tuple[str, str] = ("wkv_a", "wkv_b"),
    out: str | None = "wo",
    query_norm: str | None = None,
    key_value_norm: str | None = None,
    transposed: bool | None = None,
    block: BlockPattern | None = None,
) -> Layout:
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

    The query's up-projection holds `[q_nope | q_rope]` per head, the key/value up-projection
    `[k_nope | v]`, the key/value down-projection `[latent | k_rope]`. The rotary key is shared by
    all heads. Up-projections are `[stack..., in, heads, features]` or flat,
    `[stack..., in, heads*features]`; the number of heads follows from the sizes.

    Args:
      nope: Features per head without position, of query and key.
      rope: Rotary features per head; 0 where no positions enter (NoPE), and no key is shared.
      v: Value features per head.
      heads: Number of heads; only needed for flat, stacked kernels of a single head.
      query: The query's down- and up-projection; without query compression its only projection,
        `"wq"`.
      key_value: The down- and up-projection of keys and values.
      out: The projection back, `[stack..., heads*v, out]` or `[stack..., heads, v, out]`, or None
        to leave it to Muon's general routing.
      query_norm: The norm on the query latent, for QuacK's `rule="latent_norm"`.
      key_value_norm: The norm on the key/value latent, likewise.
      transposed: Whether flat kernels are stored `[out, in]`, as `weight` in Equinox and PyTorch.
        None: they are `[in, out]`, and one called `weight` raises.
      block: Glob over block paths, several, or a function of a path, to take only some of the
        model's attention blocks.

    Raises:
      ValueError: A size that is no whole number of at least 1 (`rope` of at least 0).

    Example:
      >>> layout = mc.layouts.mla(nope=128, rope=64, v=128)
      >>> [piece.role for piece in layout.pieces]
      ['q_nope', 'q_rope', 'k_nope', 'v', 'kv_down', 'k_rope', 'q_down', 'o']
    """
    for name, size, least in (("nope", nope, 1), ("rope", rope, 0), ("v", v, 1)):
        check_count(f"layouts.mla: {name}", size, least=least)
    _check_counts("mla", heads, None)
    query_down, query_up = (
        (None, query) if isinstance(query, str) else _both("query", query, "or one name")
    )
    key_value_down, key_value_up = _both("key_value", key_value)
    for name, value in (
        ("out", out),
        ("query_norm", query_norm),
        ("key_value_norm", key_value_norm),
    ):
        check_text(f"layouts.mla: {name}", value, optional=True)
    _check_weights("mla", transposed, query_down, query_up, *key_value, out)
    down = "features in" if transposed else "in features"
    told = {"heads": heads} if heads else {}

    def up(role: Role, projection: str, start: int, stop: int | None, features: int) -> Piece:
        sizes, axes = {"features": features, **told}, "(heads features) in" if transposed else None
        return Piece(role, projection, axes, sizes=sizes, select={"features": (start, stop)})

    pieces = [
        up("q_nope", query_up, 0, nope, nope + rope),
        up("q_rope", query_up, nope, None, nope + rope),
        up("k_nope", key_value_up, 0, nope, nope + v),
        up("v", key_value_up, nope, None, nope + v),
        Piece("kv_down", key_value_down, down, select={"features": (0, -rope or None)}),
        Piece("k_rope", key_value_down, down, select={"features": (-rope, None)}),
    ]
    if not rope:
        pieces = [piece for piece in pieces if not piece.role.endswith("rope")]
    if query_down is not None:
        pieces.append(Piece("q_down", query_down, down))
    if out is not None:
        back = "out (heads features)" if transposed else None
        pieces.append(Piece("o", out, back, sizes={"features": v, **told}))
    if query_norm is not None:
        pieces.append(Piece("q_gain", f"{query_norm}/scale", "features"))
    if key_value_norm is not None:
        pieces.append(Piece("kv_gain", f"{key_value_norm}/scale", "features"))
    return Layout("mla", tuple(pieces), block=block)


def fused_qkv(
    heads: int,
    kv_heads: int | None = None,
    *,
    kernel: str = "qkv",
    axes: str | None = None,
    out: str | None = "out",
    block: BlockPattern | None = None,
) -> Layout:
    """One kernel for queries, keys and values.

    | kernel | `axes` |
    | --- | --- |
    | `[in, 3*heads*features]`, all queries, all keys, all values | `"in (part heads features)"` |
    | `[in, heads*3*features]`, the three of each head together | `"in (heads part features)"` |
    | `[3*heads*features, in]`, as in Hugging Face's Flax GPT-2 | `"(part heads features) in"` |
    | `[in, 3, heads, features]` | `"in part heads features"` |
    | `[3, heads, in, features]` | `"part heads in features"` |
    | `[in, 3*heads, features]` | `"in (part heads) features"` |

    With fewer key heads the fused axis has `(heads + 2*kv_heads)*features` entries: all queries,
    all keys, all values; or, where `heads` comes before `part`, for each key head its queries, the
    key and the value.

    Args:
      heads: Number of query heads.
      kv_heads: Number of key heads, if fewer; then `part` and `heads` must share an axis.
      kernel: The fused projection inside the block.
      axes: How its axes lie; leading axes in front of these are stack axes. None is the first of
        the table, and raises for a kernel called `weight`, which may be `[out, in]`.
      out: The projection back from the heads, or None to leave it to Muon's general routing. Its
        axes are those of `kernel`, turned around: `[heads*features, out]`, where `kernel` is
        transposed `[out, heads*features]`, or `[heads, features, out]`.
      block: Glob over block paths, several, or a function of a path, to take only some of the
        model's attention blocks.

    Raises:
      ValueError: Counts that do not go together, or axes without `part` and `heads`.

    Example:
      >>> layout = mc.layouts.fused_qkv(8, kernel="qkv", out=None)
      >>> rows = mc.describe({"attn": {"qkv": {"kernel": jnp.ones((64, 3 * 64))}}}, layout)
      >>> [str(each) for each in rows[0].matrices]
      ['q 8 × [64, 8]', 'k 8 × [64, 8]', 'v 8 × [64, 8]']
    """
    check_count("layouts.fused_qkv: heads", heads)
    _check_counts("fused_qkv", heads, kv_heads)
    check_text("layouts.fused_qkv: kernel", kernel)
    check_text("layouts.fused_qkv: out", out, optional=True)
    if axes is None:
        axes = "in (part heads features)"
        if kernel.split("/")[-1] == "weight":
            raise ValueError(
                f"layouts.fused_qkv: {kernel} may be [in, out], or [out, in] as in Equinox and "
                f"PyTorch; say axes={axes!r} or axes='(part heads features) in'."
            )
    if not isinstance(axes, str) or not re.search(r"\b(part heads|heads part)\b", axes):
        raise ValueError(
            f"layouts.fused_qkv: axes={axes!r} must have 'part' (query, key or value) next to "
            "'heads', such as 'in (part heads features)' or 'part heads in features'."
        )
    if kv_heads is None or kv_heads == heads:
        # Parts of queries, keys and values are alike: 0, 1, 2.
        ends, fused, sizes = range(4), "part", {"part": 3, "heads": heads}
    elif "(part heads" in axes:
        # [all queries | all keys | all values]: slots of one head each.
        ends, fused = (0, heads, heads + kv_heads, heads + 2 * kv_heads), "slots"
        axes, sizes = axes.replace("part heads", fused), {fused: ends[-1]}
    elif "(heads part" in axes:
        # For each key head [its queries | the key | the value].
        group, fused = heads // kv_heads, "slots"
        ends = (0, group, group + 1, group + 2)
        axes = axes.replace("heads part", f"groups {fused}")
        sizes = {"groups": kv_heads, fused: ends[-1]}
    else:
        raise ValueError(
            f"layouts.fused_qkv: {heads} query and {kv_heads} key heads cannot share a kernel "
            f"whose parts have an axis of their own, axes={axes!r}."
        )
    roles: tuple[Role, ...] = ("q", "k", "v")
    pieces = [
        Piece(role, kernel, axes, sizes=sizes, select={fused: cut})
        for role, cut in zip(roles, itertools.pairwise(ends), strict=True)
    ]
    if out is not None:
        pieces.append(Piece("o", out, _turned_around(axes), sizes={"heads": heads}))
    shared = kv_heads not in (None, heads)
    return Layout("fused_qkv", tuple(pieces), shared_keys=shared, block=block)


def linear_attention(
    heads: int,
    value_heads: int | None = None,
    *,
    query: str = "q_proj",
    key: str = "k_proj",
    value: str = "v_proj",
    gate: str | None = None,
    out: str | None = "o_proj",
    block: BlockPattern | None = None,
) -> Layout:
    """Linear attention: KDA of Kimi Linear (arXiv 2510.26692), Gated DeltaNet (arXiv 2412.06464).

    Its queries and keys meet in no softmax, so it has no max logits and nothing to clip: clips,
    QuacK and the report pass over it and ask for no sown values. Muon takes one matrix a head.
    Kernels are flat, `[stack..., in, heads*features]`, and `out` `[stack..., heads*features, out]`.

    Args:
      heads: Number of query and key heads.
      value_heads: Number of value heads, if more; those of the gate and of `out` are as many.
      query: The query projection inside the block.
      key: The key projection.
      value: The value projection.
      gate: The projection to the gate of the heads' output, or None to leave it to Muon's general
        routing. (Of a gate through a narrow latent, `g_a_proj` and `g_b_proj`, the second.)
      out: The projection back from the heads, or None likewise.
      block: Glob over block paths, several, or a function of a path, to take only some of the
        model's attention blocks.

    Raises:
      ValueError: Numbers of heads that are no whole numbers of at least 1, or do not go together.

    Example:
      >>> layout = mc.layouts.linear_attention(4, gate="g_b_proj", block="layers/*/kda")
      >>> [piece.role for piece in layout.pieces]
      ['q', 'k', 'v', 'gate', 'o']
    """
    check_count("layouts.linear_attention: heads", heads)
    of_values = heads if value_heads is None else value_heads
    check_count("layouts.linear_attention: value_heads", of_values)
    if of_values % heads:
        raise ValueError(
            f"layouts.linear_attention: {of_values} value heads cannot share {heads} key heads "
            "evenly; value_heads must be a multiple of heads."
        )
    for name, projection in (("query", query), ("key", key), ("value", value)):
        check_text(f"layouts.linear_attention: {name}", projection)
    rows: list[tuple[Role, str | None, str, int]] = [
        ("q", query, "in (heads features)", heads),
        ("k", key, "in (heads features)", heads),
        ("v", value, "in (heads features)", of_values),
        ("gate", gate, "in (heads features)", of_values),
        ("o", out, "(heads features) out", of_values),
    ]
    check_text("layouts.linear_attention: gate", gate, optional=True)
    check_text("layouts.linear_attention: out", out, optional=True)
    pieces = tuple(
        Piece(role, name, axes, sizes={"heads": count})
        for role, name, axes, count in rows
        if name is not None
    )
    return Layout("linear_attention", pieces, block=block, softmax=False)


def _turned_around(axes: str) -> str:
    """The axes of the projection back from the heads."""
    if not re.search(r"\([^)]*features\)", axes):
        return "heads features out"
    return "out (heads features)" if axes.endswith(" in") else "(heads features) out"


def ignore(block: BlockPattern) -> Layout:
    """Attention to be left alone: no clip, no QuacK, Muon by its general routing.

    For use beside other layouts, `[layouts.mha(block="decoder/*"), layouts.ignore("encoder/*")]`.

    Args:
      block: Glob over block paths, several, or a function of a path.

    Example:
      >>> mc.qk_clip([mc.layouts.mha(block="attn"), mc.layouts.ignore("other")]).init is not None
      True
    """
    check_pattern("layouts.ignore: block", block)
    return Layout("ignore", (), block=block)


def _both(name: str, names: Any, beside: str = "") -> tuple[str, str]:
    """A down- and an up-projection."""
    if not isinstance(names, tuple) or len(names) != 2:
        raise TypeError(
            f"layouts.mla: {name} must be text for the down- and for the up-projection, "
            f'("a", "b"){beside and ", "}{beside}, got {names!r}.'
        )
    for one in names:
        check_text(f"layouts.mla: {name}", one)
    return names


def _separate(
    kind: str,
    query: Projections,
    key: Projections | None,
    value: Projections | None,
    out: Projections | None,
    heads: int | None,
    kv_heads: int | None,
    transposed: bool | None,
) -> tuple[Piece, ...]:
    """A projection each, or several; flat when the query heads are told."""
    queries, keys, values, outs = (
        _several(f"layouts.{kind}: {name}", given, optional=name != "query")
        for name, given in (("query", query), ("key", key), ("value", value), ("out", out))
    )
    _check_weights(kind, transposed, *((*queries, *keys, *values, *outs) if heads else ()))
    if transposed and not heads:
        raise ValueError(
            f"layouts.{kind}: transposed=True is for flat kernels [heads*features, in]; give "
            "heads=, or write the axes down: Piece(role, parameter, axes)."
        )
    features = "(heads features)" if heads else "heads features"
    axes, back = f"in {features}", f"{features} out"
    if transposed:
        axes, back = f"{features} in", f"out {features}"
    own = {"heads": heads} if heads else {}
    shared = {"heads": kv_heads} if kv_heads else {}
    return (
        *(Piece("q", name, axes, sizes=own) for name in queries),
        *(Piece("k", name, axes, sizes=shared) for name in keys),
        *(Piece("v", name, axes, sizes=shared) for name in values),
        *(Piece("o", name, back, sizes=own) for name in outs),
    )


def _several(owner: str, given: Projections | None, optional: bool) -> tuple[str, ...]:
    """One projection or several; none where that may be."""
    if given is None and optional:
        return ()
    names = (given,) if isinstance(given, str) else given
    right = isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)
    if not names or not right:
        wanted = f"text, or several as a tuple{', or None' * optional}"
        raise TypeError(f"{owner} must be {wanted}, got {given!r}.")
    return tuple(names)


def _check_weights(kind: str, transposed: bool | None, *parameters: str | None) -> None:
    """Shapes do not tell `[in, out]` from `[out, in]`: both are as long, or nothing says which."""
    if transposed is not None:
        check_flag(f"layouts.{kind}: transposed", transposed)
    for parameter in parameters:
        if transposed is None and parameter is not None and parameter.split("/")[-1] == "weight":
            raise ValueError(
                f"layouts.{kind}: {parameter} may be [in, out], or [out, in] as in Equinox and "
                "PyTorch, and its shape need not tell; say transposed=False or transposed=True."
            )


def _check_counts(kind: str, heads: int | None, kv_heads: int | None) -> None:
    for name, count in (("heads", heads), ("kv_heads", kv_heads)):
        if count is not None:
            check_count(f"layouts.{kind}: {name}", count)
    if heads and kv_heads and heads % kv_heads:
        raise ValueError(
            f"layouts.{kind}: {heads} query heads cannot share {kv_heads} key heads evenly; heads "
            "must be a multiple of kv_heads."
        )
