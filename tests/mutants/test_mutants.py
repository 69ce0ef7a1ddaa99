"""The breaks of `make mutants` still apply to the source as it is."""

import ast

import pytest

from tests.mutants.chosen import chosen
from tests.mutants.drawn import MODULES, breaks_of, draw


def test_chosen_breaks_apply():
    breaks = chosen()
    assert len({(each.file, each.start) for each in breaks}) >= 40
    for each in breaks:
        ast.parse(each.source())


@pytest.mark.parametrize("module", MODULES)
def test_every_drawn_break_is_a_program(module):
    for each in breaks_of(module):
        ast.parse(each.source())


def test_the_draw_repeats():
    assert draw(200, seed=16) == draw(200, seed=16)
    assert len(set(draw(200, seed=16))) == 200
    assert draw(20, seed=1) != draw(20, seed=2)
