"""The clip of outputs: per head, per block, of MLPs and experts; schedules, reports, measures."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx

import muonclip_jax as mc
from muonclip_jax.layouts import Layout, Piece
from tests.transforms.test_clip import OUTPUTS, attention, updated

HEADS, OUT = 4, 8
GAMMA = np.float32([1 / 4, 1, 1, 1 / 9])

MLP = Layout("mlp", (Piece("o", "down", "features out"),), softmax=False, block="*mlp")
EXPERTS = Layout("experts", (Piece("o", "wo", "heads features out"),), softmax=False)


PARAMS = {
    "attn": {**attention(), "bias": jnp.ones(OUT)},
    "mlp": {"up": {"kernel": jnp.ones((OUT, 12))}, "down": {"kernel": jnp.ones((12, OUT))}},
}


def assert_only_moved(moved, params, path, expected):
    for (where, new), old in zip(
        jax.tree_util.tree_leaves_with_path(moved), jax.tree.leaves(params), strict=True
    ):
        wanted = expected if jax.tree_util.keystr(where) == path else old
        np.testing.assert_allclose(new, wanted, rtol=1e-6)


@pytest.mark.parametrize(
    ("sown", "gamma"),
    [(OUTPUTS, GAMMA), (OUTPUTS.max()[None], np.full(HEADS, 1 / 9, np.float32))],
    ids=["heads", "block"],
)
def test_outputs_of_heads_and_of_blocks(sown, gamma):
    tx = mc.max_output_clip(mc.layouts.gqa(), 10.0)
    moved, state = updated(tx, PARAMS, max_output={"attn": {"max_output": sown}})
    kernel = PARAMS["attn"]["out"]["kernel"] * gamma[:, None, None]
    assert_only_moved(moved, PARAMS, "['attn']['out']['kernel']", kernel)
    np.testing.assert_array_equal(state.gamma["max_output"]["attn"], gamma)


def test_one_number_for_all_heads_is_none_of_max_logits():
    with pytest.raises(ValueError, match=r"attn sowed max_logits of shape \(1,\)"):
        updated(mc.qk_clip(mc.layouts.gqa()), PARAMS, max_logits={("attn",): OUTPUTS[:1]})


def test_outputs_of_an_mlp():
    tx = mc.max_output_clip(MLP, 10.0, signal="mlp_output")
    moved, state = updated(tx, PARAMS, mlp_output={"mlp": {"mlp_output": jnp.array([40.0])}})
    kernel = PARAMS["mlp"]["down"]["kernel"] / 4
    assert_only_moved(moved, PARAMS, "['mlp']['down']['kernel']", kernel)
    assert list(state.gamma["mlp_output"]) == ["mlp"]


def test_outputs_of_stacked_experts():
    """[layers, experts]: the stack is carried, experts are the heads."""
    params = {"moe": {"wi": jnp.ones((2, 3, 8, 4)), "wo": jnp.ones((2, 3, 4, 8))}}
    sown = {("moe",): jnp.array([[20.0, 1.0, 1.0], [1.0, 40.0, jnp.nan]])}
    moved, state = updated(mc.max_output_clip(EXPERTS, 10.0), params, max_output=sown)
    gamma = np.float32([[0.5, 1, 1], [1, 0.25, 1]])
    assert_only_moved(
        moved, params, "['moe']['wo']", jnp.ones((2, 3, 4, 8)) * gamma[..., None, None]
    )
    assert int(state.nonfinite_heads) == 1 and int(state.heads_clipped) == 2


def test_outputs_of_linear_attention_are_clipped_too():
    layout = mc.layouts.linear_attention(2, query="query", key="key", value="value", out="out")
    shapes = {"query": (OUT, 12), "key": (OUT, 12), "value": (OUT, 12), "out": (12, OUT)}
    params = {"attn": {name: {"kernel": jnp.ones(shape)} for name, shape in shapes.items()}}
    tx = mc.max_output_clip(layout, 10.0)
    moved, _ = updated(tx, params, max_output={("attn",): jnp.array([20.0, 5.0])})
    np.testing.assert_allclose(moved["attn"]["out"]["kernel"][::6, 0], [0.5, 1], rtol=1e-6)


def test_layouts_of_outputs_alone():
    blocks = mc.layouts.find_blocks(EXPERTS, {"moe": {"wo": jnp.ones((3, 4, 8))}})
    assert [block.shape for block in blocks] == [(3,)]
    with pytest.raises(ValueError, match=r"there must be a Piece of.*output projection alone.*sof"):
        Layout("mlp", (Piece("o", "down", "features out"),))
    with pytest.raises(ValueError, match=r"attn.*max_output_clip.*'o'|'o'.*does not give attn"):
        mc.max_output_clip(mc.layouts.gqa(out=None), 1.0).init(PARAMS)


def three_clips(layout):
    return optax.chain(
        mc.max_output_clip(layout, 10.0),
        mc.qk_clip(layout, 20.0),
        mc.max_output_clip(MLP, 1.0, signal="mlp_output"),
    )


SEEN = {
    "max_logits": {("attn",): OUTPUTS[::-1]},
    "max_output": {("attn",): OUTPUTS},
    "mlp_output": {("mlp",): jnp.array([0.5])},
}


def test_several_signals_in_one_chain_accumulated_and_reported(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tx = mc.accumulate(three_clips(mc.layouts.gqa()), 2)
    state = tx.init(PARAMS)
    zeros = jax.tree.map(jnp.zeros_like, PARAMS)
    _, state = tx.update(zeros, state, PARAMS, **SEEN)
    updates, state = tx.update(zeros, state, PARAMS, **jax.tree.map(lambda x: x / 2, SEEN))
    report = mc.clip_report(state)
    assert list(report.signals) == ["max_output", "max_logits", "mlp_output"]
    np.testing.assert_array_equal(report.signals["max_output"]["attn"].gamma, GAMMA)
    moved = optax.apply_updates(PARAMS, updates)["attn"]
    np.testing.assert_allclose(  # keys are shared, so queries take all of it
        moved["query"]["kernel"],
        PARAMS["attn"]["query"]["kernel"] * (20 / np.maximum(OUTPUTS[::-1], 20))[:, None],
        rtol=1e-6,
    )
    scalars = report.scalars()
    assert scalars["max_output/attn"] == 90 and scalars["clipped/max_output/attn"] == 2
    assert scalars["gamma/max_logits/attn"] == pytest.approx(20 / 90)
    assert scalars["ineffective/mlp_output/mlp"] == 0
    table = str(report)
    for words in ("max_output", "mlp_output", "1 … 90", "2 of 4", "0 of 1"):
        assert words in table


def test_clips_without_effect_are_reported_and_second_clips_have_a_name(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    tx = optax.chain(
        mc.max_output_clip(mc.layouts.gqa(), 10.0), mc.max_output_clip(mc.layouts.gqa(), 50.0)
    )
    state, zeros = tx.init(PARAMS), jax.tree.map(jnp.zeros_like, PARAMS)
    for _ in range(4):  # the weights never follow
        _, state = tx.update(zeros, state, PARAMS, max_output=SEEN["max_output"])
    report = mc.clip_report(state)
    assert list(report.signals) == ["max_output", "max_output (2)"]
    ineffective = report.signals["max_output"]["attn"].ineffective
    np.testing.assert_array_equal(ineffective, [True, False, False, True])
    assert "clips without effect: 0, 3" in str(report)
    with pytest.raises(ValueError, match="No clip is in this optimizer state"):
        mc.clip_report(optax.adam(1e-3).init(PARAMS))


# Thresholds that are schedules


def until(end, threshold=10.0):
    return lambda step: jnp.where(step < end, threshold, jnp.inf)


@pytest.mark.parametrize("clip", ["qk_clip", "max_output_clip", "muonclip"])
def test_a_schedule_ends_the_clip(clip):
    layout = mc.layouts.gqa()
    if clip == "muonclip":
        name, options = "max_logits", {"learning_rate": 1e-3, "layout": layout}
        tx = mc.muonclip(threshold=until(2), newton_schulz=ONE_STEP, **options)
        read = lambda state: mc.qk_clip_state(state)  # noqa: E731
    else:
        name = "max_logits" if clip == "qk_clip" else "max_output"
        tx, read = getattr(mc, clip)(layout, until(2)), lambda state: state.clip
    params = {"attn": attention()}
    update = jax.jit(tx.update)
    state, clipped = tx.init(params), []
    for _ in range(4):
        _, state = update(params, state, params, **{name: {("attn",): OUTPUTS}})
        clipped.append(int(read(state).heads_clipped))
    assert clipped == [2, 2, 0, 0]
    assert int(optax.tree.get(state, "ScheduledClipState").step) == 4
    assert update._cache_size() == 1


ONE_STEP = mc.NewtonSchulz(mc.schedules.polar_express(steps=1))


def test_accumulated_schedules_count_real_steps():
    tx = mc.accumulate(mc.max_output_clip(mc.layouts.gqa(), until(1)), 2)
    state = tx.init(PARAMS)
    for micro_step in range(4):
        _, state = tx.update(PARAMS, state, PARAMS, max_output=SEEN["max_output"])
        if micro_step == 1:
            assert int(state.inner_state.clip.heads_clipped) == 2
    assert int(state.inner_state.clip.heads_clipped) == 0


@pytest.mark.parametrize(
    ("threshold", "error", "words"),
    [
        (lambda step: 1.0 - step / 100, ValueError, "threshold at step 100 must be above 0"),
        (lambda step: jnp.ones(2), TypeError, "threshold at step 0 must be one number"),
        (lambda step: jnp.nan, ValueError, "threshold at step 0 must be above 0"),
        ("100", TypeError, "threshold must be one number"),
    ],
)
def test_wrong_schedules_raise_when_built(threshold, error, words):
    for build in (mc.qk_clip, mc.max_output_clip):
        with pytest.raises(error, match=words):
            build(mc.layouts.gqa(), threshold)


def test_one_clip_alone_takes_no_schedule():
    with pytest.raises(TypeError, match="apply_qk_clip counts no steps"):
        mc.apply_qk_clip(PARAMS, SEEN["max_logits"], mc.layouts.gqa(), until(3))


def test_states_of_before_signals_had_names():
    tx = mc.max_output_clip(mc.layouts.gqa(), 10.0)
    _, state = updated(tx, PARAMS, max_output=SEEN["max_output"])
    flat = [x["max_output"] if isinstance(x, dict) else x for x in state]
    for old in (tuple(flat), dict(zip(state._fields, flat, strict=False)), flat[:5]):
        new = mc.upgrade_state(old, like=tx.init(PARAMS))
        np.testing.assert_array_equal(new.gamma["max_output"]["attn"], GAMMA)
    for same in (
        mc.upgrade_state(state, like=tx.init(PARAMS)),
        mc.upgrade_state(state._asdict(), state),
    ):
        for ours, theirs in zip(jax.tree.leaves(same), jax.tree.leaves(state), strict=True):
            np.testing.assert_array_equal(ours, theirs)


# What to sow


def test_the_largest_output_of_each_head_against_float64():
    rng = np.random.default_rng(0)
    attended, kernel = rng.normal(size=(2, 7, 3, 5)), rng.normal(size=(3, 5, 6))
    expected = np.abs(np.einsum("btnh,nho->btno", attended, kernel)).max((0, 1, 3))
    for given in (kernel, kernel.reshape(15, 6)):
        found = mc.measure_max_output(jnp.float32(attended), jnp.float32(given))
        np.testing.assert_allclose(found, expected, rtol=1e-6)  # sums of five float32 products
    half = mc.measure_max_output(jnp.bfloat16(attended), jnp.bfloat16(kernel))
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, expected, rtol=0.02)  # factors of 8 bits
    attended[1, 6, 1, 0] = np.nan  # in the last of the parts, beside what fills it up
    found = mc.measure_max_output(jnp.float32(attended), jnp.float32(kernel))
    np.testing.assert_array_equal(np.isnan(found), [False, True, False])
    gradient = jax.grad(lambda x: mc.measure_max_output(x, jnp.ones((3, 5, 6))).sum())
    assert not gradient(jnp.ones((7, 3, 5))).any()


@pytest.mark.parametrize(
    ("attended", "kernel", "words"),
    [
        ((4, 8), (4, 8, 6), r"attended must be \[\.\.\., T, N, H\], found \(4, 8\)"),
        ((5, 4, 8), (8, 4, 6), r"kernel \(8, 4, 6\) is not.*expected \(4, 8, out\) or \(32, out\)"),
    ],
)
def test_operands_that_do_not_fit_raise(attended, kernel, words):
    with pytest.raises(ValueError, match=words):
        mc.measure_max_output(jnp.ones(attended), jnp.ones(kernel))


def test_lowest_logits_and_logits_by_size():
    rng = np.random.default_rng(1)
    query, key = (rng.normal(size=(2, 6, 2, 4)) - 0.5 for _ in range(2))
    logits = np.einsum("btnh,bsnh->bnts", query, key) / 2
    visible = np.tril(np.ones((6, 6), bool))
    seen = {
        "highest": np.where(visible, logits, -np.inf).max((0, 2, 3)),
        "lowest": -np.where(visible, logits, np.inf).min((0, 2, 3)),
    }
    seen["size"] = np.maximum(seen["highest"], seen["lowest"])
    measure = functools.partial(
        mc.measure_max_logits, jnp.float32(query), jnp.float32(key), is_causal=True, chunk_size=4
    )
    for which, expected in seen.items():
        np.testing.assert_allclose(measure(which=which), expected, rtol=1e-5)
    with pytest.raises(ValueError, match='which must be one of "highest", "lowest", "size"'):
        measure(which="largest")
    nothing = measure(which="size", mask=jnp.zeros((6, 6), bool))
    assert (nothing == -jnp.inf).all()


class Loud(nn.Module):
    """An MLP that says how large its output is, one number for all of it."""

    @nn.compact
    def __call__(self, x):
        y = nn.Dense(OUT, use_bias=False, name="down")(nn.relu(nn.Dense(12, name="up")(x)))
        mc.sow_signal(self, "mlp_output", jnp.abs(y).max()[None])
        return y


class LoudNNX(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(OUT, 12, rngs=rngs), nnx.Linear(12, OUT, rngs=rngs)

    def __call__(self, x):
        y = self.down(nnx.relu(self.up(x)))
        mc.sow_signal(self, "mlp_output", jnp.abs(y).max()[None])
        return y


@pytest.mark.parametrize("flavour", ["linen", "nnx"])
def test_what_an_mlp_of_flax_writes_is_clipped_to_the_threshold(flavour):
    layout = Layout("mlp", (Piece("o", "down", "features out"),), softmax=False)
    x = 10 * jax.random.normal(jax.random.key(0), (5, OUT))
    if flavour == "linen":
        model = Loud()
        params = {"params": model.init(jax.random.key(1), x)["params"]}
        forward = functools.partial(model.apply, mutable=["intermediates"])
    else:
        graph, params = nnx.split(LoudNNX(nnx.Rngs(0)), nnx.Param)

        def forward(params, x):
            return nnx.capture(lambda model, x: model(x), nnx.Intermediate)(
                nnx.merge(graph, params), x
            )

    before, sown = forward(params, x)
    threshold = float(jnp.abs(before).max()) / 3
    tx = mc.max_output_clip(layout, threshold, signal="mlp_output")
    moved, _ = updated(tx, params, mlp_output=sown)
    after, _ = forward(moved, x)
    np.testing.assert_allclose(after, before / 3, rtol=1e-5)


def test_split_over_a_mesh_it_is_what_it_is_on_one_device():
    mesh = jax.make_mesh((2,), ("heads",), axis_types=(jax.sharding.AxisType.Explicit,))
    tx = mc.max_output_clip(mc.layouts.gqa(), 10.0)
    spec = jax.sharding.PartitionSpec("heads")
    with jax.set_mesh(mesh):
        params = {"attn": attention()}
        params["attn"]["out"]["kernel"] = jax.device_put(params["attn"]["out"]["kernel"], spec)
        outputs = jax.device_put(OUTPUTS, spec)
        moved, _ = jax.jit(lambda p, s: updated(tx, p, max_output={("attn",): s}))(params, outputs)
    kernel = moved["attn"]["out"]["kernel"]
    assert jax.typeof(kernel).sharding.spec[0] == "heads"
    expected = attention()["out"]["kernel"] * GAMMA[:, None, None]
    np.testing.assert_allclose(kernel, expected, rtol=1e-6)
