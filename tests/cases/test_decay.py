"""Weight decay: the same whether layers are scanned or not, shown, and by each group's own rate."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax.contrib import MuonDimensionNumbers as Numbers

import muonclip_jax as mc

pytestmark = pytest.mark.versions  # Optax's wrappers and masks

HOW = mc.NewtonSchulz(mc.schedules.polar_express(steps=2), dtype="float32")
LAYERS = 3


def decay_of(params, tx, **extra):
    """The largest update of each parameter for zero gradients, at the given rate."""
    state = tx.init(params)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), state, params, **extra)
    return {
        "/".join(str(key.key) for key in path): float(jnp.abs(leaf).max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates)
    }


def ones(*shape):
    return jnp.ones(shape)


def shown(params, **options):
    return {row.path: row.decays for row in mc.describe(params, **options)}


# --- unrolled and scanned


# What is beside a layer's `up` kernel, and whether the first parameter of it decays.
ONE_LAYER = {
    "gamma": ({"norm": {"gamma": (8,)}}, False),
    "gain of a module that is called ln_1": ({"ln_1": {"weight": (8,)}}, False),
    "bias of a norm": ({"LayerNorm_0": {"bias": (8,)}}, False),
    "beta": ({"act": {"beta": (8,)}}, False),
    "b": ({"down": {"b": (8,)}}, False),
    "scalars, by the norm beside them": ({"mix": {"of": (4,)}, "n": {"scale": (8,)}}, False),
    "scalars, by the kernel beside them": ({"mix": {"of": (4,)}}, False),
    "a state's own decay": ({"ssm": {"A_log": (8,)}}, False),
    "logit_scale": ({"cosine": {"logit_scale": (4,)}}, False),
    "one scalar a layer": ({"mix": {"alpha": ()}}, False),
    "a convolution of the other optimizer": ({"conv": {"kernel": (3, 3, 8, 8)}}, True),
    "a projection of the other optimizer": ({"router": {"kernel": (8, 5)}}, True),
    "a table": ({"relative": {"table": (5, 8)}}, True),
    "embeddings": ({"prompt": {"embedding": (5, 8)}}, True),
}


@pytest.mark.parametrize("scanned", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize(("beside", "decays"), ONE_LAYER.values(), ids=ONE_LAYER)
def test_scanned_layers_decay_as_unrolled_ones(beside, decays, scanned):
    stack = (LAYERS,) * scanned
    params = jax.tree.map(
        lambda shape: ones(*stack, *shape),
        {**beside, "up": {"kernel": (8, 8)}},
        is_leaf=lambda node: isinstance(node, tuple),
    )
    module, inside = next(iter(beside.items()))
    path = f"{module}/{next(iter(inside))}"
    rules = {"up/kernel": Numbers(-2, -1), "*": None}
    found = decay_of(params, mc.muon(1.0, rules=rules, newton_schulz=HOW))
    assert found[path] == pytest.approx(0.1 if decays else 0, abs=1e-7)
    assert found["up/kernel"] > 0.09
    assert shown(params, rules=rules)[path] is decays


def test_per_head_biases_do_not_decay_whatever_they_are_called():
    """Flax's [heads, features], by name; others, because the layout names them."""
    heads = {"kernel": ones(8, 4, 16), "bias": ones(4, 16)}
    flax = {"attn": {"query": heads, "key": heads, "value": {"kernel": ones(8, 4, 16)}}}
    flax["attn"]["out"] = {"kernel": ones(4, 16, 8)}
    for layout in (None, mc.layouts.mha()):
        found = shown(flax, layout=layout)
        assert found.pop("attn/query/bias") is found.pop("attn/key/bias") is False
        assert all(found.values())
    pieces = (
        mc.layouts.Piece("q", "q/w", "in heads features", bias="q/own"),
        mc.layouts.Piece("k", "k/w", "in heads features"),
    )
    attn = {"q": {"w": ones(8, 4, 16), "own": ones(4, 16)}, "k": {"w": ones(8, 4, 16)}}
    assert shown({"attn": attn}, layout=mc.Layout("mine", pieces)) == {
        "attn/q/w": True,
        "attn/q/own": False,
        "attn/k/w": True,
    }


def test_what_is_around_a_scanned_model_is_read_on_its_own():
    """Embeddings of as many rows as there are layers, and a matrix as long, are no stacks."""
    params = {
        "embed": {"embedding": ones(LAYERS, 8)},
        "lm_head": {"kernel": ones(LAYERS, 9), "bias": ones(9)},
        "table": {"positions": ones(LAYERS, 8)},
        "layers": {"norm": {"scale": ones(LAYERS, 8)}, "up": {"kernel": ones(LAYERS, 8, 8)}},
    }
    assert shown(params, rules={"table/*": None}) == {
        "embed/embedding": True,
        "lm_head/kernel": True,
        "lm_head/bias": False,
        "table/positions": True,
        "layers/norm/scale": False,
        "layers/up/kernel": True,
    }


def test_a_router_among_experts_decays():
    """Experts are no layers: the norm tells how many axes are."""
    moe = {"w": ones(LAYERS, 5, 8, 8), "router": ones(LAYERS, 5, 8), "bias": ones(LAYERS, 5, 8)}
    params = {"layers": {"norm": {"scale": ones(LAYERS, 8)}, "moe": moe}}
    rules = {"*/w": "layers experts in out", "*/router": None}
    assert shown(params, rules=rules) == {
        "layers/norm/scale": False,
        "layers/moe/w": True,
        "layers/moe/router": True,
        "layers/moe/bias": False,
    }


def test_quack_goes_by_the_same_table_and_by_names_behind_another_direction():
    attn = {name: {"kernel": ones(LAYERS, 8, 2, 4)} for name in ("query", "key", "value")}
    attn["out"] = {"kernel": ones(LAYERS, 2, 4, 8)}
    params = {
        "layers": {"attn": attn, "norm": {"scale": ones(LAYERS, 8), "gamma": ones(LAYERS, 8)}}
    }
    layout = mc.layouts.mha()
    for direction in (None, optax.scale_by_adam()):
        found = decay_of(params, mc.quack(1.0, layout=layout, direction=direction))
        assert found.pop("layers/norm/scale") == found.pop("layers/norm/gamma") == 0
        assert len(found) == 4 and min(found.values()) > 0.09


# --- masks


PARAMS = {"mlp": {"kernel": ones(8, 4), "bias": ones(4)}, "embed": {"embedding": ones(9, 8)}}


def only_bias(params):
    return jax.tree_util.tree_map_with_path(lambda path, _: "bias" in str(path[-1]), params)


MASKS = {
    "function": only_bias,
    "tree": only_bias(PARAMS),
    "prefix of a tree": {"mlp": {"kernel": False, "bias": True}, "embed": False},
    "numpy's bools": jax.tree.map(np.bool_, only_bias(PARAMS)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_a_mask_decides_and_is_shown(mask):
    found = decay_of(PARAMS, mc.muon(1.0, weight_decay_mask=mask, newton_schulz=HOW))
    rows = shown(PARAMS, weight_decay_mask=mask)
    assert rows == {path: "bias" in path for path in found}
    for path, decay in found.items():
        assert decay == pytest.approx(0.1 if rows[path] else 0, abs=1e-7)


def test_the_table_shows_what_decays(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    lines = [line.split("│") for line in str(mc.describe(PARAMS)).splitlines() if "│" in line]
    assert {line[1].strip(): line[5].strip() for line in lines} == {
        "embed/embedding": "yes",
        "mlp/bias": "",
        "mlp/kernel": "yes",
    }


def test_a_mask_function_under_inject_hyperparams_raises_or_is_named_static():
    make = optax.inject_hyperparams(mc.muon)
    with pytest.raises(ValueError, match='static_args="weight_decay_mask"'):
        make(1.0, weight_decay_mask=lambda params: True).init(PARAMS)
    make = optax.inject_hyperparams(mc.muon, static_args="weight_decay_mask")
    found = decay_of(PARAMS, make(1.0, weight_decay_mask=only_bias, newton_schulz=HOW))
    assert found["mlp/bias"] > 0.09 and found["mlp/kernel"] == 0


WRONG_MASKS = {
    "of other parameters": (
        {"mlp": {"kernel": True, "bias": False}, "embedding": True},
        ["weight_decay_mask", "embed/embedding (9, 8)", "mlp/kernel", "True or False"],
    ),
    "with one too many": (
        {"mlp": {"kernel": True, "bias": False}, "embed": True, "head": True},
        ["weight_decay_mask", "head", "no parameter", "embed/embedding"],
    ),
    "of arrays": (
        jax.tree.map(lambda p: jnp.array(p.ndim > 1), PARAMS),
        ["weight_decay_mask", "embed/embedding", "True or False"],
    ),
    "of numbers": (
        lambda params: jax.tree.map(lambda p: int(p.ndim > 1), params),
        ["weight_decay_mask", "has 1 for embed/embedding", "True or False"],
    ),
    "of floats": (
        jax.tree.map(lambda p: 1.0, PARAMS),
        ["weight_decay_mask", "has 1.0 for embed/embedding", "True or False"],
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize(("mask", "words"), WRONG_MASKS.values(), ids=WRONG_MASKS)
@pytest.mark.parametrize(
    "use",
    [
        lambda mask: mc.muon(1.0, weight_decay_mask=mask).init(PARAMS),
        lambda mask: mc.describe(PARAMS, weight_decay_mask=mask),
    ],
    ids=["muon", "describe"],
)
def test_a_wrong_mask_raises(use, mask, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        use(mask)
    for word in words:
        assert word in str(caught.value)


# --- rates


GRADS = jax.tree.map(jnp.sin, PARAMS)
RATES = {
    "numbers": (0.02, 3e-4),
    "schedules": (optax.linear_schedule(0.02, 0, 4), optax.linear_schedule(0, 3e-4, 4)),
    "a number and a schedule": (0.02, optax.cosine_decay_schedule(3e-4, 4)),
}


def steps_of(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def two_chains(rate, other_rate):
    """Muon and Adam as two optimizers, each with its own rate and decay."""
    muon = optax.chain(
        mc.scale_by_muon(newton_schulz=HOW),
        mc.scale_by_update_rms("jordan"),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(rate),
    )
    mask = lambda tree: jax.tree.map(lambda p: p.ndim > 1, tree)  # noqa: E731
    adam = optax.adamw(other_rate, b1=0.9, b2=0.95, weight_decay=0.1, mask=mask)
    labels = {"mlp": {"kernel": "muon", "bias": "other"}, "embed": "other"}
    return optax.partition({"muon": muon, "other": adam}, labels)


@pytest.mark.parametrize(("rate", "other_rate"), RATES.values(), ids=RATES)
@pytest.mark.parametrize("injected", [False, True], ids=["plain", "injected"])
def test_each_group_steps_and_decays_by_its_own_rate(rate, other_rate, injected):
    make = optax.inject_hyperparams(mc.muon) if injected else mc.muon
    ours = make(rate, other_learning_rate=other_rate, update_rms="jordan", newton_schulz=HOW)
    found, wanted = steps_of(ours), steps_of(two_chains(rate, other_rate))
    # The same float32 sums in another order.
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6)


def test_decay_of_the_other_group_follows_its_rate():
    """AdamW's decay, as torch and Optax have it: 0.1 × 3e-4 of a weight of 1."""
    found = decay_of(PARAMS, mc.muon(0.02, other_learning_rate=3e-4, newton_schulz=HOW))
    assert found["embed/embedding"] == pytest.approx(0.1 * 3e-4, rel=1e-6)
    assert found["mlp/kernel"] == pytest.approx(0.1 * 0.02, rel=1e-6)


def test_muonclip_has_two_rates_as_well_and_they_can_be_changed():
    attn = {name: {"kernel": ones(8, 2, 4)} for name in ("query", "key", "value")}
    params = {"attn": {**attn, "out": {"kernel": ones(2, 4, 8)}}, **PARAMS}
    tx = optax.inject_hyperparams(mc.muonclip)(
        0.02, layout=mc.layouts.mha(), other_learning_rate=3e-4, newton_schulz=HOW
    )
    state = tx.init(params)
    zeros = jax.tree.map(jnp.zeros_like, params)
    sown = {"attn": {"max_logits": jnp.ones(2)}}
    for rate in (3e-4, 6e-4):
        state.hyperparams["other_learning_rate"] = jnp.asarray(rate)
        updates, state = tx.update(zeros, state, params, max_logits=sown)
        np.testing.assert_allclose(updates["embed"]["embedding"], -0.1 * rate, rtol=1e-6)
        np.testing.assert_allclose(updates["attn"]["out"]["kernel"], -0.1 * 0.02, rtol=1e-6)


def test_with_one_rate_the_state_is_what_it_was():
    """Checkpoints of before: the decay and a constant rate have no state of their own."""
    for weight_decay in (0.1, 0, jnp.array(0.1)):
        state = mc.muon(1e-3, weight_decay=weight_decay).init(PARAMS)
        assert state[1:] == (optax.MaskedState(optax.EmptyState()), optax.EmptyState())
    two = mc.muon(1e-3, other_learning_rate=1e-3).init(PARAMS)
    assert jax.tree.leaves(two[2]) == []


def test_a_decay_that_follows_a_schedule():
    tx = mc.muon(1.0, weight_decay=optax.linear_schedule(0.0, 0.2, 2), newton_schulz=HOW)
    state, zeros = tx.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    for decay in (0.0, 0.1, 0.2):
        updates, state = tx.update(zeros, state, PARAMS)
        np.testing.assert_allclose(updates["mlp"]["kernel"], -decay, rtol=1e-6)


# --- no decay, no parameters


MATRICES = {"mlp": {"kernel": ones(8, 4)}, "norm": {"scale": ones(8)}}
WITHOUT_PARAMS = {
    "muon": lambda: mc.muon(1e-3, weight_decay=0.0),
    "muon, two rates": lambda: mc.muon(1e-3, weight_decay=0, other_learning_rate=1e-4),
    "muon with a mask": lambda: mc.muon(
        1e-3, weight_decay=0.0, weight_decay_mask=lambda p: jax.tree.map(lambda _: True, p)
    ),
    "muon of a schedule": lambda: mc.muon(optax.linear_schedule(1e-3, 0, 9), weight_decay=0.0),
    "muon_direction": mc.muon_direction,
}


@pytest.mark.parametrize("make", WITHOUT_PARAMS.values(), ids=WITHOUT_PARAMS)
def test_without_decay_no_link_asks_for_parameters(make):
    tx = make()
    updates, _ = tx.update(MATRICES, tx.init(MATRICES))
    expected, _ = tx.update(MATRICES, tx.init(MATRICES), MATRICES)
    for a, b in zip(*map(jax.tree.leaves, (updates, expected)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_with_decay_parameters_are_asked_for():
    tx = mc.muon(1e-3)
    with pytest.raises(ValueError, match="params"):
        tx.update(MATRICES, tx.init(MATRICES))


# --- frozen


FROZEN = {
    "set_to_zero": optax.set_to_zero(),
    "set_to_zero behind a clip": optax.chain(optax.clip(1.0), optax.set_to_zero()),
    "scaled by 0": optax.chain(optax.scale_by_adam(), optax.scale(0.0)),
}


@pytest.mark.parametrize("other", FROZEN.values(), ids=FROZEN)
def test_what_is_frozen_by_the_other_optimizer_would_decay(other):
    with pytest.raises(ValueError) as caught:
        mc.muon(1.0, other=other)
    for words in (
        "other gives no updates",
        "weight_decay=0.1",
        "frozen=",
        "optax.partition",
        "decay_mask",
    ):
        assert words in str(caught.value)
    with pytest.raises(ValueError, match="other gives no updates"):
        optax.inject_hyperparams(mc.muon)(1.0, other=other).init(PARAMS)
    kept = {"weight_decay": 0.0}, {"weight_decay_mask": {"mlp": True, "embed": False}}
    for options in (*kept, {"other": optax.scale_by_adam(), "frozen": "embed/*"}):
        found = decay_of(PARAMS, mc.muon(1.0, newton_schulz=HOW, **{"other": other, **options}))
        assert found["embed/embedding"] == 0


NOT_FROZEN = {
    "warm-up from 0": optax.scale_by_schedule(optax.linear_schedule(0.0, 1.0, 100)),
    "late": optax.scale_by_schedule(lambda count: jnp.where(count > 50_000, 1.0, 0.0)),
    "every fourth step": optax.apply_every(4),
    "some parameters only": optax.partition(
        {"a": optax.set_to_zero(), "b": optax.scale_by_adam()}, {"mlp": "a", "embed": "b"}
    ),
}


@pytest.mark.parametrize("other", NOT_FROZEN.values(), ids=NOT_FROZEN)
def test_what_starts_late_is_not_frozen(other):
    mc.muon(1.0, other=other)


def test_frozen_by_a_partition_around_the_recipe():
    """The way that the error tells. (Of what is not frozen, nothing here shows that it is no
    unembedding: its rule does.)"""
    muon = mc.muon(1.0, newton_schulz=HOW, rules={"mlp/kernel": "in out"})
    tx = optax.partition(
        {"train": muon, "freeze": optax.set_to_zero()}, {"mlp": "train", "embed": "freeze"}
    )
    found = decay_of(PARAMS, tx)
    assert found["embed/embedding"] == 0 and found["mlp/kernel"] > 0.09


def test_a_norm_tells_the_whole_stack_that_it_is_in_and_no_more():
    """A norm [8] is in no stack, though all around it begin with 8; one of [2, 3, 8] is in two."""
    one = {"layer": {"norm": {"scale": ones(8)}, "relative": {"table": ones(8, 4)}}}
    found = decay_of(one, mc.add_decayed_weights(0.1, rules={"*/table": None}))
    assert found["layer/relative/table"] > 0 and found["layer/norm/scale"] == 0
    tx = mc.add_decayed_weights(0.1, rules={"*/of": None})
    two = {"layers": {"norm": {"scale": ones(2, 3, 8)}, "mix": {"of": ones(2, 3, 4)}}}
    assert decay_of(two, tx)["layers/mix/of"] == 0
