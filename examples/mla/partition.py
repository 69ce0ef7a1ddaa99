"""How the model is sharded: which mesh axis splits which axis of which parameter."""

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from examples.mla.model import Decoder, ModelConfig


def rules(config: ModelConfig) -> dict[str, tuple[tuple[str | None, int], ...]]:
    """For every matrix of the model, by module: the mesh axis that splits each of its axes
    (kernels are [in, out]), and the largest number of parts. (Of experts see `spec`.)"""
    width = ("fsdp", config.d_model)
    features = ("tp", config.expert_width if config.experts else config.d_ff)
    q_latent, kv_latent = ("fsdp", config.q_rank), ("fsdp", config.kv_rank)
    grouped = config.attention == "gqa"
    heads, kv_heads = ("tp", config.heads), ("tp", config.kv_heads if grouped else config.heads)
    vocabulary, whole = ("tp", config.vocab_size), (None, 1)
    return {
        "embed": (vocabulary, width),
        "wq": (width, heads),
        "wk": (width, kv_heads),
        "wv": (width, kv_heads),
        "wq_a": (width, whole),
        "wq_b": (q_latent, heads),
        "wkv_a": (width, whole),
        "wkv_b": (kv_latent, heads),
        "wo": (heads, width),
        "gate": (width, features),
        "up": (width, features),
        "down": (features, width),
        "router": (width, whole),
        "lm_head": (width, vocabulary),
    }


def spec(
    path: tuple[str, ...], ndim: int, config: ModelConfig, mesh: Mapping[str, int]
) -> PartitionSpec:
    """The sharding of a parameter, or of optimizer state whose path ends with the parameter's.

    Args:
      path: Ends with the module and the parameter, as in `("layers", "0", "attn", "wo", "kernel")`.
      ndim: Number of axes. Only matrices are split, and experts `[e, in, out]`: these over tp, each
        over fsdp.
      config: The model's.
      mesh: Size of each mesh axis. An axis that it does not divide stays whole.
    """
    if ndim < 2:
        return PartitionSpec()
    axes = rules(config)[path[-2]]
    if ndim == 3:
        axes = (
            ("tp", config.experts),
            *((None, 1) if name == "tp" else (name, parts) for name, parts in axes),
        )
    return PartitionSpec(
        *(
            name if name is not None and name in mesh and parts % mesh[name] == 0 else None
            for name, parts in axes
        )
    )


def shardings(state: nnx.State, config: ModelConfig) -> nnx.State | None:
    """The sharding of each array in the state of a model or its optimizer; None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None

    def sharding(path: tuple[Any, ...], x: jax.Array) -> NamedSharding:
        names = tuple(str(k.key) for k in path if isinstance(k, jax.tree_util.DictKey))
        return NamedSharding(mesh, spec(names, x.ndim, config, mesh.shape))

    return jax.tree_util.tree_map_with_path(sharding, state)


def keep_in_place(model: Decoder, optimizer: nnx.Optimizer) -> None:
    """Holds the parameters and the optimizer's state to their shardings, inside jit."""
    state = nnx.state((model, optimizer))
    wanted = shardings(state, model.config)
    if wanted is not None:
        nnx.update((model, optimizer), jax.lax.with_sharding_constraint(state, wanted))
