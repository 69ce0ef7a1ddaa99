"""Sequences that only their own beginning can tell: copying and recall are learned from them, and
measured on them.

Copying: a string of different tokens, again and again; that takes two layers, one that looks at the
token before and one that finds where it stood last. Recall: facts, each one token that stands for a
key and a value, then questions, each one token that stands for a key, with the fact as the answer;
that takes one layer, whose logits tell the key asked for from all others. Tokens are the first
8 × context of the vocabulary: keys, which strings are made of too, then facts.
"""

import numpy as np

VALUES = 3  # of each key, of which a sequence has one


def mixed(batches: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Puts synthetic sequences in the place of a share of the text.

    Args:
      batches: int32 `[steps, batch, context + 1]`.
      share: Of each batch; half of these sequences, rounded up, are to copy and half to recall.
      rng: What draws them: strings and facts of 2 tokens to half the context.

    Returns:
      The same shape. A sequence of text that is kept has its place.
    """
    steps, batch, size = batches.shape
    context = size - 1
    count = round(share * batch)
    half = -(-count // 2)
    lengths = rng.integers(2, context // 2 + 1, size=steps * count)
    to_copy = strings(rng, lengths[: steps * half], size, context)
    to_recall = facts(rng, lengths[steps * half :], size, context)
    both = [each.reshape(steps, -1, size) for each in (to_copy, to_recall)]
    return np.concatenate([*both, batches[:, count:]], axis=1)


def strings(rng: np.random.Generator, lengths: np.ndarray, size: int, context: int) -> np.ndarray:
    """Strings of `lengths` `[n]` tokens, at most 2 × context, each again and again to int32
    `[n, size]`."""
    tokens = shuffled(rng, len(lengths), 2 * context)
    return np.take_along_axis(tokens, np.arange(size) % lengths[:, None], axis=1)


def facts(rng: np.random.Generator, numbers: np.ndarray, size: int, context: int) -> np.ndarray:
    """`numbers` `[n]` facts about different keys, at most 2 × context, then a question about each
    key, in a random order, with its answer, again and again to int32 `[n, size]`."""
    keys = shuffled(rng, len(numbers), 2 * context)
    known = 2 * context + VALUES * keys + rng.integers(VALUES, size=keys.shape, dtype=np.int32)
    at = np.arange(size)
    asked = np.maximum(at - numbers[:, None], 0) // 2 % numbers[:, None]  # which, in that order
    there = np.arange(2 * context) < numbers[:, None]
    order = np.argsort(np.where(there, shuffled(rng, *keys.shape), 2 * context), axis=1)
    asked = np.take_along_axis(order, asked, axis=1)
    told = at < numbers[:, None]
    index = np.where(told, np.minimum(at, 2 * context - 1), asked)
    question = ~told & ((at - numbers[:, None]) % 2 == 0)
    found = (np.take_along_axis(each, index, axis=1) for each in (keys, known))
    return np.where(question, *found)


def shuffled(rng: np.random.Generator, rows: int, count: int) -> np.ndarray:
    """Permutations of `count` numbers, int32 `[rows, count]`."""
    return rng.permuted(np.tile(np.arange(count, dtype=np.int32), (rows, 1)), axis=1)
