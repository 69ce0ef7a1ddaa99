"""How large query and key kernels are."""

from typing import Any

import jax

import muonclip_jax as mc
from examples.mla.data import TokenizedText
from studies.common.training import Setting, State


def measure(
    _setting: Setting, state: State, _batch: jax.Array, _text: TokenizedText
) -> dict[str, Any]:
    """The spectral norms of the query and the key kernels, `[layers]` each."""
    attention = state.params["layers"]["attn"]
    return {name: mc.spectral_norm(attention[name]["kernel"]) for name in ("wq", "wk")}
