"""The mesh of a tree of arrays, and functions that see Explicit axes as Auto."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from benchmarks.compiled import collectives
from muonclip_jax._core.meshes import free_axes, in_auto_axes, mesh_axes, mesh_of, specs_of

AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
OLD_JAX = jax.__version_info__ < (0, 9)

either_kind = pytest.mark.parametrize("kind", [AUTO, EXPLICIT], ids=["Auto", "Explicit"])
with_and_without_context = pytest.mark.parametrize("context", [False, True])


def make_mesh(a=EXPLICIT, b=EXPLICIT):
    return jax.make_mesh((4, 2), ("a", "b"), axis_types=(a, b))


def put(x, mesh, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def maybe(mesh, context):
    return jax.set_mesh(mesh) if context else contextlib.nullcontext()


@either_kind
def test_the_mesh_of_arrays_and_their_shapes(kind):
    mesh = make_mesh(kind, kind)
    x = put(np.ones((8, 4), np.float32), mesh, "a", "b")
    sharded = jax.ShapeDtypeStruct((8, 4), jnp.float32, sharding=x.sharding)
    plain = {"numpy": np.ones(3), "struct": jax.ShapeDtypeStruct((3,), jnp.float32)}
    plain |= {"masked": optax.MaskedNode(), "none": None, "number": 1.0, "array": jnp.ones(3)}
    assert mesh_of(plain) is None
    for leaf in (x, sharded):
        assert mesh_of({**plain, "z": leaf}) == mesh.abstract_mesh
    seen = []
    jax.jit(lambda x: seen.append(mesh_of([2.0, x])))(x)
    jax.jit(jax.vmap(lambda x: seen.append(mesh_of(x))))(x)
    assert seen == [mesh.abstract_mesh] * 2
    model = nnx.Linear(8, 4, rngs=nnx.Rngs(0))
    assert mesh_of(nnx.state(model)) is None
    model.kernel.set_value(x)
    assert mesh_of(nnx.state(model)) == mesh_of(model) == mesh.abstract_mesh


def test_the_mesh_of_the_context():
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        assert mesh_of({"x": np.ones(3)}) == mesh.abstract_mesh
        assert mesh_of({}) == mesh.abstract_mesh


def test_one_device_is_no_mesh():
    mesh = jax.make_mesh((1, 1), ("a", "b"), axis_types=(AUTO, AUTO), devices=jax.devices()[:1])
    assert mesh_of(put(np.ones(3), mesh)) is None


def test_axes_by_hand_do_not_count():
    mesh = make_mesh()
    x = put(np.ones((8, 4), np.float32), mesh, "a", "b")
    seen = []
    record = lambda x: seen.append(mesh_of(x)) or x  # noqa: E731
    jax.jit(jax.shard_map(record, mesh=mesh, in_specs=P("a", "b"), out_specs=P("a", "b")))(x)
    jax.pmap(record, axis_name="a")(np.ones((8, 2)))
    assert seen == [None, None]
    some = jax.shard_map(record, mesh=mesh, in_specs=P("a"), out_specs=P("a"), axis_names={"a"})
    jax.jit(some)(x)
    assert free_axes(seen[-1]) == ("b",)
    assert free_axes(mesh.abstract_mesh) == ("a", "b")


def test_the_axes_in_an_entry_of_a_spec():
    assert [mesh_axes(entry) for entry in P("a", None, ("a", "b"))] == [("a",), (), ("a", "b")]


def shuffle(tree, total):
    """Reshapes that no Explicit array split like this admits."""
    x = tree["x"]
    mixed = x.reshape(-1, 4, 4).swapaxes(0, 1).reshape(x.shape) * 2
    return {"x": mixed, "masked": tree["masked"]}, {"rows": x.sum(0) + total, "new": jnp.zeros(3)}


def shuffled(tree, total):
    return in_auto_axes(shuffle, (specs_of(tree), P()))(tree, total)


@with_and_without_context
@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize(
    ("kinds", "spec"),
    [
        ((EXPLICIT, EXPLICIT), ("a", "b")),
        ((EXPLICIT, EXPLICIT), (("b", "a"),)),
        ((EXPLICIT, AUTO), ("a", "b")),
        ((AUTO, AUTO), ("a", "b")),
    ],
)  # fmt: skip
def test_any_reshape_inside_and_shardings_as_told_outside(kinds, spec, jit, context):
    if OLD_JAX and not jit:
        pytest.skip("JAX 0.8 fails at reshapes of split arrays outside of jit, on any mesh")
    mesh = make_mesh(*kinds)
    x = np.arange(32.0, dtype=np.float32).reshape(8, 4)
    wanted, _ = shuffle({"x": x, "masked": 0.0}, 0.0)
    fn = jax.jit(shuffled) if jit else shuffled
    with maybe(mesh, context):
        split = put(x, mesh, *spec)
        tree, state = fn({"x": split, "masked": optax.MaskedNode()}, jnp.ones(4))
        np.testing.assert_array_equal(tree["x"], wanted["x"])
        np.testing.assert_array_equal(state["rows"], x.sum(0) + 1)
        assert tree["masked"] == optax.MaskedNode()
    if EXPLICIT in kinds:
        assert jax.typeof(tree["x"]) == jax.typeof(split)
        assert set(jax.typeof(state["rows"]).sharding.spec) <= {None}
        assert jax.typeof(state["new"]).sharding.mesh == mesh.abstract_mesh


def test_without_explicit_axes_it_is_the_function():
    result = object()
    assert in_auto_axes(lambda *args: result, P())(np.ones(3), jnp.ones(3), 1.0) is result


def test_auto_axes_beside_explicit_ones_stay_the_compilers():
    mesh = make_mesh(EXPLICIT, AUTO)
    x = put(np.ones((8, 4), np.float32), mesh, "a", "b")
    double = in_auto_axes(lambda x: x * 2, P("a"))
    compiled = jax.jit(double).lower(x).compile()
    assert collectives(compiled) == []
    assert compiled(x).sharding.is_equivalent_to(x.sharding, 2)


@with_and_without_context
def test_inside_a_shard_map_over_other_axes(context):
    mesh = make_mesh()
    x = put(np.arange(32.0, dtype=np.float32).reshape(8, 4), mesh, "a", "b")
    turn = lambda x: x.reshape(-1)[::-1].reshape(x.shape) + jax.lax.axis_index("a")  # noqa: E731
    mapped = jax.shard_map(
        lambda x: in_auto_axes(turn, specs_of(x))(x),
        mesh=mesh,
        in_specs=P("a"),
        out_specs=P("a"),
        axis_names={"a"},
    )
    with maybe(mesh, context):
        got = jax.jit(mapped)(x)
    pairs = np.asarray(x).reshape(4, 8)[:, ::-1] + np.arange(4)[:, None]
    np.testing.assert_array_equal(got, pairs.reshape(8, 4))
    assert jax.typeof(got) == jax.typeof(x)


def test_a_shard_map_inside_needs_no_mesh():
    mesh = make_mesh()
    x = put(np.ones((8, 4), np.float32), mesh, "a")

    def fn(x):
        count = jax.shard_map(lambda x: jax.lax.psum(x, "a"), in_specs=P("a"), out_specs=P())
        return count(x)

    got = jax.jit(lambda x: in_auto_axes(fn, P())(x))(x)
    np.testing.assert_array_equal(got, np.full((2, 4), 4))
