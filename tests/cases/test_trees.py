"""Every kind of parameter tree trains as a dict of arrays does, or says with the path why not."""

from collections import namedtuple
from functools import cache, partial

import chex
import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx, serialization, struct
from flax.core import FrozenDict
from optax.contrib import MuonDimensionNumbers as Numbers

import muonclip_jax as mc
from muonclip_jax._core import paths
from tests.contract.trees import Named, rebuilt

pytestmark = pytest.mark.versions

MHA = mc.layouts.mha()
SOWN = {("attn",): jnp.array([400.0, 1.0])}

# One step of the iteration: of five only compiling takes longer.
FAST = {"newton_schulz": mc.NewtonSchulz(mc.schedules.polar_express(steps=1))}


def weights(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


def model():
    names = ("key", "out", "query", "value")
    shapes = dict.fromkeys(names, (8, 2, 4)) | {"out": (2, 4, 8)}
    attn = {name: {"kernel": weights(*shapes[name]) + i} for i, name in enumerate(names)}
    return {"attn": attn, "mlp": {"bias": weights(16), "kernel": weights(8, 16)}}


def never_called(self, *_):
    raise AssertionError("a tree was called as a function")


class Boxes(nnx.Module):
    """Modules and arrays as an NNX module's attributes; it can be called."""

    def __init__(self, children):
        for name, child in children.items():
            setattr(self, name, nnx.Param(child) if isinstance(child, jax.Array) else child)

    __call__ = never_called


@struct.dataclass
class DataArray:
    """As `Named`, with a key, as Penzai's."""

    data_array: jax.Array


def as_named_tuple(children):
    return namedtuple("Module", children)(**children)


def as_struct(children):
    fields = {"__annotations__": dict.fromkeys(children, object), "__call__": never_called}
    return struct.dataclass(type("Module", (), fields))(**children)


def as_equinox(children):
    fields = {"__annotations__": dict.fromkeys(children, object), "__call__": never_called}
    return type("Module", (eqx.Module,), fields)(**children)


def as_haiku(tree):
    attn = {f"net/attn/{name}": {"w": leaf["kernel"]} for name, leaf in tree["attn"].items()}
    return {**attn, "net/mlp": {"b": tree["mlp"]["bias"], "w": tree["mlp"]["kernel"]}}


def entries_like(params, entries):
    """A tree like the parameters, with an entry for each by its last key."""
    return paths.map_with_path(lambda path, _: entries[path[-1]], params)


# From the nested dict to the same parameters in another tree.
KINDS = {
    "dict": lambda tree: tree,
    "FrozenDict": FrozenDict,
    "NamedTuple": partial(rebuilt, as_named_tuple),
    "list": lambda tree: [tree["attn"], tree["mlp"]],
    "whole-number keys": lambda tree: {0: tree["attn"], 1: tree["mlp"]},
    "flax.struct": partial(rebuilt, as_struct),
    "eqx.Module": partial(rebuilt, as_equinox),
    "nnx.Module": partial(rebuilt, Boxes),
    "nnx.State": lambda tree: nnx.state(rebuilt(Boxes, tree)),
    "Haiku": as_haiku,
    "wrapped": partial(jax.tree.map, Named),
    "wrapped, with keys": partial(jax.tree.map, DataArray),
    "boxed": partial(jax.tree.map, lambda x: nn.Partitioned(x, names=(None,) * x.ndim)),
}
ATTENTION = {"list": (0,), "whole-number keys": (0,), "Haiku": ("net/attn",)}
HAIKU_LAYOUT = mc.layouts.mha(query="query/w", key="key/w", value="value/w", out="out/w")


def layout_of(kind):
    return HAIKU_LAYOUT if kind == "Haiku" else mc.layouts.mha()


def by_name(kind, found):
    """What is by path, by the paths of the nested dict."""
    renamed = {
        "list": {"0": "attn", "1": "mlp"},
        "whole-number keys": {"0": "attn", "1": "mlp"},
        "Haiku": {"w": "kernel", "b": "bias"},
    }.get(kind, {})
    parts = {path: [renamed.get(part, part) for part in path if part != "net"] for path in found}
    return {"/".join(parts[path]): value for path, value in found.items()}


def trained(kind, tx, params, **extra):
    """The parameters after two steps of `tx`, by path, and its last state."""

    @jax.jit
    def step(params, state):
        grads = jax.grad(lambda tree: sum(jnp.sin(x).sum() for x in jax.tree.leaves(tree)))(params)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(2):
        new, state = step(params, state)
        assert jax.tree.structure(new) == jax.tree.structure(params)
        params = new
    return by_name(kind, dict(paths.leaves(params))), state


@cache
def clip_trained(kind):
    layout, attention = layout_of(kind), ATTENTION.get(kind, ("attn",))
    rules = {"*mlp/w": "in out"} if kind == "Haiku" else None
    tx = mc.muonclip(1e-2, layout=layout, rules=rules, **FAST)
    maxima = {attention: jnp.array([400.0, 1.0])}
    return trained(kind, tx, KINDS[kind](model()), max_logits=maxima)


def small():
    return {"mlp": {"kernel": weights(8, 4)}, "norm": {"scale": jnp.ones(8)}}


@cache
def small_trained():
    new, _ = trained("dict", mc.muon(1e-2, **FAST), small())
    return new


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tree_trains_as_a_dict_does(kind):
    new, state = clip_trained(kind)
    expected, _ = clip_trained("dict")
    # The order of the leaves, and with it that of sums, may differ.
    chex.assert_trees_all_close(new, expected, rtol=1e-6)
    (gamma,) = mc.qk_clip_state(state).gamma.values()
    np.testing.assert_allclose(gamma, [0.25, 1.0])


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_tree_is_described_as_a_dict_is(kind):
    def described(kind):
        rules = {"*mlp/w": "in out"} if kind == "Haiku" else None
        rows = mc.describe(KINDS[kind](model()), layout_of(kind), rules=rules)
        found = {tuple(row.path.split("/")): (*map(str, row.matrices),) for row in rows}
        return by_name(kind, found)

    assert described(kind) == described("dict")


@pytest.mark.parametrize("kind", KINDS)
def test_what_reads_heads_reads_every_kind_of_tree(kind):
    params, layout = KINDS[kind](model()), layout_of(kind)
    sown = {ATTENTION.get(kind, ("attn",)): jnp.array([400.0, 1.0])}
    clipped = jax.eval_shape(lambda params: mc.apply_qk_clip(params, sown, layout), params)
    chex.assert_trees_all_equal_shapes_and_dtypes(clipped, params)
    (heads,) = jax.eval_shape(lambda params: mc.head_matrices(params, layout), params).values()
    assert heads["q"].shape == (2, 8, 4)
    report = jax.eval_shape(lambda p: mc.attention_report(p, None, sown, layout).blocks, params)
    (of_block,) = report.values()
    assert of_block.max_logits.shape == (2,)
    if kind != "Haiku":
        assert mc.find_layout(params).name == "mha"


# None


@pytest.mark.parametrize("kind", ["dict", "eqx.Module", "nnx.Module", "NamedTuple"])
def test_none_in_the_parameters_changes_nothing(kind):
    without = small()
    params = KINDS[kind]({"mlp": {"bias": None, **without["mlp"]}, "norm": without["norm"]})
    expected = small_trained()
    no_bias = {} if kind == "nnx.Module" else {"bias": None}  # NNX does not show it to JAX
    for options in (
        {},
        {"weight_decay_mask": entries_like(params, {"kernel": True, "scale": False})},
        {"dimension_numbers": entries_like(params, {"kernel": "in out", "scale": None})},
        {"dimension_numbers": {"mlp": {**no_bias, "kernel": "in out"}, "norm": None}},
        {"rules": {"mlp/kernel": "in out"} | {f"*/{name}": None for name in no_bias}},
    ):
        new, _ = trained(kind, mc.muon(1e-2, **options, **FAST), params)
        chex.assert_trees_all_equal(new, expected)


def test_filtered_equinox_modules():
    """What is no array is None in the parameters, and functions are told."""
    keys = {"use_bias": False, "use_final_bias": False, "key": jax.random.key(0)}
    mlp = eqx.nn.MLP(4, 4, 8, depth=2, **keys)
    tx = mc.muon(1e-2, rules={"*weight": "out in -> in out"}, **FAST)
    params = eqx.filter(mlp, eqx.is_inexact_array)
    new, _ = trained("eqx.Module", tx, params)
    assert list(new) == [f"layers/{i}/weight" for i in range(3)]
    with pytest.raises(TypeError, match=r"activation is no array.*eqx\.filter"):
        tx.init(mlp)


class EquinoxAttention(eqx.Module):
    """Weights as Equinox and PyTorch store them, `[out, in]`, and nothing of Flax."""

    q: eqx.nn.Linear
    k: eqx.nn.Linear
    v: eqx.nn.Linear
    o: eqx.nn.Linear
    activation: object = jax.nn.tanh

    def __call__(self, x):
        split = lambda project: jax.vmap(project)(x).reshape(1, len(x), 2, 4)  # noqa: E731
        out, maxima = mc.dot_product_attention(split(self.q), split(self.k), split(self.v))
        return jax.vmap(self.o)(self.activation(out.reshape(len(x), 8))), maxima


def test_a_model_of_equinox_trains_and_is_clipped():
    keys = jax.random.split(jax.random.key(0), 5)
    names = "qkvo"
    made = {n: eqx.nn.Linear(8, 8, key=keys[i], use_bias=n != "o") for i, n in enumerate(names)}
    model, x = EquinoxAttention(**made), 9 * jax.random.normal(keys[4], (6, 8))
    pieces = [
        mc.layouts.Piece(name, f"{name}/weight", "(heads features) in", sizes={"heads": 2})
        for name in ("q", "k", "v")
    ]
    out = mc.layouts.Piece("o", "o/weight", "out (heads features)", sizes={"heads": 2})
    layout = mc.layouts.Layout("equinox", (*pieces, out))
    _, maxima = model(x)
    threshold = float(maxima.mean())
    tx = mc.muonclip(1e-6, layout=layout, threshold=threshold, **FAST)

    @eqx.filter_jit
    def step(model, state):
        def loss(model):
            out, maxima = model(x)
            return jnp.mean(out**2), maxima

        (_, maxima), grads = eqx.filter_value_and_grad(loss, has_aux=True)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params, max_logits={(): maxima})
        return eqx.apply_updates(model, updates), state

    new, state = step(model, tx.init(eqx.filter(model, eqx.is_inexact_array)))
    _, after = new(x)
    # Of the step of 1e-6, of float32 sums and the clip's products.
    np.testing.assert_allclose(after, np.minimum(maxima, threshold), rtol=1e-3)
    assert int(mc.qk_clip_state(state).heads_clipped) == 1
    rows = {row.path: row.optimizer for row in mc.describe(eqx.filter(new, eqx.is_array), layout)}
    assert rows["q/weight"] == rows["o/weight"] == "muon" and rows["q/bias"] == "other"


def test_labels_that_are_none():
    """Behind Optax's own partition, with labels where the parameters are."""
    params = {"mlp": {"bias": None, "kernel": weights(8, 4)}, "norm": {"scale": jnp.ones(8)}}
    labels = {"mlp": {"bias": None, "kernel": "muon"}, "norm": {"scale": "adam"}}
    tx = optax.partition({"muon": mc.scale_by_muon(**FAST), "adam": optax.adam(1e-3)}, labels)
    new, _ = trained("dict", tx, params)
    assert list(new) == ["mlp/kernel", "norm/scale"]


# Names


def test_only_wrappers_lose_their_key():
    x = jnp.ones((2, 3))
    row = namedtuple("Row", "value array")(x, x)
    one = eqx.nn.Linear(2, 3, use_bias=False, key=jax.random.key(0))
    for tree, expected in (
        ({"a": row}, ["a/value", "a/array"]),  # a user's own fields
        ({"a": as_struct({"value": x})}, ["a/value"]),
        ({"a": as_equinox({"value": x})}, ["a/value"]),
        ({"array": x}, ["array"]),
        ({"a": namedtuple("Row", "array")(x)}, ["a/array"]),
        ({"a": one}, ["a/weight"]),
        ({"a": nnx.Param(x)}, ["a"]),
        ({"a": nnx.Param(Named(x))}, ["a"]),
        ({"a": nn.Partitioned(x, names=(None, None))}, ["a"]),
        ({"a": nn.LogicallyPartitioned(Named(x), names=(None, None))}, ["a"]),
        ({"a": Named(x), "b": DataArray(Named(x))}, ["a", "b"]),
        ({"a": Named({"b": x})}, ["a/0/b"]),  # a module registered without keys
        ({"a": Named(optax.MaskedNode())}, []),
        ({0: [x], 1: {"2/b": x}}, ["0/0", "1/2/b"]),
    ):
        assert [paths.show(path) for path, _ in paths.leaves(tree)] == expected
    assert paths.masked({"a": Named(optax.MaskedNode())}) == [("a",)]


def test_wrapped_arrays_are_named_by_their_module():
    params = {
        "token_embeddings": {"weight": Named(jnp.ones((64, 32)))},
        "up": {"kernel": Named(jnp.ones((32, 8)))},
    }
    rows = {row.path: row.optimizer for row in mc.describe(params)}
    assert rows == {"token_embeddings/weight": "other", "up/kernel": "muon"}


def test_two_parameters_of_one_path_raise():
    x = jnp.ones((4, 4))
    with pytest.raises(ValueError, match="Two parameters have the path a/kernel"):
        mc.muon(1e-3).init({"a/kernel": x, "a": {"kernel": x}})


def test_haiku_blocks_are_found_by_their_path():
    params = {f"net/attn/{n}": {"w": jnp.ones((32, 32)), "b": jnp.ones(32)} for n in "qkvo"}
    layout = mc.layouts.mha(heads=4, query="q/w", key="k/w", value="v/w", out="o/w")
    (block,) = mc.layouts.find_blocks(layout, params)
    assert (block.name, block.heads) == ("net/attn", 4)
    assert block.part("q").bias == ("net", "attn", "q", "b")
    tx = mc.qk_clip(layout)
    for sown in (
        {"net/attn": {"max_logits": jnp.full(4, 400.0)}},
        {"net": {"attn": {"max_logits": (jnp.full(4, 400.0),)}}},
        {("net/attn",): jnp.full(4, 400.0)},
        {("net", "attn", "max_logits"): jnp.full(4, 400.0)},
    ):
        _, state = tx.update(params, tx.init(params), params, max_logits=sown)
        np.testing.assert_allclose(state.gamma["net/attn"], 0.25)


def test_whole_numbers_in_what_is_sown():
    x = jnp.ones(2)
    for sown in (
        {("layers", 0): x},
        {"layers": {0: {"max_logits": x}}},
        {"layers": [{"max_logits": (x,)}]},
        {("layers", 0, "max_logits"): x},
        {"layers/0": {"max_logits": x}},
    ):
        assert list(mc.read_max_logits(sown)) == [("layers", "0")]
    keys = mc.read_activations({("layers", 0, "keys"): jnp.ones((1, 3, 2, 4))})
    assert list(keys) == [("layers", "0")]


def numbered_attention():
    shapes = {"query": (8, 2, 4), "key": (8, 2, 4), "value": (8, 2, 4), "out": (2, 4, 8)}
    return {name: {"kernel": weights(*shape)} for name, shape in shapes.items()}


class Numbered(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        layer = lambda: nnx.MultiHeadAttention(2, 8, decode=False, use_bias=False, rngs=rngs)  # noqa: E731
        self.layers = nnx.List([layer(), layer()])


# Parameters of two layers, by numbers.
NUMBERED = {
    "dict": lambda: {"layers": {0: numbered_attention(), 1: numbered_attention()}},
    "list": lambda: {"layers": [numbered_attention(), numbered_attention()]},
    "NNX state": lambda: nnx.state(Numbered(), nnx.Param),
    "NNX pure": lambda: nnx.to_pure_dict(nnx.state(Numbered(), nnx.Param)),
}
ABOVE, BELOW = np.float32([40, 40]), np.float32([1, 1])
# What was sown in them: the first is above the threshold.
SOWN_BY_NUMBER = {
    "paths": {("layers", 0): ABOVE, ("layers", 1): BELOW},
    "dict": {"layers": {0: {"max_logits": ABOVE}, 1: {"max_logits": BELOW}}},
    "list": {"layers": [{"max_logits": (ABOVE,)}, {"max_logits": (BELOW,)}]},
}


def assert_first_is_halved(after, before):
    """By √(10 / 40): the queries and keys of the first layer, and nothing else."""
    then = dict(paths.leaves(before))
    for path, now in paths.leaves(after):
        clipped = path[1] == "0" and path[2] in ("query", "key")
        factor = 0.5 if clipped else 1.0
        np.testing.assert_allclose(now, factor * then[path], rtol=1e-6, err_msg=str(path))


@pytest.mark.parametrize("sown", SOWN_BY_NUMBER)
@pytest.mark.parametrize("kind", NUMBERED)
def test_layers_by_whole_numbers_are_clipped(kind, sown):
    params, given, layout = NUMBERED[kind](), SOWN_BY_NUMBER[sown], mc.layouts.mha()
    assert_first_is_halved(mc.apply_qk_clip(params, given, layout, 10.0), params)
    tx = mc.accumulate(mc.qk_clip(layout, 10.0), every=1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, state = tx.update(zeros, tx.init(params), params, max_logits=given)
    assert_first_is_halved(jax.tree.map(jnp.add, params, updates), params)
    seen = mc.qk_clip_state(state).max_logits
    assert list(seen) == ["layers/0", "layers/1"]
    report = mc.attention_report(params, state, given, layout, threshold=10.0)
    assert report.blocks["layers/0"].above.all() and not report.blocks["layers/1"].above.any()


@pytest.mark.parametrize("kind", NUMBERED)
def test_layers_by_whole_numbers_are_described_and_named(kind, monkeypatch):
    """As by text: in `describe`, in rules, in `block=` and in `frozen=`."""
    monkeypatch.setenv("COLUMNS", "200")
    params, only = NUMBERED[kind](), mc.layouts.mha(block="layers/1")
    rows = mc.describe(
        params,
        [only, mc.layouts.ignore("layers/0")],
        rules={"layers/0/out/*": None},
        frozen="layers/0/value/*",
    )
    told = {row.path: (row.optimizer, *map(str, row.matrices)) for row in rows}
    assert told["layers/0/out/kernel"] == ("other",)
    assert told["layers/0/value/kernel"] == ("frozen",)
    assert told["layers/0/query/kernel"] == ("muon", "2 × [8, 4]")
    assert told["layers/1/query/kernel"] == ("muon", "q 2 × [8, 4]")
    assert "layers/{0..1}/query/kernel" in str(mc.describe(params, mc.layouts.mha()))
    after = mc.apply_qk_clip(params, {("layers", 1): ABOVE}, only, 10.0, frozen="layers/1/key/*")
    (block,) = mc.layouts.find_blocks(only, after)
    now, then = (
        dict(paths.leaves(tree))["layers", "1", "query", "kernel"] for tree in (after, params)
    )
    assert block.name == "layers/1"
    np.testing.assert_allclose(now, then / 4, rtol=1e-6)


# One array, and numbers


def test_a_bare_array():
    x = weights(8, 4)
    for tx in (
        optax.chain(mc.scale_by_muon(**FAST), mc.scale_by_update_rms()),
        mc.muon(1e-2, rules={"*": "in out"}, **FAST),
        mc.muon(1e-2, dimension_numbers="in out", **FAST),
    ):
        new, _ = trained("dict", tx, x)
        assert new[""].shape == x.shape and not np.array_equal(new[""], x)
    for vector in (x[0], x[0, 0]):
        trained("dict", mc.muon(1e-2, **FAST), vector)


@pytest.mark.parametrize(
    ("tx", "params", "words"),
    [
        (mc.scale_by_muon(), jnp.ones(8), r"<root> of shape \(8,\) is no matrix"),
        (optax.flatten(mc.scale_by_muon()), {"a": jnp.ones((2, 3))}, r"\(6,\).*optax.flatten"),
        (mc.scale_by_muon(), jnp.ones((2, 3, 4)), r"<root> of shape \(2, 3, 4\)"),
        (mc.muon(1e-3), jnp.ones((2, 3)), r"<root> of shape \(2, 3\).*rules="),
        (mc.qk_clip(MHA), jnp.ones((2, 3)), "no attention block found.*<root>"),
        (mc.scale_by_quack(MHA), jnp.ones(3), "no attention block found"),
    ],
)
def test_a_bare_array_that_is_no_matrix_raises(tx, params, words):
    with pytest.raises(ValueError, match=words):
        tx.init(params)


@pytest.mark.parametrize(
    "wrap",
    [lambda tx: tx, lambda tx: mc.accumulate(tx, 1), lambda tx: optax.apply_if_finite(tx, 3)],
)
def test_python_floats_as_leaves(wrap):
    params = model() | {"temperature": 0.5}
    tx = wrap(mc.muonclip(1e-2, layout=MHA, **FAST))
    new, _ = trained("dict", tx, params, max_logits=SOWN)
    assert new["temperature"] != 0.5 and jnp.isfinite(new["temperature"])
    rows = {row.path: row.shape for row in mc.describe(params)}
    assert rows["temperature"] == ()


# What cannot be trained

ATTN = model()["attn"]
WRONG = {
    "whole numbers": (jnp.ones((8, 4), jnp.int32), TypeError, "int32"),
    "empty": (jnp.ones((0, 4)), ValueError, r"shape \(0, 4\)"),
    "complex": (jnp.ones((8, 4), jnp.complex64), TypeError, "complex64"),
    "bool": (jnp.ones((8, 4), bool), TypeError, "bool"),
}


@pytest.mark.parametrize("leaf", WRONG)
@pytest.mark.parametrize(
    "link",
    [
        mc.muon(1e-3),
        mc.muon_direction(),
        mc.quack(1e-3, layout=MHA),
        mc.muonclip(1e-3, layout=MHA),
        mc.scale_by_muon(),
        mc.scale_by_orthogonalization(),
        mc.scale_by_update_rms(),
    ],
    ids=["muon", "direction", "quack", "muonclip", "scale_by", "orthogonalization", "rms"],
)
def test_what_cannot_be_trained_is_refused_at_init(link, leaf):
    wrong, error, words = WRONG[leaf]
    params = {"attn": ATTN, "a": {"kernel": wrong}}
    with pytest.raises(error, match=f"a/kernel.*{words}"):
        link.init(params)
    kept = jax.tree.map(lambda x: x is not wrong, params)
    optax.masked(link, kept).init(params)  # what is not this link's does not matter


@pytest.mark.parametrize("leaf", ["whole numbers", "complex", "bool"])
@pytest.mark.parametrize("link", [mc.scale_by_quack(MHA), mc.qk_clip(MHA)], ids=["quack", "qk"])
def test_heads_that_cannot_be_scaled_are_refused_at_init(link, leaf):
    wrong, error, words = WRONG[leaf]
    params = {"attn": ATTN | {"query": {"kernel": jnp.ones((8, 2, 4), wrong.dtype)}}}
    with pytest.raises(error, match=f"attn/query/kernel.*{words}"):
        link.init(params)
    link.init({"attn": ATTN, "a": {"kernel": wrong}})  # outside of attention it is not theirs


def test_random_keys_of_an_nnx_module_are_refused():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.up, self.dropout = nnx.Linear(4, 4, rngs=rngs), nnx.Dropout(0.5, rngs=rngs)

    model = Model(nnx.Rngs(0))
    with pytest.raises(TypeError, match=r"dropout/rngs.*nnx\.state\(model, nnx\.Param\)"):
        mc.muon(1e-3).init(nnx.state(model))
    mc.muon(1e-3).init(nnx.state(model, nnx.Param))
    # Beside attention they are not the clip's.
    params = {"attn": ATTN, "rngs": jax.random.key(0), "poles": jnp.ones(3, jnp.complex64)}
    _, state = mc.qk_clip(MHA).update(params, mc.qk_clip(MHA).init(params), params, max_logits=SOWN)
    assert state.gamma["attn"].dtype == jnp.float32


def test_complex_parameters_may_go_to_the_other_optimizer():
    params = {"mlp": {"kernel": weights(4, 8)}, "poles": jnp.ones(3, jnp.complex64)}
    tx = mc.muon(1e-2, **FAST)
    updates, _ = tx.update(params, tx.init(params), params)
    assert updates["poles"].dtype == jnp.complex64


# Trees that can be called


@pytest.mark.parametrize("kind", ["eqx.Module", "nnx.Module", "flax.struct"])
@pytest.mark.parametrize("option", ["dimension_numbers", "weight_decay_mask", "shardings"])
def test_trees_are_not_called(kind, option):
    entries = {
        "dimension_numbers": {"kernel": "in out", "scale": None},
        "weight_decay_mask": {"kernel": True, "scale": False},
        "shardings": dict.fromkeys(("kernel", "scale"), jnp.ones(1).sharding),
    }
    params = KINDS[kind](small())
    given = entries_like(params, entries[option])
    assert callable(given)
    expected = small_trained()
    for value in (given, lambda _: given, jax.tree_util.Partial(lambda _: given)):
        new, _ = trained(kind, mc.muon(1e-2, **{option: value}, **FAST), params)
        chex.assert_trees_all_equal(new, expected)


def test_dimension_numbers_of_a_callable_tree_may_be_given():
    params = KINDS["eqx.Module"](model())
    numbers = mc.muon_dimension_numbers(params, layout=MHA)
    new, _ = trained("eqx.Module", mc.muon(1e-2, dimension_numbers=numbers, **FAST), params)
    expected, _ = trained("dict", mc.muon(1e-2, layout=MHA, **FAST), model())
    chex.assert_trees_all_close(new, expected, rtol=1e-6)


# Masked parameters


@pytest.mark.parametrize(
    "masked",
    [optax.MaskedNode(), Named(optax.MaskedNode()), nnx.Param(optax.MaskedNode())],
    ids=["array", "wrapped", "variable"],
)
def test_rules_may_name_what_is_masked(masked):
    params = {"conv": {"kernel": masked}, "up": {"kernel": jnp.ones((8, 16))}}
    mc.muon(1e-3, rules={"*conv/kernel": None}).init(params)
    mc.muon(1e-3, dimension_numbers={"conv": {"kernel": None}, "up": "in out"}).init(params)
    with pytest.raises(ValueError, match="'\\*cnov/kernel' matches no parameter"):
        mc.muon(1e-3, rules={"*cnov/kernel": None}).init(params)


# Around it: Optax's own tools

CONVOLUTION = model() | {"c": {"kernel": weights(3, 3, 4, 5)}}
RULES = {"c/kernel": None}
LINKS = {
    "muon": mc.muon(1e-3, rules=RULES, **FAST),
    "muonclip": mc.muonclip(1e-3, layout=MHA, rules=RULES, **FAST),
    "quack": mc.quack(1e-3, layout=MHA, direction=mc.muon_direction(layout=MHA, rules=RULES)),
    "muon_direction": mc.muon_direction(rules=RULES, **FAST),
    "scale_by_muon": optax.masked(
        mc.scale_by_muon(dimension_numbers={"mlp": {"kernel": "in out"}}),
        {"attn": False, "c": False, "mlp": {"bias": False, "kernel": True}},
    ),
    "qk_clip": mc.qk_clip(MHA),
    "accumulate": mc.accumulate(mc.muonclip(1e-3, layout=MHA, rules=RULES, **FAST), 2),
}


@pytest.mark.parametrize("name", LINKS)
def test_tree_map_params(name):
    tx = LINKS[name]
    state = tx.init(CONVOLUTION)
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    zeros = optax.tree_map_params(tx, jnp.zeros_like, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(zeros, state)
    # As it is made for: one spec for each copy of a parameter, another for all else.
    specs = optax.tree_map_params(
        tx,
        lambda _, name: name,
        state,
        paths.map_with_path(lambda path, _: paths.show(path), CONVOLUTION),
        transform_non_params=lambda _: "none",
        is_leaf=is_masked,
    )
    found = set(jax.tree.leaves(specs))
    assert found == {"none"} if name == "qk_clip" else "mlp/kernel" in found


@pytest.mark.parametrize("name", LINKS)
def test_abstract_parameters(name):
    tx = LINKS[name]
    shapes = jax.eval_shape(lambda: CONVOLUTION)
    expected = tx.init(CONVOLUTION)
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(tx.init, shapes), expected)
    if name == "quack":  # it measures them
        with pytest.raises(TypeError, match=r"attn/.*jax\.eval_shape\(tx\.init, params\)"):
            tx.init(shapes)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tx: mc.accumulate(tx, 1),
        lambda tx: optax.MultiSteps(tx, 1),
        lambda tx: optax.named_chain(("clip", tx)),
        lambda tx: optax.apply_if_finite(tx, 3),
    ],
    ids=["accumulate", "MultiSteps", "named_chain", "apply_if_finite"],
)
@pytest.mark.parametrize("kind", ["eqx.Module", "nnx.State"])
def test_wrappers_change_nothing(wrap, kind):
    tx = mc.muonclip(1e-2, layout=MHA, **FAST)
    new, _ = trained(kind, wrap(tx), KINDS[kind](model()), max_logits=SOWN)
    expected, _ = clip_trained("dict")
    chex.assert_trees_all_close(new, expected, rtol=1e-6)


# States of something else


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (
            mc.muon(1e-3, rules=RULES),
            mc.muon(1e-3, rules=RULES | {"mlp/kernel": None}),
            r"mlp/kernel has momentum of shape \(8, 16\).*none: the routing",
        ),
        (
            mc.muon(1e-3, rules=RULES | {"mlp/kernel": None}),
            mc.muon(1e-3, rules=RULES),
            r"mlp/kernel has no momentum.*\(8, 16\): the routing",
        ),
        (
            mc.scale_by_quack(MHA, rule="fixed"),
            mc.scale_by_quack(MHA),
            r"attn/k has no initial norms.*\(2,\): the layout",
        ),
    ],
)
def test_a_state_of_another_routing_is_told(before, now, words):
    with pytest.raises(ValueError, match=words):
        now.update(CONVOLUTION, before.init(CONVOLUTION), CONVOLUTION)


@pytest.mark.parametrize(
    ("before", "now", "words"),
    [
        (mc.layouts.mha(block="a"), MHA, r"b has no maxima.*\(2,\): the layout"),
        (MHA, mc.layouts.mha(block="a"), r"b has maxima of shape \(2,\).*none: the layout"),
    ],
)
def test_a_state_of_another_layout_is_told(before, now, words):
    params = {"a": ATTN, "b": ATTN}
    state = mc.qk_clip(before).init(params)
    with pytest.raises(ValueError, match=words):
        mc.qk_clip(now).update(params, state, params, max_logits=SOWN)


def test_a_state_of_another_model_is_told():
    tx = mc.scale_by_muon()
    with pytest.raises(ValueError, match=r"a has momentum of shape \(4, 8\).*have \(8, 4\)"):
        tx.update({"a": jnp.ones((8, 4))}, tx.init({"a": jnp.ones((4, 8))}))


@pytest.mark.parametrize("kind", ["Haiku", "whole-number keys", "boxed"])
def test_states_are_upgraded_whatever_their_keys(kind):
    rules = {"*mlp/w": "in out"} if kind == "Haiku" else None
    tx = mc.accumulate(mc.muonclip(1e-2, layout=layout_of(kind), rules=rules, **FAST), 2)
    like = tx.init(KINDS[kind](model()))
    state = jax.tree.map(lambda x: x + 1, like)
    saved = serialization.msgpack_serialize(serialization.to_state_dict(state))
    restored = mc.upgrade_state(serialization.msgpack_restore(saved), like=like)
    chex.assert_trees_all_equal(restored, state)


# Without parameters


@pytest.mark.parametrize(
    "tx",
    [
        mc.muon(1e-3, weight_decay=0.0),
        mc.muon_direction(),
        optax.chain(mc.scale_by_muon(), mc.scale_by_update_rms()),
        mc.accumulate(mc.muon(1e-3, weight_decay=0.0), 1),
        optax.masked(mc.muon(1e-3, weight_decay=0), {"hidden": True}),
    ],
    ids=["muon", "direction", "links", "accumulate", "masked"],
)
def test_nothing_needs_the_parameters_where_nothing_decays(tx):
    params = {"hidden": {"kernel": weights(8, 4)}}
    updates, _ = tx.update(params, tx.init(params))
    expected, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates, expected)


def test_optax_dimension_numbers_of_a_named_wrapper():
    """A tree of patterns made of the parameters has the wrappers too."""
    params = {"up": Named(weights(8, 4))}
    numbers = jax.tree.map(lambda _: Numbers(0, 1), params)
    new, _ = trained("dict", mc.muon(1e-2, dimension_numbers=numbers, **FAST), params)
    assert list(new) == ["up"]


@struct.dataclass
class OnlyValue:
    value: jax.Array


def test_a_lone_field_called_value_is_a_name():
    """Only of NNX's variables and Flax's boxes, which hold one array as well, it is none."""
    tree = {"attn": OnlyValue(jnp.ones((8, 4)))}
    assert [path for path, _ in paths.leaves(tree)] == [("attn", "value")]
