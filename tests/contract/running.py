"""Steps of a link as a trainer takes them, and the plain run with which others are compared."""

from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from tests.contract.links import Link
from tests.contract.places import Place


class Run(NamedTuple):
    """What some steps led to."""

    params: Any
    state: Any


def build(link: Link, place: Place) -> optax.GradientTransformationExtraArgs:
    """The link as it is built for this place."""
    made = link.make(**link.arguments(place.shardings(link.params())))
    return optax.with_extra_args_support(made)


def take_steps(
    tx: optax.GradientTransformation,
    link: Link,
    place: Place,
    *,
    steps: int = 2,
    params: Any = None,
    jit: Any = jax.jit,
) -> Run:
    """The loop that all trainers have. `jit` is what compiles the step, or `lambda f: f`."""
    tx = optax.with_extra_args_support(tx)
    with place.active():
        params = place.put(link.params()) if params is None else params
        state = jit(tx.init)(params)

        @jit
        def step(params, state, grads, extra):
            updates, state = tx.update(grads, state, params, **extra)
            return optax.apply_updates(params, updates), state

        for i in range(steps):
            params, state = step(params, state, place.put(link.grads(i)), link.extra(i))
        return Run(params, state)


_plain_runs: dict[tuple[str, str, int], Run] = {}


def plain(link: Link, place: Place, steps: int = 2) -> Run:
    """The jitted run of some steps, as NumPy arrays; computed once for each link and place."""
    key = (link.name, place.name, steps)
    if key not in _plain_runs:
        run = take_steps(build(link, place), link, place, steps=steps)
        _plain_runs[key] = jax.tree.map(np.asarray, run)
    return _plain_runs[key]


def assert_same(found: Any, wanted: Any, rtol: float = 2e-5) -> None:
    """Leaf by leaf, relative to each leaf's largest entry; see `Link.tolerance`."""
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        finite = other[np.isfinite(other)]
        scale = max(np.abs(finite).max(initial=0.0), 1e-3)
        np.testing.assert_allclose(one, other, rtol=0, atol=rtol * scale)


def assert_equal(found: Any, wanted: Any) -> None:
    """Leaf by leaf, bit for bit."""
    found, wanted = jax.tree.leaves(found), jax.tree.leaves(wanted)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
