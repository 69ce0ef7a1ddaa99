"""One line for each trainer of others: what docs/how-to/trainers.md says works in their loops."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import muonclip_jax as mc
from muonclip_jax import layouts
from tests.trainers import loops

# One step of Newton and Schulz: of five only compiling takes longer.
QUICK = {"newton_schulz": mc.NewtonSchulz(mc.schedules.polar_express(steps=1))}
RATE = 1e-2


def arrays(**shapes):
    rng = np.random.default_rng(0)
    return {
        name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()
    }


def is_array(leaf):
    return hasattr(leaf, "shape")


def kernels(**shapes):
    return {name: {"kernel": x} for name, x in arrays(**shapes).items()}


HEADED = kernels(query=(8, 2, 4), key=(8, 2, 4), value=(8, 2, 4), out=(2, 4, 8))
TREE = {
    "embed": {"embedding": jnp.ones((16, 8))},
    "layer_0": {"attn": HEADED, "norm": {"scale": jnp.ones(8)}, "mlp": kernels(up=(8, 32))["up"]},
}


def check_traces(step, tx, params, *others):
    """The step is wired, and gives parameters like those that it took. Nothing is compiled."""
    after = jax.eval_shape(lambda params: step(tx, params, *others), params)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, params)


def check_moved(before, after):
    """Every parameter moved, none became NaN."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    assert all(bool(jnp.isfinite(new).all() and (new != old).any()) for old, new in pairs)


def test_train_state_that_forwards_nothing():
    """nanodo, lm1b: QuacK needs no maxima."""
    tx = mc.quack(RATE, layout=mc.find_layout(TREE), direction=mc.muon_direction(**QUICK))
    check_moved(TREE, loops.train_state_donated(tx, TREE))


def test_nanodos_names():
    """Only `out` is called otherwise there: the error has the line."""
    names = ("query", "key", "value", "attn_out_proj")
    attention = dict(zip(names, HEADED.values(), strict=True))
    params = {"blocks_0": {"CausalAttn_0": attention}}
    try:
        layout = mc.find_layout(params)
    except ValueError as error:
        assert "attn_out_proj" in str(error) and "mc.layouts." in str(error)
        layout = layouts.mha(out="attn_out_proj")
    (block,) = layouts.find_blocks(layout, params)
    assert block.heads == 2 and block.part("o").kernel[-2] == "attn_out_proj"


def test_big_vision_scales_by_a_rate_of_its_own():
    direction = mc.muon_direction(layout=mc.find_layout(TREE), **QUICK)
    check_traces(loops.big_vision, direction, TREE)


def test_an_nnx_optimizer():
    class Model(nnx.Module):
        def __init__(self):
            self.attn = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))

    model = Model()
    before = nnx.state(model, nnx.Param)
    tx = mc.muon(RATE, layout=mc.find_layout(before))
    after = nnx.eval_shape(lambda model: loops.nnx_optimizer(tx, model), model)
    assert jax.tree.map(jnp.shape, after) == jax.tree.map(jnp.shape, before)


def test_kauldrons_partial_updates():
    frozen = jax.tree.map(lambda _: False, TREE)
    frozen["embed"]["embedding"] = True
    numbers = mc.muon_dimension_numbers(TREE)  # of the whole tree: neighbours may be masked
    check_traces(loops.kauldron, mc.muon(RATE, dimension_numbers=numbers), TREE, frozen)


def test_equinox():
    """Weights `[out, in]` of flat projections: the layout's number of heads is all it takes."""

    class Model(eqx.Module):
        attn: eqx.nn.MultiheadAttention

    model = Model(eqx.nn.MultiheadAttention(2, 8, key=jax.random.key(0)))
    params = eqx.filter(model, eqx.is_inexact_array)
    layout = mc.find_layout(params, heads=2)
    (block,) = layouts.find_blocks(layout, params)
    weight = params.attn.query_proj.weight
    taken = block.part("q").take(weight)  # [heads, in, features]
    np.testing.assert_array_equal(taken, weight.reshape(2, 4, 8).swapaxes(1, 2))
    after = eqx.filter_eval_shape(loops.equinox, mc.muon(RATE, layout=layout), model)
    assert jax.tree.map(jnp.shape, eqx.filter(after, is_array)) == jax.tree.map(jnp.shape, params)


def test_brax_gives_no_parameters():
    params = {"hidden_0": {"kernel": jnp.ones((8, 32)), "bias": jnp.ones(32)}}
    check_traces(loops.brax, mc.muon(RATE, weight_decay=0.0), params)


@pytest.mark.bad_input
def test_decay_without_parameters_says_how_to_go_on():
    params = {"hidden_0": {"kernel": jnp.ones((8, 32))}}
    tx = mc.muon(RATE, **QUICK)
    with pytest.raises(ValueError, match=r"weight_decay.*params.*weight_decay=0\.0"):
        tx.update(params, tx.init(params))


def penzais():
    found = arrays(mlp=(8, 16), embed=(16, 8), gain=(8,))
    return tuple(loops.ParameterValue(value, label) for label, value in found.items())


def test_penzai_names_by_label():
    def by_label(params):
        is_parameter = lambda node: isinstance(node, loops.ParameterValue)  # noqa: E731
        read = lambda p: "in out" if "mlp" in p.label else None  # noqa: E731
        return jax.tree.map(read, params, is_leaf=is_parameter)

    params = penzais()
    tx = mc.muon(RATE, dimension_numbers=by_label(params), **QUICK)
    check_traces(loops.penzai, tx, params)


@pytest.mark.bad_input
def test_parameters_without_names_raise():
    with pytest.raises(ValueError, match=r"0.*\(8, 16\)"):
        mc.muon(RATE, **QUICK).init(penzais())


def test_haiku():
    """A key is a path of modules, a flat projection `w`."""
    shapes = dict.fromkeys(("query", "key", "value", "linear"), (8, 8))
    params = {f"net/attn/{name}": {"w": x} for name, x in arrays(**shapes).items()}
    params["net/attn/query"]["b"] = jnp.ones(8)
    layout = layouts.mha(heads=2, query="query/w", key="key/w", value="value/w", out="linear/w")
    with pytest.raises(ValueError, match=r"This fits: mc\.layouts.mha.*'query/w'.*'linear/w'"):
        mc.find_layout(params)
    (block,) = layouts.find_blocks(layout, params)
    assert (block.name, block.heads) == ("net/attn", 2)
    check_traces(loops.plain_loop, mc.muon(RATE, layout=layout), params)
