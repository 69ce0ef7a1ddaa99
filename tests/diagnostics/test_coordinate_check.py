"""The coordinate check, on an MLP for which theory knows the slopes."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import muonclip_jax as mc

WIDTHS = (64, 128, 256)
BATCH = 4
X = jax.random.normal(jax.random.key(0), (BATCH, 16))
Y = jax.random.normal(jax.random.key(1), (BATCH, 8))
# With few steps and seeds a slope is told to 0.1: the spread over seeds here is 0.03.
WITHIN = 0.1


class MLP(nn.Module):
    """Its last kernel's first standard deviation is muP's, or 1/sqrt(in) as Flax's default."""

    width: int
    mup: bool = False

    @nn.compact
    def __call__(self, x):
        x = jnp.tanh(nn.Dense(self.width, use_bias=False, name="first")(x))
        x = jnp.tanh(nn.Dense(self.width, use_bias=False, name="hidden")(x))
        std = self.width**-0.5
        if self.mup:
            r = self.width / WIDTHS[0]
            std = WIDTHS[0] ** -0.5 * mc.scaling.init_by_width("unembedding", r)
        init = nn.initializers.normal(std)
        return nn.Dense(8, use_bias=False, kernel_init=init, name="last")(x)


def mlp(width, mup=False):
    model = MLP(width, mup)

    def loss(params):
        out, sown = model.apply({"params": params}, X, capture_intermediates=True)
        return jnp.mean((out - Y) ** 2), sown["intermediates"]

    return lambda key: model.init(key, X)["params"], loss


def by_kind(first, hidden, last):
    """Adam with a rate of its own for each kernel."""
    rates = {"first": first, "hidden": hidden, "last": last}
    return optax.partition(
        {name: optax.adam(rate) for name, rate in rates.items()},
        lambda params: {name: jax.tree.map(lambda _, n=name: n, params[name]) for name in params},
    )


def muon(rule, rate):
    """Muon for the hidden kernel alone, exactly orthogonal."""
    how = mc.NewtonSchulz(mc.schedules.polar_express(12), "float32")
    tx = optax.chain(
        mc.scale_by_muon(newton_schulz=how),
        mc.scale_by_update_rms(rule),
        optax.scale_by_learning_rate(rate),
    )
    return optax.partition(
        {"muon": tx, "still": optax.set_to_zero()},
        lambda params: {
            name: jax.tree.map(lambda _, n=name: "muon" if n == "hidden" else "still", params[name])
            for name in params
        },
    )


@pytest.mark.parametrize(
    ("optimizer", "hidden", "verdict"),
    [
        # A step of η in every entry, aligned with the width's inputs: η · width.
        (lambda width: by_kind(0.0, 1e-5, 0.0), 1.0, "grows"),
        (lambda width: by_kind(0.0, 1e-3 / width, 0.0), 0.0, "stays"),
        # A spectral norm of η · scale: sqrt(out/in) = 1 keeps it, 0.2 sqrt(width) does not.
        (lambda width: muon("unit_rms_norm", 1e-3), 0.0, "stays"),
        (lambda width: muon("jordan", 1e-3), 0.0, "stays"),
        (lambda width: muon("match_adam", 1e-3), 0.5, "grows"),
        (lambda width: muon("unit_rms_norm", 0.1 / width), -1.0, "vanishes"),
    ],
    ids=["adam", "adam-mup", "unit_rms_norm", "jordan", "match_adam", "too-low"],
)
def test_slopes_are_those_of_theory(optimizer, hidden, verdict):
    check = mc.coordinate_check(mlp, optimizer, WIDTHS, steps=2)
    assert check.slopes["hidden"] == pytest.approx(hidden, abs=WITHIN)
    assert check.verdicts["hidden"] == verdict
    # The first weights' activations have one size at every width.
    assert check._slope(check.first["hidden"]) == pytest.approx(0, abs=WITHIN)


def test_mup_ratios_of_scaling_flatten_every_layer():
    """Rates by `adam_by_width`, first weights by `init_by_width`: the outputs stay too."""

    def scaled(width):
        r = width / WIDTHS[0]
        rates = (1e-4 * mc.scaling.adam_by_width(kind, r) for kind in ("hidden", "unembedding"))
        return by_kind(1e-4, *map(float, rates))

    check = mc.coordinate_check(partial(mlp, mup=True), scaled, WIDTHS, steps=3, seeds=3)
    slopes = {name: check.slopes[name] for name in ("first", "hidden", "last")}
    assert slopes == pytest.approx(dict.fromkeys(slopes, 0.0), abs=0.15)
    plain = mc.coordinate_check(
        mlp, lambda width: by_kind(1e-4, 1e-4, 1e-4), WIDTHS, steps=3, seeds=3
    )
    assert plain.verdicts["last"] == plain.verdicts["hidden"] == "grows"
    assert plain.verdicts["first"] == "stays"


def test_numbers_are_those_of_a_loop_by_hand():
    """One path, two steps of gradient descent on a quadratic, in float64."""
    start = {w: np.arange(1.0, w + 1) / w for w in (2, 4)}

    def model(width):
        first = jnp.asarray(start[width], jnp.float32)
        return lambda key: {"w": first}, lambda p: (
            0.5 * (p["w"] ** 2).sum(),
            {"twice": 2 * p["w"]},
        )

    check = mc.coordinate_check(model, lambda width: optax.sgd(0.1), (2, 4), steps=2, seeds=1)
    for i, w in enumerate((2, 4)):
        steps = [2 * start[w] * (1 - 0.9**t) for t in (1, 2)]
        expected = [np.sqrt(np.mean(change**2)) for change in steps]
        np.testing.assert_allclose(check.changes["twice"][i, 0], expected, rtol=1e-6)
        np.testing.assert_allclose(
            check.first["twice"][i, 0], np.sqrt(np.mean((2 * start[w]) ** 2))
        )


def test_the_table_tells_what_grows_and_what_stands_still():
    changes = {
        "up": np.array([[[0.5, 1.0]], [[1.0, 2.0]], [[2.0, 4.0]]]),
        "still": np.zeros((3, 1, 2)),
        "broken": np.full((3, 1, 2), np.inf),
        "down": np.array([[[1.0, 4.0]], [[1.0, 2.0]], [[1.0, 1.0]]]),
        "flat": np.array([[[9.0, 1.0]], [[1.0, 1.1]], [[3.0, 1.0]]]),
    }
    first = dict.fromkeys(changes, np.ones((3, 1)))
    check = mc.CoordinateCheck((64, 128, 256), first, changes, tolerance=0.25)
    assert check.slopes["up"] == 1 and check.slopes["down"] == -1
    assert check.verdicts == {
        "up": "grows",
        "still": "does not move",
        "broken": "not finite",
        "down": "vanishes",
        "flat": "stays",
    }
    text = str(check)
    assert "RMS after 2 steps" in text and "change at 64" in text and "at 256" in text
    (row,) = (line for line in text.splitlines() if "up" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "up", "1", "4", "+1.00", "+0.00", "grows",
    ]  # fmt: skip
    axes = mc.plots.coordinates({"one": check, "two": check}).axes
    assert [each.get_title() for each in axes] == ["one", "two"]
    lines = {line.get_label(): line for line in axes[0].lines}
    np.testing.assert_array_equal(lines["up"].get_xdata(), [64, 128, 256])
    np.testing.assert_array_equal(lines["up"].get_ydata(), [1, 2, 4])
    assert np.isnan(lines["still"].get_ydata()).all()
    with pytest.raises(ValueError, match="no checks"):
        mc.plots.coordinates({})


def test_recipes_with_a_clip_and_models_in_nnx_are_checked():
    """Max logits reach the clip, scanned paths and several calls are read, numbers that are no
    floats are left out."""

    class Block(nnx.Module):
        def __init__(self, width, rngs):
            self.attn = nnx.MultiHeadAttention(
                2, width, decode=False, attention_fn=mc.attention_fn, rngs=rngs
            )

        def __call__(self, x):
            out = self.attn(x, sow_weights=True)
            self.sow(nnx.Intermediate, "out", out)
            self.sow(nnx.Intermediate, "out", 2 * out)
            self.sow(nnx.Intermediate, "count", jnp.arange(3))
            return out

    def model(width):
        x = jax.random.normal(jax.random.key(2), (2, 5, width))
        graph, _ = nnx.split(Block(width, nnx.Rngs(0)), nnx.Param)

        def loss(params):
            merged = nnx.merge(graph, params)
            out, sown = nnx.capture(merged, nnx.Intermediate)(x)
            return jnp.mean(out**2), sown

        return lambda key: nnx.split(Block(width, nnx.Rngs(key)), nnx.Param)[1], loss

    def clipped(width):
        return mc.muonclip(1e-3, layout=mc.layouts.mha())

    check = mc.coordinate_check(model, clipped, (8, 16), steps=1, seeds=1)
    assert set(check.changes) == {"out", "attn/max_logits"}
    assert all((change > 0).all() for change in check.changes.values())


def test_what_is_wrong_is_told():
    def sgd(width):
        return optax.sgd(0.1)

    def of(loss):
        return lambda width: (lambda key: jnp.ones(width), lambda p: loss(p, width))

    with pytest.raises(TypeError, match=r"model\(2\): loss\(params\) must give the loss and"):
        mc.coordinate_check(of(lambda p, width: p.sum()), sgd, (2, 4))
    with pytest.raises(ValueError, match=r"model\(2\): no activations\. Was it collected\?"):
        mc.coordinate_check(of(lambda p, width: (p.sum(), {})), sgd, (2, 4))
    with pytest.raises(ValueError, match="'b' is at only one of 2 and 4"):
        mc.coordinate_check(
            of(lambda p, w: (p.sum(), {"a": p, **({"b": p} if w > 2 else {})})), sgd, (2, 4)
        )
    with pytest.raises(TypeError, match=r"optimizer\(2\) must be an Optax transformation"):
        mc.coordinate_check(of(lambda p, width: (p.sum(), {"a": p})), lambda width: 3, (2, 4))
