"""Linear attention beside attention: its heads are Muon's, and nothing asks it for max logits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

WIDTH, HEADS, F = 12, 3, 4
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj")


def kernels(seed, *names):
    """`[in, heads*features]`, and the projection back."""
    rng = np.random.default_rng(seed)
    shapes = {name: (WIDTH, HEADS * F) for name in names} | {"o_proj": (HEADS * F, WIDTH)}
    return {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32)}
        for name, shape in shapes.items()
    }


LINEAR = {**kernels(0, *NAMES), "A_log": jnp.zeros(HEADS), "o_norm": {"scale": jnp.ones(F)}}
PARAMS = {"kda": LINEAR, "attn": kernels(1, *NAMES)}
GRADS = jax.tree.map(lambda x: 0.1 * jnp.cos(7 * x), PARAMS)
LAYOUT = mc.find_layout(PARAMS, heads=HEADS)
MAXIMA = {("attn",): jnp.array([4.0, 1.0, 8.0])}


def test_it_is_found_by_its_decay_and_described_head_by_head():
    rows = {row.path: [str(m) for m in row.matrices] for row in mc.describe(PARAMS, LAYOUT)}
    assert rows["kda/q_proj/kernel"] == [f"q {HEADS} × [{WIDTH}, {F}]"]
    assert rows["kda/o_proj/kernel"] == [f"o {HEADS} × [{F}, {WIDTH}]"]
    assert mc.head_matrices(PARAMS, LAYOUT)["kda"]["v"].shape == (HEADS, WIDTH, F)


@pytest.mark.parametrize("sown", [MAXIMA, MAXIMA | {("kda",): jnp.full(HEADS, 99.0)}])
def test_clips_and_quack_pass_over_it_and_ask_for_no_maxima(sown):
    """Its updates are the gradients, to the bit; what it sows is nobody's."""
    tx = optax.chain(mc.scale_by_quack(LAYOUT, rule="fixed"), mc.qk_clip(LAYOUT, 2.0))
    step = jax.jit(
        lambda params: tx.update(GRADS, tx.init(params), params, max_logits=dict(sown)),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    updates, state = step(PARAMS)
    jax.tree.map(np.testing.assert_array_equal, updates["kda"], GRADS["kda"])
    gamma = mc.qk_clip_state(state).gamma
    np.testing.assert_allclose(gamma.pop("attn"), [0.5, 1, 0.25])
    assert not gamma


def test_the_report_passes_over_it():
    report = jax.eval_shape(
        lambda: mc.attention_report(PARAMS, None, MAXIMA, LAYOUT, threshold=2.0)
    )
    assert list(report.blocks) == ["attn"]


@pytest.mark.bad_input
def test_linear_attention_alone_has_nothing_to_clip():
    params = {"kda": LINEAR}
    layout = mc.find_layout(params)
    for transformation in (mc.qk_clip(layout), mc.scale_by_quack(layout)):
        with pytest.raises(ValueError, match=r"kda: .* linear attention only.*mc\.muon"):
            transformation.init(params)


WRONG = {
    "value heads": (
        lambda: mc.layouts.linear_attention(4, 6),
        "6 value heads cannot share 4 key heads",
    ),
    "heads": (lambda: mc.layouts.linear_attention(0), "layouts.linear_attention: heads"),
    "name": (lambda: mc.layouts.linear_attention(4, value=3), "layouts.linear_attention: value"),
    "softmax": (
        lambda: mc.layouts.Layout("l", mc.layouts.mha().pieces, softmax=None),
        "Layout: softmax",
    ),
    "lengths": (
        lambda: mc.layouts.find_blocks(
            mc.layouts.linear_attention(HEADS, gate="gate"),
            {**LINEAR, "gate": {"kernel": jnp.ones((WIDTH, 2 * HEADS * F))}},
        ),
        "v has 4 features .*gate 8 features",
    ),
}


@pytest.mark.bad_input
@pytest.mark.parametrize(("make", "message"), WRONG.values(), ids=WRONG)
def test_wrong_layouts_raise(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
