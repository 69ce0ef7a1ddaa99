"""`attention_report`: what it reads from where, its flags, its table. Numbers of kernels are
compared with extracted heads in test_heads.py."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import muonclip_jax as mc

WIDTH, HEADS, KV, F, LAYERS = 6, 4, 2, 3, 2
LAYOUT = mc.layouts.gqa(value=None, out=None)
RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


PARAMS = {
    "first": {
        "query": {"kernel": normal(WIDTH, HEADS, F)},
        "key": {"kernel": normal(WIDTH, KV, F)},
    },
    "rest": {
        "query": {"kernel": normal(LAYERS, WIDTH, HEADS, F)},
        "key": {"kernel": normal(LAYERS, WIDTH, KV, F)},
    },
}
MAXIMA = {
    "first": jnp.array([1.0, 20.0, 3.0, 4.0]),
    "rest": jnp.array([[5.0, 6.0, 7.0, 8.0], [9.0, 10.0, 11.0, 40.0]]),
}
KEYS = {"first": normal(2, 5, KV, F), "rest": normal(LAYERS, 2, 5, KV, F)}
SOWN = {name: {"max_logits": MAXIMA[name], "keys": (KEYS[name],)} for name in MAXIMA}
CLIP = optax.chain(optax.sgd(0.1), mc.qk_clip(LAYOUT, threshold=10.0))


@functools.cache
def after_a_step(tx=CLIP):
    return jax.jit(tx.update)(PARAMS, tx.init(PARAMS), PARAMS, max_logits=SOWN)[1]


class ReportTest(chex.TestCase):
    @chex.variants(with_jit=True)  # the other tests are without
    def test_every_number_is_where_its_head_is(self):
        report = self.variant(lambda *args: mc.attention_report(*args, LAYOUT, threshold=10.0))
        blocks = report(PARAMS, after_a_step(), SOWN).blocks
        assert list(blocks) == ["first", "rest"]
        for name, stack in (("first", ()), ("rest", (LAYERS,))):
            found = blocks[name]
            chex.assert_trees_all_equal(found.max_logits, MAXIMA[name])
            # One float32 division.
            chex.assert_trees_all_close(found.gamma, jnp.minimum(1, 10 / MAXIMA[name]), rtol=1e-6)
            chex.assert_shape([found.query_norms, found.ranks, found.dead], (*stack, HEADS))
            chex.assert_shape([found.key_norms, found.key_participation_ratios], (*stack, KV))
            chex.assert_trees_all_equal(found.above, MAXIMA[name] > 10)
            assert not found.exploding.any() and not found.dead.any()
            keys = jnp.moveaxis(KEYS[name], -2, -4).reshape(*stack, KV, -1, F)
            # The same function in another program.
            chex.assert_trees_all_close(
                found.key_participation_ratios, mc.participation_ratio(keys), rtol=1e-6
            )


def test_every_few_steps_inside_a_jitted_one():
    params = {"first": PARAMS["first"]}
    report = lambda: mc.attention_report(params, None, SOWN, LAYOUT)  # noqa: E731

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(number, last):
        return jax.lax.cond(number % 10 == 0, report, lambda: last)

    first = step(0, jax.tree.map(jnp.zeros_like, report()))
    # The same function in another program.
    chex.assert_trees_all_close(first, report(), rtol=1e-6)
    marked = jax.tree.map(jnp.ones_like, first)
    chex.assert_trees_all_equal(step(5, marked), marked)


def test_max_logits_of_the_last_clip():
    given = mc.attention_report(PARAMS, after_a_step(), None, LAYOUT).blocks
    chex.assert_trees_all_equal({name: b.max_logits for name, b in given.items()}, MAXIMA)
    assert all(block.key_participation_ratios is None for block in given.values())
    # Keys of an evaluation, maxima of the last step.
    only_keys = {"first": {"keys": KEYS["first"]}}
    mixed = mc.attention_report(PARAMS, after_a_step(), only_keys, LAYOUT).blocks
    chex.assert_trees_all_equal({name: b.max_logits for name, b in mixed.items()}, MAXIMA)
    chex.assert_shape(mixed["first"].key_participation_ratios, (KV,))
    assert mixed["rest"].key_participation_ratios is None


def test_maxima_that_were_read_before_count_more_than_the_last_clip():
    read = {("first",): 2 * MAXIMA["first"], ("rest",): 2 * MAXIMA["rest"]}
    report = mc.attention_report(PARAMS, after_a_step(), read, LAYOUT)
    chex.assert_trees_all_equal(report.blocks["rest"].max_logits, 2 * MAXIMA["rest"])


def test_without_a_clip_there_is_no_gamma():
    tx = optax.adam(1e-3)
    report = mc.attention_report(PARAMS, tx.init(PARAMS), SOWN, LAYOUT)
    assert all(block.gamma is None for block in report.blocks.values())
    assert "γ" not in str(report) and "gamma/first" not in report.scalars()


def test_inside_accumulate():
    state = after_a_step(mc.accumulate(CLIP, every=1))
    report = mc.attention_report(PARAMS, state, None, LAYOUT)
    chex.assert_trees_all_equal(report.blocks["first"].max_logits, MAXIMA["first"])


def test_qk_norm_is_no_obstacle():
    params = {"first": {**PARAMS["first"], "query_norm": {"scale": jnp.ones(F)}}}
    with pytest.raises(ValueError, match="normalises queries"):
        mc.qk_clip(LAYOUT).init(params)
    assert list(mc.attention_report(params, None, SOWN, LAYOUT).blocks) == ["first"]


def test_nnx():
    attention = nnx.MultiHeadAttention(
        2, 8, attention_fn=mc.attention_fn, decode=False, rngs=nnx.Rngs(0)
    )
    layout = mc.find_layout(nnx.state(attention, nnx.Param))
    optimizer = nnx.Optimizer(attention, mc.qk_clip(layout), wrt=nnx.Param)
    run = nnx.capture(lambda model: model(jnp.ones((1, 2, 8)), sow_weights=True), nnx.Intermediate)
    sown = run(attention)[1]
    params = nnx.state(attention, nnx.Param)
    report = mc.attention_report(params, optimizer.opt_state, sown, layout).blocks["<root>"]
    chex.assert_trees_all_equal(report.max_logits, mc.read_max_logits(sown)[()])
    chex.assert_trees_all_equal(report.gamma, jnp.ones(2))


def flags(maxima, scale_of_queries=1.0):
    scales = jnp.broadcast_to(jnp.asarray(scale_of_queries, jnp.float32), HEADS)
    block = PARAMS["first"]
    queries = {"kernel": block["query"]["kernel"] * scales[:, None]}
    params = {"first": {"query": queries, "key": block["key"]}}
    sown = {"first": {"max_logits": jnp.asarray(maxima, jnp.float32)}}
    report = mc.attention_report(params, None, sown, LAYOUT).blocks["first"]
    return [flag.tolist() for flag in (report.above, report.exploding, report.dead)]


def test_above_and_not_finite():
    assert flags([99, 101, 5, -500])[:2] == [[False, True, False, False], [False] * 4]
    # A head that saw no key has the maximum of nothing.
    above, exploding, _ = flags([jnp.nan, jnp.inf, -jnp.inf, 5])
    assert above == [False, True, False, False] and exploding == [True, True, False, False]


def test_exploding_is_rising_although_clipped():
    """The last clip saw 1, 20, 3, 4 and clipped the second."""
    params = {"first": PARAMS["first"]}
    sown = {"first": {"max_logits": MAXIMA["first"]}}
    _, state = CLIP.update(params, CLIP.init(params), params, max_logits=sown)

    def exploding(maxima, state=state, threshold=10.0):
        read = {("first",): jnp.array(maxima)}
        report = mc.attention_report(params, state, read, LAYOUT, threshold=threshold)
        return report.blocks["first"].exploding.tolist()

    second_only = [False, True, False, False]
    assert exploding([2.0, 21.0, 30.0, 4.0]) == second_only
    assert not any(exploding([2.0, 20.0, 3.0, 4.0])), "those of the clip itself do not rise"
    assert not any(exploding([2.0, 19.0, 30.0, 4.0])), "it falls, the third was not clipped"
    assert not any(exploding([2.0, 21.0, 3.0, 4.0], threshold=50.0)), "not above the threshold"
    assert not any(exploding([2.0, 21.0, 3.0, 4.0], state=None)), "nobody clips"


def test_the_clip_and_the_report_see_the_same_maxima():
    """Of an attention that the layout ignores, though it stands inside another."""
    params = {"attn": {**PARAMS["first"], "inner": PARAMS["first"]}}
    layout = [mc.layouts.gqa(block="attn", value=None, out=None), mc.layouts.ignore("attn/inner")]
    inner = {"max_logits": jnp.full(4, 500.0), "keys": KEYS["first"]}
    sown = {"attn": {"max_logits": jnp.ones(4), "core": {"keys": KEYS["first"]}, "inner": inner}}
    tx = mc.qk_clip(layout, 10.0)
    _, state = tx.update(params, tx.init(params), params, max_logits=sown)
    report = mc.attention_report(params, state, sown, layout).blocks
    assert list(report) == ["attn"]
    for maxima in (state.max_logits["attn"], report["attn"].max_logits):
        chex.assert_trees_all_equal(maxima, jnp.ones(4))
    own_keys = jnp.moveaxis(KEYS["first"], -2, 0).reshape(KV, -1, F)
    found = report["attn"].key_participation_ratios
    # The same function of the same numbers.
    chex.assert_trees_all_close(found, mc.participation_ratio(own_keys), rtol=1e-6)


def test_dead_needs_both_small_logits_and_small_kernels():
    tiny = [1, 1e-6, 1e-6, 0]
    assert flags([0.05, 0.05, 5, 0], tiny) == [[False] * 4] * 2 + [[False, True, False, True]]
    assert flags([-jnp.inf, -0.05, jnp.nan, -5], 0)[2] == [False, True, False, False]


def test_dead_is_a_bound_on_what_inputs_of_rms_1_can_do():
    w_q, w_k = (np.float64(PARAMS["first"][name]["kernel"]) for name in ("query", "key"))
    norms = [np.linalg.norm(w_q[:, h] @ w_k[:, h // 2].T, 2) for h in range(HEADS)]
    just = 0.1 * np.sqrt(F) / (WIDTH * np.array(norms))
    # 1e-3 is more than float32 rounds and less than anything that would matter.
    assert flags([0] * 4, just * 0.999)[2] == [True] * 4
    assert flags([0] * 4, just * 1.001)[2] == [False] * 4


# --- one side far below the other


def balance(scale_of_queries=1.0, scale_of_keys=1.0, params=PARAMS["first"], layout=LAYOUT):
    """The report on queries `[in, heads, features]` and keys times numbers."""
    scaled = {
        side: {"kernel": params[side]["kernel"] * jnp.asarray(scale, jnp.float32)[..., None]}
        for side, scale in (("query", scale_of_queries), ("key", scale_of_keys))
    }
    sown = {"first": {"max_logits": MAXIMA["first"]}}
    return mc.attention_report({"first": scaled}, None, sown, layout)


def test_rms_of_query_and_key_weights():
    found = balance().blocks["first"]
    for numbers, side in ((found.query_rms, "query"), (found.key_rms, "key")):
        kernel = np.float64(PARAMS["first"][side]["kernel"])
        # A float32 mean of 18 squares.
        np.testing.assert_allclose(numbers, np.sqrt((kernel**2).mean((0, 2))), rtol=1e-6)
    scalars = balance().scalars()
    assert scalars["query_rms/first"] == float(found.query_rms.min())
    assert scalars["key_rms/first"] == float(found.key_rms.min())
    assert scalars["collapsed/first"] == 0


def test_collapsed_is_a_hundredth_of_the_other_side():
    found = balance().blocks["first"]
    ratio = np.asarray(found.query_rms / jnp.repeat(found.key_rms, HEADS // KV))
    # 1e-3 is more than float32 rounds.
    just = np.array([1e-2, 1e2, 1e-2, 1e2]) / ratio
    inside, outside = np.array([1.001, 0.999] * 2), np.array([0.999, 1.001] * 2)
    assert not balance(just * inside).blocks["first"].collapsed.any()
    assert balance(just * outside).blocks["first"].collapsed.all()
    # A key that collapses is that of both heads of its group.
    assert balance(1.0, [1e-3, 1.0]).blocks["first"].collapsed.tolist() == [True] * 2 + [False] * 2
    # Both sides alike are not collapsed, however small (1e-20 squared vanishes); zero beside
    # something is, and zero beside zero is what `dead` tells.
    small = balance([1e-20] * 2 + [0.0] * 2, [1e-20, 0.0]).blocks["first"]
    assert not small.collapsed.any() and small.query_rms[0] > 0
    report = balance([0.0, 1.0, 1.0, 1.0])
    assert report.blocks["first"].collapsed.tolist() == [True, False, False, False]
    assert report.scalars()["collapsed/first"] == 1
    for told in ("collapsed: 0", "hundredth of the other's", "shared_keys"):
        assert told in " ".join(str(report).replace("│", " ").split())


GROUPED = {"query": (64, 4, 256), "key": (64, 2, 256)}
LATENT = {"wq_a": (448, 96), "wq_b": (96, 2 * 12), "wkv_a": (448, 32 + 4), "wkv_b": (32, 2 * 16)}
LECUN, SAME = jax.nn.initializers.lecun_normal(), jax.nn.initializers.normal(0.02)


@pytest.mark.parametrize(
    ("layout", "shapes", "init", "of_queries"),
    [
        (LAYOUT, GROUPED, SAME, 1.0),
        # What folds the softmax's scale into the queries' initialization, at 256 features.
        (LAYOUT, GROUPED, SAME, 1 / 16),
        # Of DeepSeek's proportions, latents a fifth and a fourteenth as wide as the model.
        (mc.layouts.mla(8, 4, 8, query=("wq_a", "wq_b"), out=None), LATENT, SAME, 1.0),
        (mc.layouts.mla(8, 4, 8, query=("wq_a", "wq_b"), out=None), LATENT, LECUN, 1.0),
    ],
    ids=["grouped", "scaled queries", "latent", "latent, by inputs"],
)
def test_no_initialization_is_collapsed(layout, shapes, init, of_queries):
    keys = jax.random.split(jax.random.key(0), len(shapes))
    kernels = {
        name: init(key, shape) * (of_queries if name == "query" else 1)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }
    params = {"attn": {name: {"kernel": x} for name, x in kernels.items()}}
    heads = mc.layouts.find_blocks(layout, params)[0].heads
    sown = {"attn": {"max_logits": jnp.ones(heads)}}
    report = jax.jit(lambda p: mc.attention_report(p, None, sown, layout))(params)
    found = report.blocks["attn"]
    assert not found.collapsed.any()
    # No nearer than a factor of five to where the flag begins.
    ratio = found.query_rms / jnp.repeat(found.key_rms, heads // len(found.key_rms))
    assert (ratio > 1 / 20).all() and (ratio < 20).all()


def latent_params(dtype=jnp.float32, **scales):
    """MLA with query compression, each kernel as Flax initializes a Dense."""
    shapes = {"wq_a": (64, 24), "wq_b": (24, 2 * 6), "wkv_a": (64, 8 + 2), "wkv_b": (8, 2 * 7)}
    rng = np.random.default_rng(0)
    normal = lambda shape: rng.normal(size=shape) / np.sqrt(shape[0])  # noqa: E731
    kernels = {name: jnp.asarray(normal(shape), dtype) for name, shape in shapes.items()}
    scaled = {name: x * jnp.asarray(scales.get(name, 1.0), dtype) for name, x in kernels.items()}
    return {"attn": {name: {"kernel": x} for name, x in scaled.items()}}


def test_each_pair_of_mla_collapses_by_itself():
    """q_rope takes all of each clip and k_rope nothing, beside nope pieces that share alike."""
    layout = mc.layouts.mla(4, 2, 3, query=("wq_a", "wq_b"), out=None)
    sown = {"attn": {"max_logits": jnp.ones(2)}}

    def report(**scales):
        return mc.attention_report(latent_params(**scales), None, sown, layout).blocks["attn"]

    heads = lambda first, second: np.repeat([first, second], [4, 2])  # noqa: E731
    clips = np.concatenate([heads(0.8**15, 0.8**30), np.ones(6)])
    keys = np.concatenate([[0.8**15] * 4, np.ones(3 + 7)])
    healthy, clipped = report(), report(wq_b=clips, wkv_b=keys)
    assert healthy.collapsed.tolist() == [False] * 2
    assert clipped.collapsed.tolist() == [True, False]
    # The smaller of the two pieces, against the kernel in float64.
    kernel = np.float64(latent_params(wq_b=clips)["attn"]["wq_b"]["kernel"]).reshape(24, 2, 6)
    sizes = [np.sqrt((kernel[..., cut] ** 2).mean((0, 2))) for cut in np.s_[:4, 4:]]
    np.testing.assert_allclose(clipped.query_rms, np.minimum(*sizes), rtol=1e-6)


def test_broken_kernels_break_their_own_head_only():
    kernel = PARAMS["first"]["query"]["kernel"].at[0, 1, 0].set(jnp.nan)
    params = {"first": {"query": {"kernel": kernel}, "key": PARAMS["first"]["key"]}}
    found = mc.attention_report(params, None, {"first": SOWN["first"]}, LAYOUT).blocks["first"]
    for numbers in (found.query_norms, found.ranks):
        np.testing.assert_array_equal(jnp.isnan(numbers), [False, True, False, False])
    assert jnp.isfinite(found.key_norms).all()


def test_huge_kernels():
    params = jax.tree.map(lambda x: 1e30 * x, PARAMS)
    huge, plain = (mc.attention_report(p, None, SOWN, LAYOUT).blocks for p in (params, PARAMS))
    for name in huge:
        # float32 roundings
        chex.assert_trees_all_close(huge[name].ranks, plain[name].ranks, rtol=1e-5)
        chex.assert_trees_all_close(
            huge[name].query_norms, 1e30 * plain[name].query_norms, rtol=1e-5
        )


def test_table_has_a_line_a_layer_and_names_heads_to_look_at(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = str(mc.attention_report(PARAMS, after_a_step(), SOWN, LAYOUT, threshold=10.0))
    lines = [line for line in text.splitlines() if line.startswith("│")]
    cells = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]
    assert [row[0] for row in cells] == ["first", "rest/0", "rest/1"]
    assert [row[1] for row in cells] == ["1 … 20", "5 … 8", "9 … 40"]
    assert [row[2] for row in cells] == ["0.5 … 1", "1", "0.25 … 1"]
    assert [row[-1] for row in cells] == ["above: 1", "", "above: 2, 3"]


def test_scalars_for_a_logger():
    report = mc.attention_report(PARAMS, after_a_step(), SOWN, LAYOUT, threshold=10.0)
    scalars = report.scalars()
    assert len(scalars) == 3 * 14 and all(type(value) is float for value in scalars.values())
    assert scalars["max_logit/rest/1"] == 40 and scalars["gamma/rest/1"] == 0.25
    assert scalars["above/rest/1"] == 2
    assert scalars["exploding/rest/1"] == scalars["dead/first"] == 0
    ratios = report.blocks["rest"].key_participation_ratios
    # float32 roundings of a mean
    np.testing.assert_allclose(scalars["key_participation_ratio/rest/0"], ratios[0].mean(), 1e-6)


WRONG_HEADS = {**SOWN, "first": {**SOWN["first"], "keys": KEYS["first"][:, :, :1]}}
TWICE = {**SOWN, "first": {**SOWN["first"], "rope": {"keys": KEYS["first"]}}}
ELSEWHERE = {name: {"max_logits": MAXIMA[name]} for name in MAXIMA} | {
    "mlp": {"keys": KEYS["first"]}
}


@pytest.mark.parametrize(
    ("sown", "words"),
    [
        (None, r"No value named 'max_logits'.*found nothing"),
        ({"first": SOWN["first"]}, "rest has query and key kernels but no max logits.*of first"),
        ({"mlp": SOWN["first"]}, "first has query and key kernels but no max logits.*of none"),
        (WRONG_HEADS, r"first sowed keys of shape \(1, 10, 3\).*2 key heads"),
        (TWICE, "2 modules in first sowed keys"),
        (ELSEWHERE, "keys sown are in no block of the layout; it has first, rest"),
    ],
    ids=["nothing", "one block", "elsewhere", "heads", "twice", "keys elsewhere"],
)
def test_refuses(sown, words):
    with pytest.raises(ValueError, match=words):
        mc.attention_report(PARAMS, None, sown, LAYOUT)


def test_two_clips_are_ambiguous():
    tx = optax.chain(mc.qk_clip(LAYOUT), mc.qk_clip(LAYOUT))
    with pytest.raises(ValueError, match=r"Expected one QKClipState.*found 2"):
        mc.attention_report(PARAMS, tx.init(PARAMS), SOWN, LAYOUT)
