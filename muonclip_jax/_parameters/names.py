"""What names say: which parameters are tables, vectors or unembeddings, by themselves or by the
module that holds them.

Names are compared as words, so `LMHead_0`, `lmHead` and `lm_head` are the same.
"""

import re
from functools import cache
from itertools import pairwise

from muonclip_jax._core import paths
from muonclip_jax._core.paths import Path

KERNELS = ("kernel", "w")
"""Flax's and Haiku's names of `[in, out]`."""

WEIGHTS = ("weight", "weights")
"""Names of what may be `[out, in]` (PyTorch, Equinox) or `[in, out]`."""

_EMBED = {"embed", "embeds", "embedding", "embeddings", "embedder", "emb", "embs", "wte", "wpe"}
_TOKEN = {"token", "tokens", "tok", "word", "words", "vocab", "vocabulary", "wte"}
_POSITION = {"position", "positions", "positional", "pos", "wpe", "type", "segment"}
_OF_TABLES = {"shared", "tied", "learned", "output", "label", "class", "rel", "relative"}
_TABLE = _EMBED | {"table", "matrix", *WEIGHTS}
_VECTOR = {"bias", "biases", "scale", "scales", "gain", "gamma", "beta", "offset", "shift"}
_LAYERS = {"layer", "layers", "block", "blocks", "stack", "stacked", "scan", "scanned"}
_HEAD = {"head", "heads", "classifier"}
_NO_HEAD = {"multi", "num", "n", "per", "talking", "self", "cross", "q", "k", "kv", "query", "key"}
_NO_LOGITS = {"pre", "router", "gate"}
_KNOWN_HEADS = {("seq", "relationship"), ("dense", "prediction")}  # of BERT and ELECTRA
_PERHAPS_HEAD = {("output", "layer"), ("output", "projection"), ("output", "proj")}
_ROUTER = {"router", "gate", "gating", "routing"}
_BESIDE_ROUTER = {
    "kernel",
    "logits",
    "weight",
    "weights",
    "layer",
    "dense",
    "expert",
    "experts",
    "moe",
}
_UP = re.compile(
    r"(\w+_)?(up|gate|gating|gate_up|w_?(i|1|3|in|up|gate)|wi_\d|f[cf]_?(1|in)|c_fc|\w+_alpha)"
    r"(_(proj|projection|einsum|layer|dense))?"
)
_DOWN = re.compile(
    r"(\w+_)?(down|w_?(o|2|out|down)|f[cf]_?(2|out)|c_proj)(_(proj|projection|einsum|layer|dense))?"
)
_PROJECTIONS = {"q", "k", "v", "o", "qkv", "kv", "query", "key", "value"} | {
    f"w{which}" for which in ("q", "k", "v", "o", "qkv", "kv")
}


@cache
def words(name: str) -> tuple[str, ...]:
    """The words of a name, without numbers: `("lm", "head")`."""
    return tuple(word for word in paths.words(name) if not word.isdigit())


def leaf(path: Path) -> str:
    """The parameter's own name; of a bare array there is none."""
    return path[-1] if path else ""


def holder(path: Path) -> str:
    """The module that holds a parameter, by name: of `heads/0/kernel` that is `heads`."""
    return next((name for name in reversed(path[:-1]) if not name.isdigit()), "")


def is_vector(path: Path) -> bool:
    """Whether a bias or a gain, whose axes but the last are stacks or heads."""
    return bool(_VECTOR & {*words(leaf(path))})


def is_norm(name: str) -> bool:
    """Whether a module is called as norms are: `LayerNorm_0`, `q_norm`, `ln_f`."""
    said = words(name)
    ends = said[:1] + said[-1:]
    return any("norm" in word or word in ("ln", "rms", "bn", "gn") for word in ends)


def is_gain(path: Path) -> bool:
    """Whether a norm's gain, which is as long as what the norm takes in."""
    return leaf(path) in ("scale", "gamma") or (is_norm(holder(path)) and not is_vector(path))


def is_like_embedding(name: str) -> bool:
    """Whether a module is called as embeddings are, of tokens or of what is no table
    (`patch_embedding`)."""
    return bool(_EMBED & {*words(name)}) or name == "E"


def is_table(path: Path) -> bool:
    """Whether an embedding for certain: `embedding` in any module, `weight` in a module whose name
    says nothing else, and `kernel` or `w` in one whose name says tokens (or is `E`)."""
    said, module = words(leaf(path)), words(holder(path))
    if said[-1:] in (("token",), ("tokens",)):
        return True  # learned ones, of which there are few
    if _EMBED & {*said}:
        return said[-1] in _TABLE or bool((_TOKEN | _POSITION) & {*said})
    if leaf(path) in KERNELS:
        tokens = bool(_TOKEN & {*module}) and module[-1] in _EMBED
        return tokens or holder(path) == "E"
    known = _EMBED | _TOKEN | _POSITION | _OF_TABLES
    return leaf(path) in (*WEIGHTS, "table") and (
        is_like_embedding(holder(path)) and {*module} <= {*known, "e"}
    )


def is_of_positions(path: Path) -> bool:
    """Whether a table has a row for each position, and not for each token."""
    return bool(_POSITION & {*words(leaf(path)), *words(holder(path))})


def is_in_attention(path: Path) -> bool:
    """Whether a module above is called as attention is, or the module that holds it as one of
    attention's projections."""
    return any(map(_is_attention, path)) or bool(_PROJECTIONS & {*words(holder(path))})


def is_fused(path: Path) -> bool:
    """Whether its module is called as what holds several projections of attention: `qkv`, `Wqkv`,
    `query_key_value`, `c_attn`, or within attention `in_proj`."""
    said = words(holder(path))
    whole = any("qkv" in word for word in said) or {"query", "key", "value"} <= {*said}
    inside = any(map(_is_attention, path[:-2]))
    return whole or said == ("c", "attn") or (said == ("in", "proj") and inside)


def head(path: Path) -> Path | None:
    """The outermost module, or parameter, that is called as an unembedding, with the number that
    follows where it is a list; None: there is none, or it is within attention."""
    for end, name in enumerate(path, 1):
        if _is_attention(name):
            return None
        if _is_head(words(name)):
            while end < len(path) and path[end].isdigit():
                end += 1
            return path[:end]
    return None


def is_perhaps_head(path: Path) -> bool:
    """Whether the module that holds it may be an unembedding or a layer's last projection."""
    return words(holder(path))[-2:] in _PERHAPS_HEAD and not is_in_attention(path)


def is_layers(name: str) -> bool:
    """Whether a module is called as a stack of layers is. One of many has a number: `block_3`."""
    return bool(_LAYERS & {*words(name)[-1:]}) and not re.search(r"\d", name)


def is_router(path: Path) -> bool:
    """Whether it may choose among experts. (`gate_proj` is a part of an MLP.)"""
    said = {*words(own(path))}
    return bool(_ROUTER & said) and said <= _ROUTER | _BESIDE_ROUTER


def is_called_router(path: Path) -> bool:
    """Whether its name leaves no doubt of that, as `gate` does."""
    return bool({"router", "routing"} & {*words(own(path))})


def own(path: Path) -> str:
    """What a kernel is called: by its module, or by itself where no module holds it alone."""
    return holder(path) if leaf(path) in (*KERNELS, *WEIGHTS) else leaf(path)


def side(path: Path) -> str | None:
    """Whether a matrix of an MLP takes in what the model is wide ("up") or gives it ("down")."""
    called = own(path)
    return "up" if _UP.fullmatch(called) else "down" if _DOWN.fullmatch(called) else None


def is_in_order(path: Path) -> bool:
    """Whether a kernel is called as those of Flax, T5 and MaxText are, which are [in, out]. (An
    einsum's may lie in any order.)"""
    plain = leaf(path) in KERNELS and "einsum" not in words(holder(path))
    return plain or bool(re.fullmatch(r"wi(_\d)?|wo", leaf(path)))


def is_of_two(path: Path) -> bool:
    """Whether a kernel is called as one of an MLP's gate and up together."""
    return bool({"gating", "wi"} & {*words(own(path))}) or {"gate", "up"} <= {*words(own(path))}


def is_for_layers(path: Path) -> bool:
    """Whether a kernel gives every layer an input of its own, as in Gemma 3n and 4."""
    return leaf(path) in KERNELS and words(holder(path))[:2] == ("per", "layer")


def is_convolution(path: Path, axes: int) -> bool:
    """Whether a kernel of so many axes is called a convolution, by the module that holds it. With
    four axes also by the module around that one, or because it cuts images into patches."""
    called = [name for name in path[:-1] if not name.isdigit()][-2:]
    some = ("conv", "dwconv", "patch") if axes > 3 else ("conv", "dwconv", "short")
    return any(_starts(name, some) for name in (called if axes > 3 else called[-1:]))


def is_depthwise(path: Path) -> bool:
    """Whether it is called a convolution of each feature by itself."""
    return any(_starts(name, ("depthwise", "dw", "short")) for name in path[-3:-1])


def _starts(name: str, some: tuple[str, ...]) -> bool:
    return any(word.startswith(some) for word in words(name))


def unnumbered(text: str) -> str:
    """With `*` in place of numbers."""
    return re.sub(r"\d+", "*", text)


def place(path: Path) -> str:
    """A glob, the same for the same parameter of all layers. (What holds a kernel keeps its own
    number, as in `Dense_1`, which tells more than layers apart.)"""
    above = path[:-2] if leaf(path) in KERNELS else path[:-1]
    return "/".join((*map(unnumbered, above), *path[len(above) :]))


def _is_attention(name: str) -> bool:
    return any(
        word.endswith(("attn", "attention")) or word in ("mha", "multihead") for word in words(name)
    )


def _is_head(said: tuple[str, ...]) -> bool:
    return (
        ("lm", "head") in pairwise(said)
        or said in _KNOWN_HEADS
        or any(word == "lmhead" or word.startswith("unembed") for word in said)
        or bool(_HEAD & {*said[-1:]} and not _NO_HEAD & {*said})
        or (any(word.startswith("logit") for word in said) and not _NO_LOGITS & {*said})
    )
