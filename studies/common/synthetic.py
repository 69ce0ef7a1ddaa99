"""Sequences that only their own beginning can tell: copying and recall are learned from them, and
measured on them.

A repeat is a string of tokens, again and again. A recall sequence is pairs of a key and its value,
again and again, each time in a new order. Tokens are among the first 2 × context of the
vocabulary, so few that a small model soon knows all of them. Those of a string differ, and so do
the keys of a sequence: one earlier token tells what follows.
"""

import numpy as np


def mixed(batches: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Puts synthetic sequences in the place of a share of the text.

    Args:
      batches: int32 `[steps, batch, context + 1]`.
      share: Of each batch; half of these sequences, rounded up, are repeats and half recall.
      rng: What draws them: strings of 4 tokens to a quarter of the context, and 2 pairs to an
        eighth of it, so that each sequence tells all that it can within its first quarter.

    Returns:
      The same shape. A sequence of text that is kept has its place.
    """
    steps, batch, size = batches.shape
    context = size - 1
    count = round(share * batch)
    half = -(-count // 2)
    lengths = rng.integers(4, context // 4 + 1, size=steps * half)
    pairs = rng.integers(2, context // 8 + 1, size=steps * (count - half))
    drawn = (make(rng, n, size, context) for make, n in ((repeats, lengths), (recalls, pairs)))
    both = [each.reshape(steps, -1, size) for each in drawn]
    return np.concatenate([*both, batches[:, count:]], axis=1)


def repeats(rng: np.random.Generator, lengths: np.ndarray, size: int, context: int) -> np.ndarray:
    """Strings of `lengths` `[n]` tokens, at most 2 × context, each again and again to int32
    `[n, size]`."""
    strings = rng.permuted(
        np.tile(np.arange(2 * context, dtype=np.int32), (len(lengths), 1)), axis=1
    )
    return np.take_along_axis(strings, np.arange(size) % lengths[:, None], axis=1)


def recalls(rng: np.random.Generator, pairs: np.ndarray, size: int, context: int) -> np.ndarray:
    """`pairs` `[n]` keys, at most 2 × context, with their values, again and again to int32
    `[n, size]`."""
    found = [_recall(rng, each, size, 2 * context) for each in pairs]
    return np.array(found, np.int32).reshape(len(pairs), size)


def _recall(rng: np.random.Generator, pairs: int, size: int, tokens: int) -> np.ndarray:
    keys, values = rng.permutation(tokens)[:pairs], rng.integers(tokens, size=pairs)
    both = np.stack([keys, values], axis=1)
    rounds = -(-size // (2 * pairs))
    return np.concatenate([both[rng.permutation(pairs)] for _ in range(rounds)]).ravel()[:size]
