"""A small decoder with multi-head latent attention (DeepSeek-V2, arXiv 2405.04434).

Axis names, used in every shape comment and einops pattern below:

    b  batch            t  query position   s  key position     d  model width
    h  heads            k  key heads (GQA)  g  queries per key head
    e  experts          j  the experts that a token is sent to
    n  nope features    r  rope features    v  value features   f  any head features
    c  key/value latent

Each attention has two forms: `__call__` for training, and `decode` for one token with a cache.
MLA's decode is *absorbed*: of earlier tokens it forms no keys or values, only reads their latents.
QK-Clip changes weights alone, so it changes nothing there. QK-norm fits too, exactly (arXiv
2606.16310). Of a head, with k = [k_nope | k_rope]:

    training    k̂ = gain * k / rms(k), then RoPE on its rope features
    decoding    q̂ · k̂ = inverse_rms * (W_UK (gain_nope * q̂_nope) · latent
                                       + q̂_rope · RoPE(gain_rope * k_rope))

The gain is a weight, so it moves: of nope features to the query, of rope features, which all heads
share, into the rotary key, before that is cached. What depends on the token is one number a head,
inverse_rms = 1 / √(mean(k²) + ε). It is worked out once, from the keys of the new token, and is
cached: c + r + h numbers a token and layer instead of c + r.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import einsum, rearrange, repeat
from flax import nnx

import muonclip_jax as mc
from examples.mla.experts import ACTIVE, mix
from examples.mla.mesh import replicate, split_batch, whole_rows

Cache = dict[str, jax.Array]

# How far an expert's bias moves in a step, and where its load is read: DeepSeek-V3, section 4.2.
BALANCE_RATE = 1e-3
EXPERT_LOAD = "expert_load"


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and options of the decoder; parameters are always float32, so that no clip is lost to
    rounding."""

    vocab_size: int = 2048
    """Tokens in the vocabulary."""
    d_model: int = 128
    """Width of the residual stream."""
    layers: int = 4
    """Attention and MLP layers."""
    heads: int = 4
    """Query heads."""
    kv_heads: int = 2
    """Key and value heads of attention gqa."""
    nope: int = 32
    """Features per head without position; all are rotary in mha and gqa."""
    rope: int = 16
    """Rotary features per head."""
    v: int = 32
    """Value features per head."""
    q_rank: int = 64
    """Width of MLA's query latent; 0 leaves out query compression."""
    kv_rank: int = 48
    """Width of MLA's key/value latent, which decoding caches."""
    d_ff: int = 384
    """Width inside the MLP; with experts, of the three together that a token goes through."""
    experts: int = 0
    """Experts of each MLP, of which a token goes to two, and to one more that all tokens share;
    0 is one dense MLP."""
    max_length: int = 256
    """Longest sequence, for decoding's cache."""
    rope_base: float = 10_000.0
    """Longest RoPE wavelength, over 2π."""
    attention: Literal["mla", "mha", "gqa"] = "mla"
    """Multi-head latent attention, or for comparison multi-head or grouped-query attention."""
    qk_norm: Literal["none", "full", "partial"] = "none"
    """RMSNorm on queries and keys: full on whole heads, before RoPE, for which mla caches one more
    number a token and head; partial for mla, on q_nope, q_rope and k_rope, each by itself. Does not
    go with an optimizer that clips."""
    soft_cap: float | None = None
    """Caps logits smoothly: cap * tanh(logit / cap)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Of the activations."""

    def __post_init__(self):
        for name, value in asdict(self).items():
            least = 0 if name in ("q_rank", "experts") else 1
            if isinstance(value, int) and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if not self.rope_base > 1:
            raise ValueError(f"rope_base must be above 1, got {self.rope_base}.")
        rotary = self.rope if self.attention == "mla" else self.nope + self.rope
        if rotary % 2:
            raise ValueError(f"RoPE turns pairs of features: {rotary} rotary features is odd.")
        if self.attention == "gqa" and self.heads % self.kv_heads:
            raise ValueError(
                f"{self.heads} heads cannot share {self.kv_heads} key heads evenly; choose "
                "kv_heads among the divisors of heads."
            )
        if self.experts and (self.experts < ACTIVE or self.d_ff % (ACTIVE + 1)):
            raise ValueError(
                f"A token goes to {ACTIVE} experts and a shared one: experts must be 0 or at least "
                f"{ACTIVE}, got {self.experts}, and {ACTIVE + 1} must divide d_ff, got {self.d_ff}."
            )
        if self.qk_norm == "partial" and self.attention != "mla":
            raise ValueError("qk_norm=partial is for attention=mla; use qk_norm=full.")
        if self.soft_cap is not None and not self.soft_cap > 0:
            raise ValueError(f"soft_cap must be above 0, got {self.soft_cap}.")

    @property
    def expert_width(self) -> int:
        """Width inside one expert."""
        return self.d_ff // (ACTIVE + 1)

    @property
    def scale(self) -> float:
        """What `q · k` is multiplied by."""
        return 1 / math.sqrt(self.nope + self.rope)


def attention_layout(config: ModelConfig) -> mc.Layout:
    """Where this model's queries, keys, values and outputs are."""
    if config.attention == "mla":
        return mc.layouts.mla(
            config.nope,
            config.rope,
            config.v,
            query=("wq_a", "wq_b") if config.q_rank else "wq",
            query_norm="q_norm" if config.q_rank else None,
            key_value_norm="kv_norm",
        )
    heads = config.heads
    if config.attention == "mha":
        return mc.layouts.mha(heads=heads, query="wq", key="wk", value="wv", out="wo")
    return mc.layouts.gqa(config.kv_heads, heads=heads, query="wq", key="wk", value="wv", out="wo")


def linear(ins: int, outs: int, config: ModelConfig, rngs: nnx.Rngs) -> nnx.Linear:
    """A kernel `[in, out]` without bias."""
    return nnx.Linear(ins, outs, use_bias=False, dtype=jnp.dtype(config.dtype), rngs=rngs)


def rms_norm(features: int, config: ModelConfig, rngs: nnx.Rngs) -> nnx.RMSNorm:
    return nnx.RMSNorm(features, dtype=jnp.dtype(config.dtype), rngs=rngs)


def apply_rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """Rotates feature pairs (i, i + f/2) of `b t h f` by position (RoFormer, arXiv 2104.09864)."""
    half = x.shape[-1] // 2
    frequencies = base ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles = rearrange(positions.astype(jnp.float32), "t -> t 1 1") * frequencies
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def attend_to_cache(logits: jax.Array, position: jax.Array, config: ModelConfig) -> jax.Array:
    """Softmax weights `... s` over the positions that are filled so far."""
    if config.soft_cap is not None:
        logits = config.soft_cap * jnp.tanh(logits / config.soft_cap)
    filled = jnp.arange(logits.shape[-1]) <= position
    return jax.nn.softmax(jnp.where(filled, logits, -jnp.inf), axis=-1)


def store(cache: jax.Array, entry: jax.Array, position: jax.Array) -> jax.Array:
    """Writes `b 1 ...` at `position` of `b s ...`."""
    return jax.lax.dynamic_update_slice_in_dim(cache, entry.astype(cache.dtype), position, axis=1)


class LatentAttention(nnx.Module):
    """MLA: queries and key/values through narrow latents, one rotary key shared by all heads."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        per_head = config.nope + config.rope
        if config.q_rank:
            self.wq_a = linear(config.d_model, config.q_rank, config, rngs)
            self.q_norm = rms_norm(config.q_rank, config, rngs)
            self.wq_b = linear(config.q_rank, config.heads * per_head, config, rngs)
        else:
            self.wq = linear(config.d_model, config.heads * per_head, config, rngs)
        self.wkv_a = linear(config.d_model, config.kv_rank + config.rope, config, rngs)
        self.kv_norm = rms_norm(config.kv_rank, config, rngs)
        self.wkv_b = linear(config.kv_rank, config.heads * (config.nope + config.v), config, rngs)
        self.wo = linear(config.heads * config.v, config.d_model, config, rngs)
        if config.qk_norm == "partial":
            self.q_nope_norm = rms_norm(config.nope, config, rngs)
            self.q_rope_norm = rms_norm(config.rope, config, rngs)
            self.k_rope_norm = rms_norm(config.rope, config, rngs)
        if config.qk_norm == "full":
            self.q_head_norm = rms_norm(per_head, config, rngs)
            self.k_head_norm = rms_norm(per_head, config, rngs)

    def queries(self, x: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`b t d` → q_nope `b t h n`, q_rope `b t h r`."""
        config = self.config
        q = self.wq_b(self.q_norm(self.wq_a(x))) if config.q_rank else self.wq(x)
        q = rearrange(q, "b t (h f) -> b t h f", h=config.heads)
        if config.qk_norm == "full":
            q = self.q_head_norm(q)
        q_nope, q_rope = jnp.split(q, [config.nope], axis=-1)
        if config.qk_norm == "partial":
            q_nope, q_rope = self.q_nope_norm(q_nope), self.q_rope_norm(q_rope)
        return q_nope, apply_rope(q_rope, positions, config.rope_base)

    def latents(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`b s d` → latent `b s c`, the key that all heads share `b s 1 r`, before RoPE."""
        latent, k_rope = jnp.split(self.wkv_a(x), [self.config.kv_rank], axis=-1)
        if self.config.qk_norm == "partial":
            k_rope = self.k_rope_norm(k_rope)
        return self.kv_norm(latent), rearrange(k_rope, "b s r -> b s 1 r")

    def keys_and_values(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`b s d` → k `b s h f`, v `b s h v`, as training sees them; decoding keeps neither."""
        config = self.config
        latent, k_rope = self.latents(x)
        kv = rearrange(self.wkv_b(latent), "b s (h f) -> b s h f", h=config.heads)
        k_nope, v = jnp.split(kv, [config.nope], axis=-1)
        if config.qk_norm == "full":
            k = self.k_head_norm(self.whole_keys(k_nope, k_rope))
            k_nope, k_rope = jnp.split(k, [config.nope], axis=-1)
        k_rope = apply_rope(k_rope, jnp.arange(x.shape[1]), config.rope_base)
        return self.whole_keys(k_nope, k_rope), v

    def whole_keys(self, k_nope: jax.Array, k_rope: jax.Array) -> jax.Array:
        """`b s h n` and `b s h r`, or what all heads share, `b s 1 r` → `b s h f`."""
        k_rope = repeat(k_rope, "b s k r -> b s (k g) r", g=k_nope.shape[2] // k_rope.shape[2])
        return jnp.concatenate([k_nope, k_rope], axis=-1)

    def __call__(self, x: jax.Array) -> jax.Array:
        config = self.config
        q = jnp.concatenate(self.queries(x, jnp.arange(x.shape[1])), axis=-1)
        k, v = self.keys_and_values(x)
        out, max_logits = mc.dot_product_attention(
            q, k, v, is_causal=True, scale=config.scale, soft_cap=config.soft_cap
        )
        mc.sow_max_logits(self, max_logits)
        return self.wo(rearrange(out, "b t h v -> b t (h v)"))

    def init_cache(self, batch: int) -> Cache:
        config = self.config
        sizes = {"latent": config.kv_rank, "k_rope": config.rope}
        if config.qk_norm == "full":
            sizes["inverse_rms"] = config.heads
        return {name: jnp.zeros((batch, config.max_length, size)) for name, size in sizes.items()}

    def decode(self, x: jax.Array, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache]:
        """One token `b 1 d`; the key and value up-projections are absorbed into q and o."""
        config = self.config
        q_nope, q_rope = self.queries(x, position[None])
        latent, k_rope = self.latents(x)
        up = rearrange(self.wkv_b.kernel[...], "c (h f) -> c h f", h=config.heads)
        up_key, up_value = jnp.split(up, [config.nope], axis=-1)
        entry = {"latent": latent}
        if config.qk_norm == "full":
            gain = self.k_head_norm.scale
            assert gain is not None
            nope_gain, rope_gain = jnp.split(gain[...], [config.nope])
            entry["inverse_rms"] = self.inverse_rms(latent, k_rope, up_key)
            q_nope, k_rope = q_nope * nope_gain, k_rope * rope_gain
        k_rope = apply_rope(k_rope, position[None], config.rope_base)
        entry["k_rope"] = rearrange(k_rope, "b s 1 r -> b s r")
        cache = {name: store(cache[name], new, position) for name, new in entry.items()}
        q_latent = einsum(q_nope, up_key, "b t h n, c h n -> b t h c")
        logits = einsum(q_latent, cache["latent"], "b t h c, b s c -> b t h s")
        logits += einsum(q_rope, cache["k_rope"], "b t h r, b s r -> b t h s")
        if config.qk_norm == "full":
            logits *= rearrange(cache["inverse_rms"], "b s h -> b 1 h s")
        weights = attend_to_cache(logits * config.scale, position, config)
        mixed = einsum(weights, cache["latent"], "b t h s, b s c -> b t h c")
        out = einsum(mixed, up_value, "b t h c, c h v -> b t h v")
        return self.wo(rearrange(out, "b t h v -> b t (h v)")), cache

    def inverse_rms(self, latent: jax.Array, k_rope: jax.Array, up_key: jax.Array) -> jax.Array:
        """What `k_head_norm` multiplies the keys of new tokens by, but for its gain: `b s h`."""
        k_nope = einsum(latent, up_key, "b s c, c h n -> b s h n")
        k = self.whole_keys(k_nope, k_rope).astype(jnp.float32)
        return jax.lax.rsqrt(jnp.square(k).mean(axis=-1) + self.k_head_norm.epsilon)


class GroupedAttention(nnx.Module):
    """MHA and GQA, for comparison; every feature of the head is rotary."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.kv_heads = config.heads if config.attention == "mha" else config.kv_heads
        per_head = config.nope + config.rope
        self.wq = linear(config.d_model, config.heads * per_head, config, rngs)
        self.wk = linear(config.d_model, self.kv_heads * per_head, config, rngs)
        self.wv = linear(config.d_model, self.kv_heads * config.v, config, rngs)
        self.wo = linear(config.heads * config.v, config.d_model, config, rngs)
        if config.qk_norm == "full":
            self.q_norm = rms_norm(per_head, config, rngs)
            self.k_norm = rms_norm(per_head, config, rngs)

    def queries(self, x: jax.Array, positions: jax.Array) -> jax.Array:
        """`b t d` → `b t h f`."""
        q = rearrange(self.wq(x), "b t (h f) -> b t h f", h=self.config.heads)
        if self.config.qk_norm == "full":
            q = self.q_norm(q)
        return apply_rope(q, positions, self.config.rope_base)

    def keys_and_values(
        self, x: jax.Array, positions: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """`b s d` → k `b s k f`, v `b s k v`; positions from 0 unless given."""
        positions = jnp.arange(x.shape[1]) if positions is None else positions
        k = rearrange(self.wk(x), "b s (k f) -> b s k f", k=self.kv_heads)
        v = rearrange(self.wv(x), "b s (k v) -> b s k v", k=self.kv_heads)
        if self.config.qk_norm == "full":
            k = self.k_norm(k)
        return apply_rope(k, positions, self.config.rope_base), v

    def __call__(self, x: jax.Array) -> jax.Array:
        q, (k, v) = self.queries(x, jnp.arange(x.shape[1])), self.keys_and_values(x)
        out, max_logits = mc.dot_product_attention(
            q, k, v, is_causal=True, scale=self.config.scale, soft_cap=self.config.soft_cap
        )
        mc.sow_max_logits(self, max_logits)
        return self.wo(rearrange(out, "b t h v -> b t (h v)"))

    def init_cache(self, batch: int) -> Cache:
        config, length = self.config, self.config.max_length
        return {
            "k": jnp.zeros((batch, length, self.kv_heads, config.nope + config.rope)),
            "v": jnp.zeros((batch, length, self.kv_heads, config.v)),
        }

    def decode(self, x: jax.Array, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache]:
        """One token `b 1 d` against the cached keys and values."""
        q = self.queries(x, position[None])
        k, v = self.keys_and_values(x, position[None])
        cache = {"k": store(cache["k"], k, position), "v": store(cache["v"], v, position)}
        grouped = rearrange(q, "b t (k g) f -> b t k g f", k=self.kv_heads)
        logits = einsum(grouped, cache["k"], "b t k g f, b s k f -> b t k g s")
        weights = attend_to_cache(logits * self.config.scale, position, self.config)
        out = einsum(weights, cache["v"], "b t k g s, b s k v -> b t k g v")
        return self.wo(rearrange(out, "b t k g v -> b t (k g v)")), cache


class SwiGLU(nnx.Module):
    """`(silu(x W_gate) * x W_up) W_down` (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, width: int):
        self.gate = linear(config.d_model, width, config, rngs)
        self.up = linear(config.d_model, width, config, rngs)
        self.down = linear(width, config.d_model, config, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(jax.nn.silu(self.gate(x)) * self.up(x))


class Bias(nnx.Variable):
    """What is added to the experts' scores when experts are chosen; no gradient moves it."""


class ExpertKernels(nnx.Module):
    """A kernel `[in, out]` for each expert: `e in out`."""

    def __init__(self, ins: int, outs: int, config: ModelConfig, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal(batch_axis=(0,))
        self.kernel = nnx.Param(init(rngs.params(), (config.experts, ins, outs), jnp.float32))


class Experts(nnx.Module):
    """A mixture of SwiGLU experts, as in DeepSeek-V3 (arXiv 2412.19437), Moonlight and Kimi K2.

    A token goes to the two experts of the largest score, and to a shared one. Scores are sigmoids;
    those of the two, divided by their sum, weigh what the experts give. No token is dropped. Loads
    are balanced without a loss of their own (arXiv 2408.15664): experts are chosen by score plus a
    bias, which `balance` raises for those that had less than their share.
    """

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        width, experts = config.expert_width, config.experts
        self.config = config
        self.router = nnx.Linear(config.d_model, experts, use_bias=False, rngs=rngs)
        self.bias = Bias(jnp.zeros(experts))
        self.gate = ExpertKernels(config.d_model, width, config, rngs)
        self.up = ExpertKernels(config.d_model, width, config, rngs)
        self.down = ExpertKernels(width, config.d_model, config, rngs)
        self.shared = SwiGLU(config, rngs, width)

    def route(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """`b t d` → the experts that a token goes to `b t j`, and what each counts `b t j`."""
        scores = jax.nn.sigmoid(self.router(x.astype(jnp.float32)))
        _, chosen = jax.lax.top_k(scores + self.bias[...], ACTIVE)
        weights = jnp.take_along_axis(scores, chosen, axis=-1)
        return chosen, weights / weights.sum(-1, keepdims=True)

    def __call__(self, x: jax.Array) -> jax.Array:
        chosen, weights = self.route(x)
        sent = jax.nn.one_hot(chosen, self.config.experts, dtype=jnp.float32)
        mc.sow_signal(self, EXPERT_LOAD, sent.mean((0, 1, 2)))
        kernels = [each.kernel[...].astype(x.dtype) for each in (self.gate, self.up, self.down)]
        return self.shared(x) + mix(x, chosen, weights.astype(x.dtype), kernels)

    def balance(self, load: jax.Array) -> None:
        """Moves each expert's bias by one step of `BALANCE_RATE`, against its load `e`."""
        self.bias[...] += BALANCE_RATE * jnp.sign(1 / self.config.experts - load)


class Layer(nnx.Module):
    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        attention = LatentAttention if config.attention == "mla" else GroupedAttention
        self.attn_norm = rms_norm(config.d_model, config, rngs)
        self.attn = attention(config, rngs)
        self.mlp_norm = rms_norm(config.d_model, config, rngs)
        self.mlp = Experts(config, rngs) if config.experts else SwiGLU(config, rngs, config.d_ff)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attn(self.attn_norm(x))
        return x + self.mlp(self.mlp_norm(x))

    def decode(self, x: jax.Array, cache: Cache, position: jax.Array) -> tuple[jax.Array, Cache]:
        attended, cache = self.attn.decode(self.attn_norm(x), cache, position)
        x = x + attended
        return x + self.mlp(self.mlp_norm(x)), cache


class Decoder(nnx.Module):
    """Embedding, pre-norm layers, unembedding."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed = nnx.Embed(
            config.vocab_size, config.d_model, dtype=jnp.dtype(config.dtype), rngs=rngs
        )
        self.layers = nnx.List([Layer(config, rngs) for _ in range(config.layers)])
        self.norm = rms_norm(config.d_model, config, rngs)
        self.lm_head = linear(config.d_model, config.vocab_size, config, rngs)

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """int32 `b t` → `b t d`, on a mesh with whole vectors of a part of the batch."""
        table = whole_rows(self.embed.embedding[...].astype(self.config.dtype))
        return split_batch(jnp.take(table, tokens, axis=0))

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """int32 `b t` → float32 logits `b t vocab`."""
        x = self.embedded(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x)).astype(jnp.float32)

    def keys(self, tokens: jax.Array) -> list[jax.Array]:
        """Every layer's keys `b s k f` as they enter the logits, for diagnostics."""
        x, keys = self.embedded(tokens), []
        for layer in self.layers:
            keys.append(layer.attn.keys_and_values(layer.attn_norm(x))[0])
            x = layer(x)
        return keys

    def balance(self, loads: dict[tuple[str, ...], jax.Array]) -> None:
        """Moves the biases of all experts against what they got in a step, `{module: e}`."""
        for i, layer in enumerate(self.layers):
            if isinstance(layer.mlp, Experts):
                layer.mlp.balance(loads["layers", str(i), "mlp"])

    def init_cache(self, batch: int) -> list[Cache]:
        return [layer.attn.init_cache(batch) for layer in self.layers]

    def decode(
        self, tokens: jax.Array, caches: list[Cache], position: jax.Array
    ) -> tuple[jax.Array, list[Cache]]:
        """One token per sequence, int32 `b` → float32 logits `b vocab`, and the caches."""
        x = self.embed(tokens)[:, None]
        filled = []
        for layer, cache in zip(self.layers, caches, strict=True):
            x, cache = layer.decode(x, cache, position)
            filled.append(cache)
        return self.lm_head(self.norm(x))[:, 0].astype(jnp.float32), filled


@nnx.jit(static_argnames="steps")
def generate(
    model: Decoder, prompt: jax.Array, steps: int, temperature: Any, key: jax.Array
) -> jax.Array:
    """Continues `prompt` (int32 `t`, at least one token) by `steps` sampled tokens.

    Returns the prompt and its continuation; temperature 0 takes the likeliest token.
    """
    length = len(prompt) + steps
    if not len(prompt) or length > model.config.max_length:
        raise ValueError(
            f"A prompt of {len(prompt)} tokens and {steps} more must be within 1 and the model's "
            f"max_length of {model.config.max_length}."
        )
    given = jnp.pad(prompt, (0, steps))

    def step(carry, inputs):
        caches, previous = carry
        position, key = inputs
        token = jnp.where(position < len(prompt), given[position], previous)
        logits, caches = model.decode(token[None], caches, position)
        sampled = jax.random.categorical(key, logits[0] / jnp.maximum(temperature, 1e-6))
        following = jnp.where(temperature > 0, sampled, logits[0].argmax(-1)).astype(prompt.dtype)
        return (caches, following), token

    start = (model.init_cache(1), prompt[0])
    _, tokens = jax.lax.scan(step, start, (jnp.arange(length), jax.random.split(key, length)))
    return replicate(tokens)
