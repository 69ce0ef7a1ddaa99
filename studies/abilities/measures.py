"""What a model can do that its loss on more of its own text does not show."""

from functools import partial
from pydoc_data.topics import topics
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from examples.mla import data
from studies.common import synthetic
from studies.common.model import Decoder, ModelConfig
from studies.common.training import Setting, State

HELD_OUT = 2**32 - 1  # the seed of what is copied and recalled, for all runs; no run has it
SEQUENCES = 40  # of each length, and of each text
LENGTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)  # of strings and of all facts, by the context
TRAINED = 3  # so many of these lengths, the first, are trained on
REACH = 4  # contexts that a sequence fills
BINS = 8  # of the positions of a context


def measure(
    setting: Setting, state: State, batch: jax.Array, text: data.TokenizedText
) -> dict[str, Any]:
    """Accuracies of copying and of recall by length, `[len(LENGTHS)]`, and losses by position on
    held-out text and on English, `[REACH * BINS]`, in nats per token."""
    context = batch.shape[1] - 1
    size = REACH * context + 1
    lengths = [round(share * context) for share in LENGTHS]
    rng = np.random.default_rng(HELD_OUT)

    def asked(make: Any, number: int) -> np.ndarray:
        return make(rng, np.full(SEQUENCES, number), size, context)

    judge = partial(judged, state.params, setting.model)
    return {
        "copying": [copied(judge(asked(synthetic.strings, n))[0], n, context) for n in lengths],
        "recall": [recalled(judge(asked(synthetic.facts, n))[0], n) for n in lengths],
        "position_loss": by_position(judge(spread_out(text.valid, size))[1]),
        "english_loss": by_position(judge(spread_out(english(text), size))[1]),
    }


@partial(jax.jit, static_argnames="config")
def judged(params: Any, config: ModelConfig, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Whether the likeliest next token is right, and the loss, `[n, size - 1]` of `[n, size]`."""

    def one(row: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits = Decoder(config).apply({"params": params}, row[None, :-1])[0]
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, row[1:])
        return jnp.argmax(logits, axis=-1) == row[1:], loss

    return jax.lax.map(one, tokens, batch_size=8)


def copied(right: jax.Array, length: int, context: int) -> float:
    """The share that is right of a string's later rounds within the context, or of its second one;
    of `right` `[n, size - 1]`, whose position i is about token i + 1. The second round's first
    token, which nothing earlier tells, is left out."""
    return float(right[:, length : max(context, 2 * length) - 1].mean())


def recalled(right: jax.Array, number: int) -> float:
    """The share that is right of the answers, each question once."""
    return float(right[:, number : 3 * number : 2].mean())


def by_position(losses: jax.Array) -> np.ndarray:
    """The mean in each of `REACH * BINS` stretches of positions, of `[n, size - 1]`."""
    return np.float64(losses).mean(axis=0).reshape(REACH * BINS, -1).mean(axis=1)


def english(text: data.TokenizedText) -> np.ndarray:
    """The chapters of Python's language reference that `help()` shows, of which none is trained
    on, in the tokens of `text`, int32 `[tokens]`."""
    return data.encode(text.tokenizer, [topics[name] for name in sorted(topics)])


def spread_out(tokens: np.ndarray, size: int) -> np.ndarray:
    """`[SEQUENCES, size]` windows, evenly spread over `[tokens]`."""
    starts = np.linspace(0, len(tokens) - size, SEQUENCES).astype(int)
    return np.stack([tokens[start : start + size] for start in starts])
