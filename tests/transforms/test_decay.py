"""Decoupled weight decay as a link: of what decays, everywhere or where the update agrees."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

RATE = 0.1


def leaves(seed):
    rng = np.random.default_rng(seed)
    return {
        "mlp": {"kernel": rng.standard_normal((8, 16)), "bias": rng.standard_normal(16)},
        "stack": {"w": rng.standard_normal((3, 8, 8)), "norm": {"scale": np.ones((3, 8))}},
    }


PARAMS, GRADS = leaves(0), leaves(1)


def decayed(params, grads, **options):
    params, grads = jax.tree.map(jnp.asarray, (params, grads))
    tx = mc.add_decayed_weights(RATE, **options)
    return tx.update(grads, tx.init(params), params)[0]


def cautious(u, w):
    """arXiv 2510.12402, Algorithm 1, entry by entry."""
    out = np.array(u, np.float64)
    for i in np.ndindex(out.shape):
        if u[i] * w[i] >= 0:
            out[i] += RATE * w[i]
    return out


@pytest.mark.parametrize("scale", [1, 1e-30], ids=["usual", "products vanish"])
def test_cautious_decay_is_the_source_entry_by_entry(scale):
    # Products of numbers below 1e-23 are 0 in float32, which would read as agreement.
    params, grads = (jax.tree.map(lambda x: scale * x, tree) for tree in (PARAMS, GRADS))
    got = decayed(params, grads, cautious=True)
    for module, name in (("mlp", "kernel"), ("stack", "w")):
        wanted = cautious(grads[module][name], params[module][name])
        np.testing.assert_allclose(got[module][name] / scale, wanted / scale, rtol=1e-6, atol=1e-6)


def test_cautious_decay_leaves_alone_what_does_not_decay():
    got = decayed(PARAMS, GRADS, cautious=True)
    np.testing.assert_array_equal(got["mlp"]["bias"], np.float32(GRADS["mlp"]["bias"]))
    np.testing.assert_array_equal(got["stack"]["norm"]["scale"], np.float32(1))


def test_plain_decay_is_optax_with_the_table_for_a_mask():
    table = {"mlp": {"kernel": True, "bias": False}, "stack": {"w": True, "norm": {"scale": False}}}
    params, grads = jax.tree.map(jnp.asarray, (PARAMS, GRADS))
    tx = optax.add_decayed_weights(RATE, table)
    chex.assert_trees_all_equal(
        decayed(PARAMS, GRADS), tx.update(grads, tx.init(params), params)[0]
    )


def test_zeros_of_either_decay_as_without_caution():
    params = {"w": np.array([[0.0, 2.0, -2.0, 0.0]])}
    grads = {"w": np.array([[1.0, 0.0, 0.0, 0.0]])}
    chex.assert_trees_all_equal(
        decayed(params, grads, cautious=True), decayed(params, grads, cautious=False)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_updates_keep_their_dtype(dtype):
    params, grads = (jax.tree.map(lambda x: jnp.asarray(x, dtype), t) for t in (PARAMS, GRADS))
    with jax.numpy_dtype_promotion("strict"):
        tx = mc.add_decayed_weights(RATE, cautious=True)
        got, _ = tx.update(grads, tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(got, grads)


def test_what_is_not_finite_stays_where_it_is():
    params = {"w": jnp.array([[1.0, jnp.nan, 1.0]])}
    grads = {"w": jnp.array([[jnp.nan, 1.0, 1.0]])}
    got = mc.add_decayed_weights(RATE, cautious=True)
    updates, _ = got.update(grads, got.init(params), params)
    np.testing.assert_allclose(updates["w"], [[jnp.nan, 1.0, 1.1]])


def test_a_schedule_counts_and_zero_needs_no_parameters():
    tx = mc.add_decayed_weights(lambda step: RATE * (step == 1), cautious=True)
    params = {"w": jnp.ones((2, 2))}
    state, seen = tx.init(params), []
    for _ in range(3):
        updates, state = tx.update(params, state, params)
        seen.append(float(updates["w"][0, 0]))
    np.testing.assert_allclose(seen, [1, 1 + RATE, 1])
    none = mc.add_decayed_weights(0.0, cautious=True)
    chex.assert_trees_all_equal(none.update(params, none.init(params))[0], params)


def test_without_parameters_it_says_what_to_do():
    tx = mc.add_decayed_weights(RATE)
    with pytest.raises(ValueError, match=r"tx\.update\(grads, state, params\)"):
        tx.update({"w": jnp.ones((2, 2))}, tx.init({"w": jnp.ones((2, 2))}))


# --- each group by its own rate, and links of one's own


def test_each_group_decays_by_its_own_rate():
    params = jax.tree.map(jnp.asarray, {**PARAMS, "embed": {"embedding": np.ones((32, 8))}})
    grads = jax.tree.map(jnp.zeros_like, params)
    rates = mc.partition_matrices(
        lambda _: optax.scale_by_learning_rate(0.5), optax.scale_by_learning_rate(0.01)
    )
    tx = optax.chain(mc.add_decayed_weights(RATE), rates)
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["mlp"]["kernel"], -0.5 * RATE * params["mlp"]["kernel"])
    np.testing.assert_allclose(updates["embed"]["embedding"], -0.01 * RATE, rtol=1e-6)


def test_links_of_ones_own_get_the_matrices_and_their_heads():
    layout = mc.layouts.mha()
    head = {"kernel": jnp.asarray(np.random.default_rng(2).standard_normal((8, 2, 4)))}
    params = {"attn": {name: head for name in ("query", "key", "value")}, "bias": jnp.ones(3)}
    params["attn"]["out"] = {"kernel": jnp.ones((2, 4, 8))}
    seen = []

    def links(numbers):
        seen.append(numbers)
        return mc.scale_by_orthogonalization(
            mc.NewtonSchulz(mc.schedules.polar_express(12), "float32"), dimension_numbers=numbers
        )

    tx = mc.partition_matrices(links, optax.scale(7.0), layout=layout)
    updates, _ = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(updates["bias"], 7.0)
    of_a_head = updates["attn"]["query"]["kernel"][:, 1]
    np.testing.assert_allclose(np.linalg.svd(of_a_head)[1], 1, atol=1e-5)
    assert seen[0] is None and len(seen) == 3  # when built, at init and at update


def test_links_that_give_no_transformation_raise_when_built():
    with pytest.raises(TypeError, match=r"what links\(None\) gives must be an Optax trans"):
        mc.partition_matrices(lambda numbers: numbers, optax.scale(1.0))
    with pytest.raises(ValueError, match=r"momentum must be in \[0, 1\)"):
        mc.partition_matrices(lambda numbers: mc.scale_by_muon(1.5), optax.scale(1.0))
