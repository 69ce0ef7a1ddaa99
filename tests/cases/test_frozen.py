"""Frozen parameters: nothing of them moves, and what trains takes all of each head's γ.

A user who fine-tunes names what is frozen once, in the form at hand: a mask, labels, globs.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from muonclip_jax._core import paths
from muonclip_jax._layouts.roles import ROLES
from muonclip_jax.layouts import find_blocks

HEADS, F = 4, 3
ONE_STEP = mc.NewtonSchulz(mc.schedules.polar_express(1))
MAXIMA = jnp.array([40.0, 1.0, 20.0, 80.0])
GAMMA = np.array([0.25, 1, 0.5, 0.125])
SOWN = {("attn",): MAXIMA}


def kernels(**shapes):
    rng = np.random.default_rng(0)
    return {n: {"kernel": jnp.asarray(rng.normal(size=s), jnp.float32)} for n, s in shapes.items()}


def plain(kv_heads=HEADS):
    key = (8, kv_heads, F)
    return {"attn": kernels(query=(8, HEADS, F), key=key, value=key, out=(HEADS, F, 8))}


def latent(rope):
    own = kernels(wq=(8, HEADS * (4 + rope)), wkv_a=(8, 5 + rope), wkv_b=(5, HEADS * 7), wo=(12, 8))
    return {"attn": own}


def with_bias():
    params = plain()
    params["attn"]["query"]["bias"] = jnp.ones((HEADS, F))
    return params


MHA, GQA = mc.layouts.mha(), mc.layouts.gqa()
MLA, NOPE = (mc.layouts.mla(4, rope, 3, query="wq") for rope in (2, 0))


def products(layout, params):
    """Of every query head, W_q W_kᵀ with each key that it meets, float64."""
    (block,) = find_blocks(layout, params)
    leaf = lambda part: params["attn"][part.kernel[1]]["kernel"]  # noqa: E731
    take = lambda part: np.asarray(part.take(leaf(part)), np.float64)  # noqa: E731
    found = []
    for part in block.queries:
        key = take(block.part(ROLES[part.role].partner))
        found.append(take(part) @ np.repeat(key, HEADS // len(key), axis=0).swapaxes(-1, -2))
    return found


def moved(before, after):
    pairs = zip(paths.leaves(before), jax.tree.leaves(after), strict=True)
    return {"/".join(path) for (path, x), y in pairs if (np.asarray(x) != np.asarray(y)).any()}


@pytest.mark.parametrize(
    ("layout", "params", "frozen", "clipped", "options"),
    [
        (MHA, plain(), "attn/key/*", ["query"], {}),
        (MHA, plain(), "attn/query/*", ["key"], {}),
        (MHA, plain(), ["attn/value/*", "*/out/*"], ["query", "key"], {}),
        (MHA, with_bias(), "attn/query/bias", ["key"], {}),  # its kernel would not scale alone
        (MHA, with_bias(), "attn/query/kernel", ["key"], {}),
        (GQA, plain(2), "attn/key/kernel", ["query"], {}),
        (GQA, plain(2), "attn/key/kernel", ["query"], {"shared_keys": "split"}),
        (MLA, latent(2), "*/wkv_b/*", ["wq"], {}),
        (MLA, latent(2), "*/wkv_a/*", ["wq", "wkv_b"], {}),
        (NOPE, latent(0), "*/wq/*", ["wkv_b"], {}),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_what_trains_takes_all_of_gamma(layout, params, frozen, clipped, options):
    after = mc.apply_qk_clip(params, SOWN, layout, 10.0, frozen=frozen, **options)
    for now, then in zip(products(layout, after), products(layout, params), strict=True):
        # γ is a power of two: what one side takes alone is exact, else float32 rounds roots.
        np.testing.assert_allclose(now, then * GAMMA[:, None, None], rtol=1e-5, atol=1e-6)
    assert {name.split("/")[1] for name in moved(params, after)} == set(clipped)


def test_the_oldest_scope_clips_keys_that_heads_share():
    """All heads take the layer's γ, so that one factor does for a shared key."""
    params = plain(2)
    after = mc.apply_qk_clip(params, SOWN, GQA, 10.0, scope="layer", frozen="attn/query/*")
    np.testing.assert_allclose(products(GQA, after)[0], products(GQA, params)[0] / 8, rtol=1e-6)
    assert moved(params, after) == {"attn/key/kernel"}


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("layout", "params", "frozen", "words"),
    [
        (GQA, plain(2), "attn/query/*", ["attn/query/kernel (8, 4, 3)", "several query heads"]),
        (MLA, latent(2), "*/wq/*", ["the q_nope", "attn/wq/kernel", "attn/wkv_a/kernel"][1:]),
        (MLA, latent(2), ["*/wq/*", "*/wkv_b/*"], ["the q_nope", "attn/wkv_b/kernel", "too"]),
        (MHA, with_bias(), ["*/bias", "*/key/*"], ["attn/query/bias", "attn/key/kernel", "too"]),
        (NOPE, latent(0), ["*/wq/*", "*/wkv_b/*"], ["attn/wq/kernel", "attn/wkv_b/kernel"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_heads_that_nothing_scales_are_an_error_at_init(layout, params, frozen, words):
    with pytest.raises(ValueError, match="nothing is left that would scale") as caught:
        mc.qk_clip(layout, frozen=frozen).init(params)
    for told in (*words, "frozen=", "layouts.ignore('attn')"):
        assert told in str(caught.value)


def two_blocks():
    return {"attn": plain()["attn"], "other": plain()["attn"]}


LABELS = {"attn": "freeze", "other": "train"}
FORMS = {
    "glob": "attn/*",
    "globs": ("attn/query/*", "attn/key/*"),
    "prefix": {"attn": True, "other": False},
    "labels": jax.tree.map(lambda label: label == "freeze", LABELS),
    "mask": jax.tree_util.tree_map_with_path(lambda path, _: path[0].key == "attn", two_blocks()),
    "function": lambda params: {"attn": True, "other": np.bool_(False)},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_block_that_is_frozen_whole_is_left_out(form):
    """Behind `optax.partition`; neither maxima nor a place in the state are asked for it."""
    params = two_blocks()
    sown = {("attn",): MAXIMA, ("other",): MAXIMA}
    rest = optax.partition({"train": optax.sgd(0.0), "freeze": optax.set_to_zero()}, LABELS)
    tx = optax.chain(rest, mc.qk_clip(MHA, 10.0, frozen=FORMS[form]))
    state = tx.init(params)
    for given in (sown, {("other",): MAXIMA}):
        updates, new = tx.update(params, state, params, max_logits=given)
        assert not any(x.any() for x in jax.tree.leaves(updates["attn"]))
        clip = mc.qk_clip_state(new)
        assert list(clip.gamma) == ["other"] and int(clip.heads_clipped) == 3
        half = np.sqrt(GAMMA)[:, None] - 1
        expected = params["other"]["query"]["kernel"] * half
        np.testing.assert_allclose(updates["other"]["query"]["kernel"], expected, rtol=1e-6)


def test_all_of_a_model_frozen():
    params, zeros = plain(), jax.tree.map(jnp.zeros_like, plain())
    tx = mc.accumulate(mc.qk_clip(MHA, 10.0, frozen="attn/*"), every=2)
    updates, state = tx.update(zeros, tx.init(params), params, max_logits=SOWN)
    assert not mc.qk_clip_state(state).gamma and not moved(zeros, updates)
    assert not moved(params, mc.apply_qk_clip(params, SOWN, MHA, 10.0, frozen={"attn": True}))


def test_quantized_weights_may_be_frozen():
    params = plain()
    params["attn"]["key"]["kernel"] = jnp.ones((8, HEADS, F), jnp.int8)
    after = mc.apply_qk_clip(params, SOWN, MHA, 10.0, frozen="attn/key/*")
    scaled = params["attn"]["query"]["kernel"] * GAMMA[:, None]
    np.testing.assert_array_equal(after["attn"]["query"]["kernel"], scaled)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("frozen", "error", "told"),
    [
        ("attn/querry/*", ValueError, r"frozen='attn/querry/\*' matches no .*attn/query/kernel"),
        ({"attn": "freeze"}, TypeError, "frozen has 'freeze' for attn; it must be True or False"),
        ({"attn": True, "mlp": True}, ValueError, "frozen has an entry for mlp, .* no parameter"),
        ({"other": True}, ValueError, r"frozen says nothing about attn/key/kernel \(8, 4, 3\)"),
        (True, ValueError, "frozen must be a tree of bools"),
    ],
    ids=["glob", "labels", "stray", "other", "one bool"],
)
@pytest.mark.parametrize(
    "link", [mc.qk_clip, mc.scale_by_quack, mc.attention_report, mc.clip_by_signal]
)
def test_what_is_no_mask_for_these_parameters(link, frozen, error, told):
    params = plain()
    act = {
        mc.attention_report: lambda: link(params, None, SOWN, MHA, frozen=frozen),
        mc.clip_by_signal: lambda: by_output(all_on_o, frozen=frozen).init(params),
    }.get(link, lambda: link(MHA, frozen=frozen).init(params))
    with pytest.raises(error, match=told):
        act()


# --- a clip by another signal
def all_on_o(block, gamma):
    return {"o": gamma}


def halves(block, gamma):
    """Values and outputs by the half each, or what trains of them by all."""
    trains = [role for role in ("v", "o") if not block.held(role)]
    return {role: gamma ** (1 / len(trains)) for role in trains}


def by_output(factors, **options):
    return mc.clip_by_signal(MHA, 10.0, signal="max_output", factors=factors, **options)


def clipped_by_output(params, factors, frozen, sown=SOWN):
    """The parameters after a step of nothing but the clip, and its state."""
    tx = by_output(factors, frozen=frozen)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, max_output=sown)
    return optax.apply_updates(params, updates), state


def of_each_head(params):
    """W_v W_o of every head, float64, `[heads, in, out]`."""
    value, out = (np.float64(params["attn"][name]["kernel"]) for name in ("value", "out"))
    return np.einsum("inf,nfo->nio", value, out)


@pytest.mark.parametrize(
    ("frozen", "clipped"),
    [
        (None, ["value", "out"]),
        ("attn/out/*", ["value"]),
        ("attn/value/kernel", ["out"]),
        # All that makes the logits, which this clip does not touch.
        (["attn/query/*", "attn/key/*"], ["value", "out"]),
        ({"attn": {"query": True, "key": True, "value": False, "out": True}}, ["value"]),
    ],
    ids=["nothing", "out", "value", "logits", "mask"],
)
def test_what_trains_takes_all_of_gamma_of_any_signal(frozen, clipped):
    params = plain()
    after, _ = clipped_by_output(params, halves, frozen)
    assert moved(params, after) == {f"attn/{name}/kernel" for name in clipped}
    now, then = map(of_each_head, (after, params))
    # Rounded roots of γ, and updates as large as the weights.
    np.testing.assert_allclose(now, then * GAMMA[:, None, None], rtol=1e-5, atol=1e-5)


ONLY_AN_O = {"attn": {"query": False, "key": False, "value": False, "out": True}, "other": False}


@pytest.mark.parametrize("frozen", ["attn/out/*", lambda params: ONLY_AN_O], ids=["glob", "mask"])
def test_a_block_is_left_out_of_which_nothing_trains_that_the_factors_scale(frozen):
    """Its queries and keys train all the same. Quantized weights may be frozen here too."""
    params = two_blocks()
    params["attn"]["out"]["kernel"] = jnp.ones((HEADS, F, 8), jnp.int8)
    for sown in ({("attn",): MAXIMA, ("other",): MAXIMA}, {("other",): MAXIMA}):
        after, state = clipped_by_output(params, all_on_o, frozen, sown)
        assert moved(params, after) == {"other/out/kernel"}
        (gamma,), (maxima,) = state.gamma.values(), state.maxima.values()
        assert list(gamma) == list(maxima) == ["other"]
        assert int(state.heads_clipped) == 3


def test_nothing_is_left_that_the_factors_scale():
    params, zeros = plain(), jax.tree.map(jnp.zeros_like, plain())
    tx = mc.accumulate(by_output(all_on_o, frozen="*/out/*"), every=2)
    updates, _ = tx.update(zeros, tx.init(params), params)
    assert not moved(zeros, updates)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("roles", "frozen", "words"),
    [
        (("v", "o"), "*/out/*", ["'o'", "attn/out/kernel (4, 3, 8)"]),
        (("q", "o"), "*/query/bias", ["'q'", "attn/query/bias (4, 3)"]),
    ],
)
def test_factors_that_scale_what_is_frozen_raise(roles, frozen, words):
    with pytest.raises(ValueError, match="clip_by_signal: factors scales") as caught:
        by_output(lambda _, gamma: dict.fromkeys(roles, gamma), frozen=frozen).init(with_bias())
    for told in (*words, "frozen=", "block.held(", "layouts.ignore('attn')"):
        assert told in str(caught.value)


# --- QuacK, recipes, report
def test_quack_leaves_frozen_updates_and_counts_their_norms():
    """q is frozen, so that k's partner never grows; k doubles, which q would have felt."""
    params, layout = two_blocks(), [mc.layouts.mha(block="attn"), mc.layouts.mha(block="other")]
    tx = mc.scale_by_quack(layout, 0.5, frozen=["attn/query/*", "other/*"])
    state = tx.init(params)
    assert list(state.initial_norms) == ["attn"]
    grown = jax.tree.map(lambda x: x, params)
    grown["attn"]["key"] = {"kernel": 2 * params["attn"]["key"]["kernel"]}
    ones = jax.tree.map(jnp.ones_like, params)
    updates, state = tx.update(ones, state, grown)
    assert moved(ones, updates) == {"attn/key/kernel"}
    np.testing.assert_allclose(updates["attn"]["key"]["kernel"], 0.5, rtol=1e-6)


@pytest.mark.parametrize("recipe", ["muonclip", "kimi_muonclip", "quack", "quack of adam"])
def test_recipes_move_nothing_frozen(recipe):
    """Nor decay it, nor keep a momentum of it; it may be quantized."""
    params = {"attn": plain()["attn"], "base": {"kernel": jnp.ones((4, 4), jnp.int8)}}
    params["attn"]["query"]["bias"] = jnp.ones((HEADS, F))
    options = {"layout": MHA, "frozen": ["attn/query/*", "base/*"]}
    muon = {**options, "newton_schulz": ONE_STEP}
    tx = {
        "muonclip": lambda: mc.muonclip(0.1, threshold=10.0, **muon),
        "kimi_muonclip": lambda: mc.kimi_muonclip(0.1, threshold=10.0, **muon),
        "quack": lambda: mc.quack(0.1, **options),
        "quack of adam": lambda: mc.quack(0.1, direction=optax.sgd(-1.0), **options),
    }[recipe]()
    grads = jax.tree.map(jnp.ones_like, params)
    state = tx.init(params)
    updates, _ = jax.jit(tx.update)(grads, state, params, max_logits=SOWN)
    after = optax.apply_updates(params, updates)
    assert moved(params, after) == {f"attn/{name}/kernel" for name in ("key", "value", "out")}
    if recipe != "quack of adam":
        momenta = [path for path, _ in paths.leaves(state) if "trace" in path]
        assert len(momenta) == 3 and not any({"query", "base"} & set(path) for path in momenta)


def test_describe_says_what_is_frozen():
    rows = mc.describe(plain(), MHA, frozen="attn/query/*")
    told = {row.path.split("/")[1]: (row.optimizer, row.decays, len(row.matrices)) for row in rows}
    assert told == {"query": ("frozen", False, 0)} | dict.fromkeys(
        ("key", "value", "out"), ("muon", True, 1)
    )
    caption = "288 parameters with muon, 0 with the other optimizer, 96 frozen"
    assert caption in " ".join(str(rows).split())


def test_the_report_says_which_heads_no_clip_holds(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    params = two_blocks()
    sown = {("attn",): MAXIMA, ("other",): MAXIMA}
    layout = mc.find_layout(params)
    state = mc.qk_clip(layout, frozen="attn/*").init(params)
    report = mc.attention_report(params, state, sown, layout, threshold=10.0, frozen="attn/*")
    assert report.blocks["attn"].frozen.all() and report.blocks["attn"].above.sum() == 3
    assert not report.blocks["other"].frozen.any()
    assert report.scalars()["frozen/attn"] == HEADS and "frozen: 0, 1, 2, 3" in str(report)
