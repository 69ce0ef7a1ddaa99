"""States of Optax's and PyTorch's Muon, converted: what follows is what they would have done."""

import pathlib
from functools import partial

import equinox as eqx
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import muonclip_jax as mc

RECORD = np.load(pathlib.Path(__file__).parent.parent / "fixtures" / "torch_muon.npz")
AS_THEIRS = mc.NewtonSchulz(mc.schedules.jordan(), "float32", "standard")
RATE = optax.linear_schedule(0.02, 0.01, 40)
PARAMS = {
    "up": {"kernel": (6, 10)},
    "embed": {"embedding": (12, 6)},
    "norm": {"scale": (6,)},
}
quick_jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


def random_like(shapes, seed):
    rng = np.random.default_rng(seed)
    is_shape = lambda node: isinstance(node, tuple)  # noqa: E731
    return jax.tree.map(lambda s: jnp.float32(rng.normal(size=s)), shapes, is_leaf=is_shape)


def steps(tx, params, state, seeds, shapes=PARAMS):
    update = quick_jit(tx.update)
    for seed in seeds:
        updates, state = update(random_like(shapes, seed), state, params)
        params = optax.apply_updates(params, updates)
    return params, state


def of_two_axes_without_embeddings(params):
    numbers = {"kernel": optax.contrib.MuonDimensionNumbers()}
    return {name: {leaf: numbers.get(leaf) for leaf in inside} for name, inside in params.items()}


def all_decay(params):
    return jax.tree.map(lambda _: True, params)


def test_the_next_five_steps_are_those_of_optax():
    """Of the whole recipe. After 20 steps 0.5ᵗ is 1e-6: Optax's bias correction is not seen."""
    theirs = optax.contrib.muon(
        RATE,
        beta=0.5,
        weight_decay=0.1,
        adam_b2=0.95,
        adam_weight_decay=0.1,
        muon_weight_dimension_numbers=of_two_axes_without_embeddings,
        consistent_rms=0.2,
    )
    ours = mc.muon(
        RATE,
        momentum=0.5,
        other=optax.scale_by_adam(b1=0.9, b2=0.95, nesterov=True),
        newton_schulz=AS_THEIRS,
        weight_decay=0.1,
        weight_decay_mask=all_decay,
    )
    params = random_like(PARAMS, 0)
    params, old = steps(theirs, params, theirs.init(params), range(20))
    state = mc.from_optax_muon(old, ours.init(params), beta=0.5)
    wanted, _ = steps(theirs, params, old, range(20, 25))
    found, state = steps(ours, params, state, range(20, 25))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, wanted)
    # A state that starts anew, or whose momentum keeps its scale, goes another way.
    for wrong in (ours.init(params), mc.from_optax_muon(old, ours.init(params), beta=0.0)):
        other, _ = steps(ours, params, wrong, range(20, 21))
        right, _ = steps(theirs, params, old, range(20, 21))
        assert np.abs(other["up"]["kernel"] - right["up"]["kernel"]).max() > 1e-3
    counts = [
        leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state) if "count" in str(path)
    ]
    assert [int(count) for count in counts] == [25, 25]  # Adam's and the schedule's


def test_with_bias_correction_the_first_steps_are_optaxs_too():
    shapes = {"up": (6, 10), "down": (10, 6)}
    theirs = optax.contrib.muon(0.01)
    ours = optax.chain(
        mc.scale_by_muon(0.95, newton_schulz=AS_THEIRS, bias_correction=True),
        mc.scale_by_update_rms("jordan"),
        optax.scale_by_learning_rate(0.01),
    )
    params = random_like(shapes, 0)
    params, old = steps(theirs, params, theirs.init(params), range(3), shapes)
    state = mc.from_optax_muon(old, ours.init(params), beta=0.95)
    wanted, _ = steps(theirs, params, old, range(3, 8), shapes)
    found, _ = steps(ours, params, state, range(3, 8), shapes)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), found, wanted)


def optax_state(params, seed=1):
    """A state of Optax's with something in it."""
    theirs = optax.contrib.muon(1e-3)
    rng = np.random.default_rng(seed)
    fill = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype) if x.ndim else x + 7  # noqa: E731
    return jax.tree.map(fill, theirs.init(params))


def momentum_of(state):
    is_trace = lambda node: isinstance(node, optax.TraceState)  # noqa: E731
    (found,) = filter(is_trace, jax.tree.leaves(state, is_leaf=is_trace))
    return jax.tree.leaves(found.trace)


def muon_of(state):
    return jax.tree.leaves(state.inner_states["muon"].inner_state[0].mu)


KERNELS = {"up": {"kernel": (6, 10), "bias": (10,)}}


class Dense(nnx.Module):
    def __init__(self):
        self.up = nnx.Linear(6, 10, rngs=nnx.Rngs(0))


def of_nnx():
    return nnx.state(Dense(), nnx.Param), None


def of_equinox():
    linear = eqx.nn.Linear(6, 10, key=jax.random.key(0))
    return eqx.filter({"up": linear}, eqx.is_inexact_array), {("*/weight", 2): "out in -> in out"}


def of_linen():
    return {"params": random_like(KERNELS, 0)}, None


@pytest.mark.parametrize("make", [of_linen, of_nnx, of_equinox])
def test_trees_of_every_library(make):
    params, rules = make()
    old = optax_state(params)
    state = mc.from_optax_muon(old, mc.muon(1e-3, rules=rules).init(params), beta=0.75)
    wanted = [4 * x for x in muon_of(old)]
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6), momentum_of(state), wanted)


def test_inside_an_nnx_optimizer():
    model = Dense()
    theirs = nnx.Optimizer(model, optax.contrib.muon(1e-3), wrt=nnx.Param)
    ours = nnx.Optimizer(model, mc.muon(1e-3), wrt=nnx.Param)
    ones = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))
    nnx.update(theirs, jax.tree.map(lambda x: x + 1, nnx.state(theirs)))
    ours.opt_state = mc.from_optax_muon(theirs.opt_state, ours.opt_state, beta=0.5)
    (momentum,) = momentum_of(ours.opt_state)
    np.testing.assert_array_equal(momentum, 2 * np.ones((6, 10)))
    ours.update(model, ones)


def test_a_restored_state_and_any_chain():
    """What Orbax gives without a target is dicts; QK-Clip's state is its own; hyper-parameters'
    schedules count on."""
    params = random_like(KERNELS, 0)
    old = optax_state(params)
    restored = flax.serialization.to_state_dict(old)
    tx = optax.inject_hyperparams(mc.muon, static_args="newton_schulz")(learning_rate=RATE)
    like = optax.chain(optax.clip_by_global_norm(1.0), tx).init(params)
    live, plain = (mc.from_optax_muon(x, like, beta=0.5) for x in (old, restored))
    jax.tree.map(np.testing.assert_array_equal, live, plain)
    assert jax.tree.structure(live) == jax.tree.structure(like)
    assert int(live[1].count) == 7


def shapes_of(prefix):
    return [name.removeprefix(prefix) for name in RECORD.files if name.startswith(prefix)]


def test_the_next_five_steps_are_those_of_torch():
    """PyTorch's own record of 20 steps: its buffers after 15 of them, by its `lerp_`, the last five
    here. (That this library takes the first 15 alike: test_muon_torch.py.)"""
    momentum, rate, decay = (
        float(RECORD[x]) for x in ("momentum", "learning_rate", "weight_decay")
    )
    names = shapes_of("initial/")[:2]
    tx = optax.chain(
        mc.scale_by_muon(momentum, newton_schulz=AS_THEIRS),
        mc.scale_by_update_rms("match_adam"),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(rate),
    )
    grads = {name: RECORD[f"gradient/{name}"].swapaxes(1, 2) for name in names}
    start = {name: RECORD[f"initial/{name}"].T for name in names}
    params, state, update = jax.tree.map(jnp.asarray, start), tx.init(start), quick_jit(tx.update)
    buffers = {name: np.zeros_like(x) for name, x in start.items()}
    for step in range(int(RECORD["steps"])):
        grad = {name: grads[name][step] for name in names}
        if step == 15:
            old = {"momentum_buffer": buffers}
            state = mc.from_torch_muon(old, tx.init(params), momentum=momentum, step=step)
        updates, state = update(grad, state, params)
        params = optax.apply_updates(params, updates)
        buffers = {n: b + (1 - momentum) * (grad[n] - b) for n, b in buffers.items()}
    for name in names:
        theirs = RECORD[f"final/match_rms_adamw/nesterov/float32/{name}"].T
        np.testing.assert_allclose(params[name], theirs, rtol=0, atol=1e-5)


def test_adamw_beside_torchs_muon():
    params = random_like(PARAMS, 0)
    muons, adams = {"up": params["up"]}, {name: params[name] for name in ("embed", "norm")}
    squares = jax.tree.map(jnp.square, adams)
    old = {"momentum_buffer": muons, "exp_avg": adams, "exp_avg_sq": squares}
    state = mc.from_torch_muon(old, mc.muon(RATE).init(params), momentum=0.5, step=9)
    is_adam = lambda node: isinstance(node, optax.ScaleByAdamState)  # noqa: E731
    (adam,) = filter(is_adam, jax.tree.leaves(state, is_leaf=is_adam))
    assert int(adam.count) == 9
    for found, wanted in ((adam.mu, adams), (adam.nu, squares)):
        assert all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(wanted)))


def convert(like=None, old=None, **options):
    params = random_like(PARAMS, 0)
    old = optax_state(params) if old is None else old
    like = (like or mc.muon(1e-3)).init(params)
    return mc.from_optax_muon(old, like, **{"beta": 0.95, **options})


def from_torch(old, **options):
    like = mc.scale_by_muon().init({"up": jnp.ones((4, 8))})
    return mc.from_torch_muon(old, like, **{"momentum": 0.95, "step": 3, **options})


MISTAKES = {
    "an embedding that was Muon's": (
        convert,
        ["Adam's moments of embed/embedding", "norm/scale", "dimension_numbers="],
    ),
    "no Adam for what had one": (
        lambda: convert(mc.muon(1e-3, rules={"embed/*": "in out"}, other=optax.identity())),
        ["momentum of norm/scale", "does not keep", "Adam"],
    ),
    "another optimizer's state": (
        lambda: convert(old=optax.adamw(1e-3).init(PARAMS_ONES)),
        ["one state of optax.contrib.muon, found 0"],
    ),
    "another model's state": (
        lambda: from_torch({"momentum_buffer": {"up": jnp.ones((8, 4))}}),
        ["(8, 4) at up", "(4, 8)"],
    ),
    "other names": (
        lambda: from_torch({"momentum_buffer": {"layers.0.up": jnp.ones((4, 8))}}),
        ["Muon's momentum of up", "layers.0.up"],
    ),
    "torch's own state": (
        lambda: from_torch({"state": {}, "param_groups": []}),
        ["momentum_buffer, exp_avg, exp_avg_sq", "'param_groups'"],
    ),
    "a factor that is none": (lambda: convert(beta=1.0), ["[0, 1)", "1.0"]),
}
PARAMS_ONES = {"up": jnp.ones((4, 8))}


@pytest.mark.bad_input
@pytest.mark.parametrize(("do", "words"), MISTAKES.values(), ids=MISTAKES)
def test_mistakes(do, words):
    with pytest.raises(ValueError) as caught:
        do()
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"
