"""docs/reference/sources.md: each formula's largest difference from its float64 transcription.

A difference is max|a - b| / max|b|, b being the transcription. The page states it; here it is
computed, so that the page and the code cannot part.
"""

import pathlib
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc
from studies.common.model import HEADS as SOWN
from studies.common.model import Attention, GroupedAttention, LatentAttention, ModelConfig
from tests.recipes import published
from tests.sources import transcriptions as source
from tests.sources.tables import DOCS, tables
from tests.transforms import quack_reference

ROOT = pathlib.Path(__file__).parents[2]
PAGE = "reference/sources.md"
CHECKS: dict[str, Callable[[], float]] = {}
CONVERGED = mc.NewtonSchulz(mc.schedules.polar_express(12, lower=1e-6), "float32")

D, F, T, BATCH, HEADS = 24, 8, 10, 2, 4
NOPE, ROPE, V, LATENT, COMPRESSED = 6, 4, 5, 8, 10
TAU = 10.0
MAXIMA = np.array([41.0, 10.0, 3.0, 11.0])
MLA = mc.layouts.mla(NOPE, ROPE, V)


def check(function):
    CHECKS[function.__name__] = function
    return function


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def difference(found, expected) -> float:
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def largest(found, expected) -> float:
    """Of trees of arrays with the same names."""
    assert found.keys() == expected.keys()
    return max(difference(found[name], expected[name]) for name in expected)


def kernels(arrays):
    return {"attn": {name: {"kernel": jnp.asarray(x, jnp.float32)} for name, x in arrays.items()}}


def arrays_of(params):
    return {name: leaf["kernel"] for name, leaf in params["attn"].items()}


def as_float32(arrays):
    """What the package is given, so that the rounding of inputs is nobody's difference."""
    return {name: np.float64(np.float32(x)) for name, x in arrays.items()}


def rounded(seed, *shape):
    return np.float64(np.float32(normal(seed, *shape)))


def sown(maxima=MAXIMA):
    return {"attn": {"max_logits": jnp.asarray(maxima, jnp.float32)}}


def attention_inputs():
    return [rounded(seed, BATCH, T, HEADS, F) for seed in range(3)]


def by_head(transcribed, *operands, **options):
    """`[B, T, heads, f]`, head by head."""
    outputs = [
        [
            transcribed(*(x[b, :, h] for x in operands), **options)
            for h in range(operands[0].shape[2])
        ]
        for b in range(len(operands[0]))
    ]
    return np.moveaxis(np.array(outputs), 1, 2)


# 002, attention


@check
def attention():
    q, k, v = attention_inputs()
    out, _ = mc.dot_product_attention(*map(jnp.float32, (q, k, v)), is_causal=True)
    return difference(out, by_head(source.attention, q / F**0.5, k, v))


@check
def max_logit():
    q, k, _ = attention_inputs()
    found = mc.measure_max_logits(jnp.float32(q), jnp.float32(k), is_causal=True)
    of_heads = [source.max_logit(q[:, :, h] / F**0.5, k[:, :, h]) for h in range(HEADS)]
    return difference(found, of_heads)


@check
def soft_cap():
    q, k, v = attention_inputs()
    operands = map(jnp.float32, (3 * q, k, v))
    out, _ = mc.dot_product_attention(*operands, is_causal=True, soft_cap=2.0)
    return difference(out, by_head(source.soft_capped, 3 * q / F**0.5, k, v, cap=2.0))


def applied(attention: Attention, x):
    """Output, sown queries and keys, and parameters of a study's attention, not scanned."""
    params = attention.init(jax.random.key(0), x)["params"]
    out, collections = attention.apply({"params": params}, x, mutable=[SOWN])
    heads = collections[SOWN]
    return out, heads["queries"][0], heads["keys"][0], jax.tree.map(np.float64, params)


@check
def qk_norm():
    config = ModelConfig(d_model=D, heads=HEADS, kv_heads=2, rope=F, v=F, qk_norm=True)
    x = rounded(0, 1, T, D)
    _, q, k, params = applied(GroupedAttention(config), jnp.float32(x))
    worst = 0.0
    for found, name in ((q, "wq"), (k, "wk")):
        flat = x[0] @ params[name]["kernel"]
        heads = flat.reshape(T, -1, F)
        expected = [source.rotated(source.rms_norm(heads[:, h])) for h in range(heads.shape[1])]
        # Flax's RMSNorm adds 1e-6 to the mean square, which is some 0.04 here.
        worst = max(worst, difference(found[0], np.stack(expected, axis=1)))
    return worst


def latent_by_source(params, x):
    """002's matrices out of a study's MLA without norms: its query latent is not in 002, and is
    multiplied out."""
    q = (params["wq_a"]["kernel"] @ params["wq_b"]["kernel"]).reshape(D, HEADS, NOPE + ROPE)
    kv = params["wkv_b"]["kernel"].reshape(LATENT, HEADS, NOPE + V)
    down = params["wkv_a"]["kernel"]
    w = {"c": down[:, :LATENT], "kr": down[:, LATENT:]}
    of_heads = {"qc": q[..., :NOPE], "qr": q[..., NOPE:], "kc": kv[..., :NOPE], "v": kv[..., NOPE:]}
    return w | {name: list(np.moveaxis(x, 1, 0)) for name, x in of_heads.items()}


def latent_attention(**options):
    sizes = {"q_rank": COMPRESSED, "kv_rank": LATENT, "nope": NOPE, "rope": ROPE, "v": V}
    config = ModelConfig(
        d_model=D,
        heads=HEADS,
        kv_heads=HEADS,
        attention="latent",
        init_std=0.5,
        **sizes,
        **options,
    )
    x = rounded(0, 1, T, D)
    out, q, k, params = applied(LatentAttention(config), jnp.float32(x))
    w = latent_by_source(params, x[0])
    return out[0], q[0], k[0], params, w, x[0]


@check
def mla_training():
    out, _, _, params, w, x = latent_attention()
    heads, _ = source.mla_training(x, w, (NOPE + ROPE) ** -0.5)
    joined = np.moveaxis(heads, 0, 1).reshape(T, -1)
    return difference(out, joined @ params["wo"]["kernel"])


@check
def mla_decoding():
    out, _, _, params, w, x = latent_attention()
    heads = source.mla_decoding(x, w, (NOPE + ROPE) ** -0.5)
    joined = np.moveaxis(heads, 0, 1).reshape(T, -1)
    return difference(out, joined @ params["wo"]["kernel"])


@check
def absorbed_qk_norm():
    out, _, _, params, w, x = latent_attention(qk_norm=True)
    gains = (params[name]["scale"] for name in ("q_norm", "k_norm"))
    heads = source.mla_decoding_normalized(x, w, (NOPE + ROPE) ** -0.5, *gains)
    joined = np.moveaxis(heads, 0, 1).reshape(T, -1)
    return difference(out, joined @ params["wo"]["kernel"])


@check
def partial_qk_norm():
    _, q, k, _, w, x = latent_attention(partial_qk_norm=True)
    expected_q, expected_k = [], []
    for qc, qr, kc in zip(w["qc"], w["qr"], w["kc"], strict=True):
        queries, keys = source.partly_normalized(x, qc, qr, x @ w["c"] @ kc, w["kr"])
        expected_q.append(queries)
        expected_k.append(keys)
    return max(
        difference(q, np.stack(expected_q, axis=1)), difference(k, np.stack(expected_k, axis=1))
    )


# 002, QK-Clip

LATENT_SHAPES = {
    "wq_a": (D, COMPRESSED),
    "wq_b": (COMPRESSED, HEADS * (NOPE + ROPE)),
    "wkv_a": (D, LATENT + ROPE),
    "wkv_b": (LATENT, HEADS * (NOPE + V)),
    "wo": (HEADS * V, D),
}


def plain_shapes(kv_heads):
    return {
        "query": (D, HEADS * F),
        "key": (D, kv_heads * F),
        "value": (D, kv_heads * F),
        "out": (HEADS * F, D),
    }


def plain_layout(kv_heads):
    return mc.layouts.gqa(kv_heads, heads=HEADS)


def random(shapes, seed=0):
    return {name: rounded(seed + i, *shape) for i, (name, shape) in enumerate(shapes.items())}


def clipped(weights, layout, **options):
    return arrays_of(mc.apply_qk_clip(kernels(weights), sown(), layout, TAU, **options))


def clip_plain(kernels, gamma):
    published.clip_plain(kernels, gamma, query="query", key="key", features=F)


def clip_latent(kernels, gamma):
    sizes = {"nope": NOPE, "rope": ROPE, "v": V}
    published.clip_latent(kernels, gamma, query="wq_b", key_value="wkv_b", **sizes)


def clip_difference(shapes, layout, clip):
    weights = random(shapes)
    found = clipped(weights, layout)
    clip(weights, published.gammas(MAXIMA, TAU))
    return largest(found, weights)


@check
def clip_mha():
    return clip_difference(plain_shapes(HEADS), plain_layout(HEADS), clip_plain)


@check
def clip_gqa():
    return clip_difference(plain_shapes(2), plain_layout(2), clip_plain)


@check
def clip_mla():
    return clip_difference(LATENT_SHAPES, MLA, clip_latent)


@check
def clip_first_version_mha():
    weights = random(plain_shapes(HEADS))
    found = clipped(weights, plain_layout(HEADS), scope="layer")
    both = {name: weights[name] for name in ("query", "key")}
    return largest(found, weights | source.first_version(both, MAXIMA.max(), TAU))


@check
def clip_first_version_mla():
    """All of W_q and W_k: of the kernels that hold something else too, those columns."""
    weights = random(LATENT_SHAPES)
    found = clipped(weights, MLA, scope="layer")
    keys = weights["wkv_b"].reshape(LATENT, HEADS, NOPE + V)[..., :NOPE]
    parts = {"wq_b": weights["wq_b"], "kr": weights["wkv_a"][:, LATENT:], "kc": keys}
    scaled = source.first_version(parts, MAXIMA.max(), TAU)
    expected = {name: w.copy() for name, w in weights.items()}
    expected["wq_b"] = scaled["wq_b"]
    expected["wkv_a"][:, LATENT:] = scaled["kr"]
    expected["wkv_b"].reshape(LATENT, HEADS, NOPE + V)[..., :NOPE] = scaled["kc"]
    return largest(found, expected)


@check
def max_output_clip():
    weights, outputs = {"out": rounded(0, HEADS, F, D)}, np.array([20.0, 1.0, 10.0, 12.0])
    attention = {"query": rounded(1, D, HEADS, F), "key": rounded(2, D, HEADS, F)}
    params = kernels(attention | weights)
    tx = mc.max_output_clip(mc.layouts.mha(value=None), TAU, signal="output")
    signal = {"attn": {"output": jnp.asarray(outputs, jnp.float32)}}
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, output=signal)
    found = arrays_of(optax.apply_updates(params, updates))["out"]
    return difference(
        found, [source.output_clip(w, s, TAU) for w, s in zip(weights["out"], outputs, strict=True)]
    )


STEPS = 20


def trained(tx, weights, gradients, maxima):
    params, state = kernels(weights), tx.init(kernels(weights))
    update = jax.jit(tx.update)
    for grad, s in zip(gradients, maxima, strict=True):
        updates, state = update(kernels(grad), state, params, max_logits=sown(s))
        params = optax.apply_updates(params, updates)
    return arrays_of(params)


def run_inputs(shapes):
    weights = random(shapes)
    gradients = [random(shapes, seed=100 * (1 + step)) for step in range(STEPS)]
    maxima = [np.float64(np.float32(5 + 20 * np.abs(normal(step, HEADS)))) for step in range(STEPS)]
    return weights, gradients, maxima


@check
def adamclip():
    weights, gradients, maxima = run_inputs(plain_shapes(HEADS))
    eta, b1, b2, eps, decay = 0.01, 0.9, 0.95, 1e-8, 0.1
    tx = optax.chain(
        optax.adamw(eta, b1=b1, b2=b2, eps=eps, weight_decay=decay),
        mc.qk_clip(plain_layout(HEADS), TAU),
    )
    found = trained(tx, weights, gradients, maxima)
    moments = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}
    current = dict(weights)
    for step, (grad, s) in enumerate(zip(gradients, maxima, strict=True), 1):
        for name, w in current.items():
            numbers = (step, eta, b1, b2, eps, decay)
            current[name], *moments[name] = source.adamw(w, *moments[name], grad[name], *numbers)
        clip_plain(current, published.gammas(s, TAU))
    return largest(found, current)


SETTINGS = published.Settings(learning_rate=0.02, weight_decay=0.1, momentum=0.95, threshold=TAU)


def box_difference(shapes, layout, clip, newton_schulz):
    weights, gradients, maxima = run_inputs(shapes)
    tx = mc.kimi_muonclip(
        SETTINGS.learning_rate,
        layout=layout,
        threshold=TAU,
        momentum=SETTINGS.momentum,
        weight_decay=SETTINGS.weight_decay,
        newton_schulz=newton_schulz,
    )
    found = trained(tx, weights, gradients, maxima)
    return largest(found, published.train(weights, gradients, maxima, SETTINGS, clip))


@check
def muonclip_mha():
    return box_difference(plain_shapes(HEADS), plain_layout(HEADS), clip_plain, CONVERGED)


@check
def muonclip_gqa():
    return box_difference(plain_shapes(2), plain_layout(2), clip_plain, CONVERGED)


@check
def muonclip_mla():
    return box_difference(LATENT_SHAPES, MLA, clip_latent, CONVERGED)


@check
def muonclip_mla_default():
    return box_difference(LATENT_SHAPES, MLA, clip_latent, mc.NewtonSchulz())


@check
def update_rms():
    worst = 0.0
    for shape in ((6, 24), (24, 6), (8, 8)):
        update = {"w": jnp.ones(shape)}
        scaled, _ = (tx := mc.scale_by_update_rms()).update(update, tx.init(update))
        worst = max(
            worst, difference(scaled["w"], np.full(shape, source.update_rms_factor(*shape)))
        )
    return worst


# 002 and 004, matrices


@check
def msign():
    m = rounded(0, 16, 24)
    found = mc.orthogonalize(jnp.float32(m), CONVERGED.schedule, dtype=jnp.float32)
    return max(difference(found, source.msign(m)), difference(found, source.msign_by_root(m)))


@check
def msign_default():
    m = rounded(0, 16, 24)
    return difference(mc.orthogonalize(jnp.float32(m)), source.msign(m))


@check
def mclip():
    m = rounded(0, 16, 24)
    return difference(mc.linalg.mclip(jnp.float32(m)), source.mclip(m))


@check
def mcsgn():
    m = rounded(0, 8, 8)
    return difference(mc.linalg.mcsgn(jnp.float32(m)), source.mcsgn(m))


@check
def msign_derivative():
    m, g = rounded(0, 8, 12), rounded(1, 8, 12)
    gradient = jax.grad(lambda m: jnp.sum(jnp.float32(g) * mc.linalg.msign(m)))(jnp.float32(m))
    return difference(gradient, source.msign_derivative(m, g))


@check
def diagonal_plus_low_rank():
    q, k = rounded(0, 24, 4) / 4, rounded(1, 24, 4) / 4
    diagonal = 1 + np.abs(rounded(2, 24))
    arguments = (jnp.float32(x) for x in (diagonal, q, k))
    found = mc.linalg.inverse_low_rank_triangular(*arguments)
    diagonal = np.float64(np.float32(diagonal))
    return difference(found, np.linalg.inv(source.diagonal_plus_low_rank(diagonal, q, k)))


@check
def singular_value_entropy():
    m = rounded(0, 16, 24)
    found = jnp.log(mc.effective_rank(jnp.float32(m), 2)) / np.log(16)
    return difference(found, source.singular_value_entropy(m))


@check
def participation_ratio():
    keys = rounded(0, 40, F) * 2.0 ** -np.arange(F)
    return difference(mc.participation_ratio(jnp.float32(keys)), source.participation_ratio(keys))


# 003, QuacK


def quack_difference(layout, matrices, algorithm):
    """`matrices` cuts the matrices of each role out of the kernels, a list by head."""
    first, now = (random(layout_shapes(layout), seed) for seed in (0, 50))
    tx = mc.scale_by_quack(layout, 0.7)
    state = tx.init(kernels(first))
    ones = jax.tree.map(jnp.ones_like, kernels(now))
    _, state = tx.update(ones, state, kernels(now))
    found = mc.quack_state(state).factors["attn"]
    expected = algorithm(matrices(now), matrices(first), 0.7)
    return largest(found, {role: np.array(x) for role, x in expected.items()})


def layout_shapes(layout):
    return LATENT_SHAPES if layout is MLA else plain_shapes(HEADS)


def plain_matrices(weights):
    heads = {"q": weights["query"], "k": weights["key"]}
    return {role: np.split(w, HEADS, axis=1) for role, w in heads.items()}


def latent_matrices(weights):
    q = weights["wq_b"].reshape(COMPRESSED, HEADS, NOPE + ROPE)
    kv = weights["wkv_b"].reshape(LATENT, HEADS, NOPE + V)
    heads = {"q_nope": q[..., :NOPE], "q_rope": q[..., NOPE:], "k_nope": kv[..., :NOPE]}
    shared = {
        "q_down": [weights["wq_a"]],
        "kv_down": [weights["wkv_a"][:, :LATENT]],
        "k_rope": [weights["wkv_a"][:, LATENT:]],
    }
    return {role: list(np.moveaxis(w, 1, 0)) for role, w in heads.items()} | shared


@check
def quack_algorithm_1():
    layout = plain_layout(HEADS)
    return quack_difference(layout, plain_matrices, quack_reference.algorithm_1)


@check
def quack_algorithm_2():
    return quack_difference(MLA, latent_matrices, quack_reference.algorithm_2)


@check
def fixed_lower_rate():
    """MLA: all of queries and keys but the latent that values share."""
    weights, eta, relative, decay = random(LATENT_SHAPES), 0.02, 0.1, 0.1
    tx = mc.quack(
        eta,
        layout=MLA,
        rule="fixed",
        relative_learning_rate=relative,
        direction=optax.identity(),
        weight_decay=decay,
    )
    directions = random(LATENT_SHAPES, seed=70)
    params = kernels(weights)
    updates, _ = tx.update(kernels(directions), tx.init(params), params)
    found = arrays_of(optax.apply_updates(params, updates))

    def stepped(name, rate):
        return source.fixed_lower_rate(weights[name], directions[name], eta, rate, decay)

    expected = {name: stepped(name, 1.0) for name in weights}
    for name in ("wq_a", "wq_b"):
        expected[name] = stepped(name, relative)
    expected["wkv_a"][:, LATENT:] = stepped("wkv_a", relative)[:, LATENT:]
    of_heads, slower = (
        x.reshape(LATENT, HEADS, NOPE + V) for x in (expected["wkv_b"], stepped("wkv_b", relative))
    )
    of_heads[..., :NOPE] = slower[..., :NOPE]
    return largest(found, expected)


# The page


def formulas():
    return [row for rows in tables(PAGE) for row in rows if "largest difference" in row]


def claims():
    return [row for rows in tables(PAGE) for row in rows if "verdict" in row]


def stated():
    """check → the largest difference that the page allows."""
    found = {}
    for row in formulas():
        for name, number in re.findall(r"`(\w+)` ([\d.]+e-\d+)", row["largest difference"]):
            assert name not in found
            found[name] = float(number)
    return found


@pytest.mark.parametrize("name", CHECKS)
def test_difference_is_at_most_what_the_page_states(name):
    limit, found = stated()[name], CHECKS[name]()
    assert found <= limit
    # Rounding differs by processor and version, not by a power of ten and a half.
    assert limit < 1e-6 or found > limit / 30, f"the page may state less than {limit}: {found:.1e}"


def test_every_row_of_a_formula_has_its_check_or_says_why_not():
    assert stated().keys() == CHECKS.keys()
    for row in formulas():
        words = row["largest difference"]
        assert re.search(r"`\w+` [\d.]+e-\d+", words) or words.startswith(("later", "none: ")), row


def test_what_the_page_names_is_there():
    text = (DOCS / PAGE).read_text()
    names = set(re.findall(r"`mc\.([\w.]+)", text))
    for name in names:
        thing = mc
        for part in name.split("."):
            thing = getattr(thing, part)
    files = set(re.findall(r"`((?:tests|studies|examples|docs)/[\w/.]+)`", text))
    assert names and files
    assert not [file for file in files if not (ROOT / file).exists()]


def test_every_claim_has_a_verdict_or_the_reason_for_none():
    rows = claims()
    assert rows
    for row in rows:
        study, verdict = row["study"], row["verdict"]
        if study == "–":
            assert verdict.startswith("not tested, because "), row
        else:
            (place,) = re.findall(r"^`([\w/.]+)`$", study)
            folder = ROOT / "studies" / place
            assert (folder if "/" not in place else ROOT / place).exists(), row
            assert verdict, row
