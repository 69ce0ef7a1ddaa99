"""`attention_fn`: what Flax's own attention modules call."""

import functools
import inspect

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from muonclip_jax._attention import flax
from muonclip_jax._attention.attention import dot_product_attention
from muonclip_jax._attention.flax import attention_fn
from muonclip_jax._attention.max_logits import read_max_logits

X = jax.random.normal(jax.random.key(0), (2, 5, 8))
QKV = [jax.random.normal(jax.random.key(i), (5, 4, 2)) for i in range(3)]
# Matrix products of the same float32 numbers, inside and outside of a model.
assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5)


def parameters(function):
    return inspect.signature(function).parameters


@pytest.mark.parametrize("theirs", [nn.dot_product_attention, nnx.dot_product_attention])
def test_signature_is_flaxs(theirs):
    """Names, order and defaults of all up to `module`; behind it come the options."""
    ours = list(parameters(attention_fn).values())
    order = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    theirs = parameters(theirs)
    assert [(name, theirs[name].default) for name in order] == [
        (name, parameters(attention_fn)[name].default) for name in order
    ]
    assert order == list(theirs)[: len(order)] and order[-1] == "module"


def test_takes_every_option_of_dot_product_attention():
    given, options = parameters(attention_fn), parameters(dot_product_attention)
    assert set(given) == {*options, "deterministic", "module"}
    assert all(given[name].default == option.default for name, option in options.items())


def test_every_option_reaches_the_attention(monkeypatch):
    options = {name: object() for name in parameters(dot_product_attention)}
    options |= {"mask": None, "dropout_rate": 0.5}
    bind = inspect.signature(dot_product_attention).bind

    def fake(*args, **kwargs):
        assert bind(*args, **kwargs).arguments == options
        return "out", "max_logits"

    monkeypatch.setattr(flax, "dot_product_attention", fake)
    assert attention_fn(**options) == "out"


def test_numbers_in_a_mask_attend_unless_zero():
    """As Flax's mask helpers give them, in the dtype of their inputs."""
    mask = jnp.array([1.0, 0.0, 2.0, 0.0, 1.0])
    expected, _ = dot_product_attention(*QKV, mask=mask != 0)
    np.testing.assert_array_equal(attention_fn(*QKV, mask=mask), expected)
    np.testing.assert_array_equal(attention_fn(*QKV, mask=mask.astype(int)), expected)


def test_deterministic_switches_dropout_off():
    dropout = {"dropout_rng": jax.random.key(0), "dropout_rate": 0.5}
    plain = attention_fn(*QKV)
    np.testing.assert_array_equal(attention_fn(*QKV, deterministic=True, **dropout), plain)
    np.testing.assert_array_equal(attention_fn(*QKV, deterministic=True, dropout_rate=0.5), plain)
    assert np.abs(attention_fn(*QKV, **dropout) - plain).max() > 0.01


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (TypeError, {"module": object()}, ["module", "flax.nnx.Module", "object"]),
        (ValueError, {"dropout_rate": 0.1}, ["dropout_rng", "0.1", "deterministic=True"]),
        (ValueError, {"dropout_rate": 1.5, "deterministic": True}, ["dropout_rate", "1.5"]),
        (ValueError, {"mask": jnp.ones(3)}, ["mask (3,)"]),
    ],
)
def test_wrong_calls(error, options, words):
    with pytest.raises(error) as caught:
        attention_fn(*QKV, **options)
    for word in words:
        assert word in str(caught.value)


def test_options_of_a_partial_reach_linens_module():
    module = functools.partial(nn.MultiHeadDotProductAttention, num_heads=4)
    ours = module(attention_fn=functools.partial(attention_fn, is_causal=True))
    params = module().init(jax.random.key(1), X)
    masked = module().apply(params, X, mask=nn.make_causal_mask(X[..., 0]))
    # Averages in float32, of numbers of order one.
    chex.assert_trees_all_close(ours.apply(params, X), masked, atol=1e-5)


@pytest.mark.parametrize("module", [nn.MultiHeadDotProductAttention, nn.MultiHeadAttention])
def test_linen_attention_unchanged_but_sown(module):
    ours = module(num_heads=4, attention_fn=attention_fn)
    flax = module(num_heads=4)
    params = flax.init(jax.random.key(1), X)
    mask = nn.make_causal_mask(X[..., 0])  # float32, as Flax makes it
    out, state = ours.apply(params, X, mask=mask, sow_weights=True, mutable=["intermediates"])
    # Averages in float32, of numbers of order one.
    chex.assert_trees_all_close(out, flax.apply(params, X, mask=mask), atol=1e-5)
    assert_close(read_max_logits(state)[()], masked_maxima(params["params"], mask))


def masked_maxima(params, mask):
    query, key = (
        np.einsum("btd,dnh->bnth", X, params[name]["kernel"]) + params[name]["bias"][:, None]
        for name in ("query", "key")
    )
    logits = np.einsum("bnth,bnsh->bnts", query, key) / np.sqrt(query.shape[-1])
    return np.where(mask, logits, -np.inf).max((0, 2, 3))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_nnx_attention_unchanged_but_sown(kv_heads):
    def build(**options):
        return nnx.MultiHeadAttention(
            4, 8, num_kv_heads=kv_heads, decode=False, rngs=nnx.Rngs(1), **options
        )

    ours, flax = build(attention_fn=attention_fn), build()
    forward = nnx.capture(ours, nnx.Intermediate)
    mask = nnx.make_causal_mask(X[..., 0])
    out, state = forward(X, mask=mask, sow_weights=True)
    # Averages in float32, of numbers of order one.
    chex.assert_trees_all_close(out, flax(X, mask=mask), atol=1e-5)
    params = {name: nnx.to_pure_dict(nnx.state(getattr(ours, name))) for name in ("query", "key")}
    for leaf in ("kernel", "bias"):
        params["key"][leaf] = np.repeat(params["key"][leaf], 4 // kv_heads, axis=-2)
    assert_close(read_max_logits(state)[()], masked_maxima(params, mask))
    assert not forward(X)[1], "without sow_weights nothing is sown"


@pytest.mark.skipif(
    "is_causal" not in inspect.signature(nnx.MultiHeadAttention.__call__).parameters,
    reason="Flax before 0.12.7 has no is_causal",
)
def test_nnx_attention_passes_is_causal():
    attention = nnx.MultiHeadAttention(
        4, 8, decode=False, attention_fn=attention_fn, rngs=nnx.Rngs(1)
    )
    masked = attention(X, mask=nnx.make_causal_mask(X[..., 0]))
    # The same averages.
    chex.assert_trees_all_close(attention(X, is_causal=True), masked, atol=1e-6)


def test_flax_dropout_reaches_the_attention():
    module = nn.MultiHeadAttention(
        num_heads=4, dropout_rate=0.5, deterministic=False, attention_fn=attention_fn
    )
    params = module.init(jax.random.key(1), X)
    first, again, other = (
        module.apply(params, X, rngs={"dropout": jax.random.key(seed)}) for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, again)
    assert np.abs(first - other).max() > 0.01
