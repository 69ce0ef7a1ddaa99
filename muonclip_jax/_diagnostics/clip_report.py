"""Every clip of an optimizer in numbers: what it saw, and what it did."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np

from muonclip_jax._attention.max_logits import MAX_LOGITS
from muonclip_jax._core.states import states_of
from muonclip_jax._core.tables import Mark, Readable, Sheet
from muonclip_jax._diagnostics.report import extent, layers
from muonclip_jax._transforms.clip import INEFFECTIVE, ClipState
from muonclip_jax._transforms.qk_clip import QKClipState

_ByBlock = dict[str, jax.Array]


class SignalReport(NamedTuple):
    """What the last step of a clip saw and did in one block, or a stack of them.

    Attributes:
      maxima: The signal, `[stack..., heads]`; -inf before the first step.
      gamma: The clip factors, same shape; 1 where not clipped.
      ineffective: bool, same shape: three clips in a row or more were without effect. Is the clip
        the last link of the chain? Do the clipped weights make the signal?

    Example:
      >>> report = mc.clip_report(mc.qk_clip(layout).init(params))
      >>> report.signals["max_logits"]["attn"].gamma
      Array([1., 1.], dtype=float32)
    """

    maxima: jax.Array
    gamma: jax.Array
    ineffective: jax.Array


@jax.tree_util.register_dataclass
@dataclass(frozen=True, repr=False)
class ClipReport(Readable):
    """What `clip_report` found. A pytree, so `jax.jit` may return it; outside of it, `print`,
    `rich.print` and a notebook show a table of layers, and `scalars` are for a logger.

    Attributes:
      signals: By the signal's name and the block's path, a `SignalReport`. A second clip of the
        same signal is `max_output (2)`.

    Example:
      >>> mc.clip_report(mc.max_output_clip(layout, 30.0).init(params)).scalars()["gamma/max_output/attn"]
      1.0
    """  # noqa: E501

    signals: dict[str, dict[str, SignalReport]]

    def scalars(self) -> dict[str, float]:
        """Each layer in a few numbers, over its heads: the largest signal, the smallest γ, how many
        heads were clipped, and clipped without effect: `{"max_output/layers/attn/3": 41.2,
        "gamma/max_output/layers/attn/3": 0.9, ...}`. One transfer from the device."""
        return {
            f"{prefix}{signal}/{layer}": float(value)
            for signal, layer, seen in self._layers()
            for prefix, value in (
                ("", np.max(seen.maxima)),
                ("gamma/", np.min(seen.gamma)),
                ("clipped/", np.sum(seen.gamma < 1)),
                ("ineffective/", np.sum(seen.ineffective)),
            )
        }

    def __repr__(self) -> str:
        blocks = {signal: list(blocks) for signal, blocks in self.signals.items()}
        return f"ClipReport(signals={blocks})"

    def _sheets(self) -> list[Sheet]:
        numbers = ("size", "γ", "clipped")
        rows: list[tuple[str, ...]] = []
        marks: list[Mark] = []
        for signal, layer, seen in self._layers():
            clipped = f"{np.sum(seen.gamma < 1)} of {seen.gamma.size}"
            which = ", ".join(map(str, np.flatnonzero(seen.ineffective)))
            look_at = f"clips without effect: {which}" if which else ""
            rows.append((signal, layer, extent(seen.maxima), extent(seen.gamma), clipped, look_at))
            marks.append("look" if look_at else "")
        headers = ("signal", "layer", *numbers, "look at")
        caption = "lowest … highest of a layer's heads"
        return [Sheet(headers, rows, caption=caption, numbers=numbers, marks=marks)]

    def _layers(self) -> Iterator[tuple[str, str, Any]]:
        """Every layer of every clip by itself, on the host, `[heads]`."""
        for signal, blocks in jax.device_get(self.signals).items():
            for name, block in blocks.items():
                for index, layer in layers(name, block.maxima.shape[:-1]):
                    yield signal, layer, SignalReport._make(x[index] for x in block)


def clip_report(opt_state: Any) -> ClipReport:
    """Reports every clip of an optimizer: `qk_clip`, `max_output_clip`, `clip_by_signal`.

    Reads the state alone. Works under `jax.jit` and outside, without host synchronisation.
    `attention_report` tells more of attention heads, from their kernels.

    Args:
      opt_state: Any Optax state (or `nnx.Optimizer.opt_state`) with clips in it.

    Returns:
      A `ClipReport`, in the order of the chain.

    Raises:
      ValueError: No clip is in it.

    Example:
      >>> tx = optax.chain(mc.qk_clip(layout), mc.max_output_clip(layout, 30.0))
      >>> list(mc.clip_report(tx.init(params)).signals)
      ['max_logits', 'max_output']
    """
    states = states_of(opt_state, QKClipState, ClipState)
    if not states:
        raise ValueError(
            "No clip is in this optimizer state: mc.clip_report reads those of mc.qk_clip, "
            "mc.max_output_clip and mc.clip_by_signal."
        )
    signals: dict[str, dict[str, SignalReport]] = {}
    for state in states:
        signal, maxima, gamma, counts = _of_one_signal(state)
        earlier = sum(name.split(" (")[0] == signal for name in signals)
        name = f"{signal} ({earlier + 1})" if earlier else signal
        signals[name] = {
            block: SignalReport(maxima[block], gamma[block], counts[block] >= INEFFECTIVE)
            for block in maxima
        }
    return ClipReport(signals)


def _of_one_signal(state: QKClipState | ClipState) -> tuple[str, _ByBlock, _ByBlock, _ByBlock]:
    """The signal's name, maxima, γ and counts of clips without effect, each by block."""
    if isinstance(state, QKClipState):
        return MAX_LOGITS, state.max_logits, state.gamma, state.ineffective_clips
    (signal,) = state.maxima
    return signal, state.maxima[signal], state.gamma[signal], state.ineffective_clips[signal]
