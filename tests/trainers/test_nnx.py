"""NNX trainers that own their step: what the model records reaches the clip, nothing else."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import muonclip_jax as mc

X = jax.random.normal(jax.random.key(0), (4, 3, 8))
LAYOUT = mc.layouts.mha(value=None, out=None)
TX = optax.chain(optax.sgd(1e-2), mc.qk_clip(LAYOUT, threshold=1.0))


class Attention(nnx.Module):
    """Logits, and a mean of the inputs by them; that sows what it is told."""

    def __init__(self, rngs):
        self.query = nnx.LinearGeneral(8, (2, 4), use_bias=False, rngs=rngs)
        self.key = nnx.LinearGeneral(8, (2, 4), use_bias=False, rngs=rngs)

    def __call__(self, x):
        logits = jnp.einsum("btnh,bsnh->bnts", self.query(x), self.key(x))
        mc.sow_max_logits(self, logits.max((0, 2, 3)))
        return x + jnp.einsum("bnts,bsd->btd", jax.nn.softmax(logits), x)


class Model(nnx.Module):
    """`call(block, x)` is how the model calls its blocks."""

    def __init__(self, call=Attention.__call__):
        self.layers = nnx.List([Attention(nnx.Rngs(seed)) for seed in range(2)])
        self.call = call

    def __call__(self, x):
        for layer in self.layers:
            x = self.call(layer, x)
        return x


class Scanned(nnx.Module):
    def __init__(self, axes=0):
        self.layers = nnx.vmap(Attention)(nnx.Rngs(1).split(2))
        self.axes = axes

    def __call__(self, x):
        over = (nnx.Carry, self.axes)
        return nnx.scan(lambda x, block: block(x), in_axes=over, out_axes=nnx.Carry)(x, self.layers)


def loss_of(model, x):
    return jnp.mean(model(x) ** 2)


def prepared(model, tx=TX):
    """As a trainer gets them; its step below knows of no maxima."""
    optimizer = nnx.Optimizer(mc.record_max_logits(model, LAYOUT), tx, wrt=nnx.Param)
    return model, mc.use_recorded_max_logits(optimizer)


@nnx.jit
def trainers_step(model, optimizer, x):
    loss, grads = nnx.value_and_grad(loss_of)(model, x)
    optimizer.update(model, grads)
    return loss


def reference(kernels, x=X):
    """The maxima of a stack of layers, in float64."""
    x, maxima = np.asarray(x, np.float64), []
    for query, key in kernels:
        q, k = (np.einsum("btd,dnh->btnh", x, np.asarray(w, np.float64)) for w in (query, key))
        logits = np.einsum("btnh,bsnh->bnts", q, k)
        maxima.append(logits.max((0, 2, 3)))
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        x = x + np.einsum("bnts,bsd->btd", weights / weights.sum(-1, keepdims=True), x)
    return np.stack(maxima)


def kernels_of(model):
    return [(layer.query.kernel[...], layer.key.kernel[...]) for layer in model.layers]


EXPECTED = reference(kernels_of(Model()))
# Products of a few float32 numbers.
assert_close = functools.partial(np.testing.assert_allclose, rtol=1e-5)


def seen(optimizer):
    """What the clip was given, `[layers, heads]`."""
    maxima = mc.qk_clip_state(optimizer.opt_state).max_logits
    return np.stack([maxima[path] for path in sorted(maxima)])


def recorded(model):
    return np.stack(jax.tree.leaves(nnx.state(model, mc.MaxLogits)))


@pytest.fixture(scope="module")
def stepped():
    """A model after one jitted step of a trainer, and its optimizer."""
    model, optimizer = prepared(Model())
    trainers_step(model, optimizer, X)
    return model, optimizer


def test_the_clip_sees_what_the_forward_pass_gave(stepped):
    _, optimizer = stepped
    assert_close(seen(optimizer), EXPECTED)
    state = mc.qk_clip_state(optimizer.opt_state)
    assert int(state.heads_clipped) == (EXPECTED > 1).sum() > 0
    assert_close(np.stack(list(state.gamma.values())), 1 / np.maximum(EXPECTED, 1))


def test_the_step_is_the_one_with_maxima_handed_over(stepped):
    model = Model()
    optimizer = nnx.Optimizer(model, TX, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            out, sown = nnx.capture(lambda model: model(X), nnx.Intermediate)(model)
            return jnp.mean(out**2), sown

        grads, sown = nnx.grad(loss, has_aux=True)(model)
        optimizer.update(model, grads, max_logits=sown)

    step(model, optimizer)
    params = [nnx.to_pure_dict(nnx.state(m, nnx.Param)) for m in (stepped[0], model)]
    # The same operations, compiled with and without the variable.
    chex.assert_trees_all_close(*params, rtol=1e-6, atol=1e-7)


def test_evaluation_changes_nothing(stepped):
    model, _ = stepped
    model(100 * X)
    nnx.jit(loss_of)(model, 100 * X)
    assert (recorded(model) == np.inf).all()


def test_a_step_without_a_forward_pass_clips_nothing_and_is_seen():
    model, optimizer = prepared(Model())
    zeros = jax.tree.map(jnp.zeros_like, nnx.state(model, nnx.Param))
    before = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))
    optimizer.update(model, zeros)
    chex.assert_trees_all_equal(nnx.state(model, nnx.Param), before)
    assert int(mc.qk_clip_state(optimizer.opt_state).nonfinite_heads) == EXPECTED.size


def test_micro_batches_before_one_update_are_taken_together():
    model, optimizer = prepared(Model())

    @nnx.jit
    def step(model, optimizer, batches):
        grads = [nnx.grad(loss_of)(model, batch) for batch in batches]
        optimizer.update(model, jax.tree.map(lambda *g: sum(g) / len(g), *grads))

    step(model, optimizer, jnp.split(X, 2))
    assert_close(seen(optimizer), EXPECTED)
    assert (recorded(model) == np.inf).all()


@pytest.mark.parametrize("wrap", [optax.MultiSteps, mc.accumulate])
def test_micro_batches_of_the_optimizer_are_taken_together(wrap):
    model, optimizer = prepared(Model(), wrap(TX, 2))
    for batch in jnp.split(X, 2):
        trainers_step(model, optimizer, batch)
    assert_close(seen(optimizer), EXPECTED)
    assert (recorded(model) == np.inf).all()


def test_remat_records_the_same():
    model, optimizer = prepared(Model(nnx.remat(Attention.__call__)))
    trainers_step(model, optimizer, X)
    assert_close(seen(optimizer), EXPECTED)


@pytest.mark.parametrize("axes", [0, nnx.StateAxes({(nnx.Param, mc.MaxLogits): 0, ...: None})])
def test_scanned_layers_record_one_row_each(axes):
    model, optimizer = prepared(Scanned(axes))
    queries, keys = model.layers.query.kernel[...], model.layers.key.kernel[...]
    # Split and merged on the way, as trainers of pure functions do.
    model = nnx.merge(*nnx.split(model))
    trainers_step(model, optimizer, X)
    assert_close(seen(optimizer)[0], reference(zip(queries, keys, strict=True)))


def test_flaxs_own_attention_records_without_a_change_of_the_model():
    attention = nnx.MultiHeadAttention(2, 8, decode=False, use_bias=False, rngs=nnx.Rngs(0))
    plain = attention(X)
    model, optimizer = prepared(attention)
    # Averages in float32, of numbers of order one.
    np.testing.assert_allclose(model(X), plain, atol=1e-5)
    kernels = model.query.kernel[...] / 2, model.key.kernel[...]  # 1/sqrt(4)
    trainers_step(model, optimizer, X)
    assert_close(seen(optimizer), reference([kernels]))
    other = nnx.MultiHeadAttention(
        2, 8, decode=False, attention_fn=nnx.dot_product_attention, rngs=nnx.Rngs(0)
    )
    assert mc.record_max_logits(mc.record_max_logits(other)).attention_fn is mc.attention_fn


def test_a_measured_maximum_is_recorded_and_captured():
    """It carries no gradient: that the step trains the kernels is enough."""

    class Measured(Attention):
        def __call__(self, x):
            query, key = self.query(x), self.key(x)
            mc.sow_max_logits(self, mc.measure_max_logits(query, key))
            return query.sum() + key.sum()

    model, _ = prepared(Measured(nnx.Rngs(0)))

    def loss(model):
        return nnx.capture(lambda model: model(X), nnx.Intermediate)(model)

    _, sown = nnx.jit(nnx.grad(loss, has_aux=True))(model)
    (maxima,) = mc.read_max_logits(sown).values()
    np.testing.assert_array_equal(recorded(model)[0], maxima)


def test_a_nan_stays_until_the_update():
    model, optimizer = prepared(Model(), optax.MultiSteps(TX, 2))
    for x in (X.at[0].set(jnp.nan), X):
        trainers_step(model, optimizer, x)
    assert np.isnan(seen(optimizer)).all()


def test_a_restored_run_continues_alike(stepped):
    """The state of a model and its optimizer, saved whole, brings everything back."""
    runs = [stepped, prepared(Model())]
    for old, new in zip(*runs, strict=True):
        saved = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(old)))
        state = nnx.state(new)
        nnx.replace_by_pure_dict(state, saved)
        nnx.update(new, state)
    first, second = (trainers_step(*run, X) for run in runs)
    assert first == second
    np.testing.assert_array_equal(*(seen(optimizer) for _, optimizer in runs))


def test_an_explicit_mesh():
    mesh = jax.make_mesh((2, 2), ("data", "tp"), axis_types=(jax.sharding.AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        model, optimizer = prepared(Model())
        trainers_step(model, optimizer, jax.device_put(X, jax.NamedSharding(mesh, jax.P("data"))))
    assert_close(seen(optimizer), EXPECTED)


def update_unprepared():
    model = Model()
    optimizer = mc.use_recorded_max_logits(nnx.Optimizer(model, TX, wrt=nnx.Param))
    optimizer.update(model, nnx.state(model, nnx.Param))


def scan_without_the_variable():
    model, _ = prepared(Scanned(nnx.StateAxes({nnx.Param: 0, ...: None})))
    nnx.grad(loss_of)(model, X)


def record_in_a_dict():
    class Holder(nnx.Module):
        def __init__(self):
            kernels = {
                name: {"kernel": nnx.Param(jnp.ones((8, 2, 4)))} for name in ("query", "key")
            }
            self.attn = nnx.data(kernels)

    mc.record_max_logits(Holder(), LAYOUT)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("error", "mistake", "words"),
    [
        (ValueError, update_unprepared, ["Model records no max", "mc.record_max_logits(model)"]),
        (ValueError, scan_without_the_variable, ["(2,)", "(2, 2)", "mc.MaxLogits: 0"]),
        (ValueError, record_in_a_dict, ["attn is not a module", "Holder", "nnx.capture"]),
        (TypeError, lambda: mc.record_max_logits({}), ["nnx.Module", "dict", "mc.TrainState"]),
        (TypeError, lambda: mc.use_recorded_max_logits(optax.sgd(1)), ["nnx.Optimizer(model, tx"]),
    ],
)
def test_wrong_wiring(error, mistake, words):
    with pytest.raises(error) as caught:
        mistake()
    for word in words:
        assert word in str(caught.value)


class Silent(Attention):
    """That sows nothing, as other people's: its logits go to the softmax, here in a method under
    remat."""

    def block(self, x):
        logits = jnp.einsum("btnh,bsnh->bnts", self.query(x), self.key(x))
        return x + jnp.einsum("bnts,bsd->btd", jax.nn.softmax(logits), x)

    def __call__(self, x):
        return nnx.remat(self.block.__func__)(self, x)


def test_attention_that_sows_nothing_is_watched_at_its_softmax():
    softmax = jax.nn.softmax
    model = Model()
    model.layers = nnx.List([Silent(nnx.Rngs(seed)) for seed in range(2)])
    for _ in range(2):  # a second call changes nothing
        mc.record_max_logits(model, LAYOUT, softmax="b heads t s -> heads")
    optimizer = mc.use_recorded_max_logits(nnx.Optimizer(model, TX, wrt=nnx.Param))
    trainers_step(model, optimizer, X)
    assert_close(seen(optimizer), EXPECTED)
    assert jax.nn.softmax is softmax
