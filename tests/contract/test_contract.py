"""What every link and recipe keeps to, on one device and on meshes.

A cell is one behaviour of one link in one place. Each asserts against the plain run: a jitted step,
called in a Python loop.
"""

import gc
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import muonclip_jax as mc
from muonclip_jax._core import paths
from tests.contract.cells import cells, cells_on_one_device
from tests.contract.running import assert_equal, assert_same, build, plain, take_steps
from tests.contract.trees import KINDS

same = lambda f, **_: f  # noqa: E731 (in place of jax.jit: eager)


def started(link, place):
    """A link, its parameters and its state, where they lie."""
    tx = build(link, place)
    params = place.put(link.params())
    return tx, params, jax.jit(tx.init)(params)


def typed(tree):
    """Everything that a compiled program is specialised to."""
    return jax.tree.map(lambda x: jax.typeof(x) if hasattr(x, "dtype") else x, tree)


# --- Optax's conventions ------------------------------------------------------------------------


@cells
def test_eager_is_jitted(link, place):
    found = take_steps(build(link, place), link, place, jit=same)
    assert_same(found, plain(link, place), link.tolerance)


@cells
def test_without_jit_at_all(link, place):
    with jax.disable_jit():
        found = take_steps(build(link, place), link, place, steps=1, jit=same)
    assert_same(found, plain(link, place, 1))


@cells
def test_updates_are_like_the_gradients(link, place):
    with place.active():
        tx, params, state = started(link, place)
        grads = place.put(link.grads())
        updates, _ = jax.jit(tx.update)(grads, state, params, **link.extra())
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)
        assert typed(updates) == typed(grads)


@cells
def test_state_keeps_its_types(link, place):
    with place.active():
        tx, params, state = started(link, place)
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
        _, after = jax.jit(tx.update)(place.put(link.grads()), state, params, **link.extra())
        assert jax.tree.structure(state) == jax.tree.structure(after)
        assert typed(state) == typed(after)


@cells
def test_init_of_shapes(link, place):
    with place.active():
        tx, params, state = started(link, place)
        abstract = jax.eval_shape(tx.init, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(abstract, state)


@cells
def test_init_is_not_changed_by_values(link, place):
    """The state of large parameters and of small ones has one structure."""
    with place.active():
        tx = build(link, place)
        params = place.put(link.params())
        other = jax.tree.map(lambda x: 100 * x, params)
        assert typed(tx.init(params)) == typed(tx.init(other))


@cells
def test_inputs_are_left_alone(link, place):
    with place.active():
        tx, params, state = started(link, place)
        grads = place.put(link.grads())
        copy = lambda tree: jax.tree.map(lambda x: np.array(x), tree)  # noqa: E731
        before = copy((params, state, grads))
        tx.update(grads, state, params, **link.extra())
        assert_equal((params, state, grads), before)


@cells
def test_arguments_for_others_pass_by(link, place):
    with place.active():
        tx, params, state = started(link, place)
        grads, extra = place.put(link.grads()), link.extra()
        update = jax.jit(tx.update)
        found = update(grads, state, params, **extra, value=jnp.ones(()))
        assert_equal(found, update(grads, state, params, **extra))


@cells
def test_zero_gradients(link, place):
    with place.active():
        tx, params, state = started(link, place)
        zeros = jax.tree.map(jnp.zeros_like, params)
        found = jax.jit(tx.update)(zeros, state, params, **link.extra())
        chex.assert_tree_all_finite(found[0])


@cells
def test_same_bits_again(link, place):
    first, second = (take_steps(build(link, place), link, place) for _ in range(2))
    assert_equal(first, second)


# --- transformations of JAX ---------------------------------------------------------------------


@cells
def test_scan_over_steps(link, place):
    steps = 3
    with place.active():
        tx, params, state = started(link, place)
        stack = lambda *xs: np.stack(xs)  # noqa: E731
        grads = place.put(jax.tree.map(stack, *(link.grads(i) for i in range(steps))), lead=1)
        extras = jax.tree.map(lambda *xs: jnp.stack(xs), *(link.extra(i) for i in range(steps)))

        def step(carry, given):
            params, state = carry
            updates, state = tx.update(given[0], state, params, **given[1])
            return (optax.apply_updates(params, updates), state), None

        run, _ = jax.jit(lambda *args: jax.lax.scan(step, args, (grads, extras)))(params, state)
    assert_same(run, plain(link, place, steps))


@cells
def test_one_program_for_all_steps(link, place):
    traces = []

    def counting(fn, **options):
        def traced(*args):
            traces.append(fn.__name__)
            return fn(*args)

        return jax.jit(traced, **options)

    take_steps(build(link, place), link, place, steps=4, jit=counting)
    assert traces.count("step") == 1


@cells
def test_donation(link, place):
    def donating(fn):
        return jax.jit(fn, donate_argnums=(0, 1) if fn.__name__ == "step" else ())

    assert_same(take_steps(build(link, place), link, place, jit=donating), plain(link, place))


@cells
def test_no_transfers(link, place):
    with place.active():
        tx, params, state = started(link, place)
        grads, extra = place.put(link.grads()), link.extra()
        update = jax.jit(tx.update)
        update(grads, state, params, **extra)
        with jax.transfer_guard("disallow"):
            jax.block_until_ready(update(grads, state, params, **extra))


@cells
def test_nothing_grows(link, place):
    """The arrays alive after a thousand steps are those after ten."""
    with place.active():
        tx, params, state = started(link, place)
        grads, extra = place.put(link.grads()), link.extra()
        step = jax.jit(lambda *args, **extra: tx.update(*args, **extra)[1])
        alive = []
        for i in range(1000 if place.axis_type is None else 100):
            state = step(grads, state, params, **extra)
            if i in (9, 99, 999):
                gc.collect()
                alive.append(len(jax.live_arrays()))
    assert len(set(alive)) == 1
    # A jitted `init` of Optax's Adam is replicated where axes are Auto. After a step its moments
    # are split as the gradients are, which is a program of its own.
    assert step._cache_size() <= (2 if place.axis_type is jax.sharding.AxisType.Auto else 1)


@cells_on_one_device
def test_vmap_over_members(link, place):
    tx = build(link, place)
    members = [link.params(), jax.tree.map(lambda x: 2 * x, link.params())]
    both = jax.tree.map(lambda *xs: jnp.stack(xs), *members)
    grads = jax.tree.map(lambda *xs: jnp.stack(xs), link.grads(0), link.grads(1))

    def step(params, grads):
        return tx.update(grads, tx.init(params), params, **link.extra())

    found = jax.jit(jax.vmap(step))(both, grads)
    for i, member in enumerate(members):
        alone = jax.jit(step)(jax.tree.map(jnp.asarray, member), link.grads(i))
        assert_same(jax.tree.map(lambda x, i=i: x[i], found), alone)


@cells
def test_reverse_mode(link, place):
    """A loss of the updated parameters can be differentiated in the gradients."""
    with place.active():
        tx, params, state = started(link, place)
        extra = link.extra()

        def loss(grads):
            updates, _ = tx.update(grads, state, params, **extra)
            return sum(jnp.sum(u**2) for u in jax.tree.leaves(updates))

        slopes = jax.jit(jax.grad(loss))(place.put(link.grads()))
        chex.assert_tree_all_finite(slopes)


@cells_on_one_device
def test_export(link, place):
    tx, params, state = started(link, place)
    extra = link.extra()
    flat, structure = jax.tree.flatten((place.put(link.grads()), state, params))
    step = jax.jit(lambda *xs: jax.tree.leaves(tx.update(*structure.unflatten(xs), **extra)))
    exported = jax.export.export(step)(*flat)
    assert_same(exported.call(*flat), step(*flat))


# --- wrappers of Optax --------------------------------------------------------------------------


@cells
def test_inject_hyperparams_with_jitted_init(link, place):
    shardings = place.shardings(link.params())
    static = tuple(name for name in link.arguments(shardings) if name not in link.numbers)
    make = optax.inject_hyperparams(link.make, static_args=static)
    found = take_steps(make(**link.arguments(shardings)), link, place)
    assert_same(found.params, plain(link, place).params, link.tolerance)


@cells
def test_masked(link, place):
    """One matrix is left out: its update is its gradient, the others' are as without the mask."""
    with place.active():
        _, params, _ = started(link, place)
        last = list(params)[-1]
        mask = {name: jax.tree.map(lambda _, on=name != last: on, params[name]) for name in params}
        arguments = link.arguments()
        if link.place and (shardings := place.shardings(link.params())) is not None:
            arguments["shardings"] = shardings
        tx = optax.masked(link.make(**arguments), mask)
        grads = place.put(link.grads())
        updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params, **link.extra())
        whole = build(link, place)
        wanted, _ = jax.jit(whole.update)(grads, whole.init(params), params, **link.extra())
    assert_equal(updates[last], grads[last])
    rest = [name for name in params if name != last]
    assert_same([updates[name] for name in rest], [wanted[name] for name in rest])


@cells
def test_partition(link, place):
    with place.active():
        _, params, _ = started(link, place)
        last = list(params)[-1]
        labels = {
            name: jax.tree.map(lambda _, n=name: "rest" if n == last else "ours", params[name])
            for name in params
        }
        tx = optax.partition({"ours": build(link, place), "rest": optax.set_to_zero()}, labels)
        grads = place.put(link.grads())
        updates, _ = jax.jit(tx.update)(grads, jax.jit(tx.init)(params), params, **link.extra())
        assert not any(np.any(x) for x in jax.tree.leaves(updates[last]))
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, grads)


@cells
def test_apply_if_finite(link, place):
    tx = optax.apply_if_finite(build(link, place), 3)
    found = take_steps(tx, link, place)
    assert_same(found.params, plain(link, place).params)


@cells
def test_apply_if_finite_leaves_a_bad_step_out(link, place):
    with place.active():
        tx = optax.apply_if_finite(build(link, place), 3)
        params = place.put(link.params())
        bad = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params)
        state = jax.jit(tx.init)(params)
        updates, after = jax.jit(tx.update)(bad, state, params, **link.extra())
        if int(after.total_notfinite):  # `accumulate` has only listened: its updates are zeros
            assert_equal(after.inner_state, state.inner_state)
        assert not any(np.any(np.asarray(x)) for x in jax.tree.leaves(updates))


@cells
def test_multi_steps(link, place):
    """The same batch twice is the same as once."""
    tx = optax.MultiSteps(build(link, place), 2).gradient_transformation()
    with place.active():
        params = place.put(link.params())
        grads, extra = place.put(link.grads()), link.extra()
        update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
        for _ in range(2):
            updates, state = update(grads, state, params, **extra)
        plainly = build(link, place)
        wanted, _ = jax.jit(plainly.update)(grads, plainly.init(params), params, **extra)
    assert_same(updates, wanted)


@cells
def test_named_chain(link, place):
    tx = optax.named_chain(("before", optax.identity()), ("ours", build(link, place)))
    found = take_steps(tx, link, place)
    assert_same(found.params, plain(link, place).params)
    assert_same(found.state["ours"], plain(link, place).state)


@cells
def test_chain_in_a_chain(link, place):
    tx = optax.chain(optax.clip_by_global_norm(1e9), optax.chain(build(link, place)))
    assert_same(take_steps(tx, link, place).params, plain(link, place).params)


@cells
def test_conditionally_transform(link, place):
    tx = optax.transforms.conditionally_transform(build(link, place), lambda step: step < 1)
    with place.active():
        params = place.put(link.params())
        grads, extra = place.put(link.grads()), link.extra()
        update, state = jax.jit(tx.update), jax.jit(tx.init)(params)
        _, state = update(grads, state, params, **extra)
        updates, _ = update(grads, state, params, **extra)
    assert_equal(updates, grads)


@cells_on_one_device
def test_tree_map_params(link, place):
    tx, params, state = started(link, place)
    assert_equal(optax.tree_map_params(tx, lambda x: x, state), state)
    seen = []
    is_masked = lambda node: isinstance(node, optax.MaskedNode)  # noqa: E731
    see = lambda x, p: seen.append((x, p))  # noqa: E731
    optax.tree_map_params(tx, see, state, params, is_leaf=is_masked)
    kept = [(x, p) for x, p in seen if not is_masked(x)]
    assert all(x.shape == p.shape for x, p in kept)
    assert len(kept) >= len(jax.tree.leaves(params)) * ("trace=" in str(state))


@cells_on_one_device
def test_states_of_others_are_reached(link, place):
    """`optax.tree.get` and `set` find a hyper-parameter that stands beside ours."""
    tx, params, _ = started(link, place)
    chained = optax.chain(tx, optax.inject_hyperparams(optax.scale)(step_size=0.1))
    after = optax.tree.set(chained.init(params), step_size=0.5)
    assert float(optax.tree.get(after, "step_size")) == 0.5


# --- checkpoints --------------------------------------------------------------------------------


@cells
@pytest.mark.parametrize("target", ["with a target", "without"])
def test_orbax_round_trip(link, place, target, tmp_path):
    """The next step after a restart has the same bits."""
    with place.active():
        tx, params, state = started(link, place)
        update = jax.jit(tx.update)
        _, state = update(place.put(link.grads()), state, params, **link.extra())
        checkpointer = ocp.StandardCheckpointer()
        folder, saved = pathlib.Path(tmp_path, "run"), {"step": 1, "state": state}
        checkpointer.save(folder, saved)
        checkpointer.wait_until_finished()
        if target == "with a target":
            like = jax.tree.map(ocp.utils.to_shape_dtype_struct, saved)
            found = checkpointer.restore(folder, like)["state"]
        else:  # dicts in place of named tuples
            by_path = dict(paths.leaves(checkpointer.restore(folder)["state"]))
            found = paths.map_with_path(lambda path, _: by_path[path], state)
        restored = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), found, state)
        grads = place.put(link.grads(1))
        found = update(grads, restored, params, **link.extra(1))
        assert_equal(found, update(grads, state, params, **link.extra(1)))


# --- numbers ------------------------------------------------------------------------------------


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


@cells
@pytest.mark.parametrize(
    "dtypes",
    ["bfloat16 float32", "float32 bfloat16", "bfloat16 bfloat16", "float16 float16"],
)
def test_mixed_precision(link, place, dtypes):
    """Updates keep the gradients' dtype, parameters theirs, states what they began with; near the
    float32 run, as near as eight or eleven bits are."""
    of_params, of_grads = dtypes.split()
    with place.active():
        tx = build(link, place)
        params = cast(place.put(link.params()), of_params)
        grads = cast(place.put(link.grads()), of_grads)
        state = jax.jit(tx.init)(params)
        updates, after = jax.jit(tx.update)(grads, state, params, **link.extra())
        before = dict(paths.leaves(typed(state)))
        changed = [path for path, x in paths.leaves(typed(after)) if x != before[path]]
        # What Optax's optimizer for the others keeps gets the gradients' dtype, as outside of ours.
        assert not [path for path in changed if "other" not in path]
        # In a chain Optax's decay adds parameters to updates; `accumulate` has the parameters'.
        is_one = link.name.startswith(("scale_by", "qk_clip", "clip_by"))
        allowed = {of_grads} if is_one else {of_grads, of_params}
        assert {x.dtype.name for x in jax.tree.leaves(updates)} <= allowed
        applied = optax.apply_updates(params, updates)
        assert all(x.dtype == of_params for x in jax.tree.leaves(applied))
        whole = build(link, place)
        exact = place.put(link.params())
        wanted, _ = jax.jit(whole.update)(
            place.put(link.grads()), whole.init(exact), exact, **link.extra()
        )
    assert_same(updates, wanted, rtol=0.05)


@cells
def test_x64(link, place):
    """Everything in float64, counters in what JAX makes them."""
    with jax.enable_x64(True), place.active():
        tx = build(link, place)
        params = cast(place.put(link.params()), "float64")
        grads = cast(place.put(link.grads()), "float64")
        state = jax.jit(tx.init)(params)
        updates, after = jax.jit(tx.update)(grads, state, params, **link.extra())
        assert typed(after) == typed(state)
        assert all(x.dtype == "float64" for x in jax.tree.leaves(updates))
        chex.assert_tree_all_finite(updates)


@cells
def test_strict_dtype_promotion(link, place):
    with jax.numpy_dtype_promotion("strict"):
        found = take_steps_applying_ourselves(link, place)
    assert_same(found, plain(link, place, 1).params)


@cells
def test_rank_promotion(link, place):
    with jax.numpy_rank_promotion("raise"):
        found = take_steps_applying_ourselves(link, place)
    assert_same(found, plain(link, place, 1).params)


@cells
@pytest.mark.parametrize("flag", [jax.debug_nans, jax.debug_infs])
def test_debugging_flags(link, place, flag):
    """Nothing not finite is computed on the way. The maxima before the first step are -inf, in the
    states of clips only."""
    if flag is jax.debug_infs and link.signal is not None:
        flag = jax.debug_nans
    with flag(True):
        found = take_steps(build(link, place), link, place)
    assert_same(found, plain(link, place))


def take_steps_applying_ourselves(link, place):
    with place.active():
        tx, params, state = started(link, place)
        updates, _ = jax.jit(tx.update)(place.put(link.grads()), state, params, **link.extra())
        return jax.tree.map(lambda p, u: p + u, params, updates)


# --- trees --------------------------------------------------------------------------------------


@cells_on_one_device
@pytest.mark.parametrize("kind", KINDS)
def test_trees_of_others(link, place, kind):
    """Whatever holds the parameters, the run is the same, and the tree is kept."""
    kept = KINDS[kind]
    tx = build(link, place)
    params = kept.store(place.put(link.params()))
    state = jax.jit(tx.init)(params)
    update = jax.jit(tx.update)
    for i in range(2):
        extra = {
            name: {kept.prefix + path: x for path, x in mc.read_signal(sown, name).items()}
            for name, sown in link.extra(i).items()
        }
        grads = kept.store(place.put(link.grads(i)))
        updates, state = update(grads, state, params, **extra)
        assert jax.tree.structure(updates) == jax.tree.structure(params)
        params = optax.apply_updates(params, updates)
    assert_same(params, plain(link, place).params)
