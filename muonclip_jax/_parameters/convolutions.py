"""Convolutions, whose kernels Flax stores as [window..., in, out].

conv/kernel [3, 3, 64, 128]           one matrix [3*3*64, 128], as Jordan's Muon flattens them
conv1d/kernel [4, 1, 512], depthwise  no matrix: each feature has a filter of its own
"""

from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.find import Stack
from muonclip_jax._parameters import names
from muonclip_jax._parameters.neighbours import Neighbours, Reading, Shape, pattern


class Unsure(Exception):
    """A convolution of one input, or of each feature by itself."""


def convolution(path: Path, near: Neighbours) -> Reading | None:
    """A convolution by its name, or by a square window beside a bias of its outputs; None of other
    kernels.

    Raises:
      Unsure: It has one input, and nothing tells whether each feature is filtered by itself.
    """
    stack = near.stack(path)
    own = stack.without(near.shapes[path])
    if own is None or names.leaf(path) not in names.KERNELS or not _is_one(path, own, stack, near):
        return None
    if own[-2] > 1:
        window = [f"window{axis}" for axis in range(len(own) - 2)]
        joined = f"({' '.join(window)} in) out"
        return Reading(pattern([*window, "in", "out"], stack, joined), "a convolution, one matrix")
    if names.is_depthwise(path) or near.is_recurrent(path) or near.is_given(own[-1], path):
        return Reading(None, "a depthwise convolution: a filter for each feature, no matrix")
    raise Unsure


def _is_one(path: Path, own: Shape, stack: Stack, near: Neighbours) -> bool:
    if not 3 <= len(own) <= 5:
        return False
    bias = near.bias(path)
    alone = bias is not None and stack.without(near.shapes[bias]) == own[-1:]
    if bias is not None and not alone:
        return False
    if names.is_convolution(path, len(own)):
        return alone or bool(stack.lengths) or not near.may_be_stacked(path)
    square = len(own) == 4 and own[0] == own[1] and not names.is_in_attention(path)
    return square and (alone or near.is_between_norms(path))
