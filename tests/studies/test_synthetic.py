"""Sequences to copy and to recall from: what they hold, and how right answers are counted."""

from functools import partial

import numpy as np
import pytest

from studies.abilities import measures
from studies.common import synthetic

CONTEXT = 16
SIZE = 4 * CONTEXT + 1


def rng():
    return np.random.default_rng(0)


def test_a_string_of_different_tokens_again_and_again():
    lengths = np.array([2, 7, 24])
    found = synthetic.strings(rng(), lengths, SIZE, CONTEXT)
    assert found.shape == (3, SIZE) and found.dtype == np.int32
    for row, length in zip(found, lengths, strict=True):
        assert len(set(row[:length])) == length
        np.testing.assert_array_equal(row[length:], row[:-length])
    assert found.min() >= 0 and found.max() < 2 * CONTEXT


def test_facts_and_then_questions_about_each():
    numbers = np.array([2, 5, 16])
    found = synthetic.facts(rng(), numbers, SIZE, CONTEXT)
    assert found.shape == (3, SIZE) and found.dtype == np.int32
    for row, number in zip(found, numbers, strict=True):
        told = {(fact - 2 * CONTEXT) // synthetic.VALUES: fact for fact in row[:number]}
        assert len(told) == number  # about different keys
        questions, answers = row[number : 3 * number : 2], row[number + 1 : 3 * number : 2]
        assert sorted(questions) == sorted(told)
        assert [told[key] for key in questions] == list(answers)
        np.testing.assert_array_equal(row[3 * number :], row[number : -2 * number])
    assert list(found[2, 16:48:2]) != [
        (f - 2 * CONTEXT) // 3 for f in found[2, :16]
    ]  # another order
    assert found.max() < 8 * CONTEXT


def test_mixed_replaces_the_first_of_each_batch_and_no_other():
    text = np.full((50, 6, CONTEXT + 1), -1, np.int32)
    found = synthetic.mixed(text, 0.5, rng())
    assert found.shape == text.shape and found.dtype == np.int32
    np.testing.assert_array_equal(found[:, 3:], text[:, 3:])
    assert found[:, :3].min() >= 0
    assert len({row.tobytes() for row in found[:, :3].reshape(150, -1)}) == 150  # all new
    # Two of three are strings, which end within half of the context.
    for row in found[:, :2].reshape(100, -1):
        assert any((row[length:] == row[:-length]).all() for length in range(2, CONTEXT // 2 + 1))


@pytest.mark.parametrize("length", [4, 8, 16])
def test_who_copies_and_recalls_gets_one_and_who_does_not_gets_little(length):
    """Readers of nothing but the sequence: an attention that finds the last time a token was seen
    and takes what followed, and one that finds a fact by its key."""
    for make, score, read in (
        (synthetic.strings, partial(measures.copied, context=CONTEXT), follower),
        (synthetic.facts, measures.recalled, fact_of),
    ):
        tokens = make(rng(), np.full(3, length), SIZE, CONTEXT)
        right = np.stack([read(row) for row in tokens]) == tokens[:, 1:]
        assert score(right, length) == 1
        assert score(tokens[:, :-1] == tokens[:, 1:], length) < 0.5
        # The first round tells nothing, and nobody is asked about it.
        asked_from = length if make is synthetic.strings else length - 1
        early = right.copy()
        early[:, :asked_from] = ~early[:, :asked_from]
        assert score(early, length) == score(right, length)


def follower(row):
    """At each position, what followed its token the last time; -1 where it is new."""
    seen = [np.flatnonzero(row[:i] == row[i]) for i in range(len(row) - 1)]
    return np.array([row[each[-1] + 1] if len(each) else -1 for each in seen])


def fact_of(row):
    """At each position, the fact so far whose key it names; -1 where none does."""
    keys = np.where(row >= 2 * CONTEXT, (row - 2 * CONTEXT) // synthetic.VALUES, -1)
    seen = [np.flatnonzero(keys[:i] == row[i]) for i in range(len(row) - 1)]
    return np.array([row[each[-1]] if len(each) else -1 for each in seen])


def test_losses_by_position_are_means_of_stretches():
    size = measures.REACH * measures.BINS * 2
    losses = np.arange(3 * size, dtype=np.float32).reshape(3, size)
    expected = losses.reshape(3, -1, 2).mean(axis=(0, 2))
    np.testing.assert_allclose(measures.by_position(losses), expected)


def test_windows_are_spread_from_end_to_end():
    found = measures.spread_out(np.arange(1000), 50)
    assert found.shape == (measures.SEQUENCES, 50)
    assert found[0, 0] == 0 and found[-1, -1] == 999
    np.testing.assert_array_equal(np.diff(found, axis=1), 1)
    assert np.ptp(np.diff(found[:, 0])) <= 1
