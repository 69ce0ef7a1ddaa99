"""Checkpoints of every version, restored: the next steps are those that this version took."""

import pathlib

import chex
import jax
import numpy as np
import pytest
from flax import serialization

import muonclip_jax as mc
from tests.states.make_golden import STEPS, advance, chains, inputs

FOLDER = pathlib.Path(__file__).parent
VERSIONS = sorted(folder.name for folder in FOLDER.glob("golden-*"))
# Compiled for another processor XLA sums in another order, and Newton–Schulz enlarges a rounding
# of float32 by up to 1e3 times the learning rate of 0.01. So it is for matrices of few rows, which
# "auto" takes by the standard iteration since 0.3; one chain has no learning rate.
TOLERANCE = 4e-6


def continues(name, like, restored):
    state, golden = restored
    _, batches = inputs(name)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, like)
    after, _ = advance(chains()[name], golden["params"], state, batches[STEPS:])
    chex.assert_trees_all_close(after, golden["after"], atol=TOLERANCE, rtol=0)
    moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), golden["after"], golden["params"])
    assert max(jax.tree.leaves(moved)) > 1e3 * TOLERANCE


@pytest.mark.parametrize("name", chains())
@pytest.mark.parametrize("version", VERSIONS)
def test_a_golden_checkpoint_continues(version, name):
    golden = serialization.msgpack_restore((FOLDER / version / f"{name}.msgpack").read_bytes())
    like = chains()[name].init(inputs(name)[0])
    continues(name, like, (mc.upgrade_state(golden["state"], like), golden))
    if version == VERSIONS[-1]:  # today's form: no conversion
        continues(name, like, (serialization.from_state_dict(like, golden["state"]), golden))


@pytest.mark.parametrize("version", VERSIONS)
def test_from_orbax(version):
    """Without a target Orbax gives dicts and lists."""
    ocp = pytest.importorskip("orbax.checkpoint")
    name = "accumulate"
    golden = serialization.msgpack_restore((FOLDER / version / f"{name}.msgpack").read_bytes())
    with ocp.PyTreeCheckpointer() as checkpointer:
        old = checkpointer.restore((FOLDER / version / f"{name}.orbax").absolute())
    like = jax.eval_shape(chains()[name].init, inputs(name)[0])
    continues(name, like, (mc.upgrade_state(old, like), golden))


def test_from_tuples():
    """As a pickle holds them whose classes are gone."""
    params, _ = inputs("bias_correction")
    like = mc.accumulate(mc.scale_by_muon(), 2).init(params)
    seven = jax.tree.map(lambda x: np.full_like(x, 7), params)
    muon = (np.int32(3), seven)
    state = mc.upgrade_state((np.int32(1), np.int32(3), params, {}, muon), like)
    chex.assert_trees_all_equal(state.inner_state[0].trace, seven)
    assert int(state.micro_step) == 1
    chex.assert_trees_all_equal(mc.upgrade_state(state, like), state)


def test_what_does_not_fit_raises():
    params, _ = inputs("bias_correction")
    like = mc.scale_by_muon().init(params)
    with pytest.raises(ValueError, match="nothing at momentum/up; it has down"):
        mc.upgrade_state({"count": 0, "momentum": {"down": 0}}, like)
    with pytest.raises(ValueError, match=r"shape \(2,\) at momentum/up, and `like` \(4, 6\)"):
        mc.upgrade_state({"count": 0, "momentum": {"up": np.ones(2)}}, like)
