"""Every public function and class shows how it is used, and what it shows is so.

The examples are doctests. Each one starts from its own copy of these names:

  jax, jnp, np, nn (flax.linen), nnx (flax.nnx), optax, mc (muonclip_jax), P (PartitionSpec)
  model    a language model in Flax Linen: "embed", one attention "attn", "mlp", "head"
  tokens   what it reads, (2, 5) integers
  params   its parameters: embed/embedding (16, 8); attn/{query,key,value}/kernel (8, 2, 4) and
           /bias (2, 4); attn/out/kernel (2, 4, 8) and /bias (8,); mlp/kernel (8, 16) and
           /bias (16,); head/kernel (16, 16) and /bias (16,)
  layout   mc.find_layout(params)
  grads    the gradient of a loss, a tree like params
  sown     the maximum logit of each head, as qk_clip takes it
"""

import doctest
import inspect
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

import muonclip_jax as mc

OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def public() -> dict[str, Any]:
    """What `muonclip_jax` and its public modules export, but for modules and aliases of types."""
    modules = [mc, mc.layouts, mc.schedules, mc.linalg, mc.scaling, mc.plots]
    found = {}
    for module in modules:
        prefix = "" if module is mc else module.__name__.removeprefix("muonclip_jax.") + "."
        for name in module.__all__:
            thing = getattr(module, name)
            documented = inspect.isfunction(thing) or inspect.isclass(thing)
            if documented and not any(thing is other for other in found.values()):
                found[prefix + name] = thing
    return found


class Model(nn.Module):
    """Small, with one of everything that the transformations tell apart."""

    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(16, 8, name="embed")(tokens)
        x = x + nn.MultiHeadDotProductAttention(
            num_heads=2, qkv_features=8, attention_fn=mc.attention_fn, name="attn"
        )(x, sow_weights=True)
        return nn.Dense(16, name="head")(nn.relu(nn.Dense(16, name="mlp")(x)))


@pytest.fixture(scope="module")
def namespace() -> dict[str, Any]:
    model, tokens = Model(), jnp.arange(10).reshape(2, 5)
    params = model.init(jax.random.key(0), tokens)["params"]

    def loss(params):
        logits, sown = model.apply({"params": params}, tokens, mutable=["intermediates"])
        values = optax.softmax_cross_entropy_with_integer_labels(logits, tokens)
        return values.mean(), mc.read_max_logits(sown["intermediates"])

    grads, sown = jax.grad(loss, has_aux=True)(params)
    return {
        "jax": jax,
        "jnp": jnp,
        "np": np,
        "nn": nn,
        "nnx": nnx,
        "optax": optax,
        "mc": mc,
        "P": PartitionSpec,
        "model": model,
        "tokens": tokens,
        "params": params,
        "layout": mc.find_layout(params),
        "grads": grads,
        "sown": sown,
    }


def example_of(thing: Any) -> doctest.DocTest:
    parser = doctest.DocTestParser()
    return parser.get_doctest(inspect.getdoc(thing) or "", {}, thing.__name__, thing.__name__, 0)


@pytest.mark.parametrize("name", sorted(public()))
def test_example_runs(name, namespace):
    test = example_of(public()[name])
    assert test.examples, f"the docstring of {name} has no example (>>>)"
    assert len(test.examples) <= 12, f"the example of {name} is long: show one use"
    containers = dict, list
    test.globs = {
        key: jax.tree.map(lambda leaf: leaf, value) if isinstance(value, containers) else value
        for key, value in namespace.items()
    }
    told: list[str] = []
    result = doctest.DocTestRunner(optionflags=OPTIONS, verbose=False).run(test, out=told.append)
    assert not result.failed, "".join(told)
