"""What counts as hidden, in a program as a GPU's compiler writes it."""

import pytest

from benchmarks.overlap import overlap

PROGRAM = """
%fused (p: f32[64,64]) -> f32[64,64] {
  %p = f32[64,64]{1,0} parameter(0)
  ROOT %dot = f32[64,64]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}

%body (state: (s32[], f32[64,64])) -> (s32[], f32[64,64]) {
  %state = (s32[], f32[64,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  %y = f32[64,64]{1,0} get-tuple-element(%state), index=1
  %product = f32[64,64]{1,0} fusion(%y), kind=kOutput, calls=%fused
  ROOT %out = (s32[], f32[64,64]{1,0}) tuple(%next, %product)
}

%condition (state.1: (s32[], f32[64,64])) -> pred[] {
  %state.1 = (s32[], f32[64,64]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%state.1), index=0
  %five = s32[] constant(5)
  ROOT %more = pred[] compare(%j, %five), direction=LT
}

ENTRY %main (x: f32[64,64], start: (s32[], f32[64,64])) -> f32[64,64] {
  %x = f32[64,64]{1,0} parameter(0)
  %start = (s32[], f32[64,64]{1,0}) parameter(1)
  %a = ((f32[64,64]{1,0}), f32[64,64]{1,0}) all-to-all-start(%x), replica_groups={{0,1}}
  BETWEEN
  %a.done = f32[64,64]{1,0} all-to-all-done(%a)
  AFTER
  ROOT %sync = f32[64,64]{1,0} all-to-all(%a.done), replica_groups={{0,1}}
}
"""
LOOP = "%loop = (s32[], f32[64,64]{1,0}) while(%start), condition=%condition, body=%body"
COPY = "%copy = f32[64,64]{1,0} copy(%x)"
SIZE = 64 * 64 * 4


@pytest.mark.parametrize(
    ("between", "after", "hidden"), [(LOOP, COPY, SIZE), (COPY, LOOP, 0), ("", "", 0)]
)
def test_what_stands_between_start_and_done(between, after, hidden):
    found = overlap(PROGRAM.replace("BETWEEN", between).replace("AFTER", after))
    assert found == (2 * SIZE, hidden)
    assert found.share == hidden / (2 * SIZE)


def test_without_collectives_nothing_waits():
    assert overlap(PROGRAM.split("ENTRY")[0] + "ENTRY %main () -> f32[] {\n}").share == 1
