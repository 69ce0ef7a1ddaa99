"""How many heads flat kernels `[in, heads*features]` hold, which their shapes do not tell."""

import re
from collections.abc import Mapping

from muonclip_jax._core import paths
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts import suggest
from muonclip_jax._layouts.families import Ask, Family, Inside, Latent
from muonclip_jax._layouts.surroundings import Shapes

# As long as a head: norms on queries and keys. (Those of latent attention are on the latents.)
_QK_NORM = re.compile(r"_?(q|k|query|key)_?(layer)?(norm|ln)")
_OF_HEADS = ("sinks",)  # one number a head


def seen(family: Family, inside: Inside, shapes: Shapes, ask: Ask) -> int | None:
    """Features of a head, if all that tells them agrees.

    Args:
      family: Whose kernels they are.
      inside: The parameters of the module.
      shapes: Those of the model.
      ask: The kernels.
    """
    norms: set[int] = set()
    heads: set[int] = set()
    for name, shape in inside.items():
        module, _, leaf = name.rpartition("/")
        length = shape[0 if ask.stack_axis else -1] if shape else 1
        if _QK_NORM.fullmatch(module or leaf) and not isinstance(family, Latent):
            norms.add(length)
        if name in _OF_HEADS:
            heads.add(length)
    if family.heads_in:
        heads |= {x[-1] for path, x in shapes.items() if paths.show(path).endswith(family.heads_in)}
    if len(norms) > 1 or ask.queries in norms:  # over all heads at once
        norms = set()
    sizes = norms | {ask.queries // count for count in heads if not ask.queries % count}
    size = sizes.pop() if sizes else 0
    fits = size and not sizes and not ask.queries % size and not ask.keys % size
    return size if fits else None


def question(queries: int, keys: int) -> str:
    """The call that tells how many heads there are, by their features."""
    grouped = ", kv_heads=..." if queries != keys else ""
    return f"find_layout(params, heads=...{grouped})"


def told(
    asked: Mapping[Path, tuple[Family, Ask]],
    modules: Mapping[Path, Inside],
    heads: int | None,
    kv_heads: int | None,
) -> int:
    """Features of a head by the numbers of heads that the user gave.

    Args:
      asked: The modules whose kernels do not tell.
      modules: Their parameters.
      heads: Query heads.
      kv_heads: Key heads.

    Raises:
      ValueError: None is given, they do not fit, or the kernels are of several widths, for which
        one number would be a guess.
    """
    widths: dict[tuple[int, int], tuple[Path, Family]] = {}
    for path, (family, ask) in asked.items():
        widths.setdefault((ask.queries, ask.keys), (path, family))
    (queries, keys), (path, _) = next(iter(widths.items()))
    shown = f"{paths.show(path)} has {queries} query and {keys} key features in all its heads"
    if len(widths) > 1:
        lines = [suggest.call(family, modules[path], path) for path, family in widths.values()]
        raise ValueError(
            f"find_layout: {shown}, others have other widths, and nothing in the parameters tells "
            f"how many heads each has. Fill in the numbers: [{', '.join(lines)}]."
        )
    if heads is None and kv_heads is None:
        raise ValueError(
            f"find_layout: {shown}, and nothing in the parameters tells how many heads there are. "
            f"Give {question(queries, keys)}."
        )
    given = [(n, count) for n, count in ((queries, heads), (keys, kv_heads)) if count is not None]
    size = given[0][0] // given[0][1]
    if any(size * count != n for n, count in given) or queries % size or keys % size:
        raise ValueError(
            f"find_layout: heads={heads}, kv_heads={kv_heads}, but {shown}, and heads of queries "
            "and of keys are as long. Correct the numbers."
        )
    return size
