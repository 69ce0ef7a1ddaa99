"""One small decoder with every attention that the studies compare.

Layers are scanned, so all that a layer has or sows comes with a leading axis `layers`. Axis names:

    b  batch    t  position    d  model width    h  heads (k of them for keys)    f  head features
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

import muonclip_jax as mc
from examples.mla.model import apply_rope

BLOCK = ("layers", "attn")  # the path of all attention blocks, which are one stack
HEADS = "heads"  # the collection of queries and keys, as they enter the logits


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of the decoder."""

    vocab_size: int = 1024
    d_model: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 4
    """Key and value heads; latent attention has one key per query head."""
    nope: int = 0
    """Features per head without position."""
    rope: int = 32
    """Rotary features per head, the last ones; of latent attention's keys all heads share them."""
    v: int = 32
    """Value features per head."""
    q_rank: int = 64
    """Width of latent attention's query latent."""
    kv_rank: int = 48
    """Width of its key and value latent."""
    d_ff: int = 512
    attention: Literal["grouped", "fused", "latent"] = "grouped"
    """Separate projections; queries, keys, values and outputs in one kernel; or MLA."""
    mlp: Literal["relu2", "swiglu"] = "relu2"
    qk_norm: bool = False
    """RMSNorm with gains on whole queries and keys, before RoPE. In latent attention absorbed
    decoding keeps one number more a token and head for it, see `examples/mla/model.py`."""
    partial_qk_norm: bool = False
    """In latent attention, RMSNorm with gains on all that absorbed decoding can form: queries
    without position, rotary queries and the shared rotary keys, each by itself, before RoPE."""
    latent_norm: bool = False
    """RMSNorm on the latents of latent attention, as DeepSeek has it."""
    soft_cap: float | None = None
    """Caps logits smoothly: cap * tanh(logit / cap)."""
    init_std: float = 0.04
    """Of all kernels and the embedding."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations; parameters are float32."""


def tiny(model: ModelConfig) -> ModelConfig:
    """The same kind of model, of some ten thousand parameters, for seconds."""
    return replace(
        model, vocab_size=257, d_model=32, layers=2, heads=2, kv_heads=2, rope=16, v=16, d_ff=64
    )


def large(model: ModelConfig) -> ModelConfig:
    """The same kind of model, of some 200 million parameters, for GPUs."""
    return replace(
        model,
        vocab_size=49152,
        d_model=1024,
        layers=12,
        heads=16,
        kv_heads=16,
        rope=64,
        v=64,
        d_ff=2816,
        mlp="swiglu",
        init_std=0.02,
        dtype="bfloat16",
    )


def attention_layout(config: ModelConfig) -> mc.Layout | None:
    """Where queries, keys, values and outputs are; None for the fused kernel, which is there to be
    orthogonalized whole."""
    names = {"query": "wq", "key": "wk", "value": "wv", "out": "wo"}
    match config.attention:
        case "grouped":
            return mc.layouts.gqa(config.kv_heads, heads=config.heads, **names)
        case "latent":
            norms = {"query_norm": "q_latent_norm", "key_value_norm": "kv_latent_norm"}
            return mc.layouts.mla(
                config.nope, config.rope, config.v, **(norms if config.latent_norm else {})
            )
        case "fused":
            return None


def init_params(config: ModelConfig, seed: int) -> Any:
    """The parameters of a seed."""
    tokens = jnp.zeros((1, 2), jnp.int32)
    return Decoder(config).init(jax.random.key(seed), tokens)["params"]


class Kernel(nn.Module):
    """A bare kernel `[in, out]`."""

    ins: int
    outs: int
    config: ModelConfig

    @nn.compact
    def __call__(self) -> jax.Array:
        init = nn.initializers.normal(self.config.init_std)
        return self.param("kernel", init, (self.ins, self.outs)).astype(self.config.dtype)


def linear(features: int, config: ModelConfig, name: str | None = None) -> nn.Dense:
    init = nn.initializers.normal(config.init_std)
    return nn.Dense(features, use_bias=False, dtype=config.dtype, kernel_init=init, name=name)


def rms_norm(config: ModelConfig, name: str | None = None) -> nn.RMSNorm:
    return nn.RMSNorm(dtype=config.dtype, name=name)


class Attention(nn.Module):
    """What all kinds share: from queries, keys and values to the output."""

    config: ModelConfig

    def setup(self):
        if self.config.qk_norm:
            self.q_norm, self.k_norm = rms_norm(self.config), rms_norm(self.config)
        if self.config.partial_qk_norm and self.config.attention != "latent":
            raise ValueError("partial_qk_norm is for attention='latent'; others have qk_norm.")

    def project(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """`b t d` → q `b t h f`, k `b t k f`, v `b t k v`."""
        raise NotImplementedError

    def join(self, heads: jax.Array) -> jax.Array:
        """`b t (h v)` → `b t d`."""
        return self.wo(heads)

    def __call__(self, x: jax.Array) -> jax.Array:
        q, k, v = self.project(x)
        if self.config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = self.turn(q), self.turn(k)
        self.sow(HEADS, "queries", q)
        self.sow(HEADS, "keys", k)
        out, max_logits = mc.dot_product_attention(
            q, k, v, is_causal=True, soft_cap=self.config.soft_cap
        )
        mc.sow_max_logits(self, max_logits)
        return self.join(rearrange(out, "b t h v -> b t (h v)"))

    def turn(self, x: jax.Array) -> jax.Array:
        """RoPE on the last features of `b t h f`."""
        still, turning = jnp.split(x, [self.config.nope], axis=-1)
        turned = apply_rope(turning, jnp.arange(x.shape[1]), base=10_000.0)
        return jnp.concatenate([still, turned], axis=-1)


class GroupedAttention(Attention):
    """MHA and GQA, every projection a kernel."""

    def setup(self):
        super().setup()
        c = self.config
        self.wq = linear(c.heads * (c.nope + c.rope), c)
        self.wk = linear(c.kv_heads * (c.nope + c.rope), c)
        self.wv = linear(c.kv_heads * c.v, c)
        self.wo = linear(c.d_model, c)

    def project(self, x):
        q, k, v = self.wq(x), self.wk(x), self.wv(x)
        return split_heads(q, k, v, self.config)


class FusedAttention(Attention):
    """The same with one kernel `[d, q + k + v + d]`, so that Muon orthogonalizes all at once; the
    output projection is its last columns."""

    def setup(self):
        super().setup()
        c = self.config
        if c.heads * c.v != c.d_model:
            raise ValueError(f"{c.heads} heads of {c.v} values must make d_model={c.d_model}.")
        self.qkvo = Kernel(c.d_model, sum(self.widths()) + c.d_model, c)

    def widths(self) -> tuple[int, int, int]:
        c = self.config
        features = c.nope + c.rope
        return c.heads * features, c.kv_heads * features, c.kv_heads * c.v

    def project(self, x):
        q, k, v = self.widths()
        parts = jnp.split(x @ self.qkvo()[:, : q + k + v], [q, q + k], axis=-1)
        return split_heads(*parts, self.config)

    def join(self, heads):
        return heads @ self.qkvo()[:, -self.config.d_model :]


class LatentAttention(Attention):
    """MLA (DeepSeek-V2, arXiv 2405.04434) in its training form."""

    def setup(self):
        super().setup()
        c = self.config
        self.wq_a = linear(c.q_rank, c)
        self.wq_b = linear(c.heads * (c.nope + c.rope), c)
        self.wkv_a = linear(c.kv_rank + c.rope, c)
        self.wkv_b = linear(c.heads * (c.nope + c.v), c)
        self.wo = linear(c.d_model, c)
        if c.latent_norm:
            self.q_latent_norm, self.kv_latent_norm = rms_norm(c), rms_norm(c)
        if c.partial_qk_norm:
            self.q_nope_norm, self.q_rope_norm = rms_norm(c), rms_norm(c)
            self.k_rope_norm = rms_norm(c)

    def project(self, x):
        c = self.config
        q_latent = self.wq_a(x)
        kv_latent, k_rope = jnp.split(self.wkv_a(x), [c.kv_rank], axis=-1)
        if c.latent_norm:
            q_latent, kv_latent = self.q_latent_norm(q_latent), self.kv_latent_norm(kv_latent)
        q = rearrange(self.wq_b(q_latent), "b t (h f) -> b t h f", h=c.heads)
        kv = rearrange(self.wkv_b(kv_latent), "b t (h f) -> b t h f", h=c.heads)
        k_nope, v = jnp.split(kv, [c.nope], axis=-1)
        if c.partial_qk_norm:
            q_nope, q_rope = jnp.split(q, [c.nope], axis=-1)
            q = jnp.concatenate([self.q_nope_norm(q_nope), self.q_rope_norm(q_rope)], axis=-1)
            k_rope = self.k_rope_norm(k_rope)
        k_rope = repeat(k_rope, "b t r -> b t h r", h=c.heads)
        return q, jnp.concatenate([k_nope, k_rope], axis=-1), v


ATTENTION = {"grouped": GroupedAttention, "fused": FusedAttention, "latent": LatentAttention}


def split_heads(q, k, v, config: ModelConfig) -> tuple[jax.Array, jax.Array, jax.Array]:
    per_head = "b t (h f) -> b t h f"
    return (
        rearrange(q, per_head, h=config.heads),
        rearrange(k, per_head, h=config.kv_heads),
        rearrange(v, per_head, h=config.kv_heads),
    )


class MLP(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        up = linear(self.config.d_ff, self.config, "up")(x)
        match self.config.mlp:
            case "relu2":
                inner = jax.nn.relu(up) ** 2
            case "swiglu":
                inner = jax.nn.silu(linear(self.config.d_ff, self.config, "gate")(x)) * up
        return linear(self.config.d_model, self.config, "down")(inner)


class Layer(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        c = self.config
        x = x + ATTENTION[c.attention](c, name="attn")(rms_norm(c, "attn_norm")(x))
        return x + MLP(c, name="mlp")(rms_norm(c, "mlp_norm")(x)), None


class Decoder(nn.Module):
    """Embedding, pre-norm layers, and the embedding again as unembedding."""

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 `b t` → float32 logits `b t vocab`."""
        c = self.config
        init = nn.initializers.normal(c.init_std)
        embed = nn.Embed(c.vocab_size, c.d_model, dtype=c.dtype, embedding_init=init, name="embed")
        layers = nn.scan(
            Layer,
            variable_axes={"params": 0, "intermediates": 0, HEADS: 0},
            split_rngs={"params": True},
            length=c.layers,
        )
        x, _ = layers(c, name="layers")(embed(tokens) * c.d_model**0.5, None)
        return embed.attend(rms_norm(c, "norm")(x)).astype(jnp.float32)


def queries_and_keys(
    params: Any, config: ModelConfig, tokens: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits `b t vocab`, queries `layers b t h f` and keys `layers b t k f`, as they enter the
    attention's logits: after QK-norm and RoPE."""
    logits, sown = Decoder(config).apply({"params": params}, tokens, mutable=[HEADS])
    sown = sown[HEADS]["layers"]["attn"]
    return logits, sown["queries"][0], sown["keys"][0]


def attention_logits(queries: jax.Array, keys: jax.Array, last: int = 64) -> jax.Array:
    """The pre-softmax logits `layers b h t s` of the last positions t, without a soft cap; 0 where
    the query must not look."""
    length = queries.shape[2]
    queries = queries[:, :, -last:].astype(jnp.float32)
    keys = repeat(
        keys.astype(jnp.float32), "l b s k f -> l b s (k g) f", g=queries.shape[3] // keys.shape[3]
    )
    logits = jnp.einsum("lbthf,lbshf->lbhts", queries, keys) * keys.shape[-1] ** -0.5
    seen = jnp.arange(length) <= jnp.arange(length)[-last:, None]
    return jnp.where(seen, logits, 0)
