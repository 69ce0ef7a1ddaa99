"""Known models: what their attention calls its projections and how it stores them.

An entry of `FAMILIES` is one spelling. It reads a module by names and shapes alone, and gives the
layout, or says which number the shapes do not tell (`Ask`), or that the module is none of its own.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from muonclip_jax._layouts.blocks import Layout
from muonclip_jax._layouts.kinds import fused_qkv, linear_attention, mla
from muonclip_jax._layouts.pieces import Part, Piece
from muonclip_jax._layouts.roles import Role

Shape = tuple[int, ...]
Inside = Mapping[str, Shape]
"""A module's parameters by their paths inside of it, `q_proj/kernel`."""


class Ask(NamedTuple):
    """Flat kernels: nothing in their shapes tells how many heads they hold.

    Attributes:
      queries: All heads' query features, `heads * features`.
      keys: All key heads' features.
      stack_axis: Where the kernels have stack axes, if they have any.
    """

    queries: int
    keys: int
    stack_axis: int


HeadSize = Callable[[Ask], int | None]
"""How many features a head has, where something tells it."""


class Storage(NamedTuple):
    """How separate projections lie; values lie as keys do."""

    query: str
    key: str
    out: str

    @property
    def flat(self) -> bool:
        """Whether heads and features share an axis, so that shapes do not tell the heads."""
        return "(heads features)" in self.query


HEADED = Storage("in heads features", "in heads features", "heads features out")
FLAT_OUT = HEADED._replace(out="(heads features) out")
FLAT = Storage("in (heads features)", "in (heads features)", "(heads features) out")
HEADS_IN_FRONT = Storage("heads in features", "heads in features", "heads features out")
# Equinox and PyTorch, and Haliax with its named axes.
TRANSPOSED = Storage("(heads features) in", "(heads features) in", "out (heads features)")
OUT_FIRST = Storage("heads features in", "heads features in", "out heads features")
GROUPED_OUT_FIRST = OUT_FIRST._replace(query="groups slots features in")
GROUPED = HEADED._replace(query="in groups slots features")

KERNELS = (HEADED, FLAT_OUT, FLAT)
WEIGHTS = (GROUPED_OUT_FIRST, OUT_FIRST, GROUPED, HEADED, TRANSPOSED, FLAT)

# Parameters of the attention module itself that are biases of one of its projections.
_BIASES: dict[Role, str] = {"q": "q_bias", "k": "k_bias", "v": "v_bias"}


@dataclass(frozen=True)
class Separate:
    """Queries, keys and values in a projection each.

    Attributes:
      models: Whose spelling this is.
      query: The query projection: a module with a `kernel`, `w` or `weight`, or the parameter.
      key: The key projection.
      value: The value projection; None: the keys are the values.
      out: The projection back.
      beside: Modules or parameters in the same module that tell this family apart.
      storages: How it may lie; the first that all shapes fit is taken.
      weights: The same for projections whose parameter is called `weight`.
      heads_in: A parameter anywhere in the model, `[..., heads]`, that tells the heads.
    """

    models: str
    query: str = "query"
    key: str = "key"
    value: str | None = "value"
    out: str = "out"
    beside: tuple[str, ...] = ()
    storages: tuple[Storage, ...] = KERNELS
    weights: tuple[Storage, ...] = WEIGHTS
    heads_in: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The projections."""
        return tuple(filter(None, (self.query, self.key, self.value, self.out)))

    def readings(self, inside: Inside, size: HeadSize) -> Iterator[Layout | Ask]:
        """What a module with these names can be, the likeliest first."""
        weights = parameter(self.query, inside).endswith("/weight")
        fits = [
            (storage, axis, parts)
            for storage in (self.weights if weights else self.storages)
            for axis in (0, 1)
            if (parts := self._fit(storage, axis, inside)) is not None
        ]
        # Keys of another width are those of attention to something else.
        fits = [fit for fit in fits if fit[2]["q"].ins == fit[2]["k"].ins] or fits
        if not {FLAT, TRANSPOSED} <= {storage for storage, *_ in fits}:
            for storage, axis, parts in fits:
                yield self._reading(storage, axis, parts, inside, size)

    def _reading(
        self,
        storage: Storage,
        axis: int,
        parts: Mapping[Role, Part],
        inside: Inside,
        size: HeadSize,
    ) -> Layout | Ask:
        query, key, out = parts["q"], parts["k"], parts["o"]
        heads, kv_heads, features = query.heads, key.heads, key.features
        if storage.flat:
            ask = Ask(width(out), width(key), axis)
            told = size(ask)
            if told is None:
                return ask
            features = told
            heads, kv_heads = ask.queries // features, ask.keys // features
        kind = "mha" if heads == kv_heads else "gqa"
        pieces = self.pieces(storage, inside, heads, kv_heads)
        if _is_gated(storage, parts):
            kind, pieces = "gated", _with_gate(pieces, features)
        return Layout(kind, pieces, shared_keys=kind != "mha", stack_axis=axis)

    def pieces(
        self, storage: Storage, inside: Inside, heads: int, kv_heads: int
    ) -> tuple[Piece, ...]:
        """What a module with these names holds, without a gate."""
        rows: list[tuple[Role, str | None, str, int]] = [
            ("q", self.query, storage.query, heads),
            ("k", self.key, storage.key, kv_heads),
            ("v", self.value, storage.key, kv_heads),
            ("o", self.out, storage.out, heads),
        ]
        return tuple(
            Piece(
                role,
                layout_name(name, inside),
                axes,
                sizes={"heads": count} if "(heads" in axes else {},
                bias=_BIASES[role] if _BIASES.get(role) in inside else None,
            )
            for role, name, axes, count in rows
            if name is not None
        )

    def _fit(self, storage: Storage, axis: int, inside: Inside) -> dict[Role, Part] | None:
        """The parts, flat ones as a single head, if all lengths go together."""
        parts = fit(self.pieces(storage, inside, 1, 1), inside, axis)
        if not parts:
            return None
        query, key, out = parts["q"], parts["k"], parts["o"]
        value = parts.get("v", key)
        gates = 2 if _is_gated(storage, parts) else 1
        if storage.flat:
            together = width(query) == gates * width(out) and not width(out) % width(key)
            together &= width(key) == width(value) and query.ins == out.matrix[1]
        else:
            together = query.features == gates * key.features and not query.heads % key.heads
            together &= key.heads == value.heads and width(out) == query.heads * value.features
            together &= out.features in (value.features, width(out))
        return parts if together and key.ins == value.ins else None


def _is_gated(storage: Storage, parts: Mapping[Role, Part]) -> bool:
    """Whether each head's query has beside it the gate of its output, as in Qwen3-Next."""
    query, key, out = parts["q"], parts["k"], parts["o"]
    if storage.flat:
        return width(query) == 2 * width(out)
    return query.features == 2 * key.features


def _with_gate(pieces: Sequence[Piece], features: int) -> tuple[Piece, ...]:
    query, *others = pieces
    query = replace(query, sizes=dict(query.sizes) | {"features": 2 * features})
    return (
        replace(query, select={"features": (0, features)}),
        replace(query, role="gate", select={"features": (features, None)}),
        *others,
    )


@dataclass(frozen=True)
class Written:
    """Attention of which every head has an axis of its own: a layout without sizes fits all.

    Attributes:
      models: Whose spelling this is.
      layout: The layout.
    """

    models: str
    layout: Layout
    beside: tuple[str, ...] = ()
    heads_in: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The projections."""
        return tuple(dict.fromkeys(piece.parameter for piece in self.layout.pieces))

    def readings(self, inside: Inside, size: HeadSize) -> Iterator[Layout | Ask]:
        """What a module with these names can be, the likeliest first."""
        for axis in (0, 1):
            parts = fit(self.layout.pieces, inside, axis)
            if not parts:
                continue
            query, key, out = parts["q"], parts["k"], parts["o"]
            value = parts.get("v", key)
            together = (query.features, key.heads) == (key.features, value.heads)
            together &= (query.heads, value.features) == (out.heads, out.features)
            if together and not query.heads % key.heads:
                yield replace(self.layout, stack_axis=axis)


@dataclass(frozen=True)
class Fused:
    """Queries, keys and values in one kernel, of which the model's source says how they lie.

    Attributes:
      models: Whose spelling this is.
      kernel: The fused projection.
      out: The projection back.
      axes: Its axes, as in `fused_qkv`; the first that the shapes fit are taken.
    """

    models: str
    kernel: str
    out: str
    axes: tuple[str, ...]
    beside: tuple[str, ...] = ()
    heads_in: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The projections."""
        return (self.kernel, self.out)

    def readings(self, inside: Inside, size: HeadSize) -> Iterator[Layout | Ask]:
        """What a module with these names can be, the likeliest first."""
        found = (
            self._read(axes, stack_axis, inside, size)
            for axes in self.axes
            for stack_axis in (0, 1)
        )
        return filter(None, found)

    def _read(self, axes: str, stack_axis: int, inside: Inside, size: HeadSize):
        headed = axes.endswith(" features")
        rank = 3 if headed else 2
        own = without_stack((self.kernel, self.out), (rank, rank), stack_axis, inside)
        if own is None:
            return None
        kernel, out = own
        if axes.endswith(" in"):
            kernel, out = kernel[::-1], out[::-1]
        queries, both = out[0], kernel[1] - out[0]
        if kernel[0] != out[-1] or both <= 0 or both % 2 or queries % (both // 2):
            return None
        if headed:
            heads, kv_heads = queries, both // 2
            if kernel[2] != out[1]:
                return None
        else:
            ask = Ask(queries, both // 2, stack_axis)
            features = size(ask)
            if features is None:
                return ask
            heads, kv_heads = ask.queries // features, ask.keys // features
        layout = fused_qkv(
            heads,
            None if heads == kv_heads else kv_heads,
            kernel=layout_name(self.kernel, inside),
            axes=axes,
            out=layout_name(self.out, inside),
        )
        return replace(layout, stack_axis=stack_axis)


@dataclass(frozen=True)
class Latent:
    """Multi-head latent attention: all sizes follow from the shapes of its five projections.

    Attributes:
      models: Whose spelling this is.
      queries: The query's down- and up-projection, and its only one where it is not compressed.
      key_value: The down- and up-projection of keys and values.
      out: The projection back.
      norms: The norms on the query and on the key/value latent.
    """

    models: str
    queries: tuple[tuple[str, ...], ...]
    key_value: tuple[str, str]
    out: str
    norms: tuple[str, str]
    beside: tuple[str, ...] = ()
    heads_in: str | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The projections that all have."""
        return (*self.key_value, self.out)

    def readings(self, inside: Inside, size: HeadSize) -> Iterator[Layout | Ask]:
        """What a module with these names can be, the likeliest first."""
        query = next((each for each in self.queries if holds(each, inside)), None)
        if query is None:
            return iter(())
        weights = parameter(self.out, inside).endswith("/weight")
        # Ranks of down- and up-projections and of `out`; where stack axes are; whether [out, in].
        ways = itertools.product(
            ((2, 3, 3), (2, 3, 2), (2, 2, 2)), (0, 1), (False, True)[: 1 + weights]
        )
        return filter(None, (self._read(query, *way, inside, size) for way in ways))

    def _read(
        self,
        query: tuple[str, ...],
        ranks: Shape,
        stack_axis: int,
        turned: bool,
        inside: Inside,
        size: HeadSize,
    ) -> Layout | Ask | None:
        """The layout, if kernels have these ranks and orientation."""
        names = (*query, *self.names)
        own = without_stack(names, (*ranks[:2][-len(query) :], *ranks), stack_axis, inside)
        if own is None:
            return None
        *downs, up, kv_down, kv_up, out = (shape[::-1] if turned else shape for shape in own)
        latents = [(down[1], up[0]) for down in downs]
        widths = {(downs or [up])[0][0], kv_down[0], out[-1]}
        rope = kv_down[1] - kv_up[0]
        if any(one != other for one, other in latents) or len(widths) > 1 or rope < 0:
            return None
        sizes = _latent_sizes(up[1:], kv_up[1:], out[:-1], rope, stack_axis, size)
        if sizes is None or isinstance(sizes, Ask):
            return sizes
        heads, nope, value = sizes
        *query_names, key_value_down, key_value_up, back = (layout_name(n, inside) for n in names)
        layout = mla(
            nope,
            rope,
            value,
            heads=heads if len(kv_up) == 2 else None,
            query=(query_names[0], query_names[1]) if downs else query_names[0],
            key_value=(key_value_down, key_value_up),
            out=back,
            transposed=turned or None,
        )
        gains = self._gains(bool(downs), inside)
        return replace(layout, pieces=(*layout.pieces, *gains), stack_axis=stack_axis)

    def _gains(self, compressed: bool, inside: Inside) -> Iterator[Piece]:
        roles: tuple[Role, ...] = ("q_gain", "kv_gain")
        for role, norm in list(zip(roles, self.norms, strict=True))[not compressed :]:
            for leaf in ("scale", "kernel", "weight"):
                if f"{norm}/{leaf}" in inside:
                    yield Piece(role, f"{norm}/{leaf}", "features")


Family = Separate | Written | Fused | Latent


@dataclass(frozen=True)
class Linear:
    """Linear attention with flat projections. `A_log`, one number a head, tells its heads, and the
    norm behind them how long a value is.

    Attributes:
      models: Whose spelling this is.
      names: The query, key, value and output projections.
      gate: The projection to the outputs' gate.
      norm: The norm on the heads' outputs.
    """

    models: str
    names: tuple[str, str, str, str]
    gate: str
    norm: str

    def read(self, inside: Inside) -> Layout | None:
        """The layout of a module with these names."""
        gates = [self.gate] if holds([self.gate], inside) else []
        names = (*self.names, *gates)
        for axis in (0, 1):
            own = without_stack(names, (2,) * len(names), axis, inside)
            heads, size = _decays_and_size(self.names[0], self.norm, axis, inside)
            if own is None or not heads:
                continue
            query, key, value, out, *gate = own
            together = query == key and out == value[::-1] and all(g[1] == value[1] for g in gate)
            if together and not query[1] % heads and value[1] == heads * size:
                query_name, key_name, value_name, out_name, *gate_name = (
                    layout_name(name, inside) for name in names
                )
                layout = linear_attention(
                    heads,
                    query=query_name,
                    key=key_name,
                    value=value_name,
                    gate=gate_name[0] if gate_name else None,
                    out=out_name,
                )
                return replace(layout, stack_axis=axis)
        return None


@dataclass(frozen=True)
class LinearFused:
    """Gated DeltaNet with one kernel, `[query | key | values | gates]` of each key head.

    No shape tells how long a key is. It is read as long as a value where the kernel's width allows
    that: so they are in each published model (128, in Qwen3-Next).

    Attributes:
      models: Whose spelling this is.
      names: The fused projection and the projection back.
      norm: The norm on the heads' outputs.
    """

    models: str
    names: tuple[str, str]
    norm: str

    def read(self, inside: Inside) -> Layout | None:
        """The layout of a module with these names."""
        for axis in (0, 1):
            own = without_stack(self.names, (2, 2), axis, inside)
            heads, size = _decays_and_size(self.names[0], self.norm, axis, inside)
            if own is None or not heads or not size:
                continue
            kernel, out = own
            keys, rest = divmod(kernel[1] - 2 * out[0], 2 * size)
            if out == (heads * size, kernel[0]) and keys > 0 and not rest and not heads % keys:
                pieces = self._pieces(keys, heads, inside)
                return Layout("linear_attention", pieces, stack_axis=axis, softmax=False)
        return None

    def _pieces(self, keys: int, heads: int, inside: Inside) -> tuple[Piece, ...]:
        values = heads // keys
        ends = (0, 1, 2, 2 + values, 2 + 2 * values)
        sizes = {"groups": keys, "slots": ends[-1]}
        roles: tuple[Role, ...] = ("q", "k", "v", "gate")
        fused, out = (layout_name(name, inside) for name in self.names)
        pieces = [
            Piece(role, fused, "in (groups slots features)", sizes, {"slots": cut})
            for role, cut in zip(roles, itertools.pairwise(ends), strict=True)
        ]
        return (*pieces, Piece("o", out, "(heads features) out", {"heads": heads}))


def _decays_and_size(kernel: str, norm: str, stack_axis: int, inside: Inside) -> tuple[int, int]:
    """How many heads `A_log` has, and how long the gain of the norm behind them is; 0 for none."""
    depth = len(inside[parameter(kernel, inside)]) - 2

    def length(name: str) -> int:
        found = [shape for path, shape in inside.items() if f"{path}/".startswith(f"{name}/")]
        own = [(*shape[:stack_axis], *shape[stack_axis + depth :]) for shape in found]
        return math.prod(own[0]) if len(own) == 1 else 0

    return length("A_log"), length(norm)


def read(family: Family, inside: Inside, size: HeadSize) -> Layout | Ask | None:
    """The layout of a module with these names, if its shapes fit."""
    return next(iter(family.readings(inside, size)), None)


def _latent_sizes(
    query: Shape, key_value: Shape, out: Shape, rope: int, stack_axis: int, size: HeadSize
) -> tuple[int, int, int] | Ask | None:
    """Heads, nope and value features. `[heads, features]` or `[heads*features]` of each."""
    if len(key_value) == 2:
        heads = key_value[0]
        value, rest = (out[1], 0) if len(out) == 2 else divmod(out[0], heads)
        nope = key_value[1] - value
        if rest or query != (heads, nope + rope) or out[0] not in (heads, heads * value):
            return None
    else:
        # Q = heads (nope + rope), KV = heads (nope + value), O = heads value.
        all_nope = key_value[0] - out[0]
        all_rope = query[0] - all_nope
        if not rope and not all_rope and all_nope > 0:
            ask = Ask(query[0], all_nope, stack_axis)
            nope = size(ask)
            if nope is None:
                return ask
            heads = all_nope // nope
        elif not rope or all_rope % rope or (heads := all_rope // rope) < 1:
            return None
        if all_nope % heads or out[0] % heads:
            return None
        nope, value = all_nope // heads, out[0] // heads
    return (heads, nope, value) if min(heads, nope, value) > 0 else None


def width(part: Part) -> int:
    """The features of all heads."""
    return part.heads * part.features


def parameter(name: str, inside: Inside) -> str:
    """The path, inside the block, of the parameter of a projection; empty if there is none."""
    candidates = (f"{name}/kernel", f"{name}/w", f"{name}/weight", name)
    return next((each for each in candidates if len(inside.get(each, ())) >= 2), "")


def holds(names: Sequence[str], inside: Inside) -> bool:
    """Whether a module has all these projections."""
    return all(parameter(name, inside) for name in names)


def layout_name(name: str, inside: Inside) -> str:
    """How a layout names it: a module for the `kernel` in it, else the parameter."""
    return parameter(name, inside).removesuffix("/kernel")


def fit(pieces: Sequence[Piece], inside: Inside, stack_axis: int) -> dict[Role, Part] | None:
    """The parts by role; None where a shape does not fit, or stacks differ."""
    parts: dict[Role, Part] = {}
    for piece in pieces:
        path = next(leaf for leaf in piece.leaves if "/".join(leaf) in inside)
        try:
            parts[piece.role] = piece.fit(path, inside["/".join(path)], stack_axis=stack_axis)
        except ValueError:
            return None
    stacks = {part.stack for part in parts.values()}
    return parts if len(stacks) == 1 and (not stack_axis or any(stacks)) else None


def without_stack(
    names: Sequence[str], ranks: Sequence[int], stack_axis: int, inside: Inside
) -> list[Shape] | None:
    """The shapes of projections of these ranks without stack axes, of which all have the same."""
    shapes = [inside[parameter(name, inside)] for name in names]
    depths = {len(shape) - rank for shape, rank in zip(shapes, ranks, strict=True)}
    depth = depths.pop()
    cut = slice(stack_axis, stack_axis + depth)
    alike = not depths and len({shape[cut] for shape in shapes}) == 1
    if not alike or depth < 0 or (stack_axis and not depth):
        return None
    return [(*shape[:stack_axis], *shape[stack_axis + depth :]) for shape in shapes]


# Which keys and values are in a parameter, or queries too, by the index on its first axis.
_PARTS = "part heads in features"
_GEMMA_OUT = Piece("o", "attn_vec_einsum/w", "heads features out")
_GEMMA_QUERY = Piece("q", "q_einsum/w", "heads in features")
_GEMMA_KEYS = Layout(
    "gemma",
    (_GEMMA_QUERY, Piece("k", "k_einsum/w", "heads in features"), _GEMMA_OUT),
    shared_keys=True,
)


def _parts(parameter: str, axes: str, *roles: Role) -> tuple[Piece, ...]:
    """Pieces of one parameter that has an axis for what is what."""
    sizes = {"part": len(roles)}
    return tuple(
        Piece(role, parameter, axes, sizes, {"part": index}) for index, role in enumerate(roles)
    )


FAMILIES: tuple[Family, ...] = (
    Separate("Flax's attention, Linen and NNX; MaxText; T5X"),
    Separate("nanodo", out="attn_out_proj"),
    Separate("Llama, Mistral, Qwen", "q_proj", "k_proj", "v_proj", "o_proj"),
    Separate("OPT, BART, Whisper, CLIP, GPT-J", "q_proj", "k_proj", "v_proj", "out_proj"),
    Separate("LLaDA in bonsai", "q_proj", "k_proj", "v_proj", "attn_out"),
    Separate("Llama, as Meta wrote it", "wq", "wk", "wv", "wo"),
    Separate("T5", "q", "k", "v", "o", heads_in="relative_attention_bias/embedding"),
    Separate("BERT, RoBERTa", "self/query", "self/key", "self/value", "output/dense"),
    Separate("ViT", "attention/query", "attention/key", "attention/value", "output/dense"),
    Separate("ALBERT", out="dense"),
    Separate("V-JEPA 2 in bonsai", out="proj"),
    Separate("DistilBERT", "q_lin", "k_lin", "v_lin", "out_lin"),
    Separate("SigLIP in Tunix", "query_proj", "key_proj", "value_proj", "out_proj"),
    Separate(
        "Equinox", "query_proj", "key_proj", "value_proj", "output_proj", weights=(TRANSPOSED,)
    ),
    Written(
        "Gemma 1 to 4",
        Layout(
            "gemma",
            (_GEMMA_QUERY, *_parts("kv_einsum/w", _PARTS, "k", "v"), _GEMMA_OUT),
            shared_keys=True,
        ),
    ),
    Written(
        "Gemma, as many key heads",
        Layout("gemma", (*_parts("qkv_einsum/w", _PARTS, "q", "k", "v"), _GEMMA_OUT)),
    ),
    Written("Gemma 4 of DeepMind, keys are values", _GEMMA_KEYS, beside=("key_norm",)),
    Written("Gemma 4 in Tunix, keys are values", _GEMMA_KEYS, beside=("_key_norm",)),
    Separate("Gemma 4 in MaxText, keys are values", value=None, beside=("key_norm",)),
    Fused("MaxText, fused", "qkv_proj", "out", ("in (part heads) features",)),
    Written(
        "GPT-3 in MaxText",
        Layout(
            "gpt3",
            (
                *_parts("qkv_proj", "in part heads features", "q", "k", "v"),
                Piece("o", "out", "heads features out"),
            ),
        ),
    ),
    Fused("GPT-2", "c_attn", "c_proj", ("(part heads features) in", "in (part heads features)")),
    Written(
        "GPT-2 in Levanter",
        Layout(
            "gpt2",
            (
                *_parts("c_attn/weight", "in part heads features", "q", "k", "v"),
                Piece("o", "c_proj/weight", "heads features out"),
            ),
        ),
    ),
    Fused("Phi 3", "qkv_proj", "o_proj", ("in (part heads features)",)),
    Fused("MPT, DBRX", "Wqkv", "out_proj", ("in (part heads features)",)),
    Fused("vision of Qwen 3 VL", "qkv", "proj", ("in (part heads features)",)),
    Fused("GPT-NeoX, BLOOM, Falcon", "query_key_value", "dense", ("in (heads part features)",)),
    Fused("InternLM 2", "wqkv", "wo", ("in (heads part features)",)),
    Latent(
        "DeepSeek V2 and V3, Kimi K2 in MaxText",
        (("wq_a", "wq_b"), ("query",)),
        ("wkv_a", "wkv_b"),
        "out",
        ("q_norm", "kv_norm"),
    ),
    Latent(
        "DeepSeek V3, as published",
        (("wq_a", "wq_b"), ("wq",)),
        ("wkv_a", "wkv_b"),
        "wo",
        ("q_norm", "kv_norm"),
    ),
    Latent(
        "DeepSeek, GLM 5, Kimi Linear",
        (("q_a_proj", "q_b_proj"), ("q_proj",)),
        ("kv_a_proj_with_mqa", "kv_b_proj"),
        "o_proj",
        ("q_a_layernorm", "kv_a_layernorm"),
    ),
)
"""The first entry that has all names in a module, and what must be beside them, reads it."""

LINEAR: tuple[Linear | LinearFused, ...] = (
    Linear("Kimi Linear", ("q_proj", "k_proj", "v_proj", "o_proj"), "g_b_proj", "o_norm"),
    LinearFused("Qwen3-Next", ("in_proj_qkvz", "out_proj"), "norm"),
)
"""The same for modules with an `A_log`: the rate at which linear attention forgets."""


STORED: tuple[tuple[Piece, ...], ...] = (
    # DeepSeek's indexer, which chooses what others attend to.
    (Piece("q", "wq_b", "in heads features"), Piece("k", "wk", "in features")),
    # DeepSeek V4: keys are values, and its output has a first projection for each group of heads.
    (
        Piece("q", "wq_b", "in heads features"),
        Piece("k", "wkv", "in heads features"),
        Piece("o", "o_a_proj", "groups features out"),
    ),
)
"""Attention in MaxText of which only the storage is known, for Muon: nothing clips it."""
