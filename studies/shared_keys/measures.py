"""The sizes of queries' and keys' weights."""

from typing import Any

import jax
import jax.numpy as jnp

import muonclip_jax as mc
from examples.mla.data import TokenizedText
from studies.common.model import attention_layout
from studies.common.training import Setting, State


def measure(
    setting: Setting, state: State, _batch: jax.Array, _text: TokenizedText
) -> dict[str, Any]:
    """The root mean square of the weights of each query head, `[layers, heads]`, and of each key
    head, `[layers, key heads]`."""
    (kernels,) = mc.head_matrices(state.params, attention_layout(setting.model)).values()
    return {f"{role}_rms": jnp.sqrt(jnp.square(kernels[role]).mean(axis=(-2, -1))) for role in "qk"}
