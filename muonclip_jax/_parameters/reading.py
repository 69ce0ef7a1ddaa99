"""How a parameter is read that neither a rule nor the layout decides: by names and shapes."""

import re
from typing import Any

from muonclip_jax._core import paths
from muonclip_jax._core.axes import MatrixPattern
from muonclip_jax._core.paths import Path
from muonclip_jax._layouts.blocks import module_path
from muonclip_jax._layouts.find import is_flax_attention

# What a parameter is without a rule. Flax kernels are [in, out].
MATRIX = MatrixPattern("... in out")
_INPUT_HEADS = MatrixPattern("... in heads features -> ... heads in features")
_FIX = (
    "Say how to treat it: rules={{'{pattern}': 'experts in out'}} (names of its axes as in einops, "
    "inputs and outputs last; or a muonclip_jax.MatrixPattern, or an "
    "optax.contrib.MuonDimensionNumbers), or None for the other optimizer."
)

_UNEMBEDDING = re.compile(r"(^|_)(head|unembed\w*|logits\w*|classifier|output_layer)$")


def read(path: Path, around: "Surroundings") -> MatrixPattern | None:
    """What a parameter is, as a pattern of its matrices; None: not for Muon.

    Raises:
      ValueError: It could be several things, or none; with path, shape and fix.
    """
    shape = around.shapes[path]
    if is_vector(path, shape) or _is_embedding(path):
        return None
    if path[-1:] != ("kernel",):
        raise ValueError(
            f"{paths.show(path)} of shape {shape} is neither a kernel nor an embedding, bias or "
            "scale by its name. If it belongs to attention, describe it with layout=. Else: "
            + _FIX.format(pattern=paths.show(path))
        )
    return _kernel_pattern(path, around)


def _kernel_pattern(path: Path, around: "Surroundings") -> MatrixPattern:
    shape, module = around.shapes[path], path[:-1]
    # What one layer's kernel looks like, and which of its axes its bias has.
    in_attention = is_flax_attention(module[:-1], around.shapes)
    if in_attention and module[-1] in ("query", "key", "value"):
        own_axes, bias_axes, pattern = 3, 2, _INPUT_HEADS
    elif in_attention and module[-1] == "out":
        own_axes, bias_axes, pattern = 3, 1, MATRIX  # [heads, head_features, out]
    else:
        own_axes, bias_axes, pattern = 2, 1, MATRIX
    stack = shape[: len(shape) - own_axes]
    bias = around.shapes.get((*module, "bias"), (*stack, *shape[-bias_axes:]))
    if bias == (*stack, *shape[-bias_axes:]) and (not stack or around.stacked_by(path, stack)):
        return pattern
    raise ValueError(
        f"{paths.show(path)} of shape {shape} does not look like "
        f"{'a stack of kernels' if stack else 'one kernel'} [stack..., "
        f"{'in, heads, head_features' if own_axes == 3 else 'in, out'}] to the parameters around "
        f"it ({around.around(path)}): is it a convolution ('h w in out -> (h w in) out'), a stack "
        "of experts ('experts in out'), a projection to heads (one matrix per head: 'in heads "
        "features -> heads in features'), a scan axis other than 0? "
        + _FIX.format(pattern=paths.show(path))
    )


class Surroundings:
    """The shapes of a parameter tree, and what they tell about stacked layers."""

    def __init__(self, params: Any):
        self.shapes = paths.shapes(params)
        self._scales: dict[Path, list[Path]] = {}  # module → norm scales anywhere inside
        self._modules: dict[Path, list[Path]] = {}  # top-level module → its parameters
        for path, shape in self.shapes.items():
            self._modules.setdefault(module_path(path)[:1], []).append(path)
            if path[-1:] == ("scale",) and shape:
                for depth in range(len(path) - 1):
                    self._scales.setdefault(path[:depth], []).append(path)

    def stacked_by(self, kernel: Path, stack: tuple[int, ...]) -> bool:
        """Whether the kernel's first axes are a stack of layers: the bias beside it has been
        compared, the nearest norm has these axes in front of its own one, or, where there is
        neither, everything in the top-level module has the same first axis."""
        scales = self._nearest_scales(kernel)
        if scales:
            return stack == min((self.shapes[path][:-1] for path in scales), key=len)
        if (*kernel[:-1], "bias") in self.shapes:
            return True
        shapes = {path: self.shapes[path] for path in self._modules[module_path(kernel)[:1]]}
        return (
            len(stack) == 1
            and "conv" not in "".join(kernel[-2:]).lower()
            and all(
                shape[:1] == stack and len(shape) >= (3 if path[-1] == "kernel" else 2)
                for path, shape in shapes.items()
            )
        )

    def around(self, kernel: Path) -> str:
        """What `stacked_by` looked at, in words."""
        bias = (*kernel[:-1], "bias")
        looked_at = [bias] * (bias in self.shapes) + self._nearest_scales(kernel)[:2]
        return (
            ", ".join(f"{paths.show(p)} {self.shapes[p]}" for p in looked_at) or "no bias, no norm"
        )

    def _nearest_scales(self, kernel: Path) -> list[Path]:
        nearest = (self._scales.get(kernel[:depth]) for depth in reversed(range(len(kernel) - 1)))
        return next(filter(None, nearest), [])


def is_vector(path: Path, shape: tuple[int, ...]) -> bool:
    return len(shape) < 2 or path[-1:] in (("bias",), ("scale",))


def _is_embedding(path: Path) -> bool:
    return any("embed" in part.lower() for part in path[-2:]) or any(
        _UNEMBEDDING.search(part.lower()) for part in path[-2:]
    )
