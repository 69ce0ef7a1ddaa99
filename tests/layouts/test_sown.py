"""What a module sowed, as one number for each head of each layer."""

import jax.numpy as jnp
import numpy as np
import pytest

from muonclip_jax._layouts.sown import fit


@pytest.mark.parametrize(
    ("shape", "sown", "wanted"),
    [
        ((4,), [5.0], [5.0] * 4),
        ((3, 4), [[1.0], [2.0], [3.0]], [[1.0] * 4, [2.0] * 4, [3.0] * 4]),
        ((2, 2), [[[1.0], [7.0], [2.0]], [[3.0], [4.0], [5.0]]], [[7.0] * 2, [5.0] * 2]),
    ],
    ids=["one layer", "a stack", "a stack and a batch"],
)
def test_one_number_for_all_heads_is_that_of_each(shape, sown, wanted):
    found = fit("mlp", shape, jnp.array(sown), "mlp_output")
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("batch", [5, 2])
def test_what_two_stacks_have_beside_a_batch_is_reduced(batch):
    """[layers, experts, batch, heads], and the batch in front; 5 is no length of the stacks."""
    sown = np.random.default_rng(0).standard_normal((2, 3, batch, 4)).astype(np.float32)
    wanted = sown.max(2)
    np.testing.assert_array_equal(fit("moe", (2, 3, 4), jnp.asarray(sown), "max_logits"), wanted)
    before = np.moveaxis(sown, 2, 0)
    np.testing.assert_array_equal(fit("moe", (2, 3, 4), jnp.asarray(before), "max_logits"), wanted)


def test_two_numbers_for_four_heads_are_not_for_all():
    with pytest.raises(ValueError, match=r"sowed mlp_output of shape \(3, 2\)") as told:
        fit("mlp", (3, 4), jnp.ones((3, 2)), "mlp_output")
    assert "or one for all, [..., 1]" in str(told.value)
    with pytest.raises(ValueError, match=r"sowed max_logits of shape \(3, 2\)") as told:
        fit("attn", (3, 4), jnp.ones((3, 2)), "max_logits")
    assert "one for all" not in str(told.value)
