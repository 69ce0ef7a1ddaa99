"""Lines to paste, for attention that nothing known reads, or of which a number is missing."""

import re
from collections.abc import Mapping, Sequence

from muonclip_jax._core import paths
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import Layout, module_path
from muonclip_jax._layouts.families import (
    FAMILIES,
    HEADED,
    TRANSPOSED,
    WEIGHTS,
    Ask,
    Family,
    Fused,
    Inside,
    Separate,
    layout_name,
    parameter,
    read,
)

# What a projection is called, by a word of its name.
_WORDS = {
    "query": re.compile(r"w?(q|query|queries)"),
    "key": re.compile(r"w?(k|key|keys)"),
    "value": re.compile(r"w?(v|value|values)"),
}


def unknown(strange: Sequence[Path], modules: Mapping[Path, Inside]) -> str:
    """The error for attention of no known model.

    Args:
      strange: Its modules.
      modules: The parameters in every module.
    """
    path = strange[0]
    held = ", ".join(f"{name} {shape}" for name, shape in modules[path].items())
    more = f", and so do {len(strange) - 1} more modules" if len(strange) > 1 else ""
    return (
        f"find_layout: {paths.show(path)} looks like attention, but of no known model{more}. It "
        f"holds {held}. {nearest(modules[path])} (A list of layouts, with block= patterns that "
        "say which is whose, describes several kinds; layouts.ignore(block) leaves attention "
        "alone.)"
    )


def nearest(inside: Inside) -> str:
    """Which known spelling is near, what differs, and the line that fits."""
    if own := spelling(inside):
        return f"{_differences(own)} This fits: {call(own, inside)}."
    if fused := [name for name in _projections(inside) if "qkv" in name or len(_sides(name)) == 3]:
        return (
            "In which order a fused kernel holds queries, keys and values no shape tells; see its "
            f"axes in {fused_qkv(fused[0])}."
        )
    return (
        "Name its projections: mc.layouts.mha(query=..., key=..., value=..., out=...), "
        "mc.layouts.gqa(...), mc.layouts.mla(nope, rope, v, ...), or mc.layouts.Layout(name, "
        "pieces=(mc.layouts.Piece(...), ...))."
    )


def fused_qkv(kernel: str) -> str:
    """The layout of a fused kernel of which only the name is known."""
    return f"mc.layouts.fused_qkv(heads=..., kernel={kernel!r}, axes=..., out=...)"


def spelling(inside: Inside) -> Separate | None:
    """Names of a query, a key and a value, and of an output, whose shapes go together."""
    names = _projections(inside)
    told = {side: [name for name in names if _sides(name) == {side}] for side in _WORDS}
    if any(len(found) != 1 for found in told.values()):
        return None
    query, key, value = (found[0] for found in told.values())
    for out in names:
        for weights in (WEIGHTS, (TRANSPOSED,)):  # of either orientation: asks
            own = Separate("own", query, key, value, out, weights=weights)
            if out not in (query, key, value) and read(own, inside, lambda _: None) is not None:
                return own
    return None


def call(family: Family, inside: Inside, path: Path | None = None) -> str:
    """The layout of a module as Python, with `...` for what nothing tells.

    Args:
      family: Its spelling.
      inside: The parameters of the module.
      path: Where it is, for a `block=` pattern.
    """
    block = {} if path is None else {"block": repr(paths.show(module_path(path)))}
    if isinstance(family, Fused):
        names = {"kernel": family.kernel, "out": family.out}
        given = {side: repr(layout_name(name, inside)) for side, name in names.items()}
        numbers = {"heads": "...", "kv_heads": "..."}
        return _python("fused_qkv", {**numbers, **given, "axes": repr(family.axes[0]), **block})
    if not isinstance(family, Separate):
        return _python("mla", {"nope": "...", "rope": "...", "v": "...", "heads": "...", **block})
    names = {"query": family.query, "key": family.key, "value": family.value, "out": family.out}
    told = {side: layout_name(name, inside) for side, name in names.items() if name}
    given = {side: repr(name) for side, name in told.items() if name != side}
    answer = read(family, inside, lambda _: None)
    if not isinstance(answer, Layout):
        grouped = isinstance(answer, Ask) and answer.queries != answer.keys
        numbers = {"kv_heads": "...", "heads": "..."} if grouped else {"heads": "..."}
        weights = parameter(family.query, inside).endswith("/weight")
        turned = {"transposed": "..."} if weights else {}
        return _python("gqa" if grouped else "mha", {**numbers, **given, **turned, **block})
    line = _python("gqa" if answer.shared_keys else "mha", {**given, **block})
    if answer.pieces != family.pieces(HEADED, inside, 1, 1):
        pieces = ", ".join(f"mc.layouts.{piece}" for piece in answer.pieces)
        line = f"mc.layouts.Layout({answer.name!r}, ({pieces}), shared_keys=True)"
    return f"dataclasses.replace({line}, stack_axis=1)" if answer.stack_axis else line


def _python(kind: str, arguments: Mapping[str, str]) -> str:
    return f"mc.layouts.{kind}({', '.join(f'{name}={text}' for name, text in arguments.items())})"


def _projections(inside: Inside) -> list[str]:
    """What may be a projection, as layouts name it but for `w` and `weight`."""
    names = (
        re.sub(r"/(kernel|weight|w)$", "", name)
        for name, shape in inside.items()
        if len(shape) >= 2 and not name.endswith("bias")
    )
    return list(dict.fromkeys(names))


def _sides(name: str) -> set[str]:
    """Which projections a name says: of `query_key_value` all three."""
    words = paths.words(name.split("/")[-1])
    return {side for side, word in _WORDS.items() if any(map(word.fullmatch, words))}


def _differences(own: Separate) -> str:
    """The known spelling that has most names of this one, and what differs."""
    known = [each for each in FAMILIES if isinstance(each, Separate) and each.value]
    near = max(known, key=lambda each: len(set(each.names) & set(own.names)))
    pairs = zip(near.names, own.names, strict=True)
    differ = [f"{one} is called {other}" for one, other in pairs if one != other]
    unclear = ["no shape tells whether weights are [out, in]"]
    return f"Nearest is {near.models}; here {', '.join(differ or unclear)}."
