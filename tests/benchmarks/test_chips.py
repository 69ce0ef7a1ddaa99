"""The figures of chips that the package knows are those of the benchmarks' table."""

import pytest

from benchmarks.chips import CHIPS, Switched
from muonclip_jax._spread.machine import _BY_KIND, Machine


def machine_by(kind: str) -> Machine:
    return next(machine for name, machine in _BY_KIND.items() if kind.startswith(name))


@pytest.mark.parametrize("chip", CHIPS.values(), ids=CHIPS)
def test_plans_and_rooflines_go_by_the_same_figures(chip):
    machine = machine_by(chip.name)
    assert machine.flops == chip.flops["bfloat16"]
    if isinstance(chip.links, Switched):
        links = chip.links
        assert (machine.near, machine.far) == (links.domain_rate, links.network_rate)
        assert (machine.domain, machine.torus) == (links.domain, 0)
    else:  # both ways along one axis
        assert (machine.near, machine.torus) == (2 * chip.links.link_rate, chip.links.axes)
