"""Which cells the contract has: every behaviour of every link, in every place where it can differ.

    python -m tests.contract

prints how many there are, and what is passed over with its reason.
"""

import re
from collections.abc import Callable

import pytest

from tests.contract.links import LINKS, Link
from tests.contract.places import ONE_DEVICE, PLACES, Place

_WITH_ADAM = "^((kimi_)?muon(clip)?|moonlight|normuon|muonh|nanochat)$"

# What is passed over: the behaviour, the link and the place as patterns, and the reason.
PASSED_OVER = [
    ("inject", "^scale_by_(orthogonalization|update_rms)$", "", "it has no numbers to inject"),
    (
        "strict",
        "^((kimi_)?muon(clip)?|moonlight|normuon|muonh|nanochat)$",
        "",
        "optax.scale_by_adam multiplies floats with counts",
    ),
    ("masked", "clip|accumulate", "", "a clip must see all parameters"),
]


# Programs that take long to compile, and say what others here have said: `make contract` has them.
_LONG_ANYWHERE = (
    "scale_by_muon corrected",
    "partition_matrices",
    "muon_direction",
    "muon",
    "kimi_muonclip",
    "moonlight",
    "normuon",
    "muonh",
    "nanochat",
    "quack",
    "accumulate",
    "qk_clip until a step",
    "max_output_clip",
    "clip_singular_values",
    "scale_by_periodic_orthogonalization",
    "decay_spectral_norm",
)
_LONG_ON_MESHES = (
    "scale_by_muon",
    "scale_by_muon in 8 bits",
    "scale_by_orthogonalization",
    "muonclip",
    "cap_spectral_norm",
    "normalize_rms",
    "scale_by_neuron_rms",
    "hyperball",
)


def is_long(link: Link, place: Place) -> bool:
    """Whether `make test-all` leaves the cell to `make contract`."""
    on_mesh = place is not ONE_DEVICE
    return link.name in _LONG_ANYWHERE or (on_mesh and link.name in _LONG_ON_MESHES)


def reason(behaviour: str, link: Link, place: Place) -> str | None:
    """Why a cell is passed over; None where it is not."""
    told = (behaviour, link.name, place.name)
    for *patterns, why in PASSED_OVER:
        if all(re.search(p, text) for p, text in zip(patterns, told, strict=True)):
            return why
    return None


def cells(test: Callable[..., None]) -> Callable[..., None]:
    """For every link in every place."""
    return _parametrized(test, PLACES)


def cells_on_one_device(test: Callable[..., None]) -> Callable[..., None]:
    """For every link; what lies on a mesh makes no difference to it."""
    return _parametrized(test, [ONE_DEVICE])


def _parametrized(test: Callable[..., None], places: list[Place]) -> Callable[..., None]:
    behaviour = test.__name__.removeprefix("test_")
    kept, passed = [], []
    for link in LINKS:
        for place in places:
            why = reason(behaviour, link, place)
            if why is None:
                marks = [pytest.mark.long] if is_long(link, place) else []
                name = f"{link.name}-{place.name}"
                kept.append(pytest.param(link, place, id=name, marks=marks))
            else:
                passed.append((link.name, place.name, why))
    marked = pytest.mark.contract(
        pytest.mark.slow(pytest.mark.parametrize(("link", "place"), kept)(test))
    )
    marked.kept, marked.passed_over = kept, passed
    return marked
