"""Thousands of steps of the whole chain at a rate at which Muon alone diverges: nothing may grow.

    make soak                        5,000 steps
    make soak ARGS="--steps 200"

A small MLA decoder learns sequences that repeat. Held: the process's memory and the live arrays are
flat, nothing is compiled again, parameters are finite, γ is in (0, 1]. Muon without the clip runs
beside it until its max logits are far above what the clip holds. Prints figures; returns 1 if
anything is not held.
"""

import argparse
import gc
import resource
import sys
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import muonclip_jax as mc
from examples.mla.model import Decoder, ModelConfig, attention_layout

CONFIG = ModelConfig(
    vocab_size=32, d_model=16, layers=2, heads=2, nope=4, rope=4, v=4, q_rank=8, kv_rank=8,
    d_ff=32, max_length=16,
)  # fmt: skip
THRESHOLD, RATE, DECAY, BATCH = 5.0, 0.02, 0.1, 8
FAR = 8 * THRESHOLD  # Muon alone has diverged
LOOKS = 20  # how often memory is read


@dataclass(frozen=True)
class Figures:
    """What a run showed.

    Attributes:
      live: Live arrays at each look.
      resident: MiB of the process at each look.
      compiled: Programs of the step, 1 if nothing was compiled again.
      clipped: Steps in which a head was clipped.
      gamma: The smallest and the largest clip factor.
      peak: The largest max logit, over the threshold.
      losses: The first and the last.
    """

    steps: int
    live: list[int]
    resident: list[float]
    compiled: int
    clipped: int
    gamma: tuple[float, float]
    peak: float
    losses: tuple[float, float]
    finite: bool

    def broken(self) -> list[str]:
        """What is not held."""
        half = len(self.resident) // 2
        # The allocator keeps pages; between the halves of a run they do not grow by 2%.
        grown = np.median(self.resident[half:]) / np.median(self.resident[1:half])
        held = {
            "live arrays are as many at every look": len(set(self.live)) == 1,
            f"memory is flat (it grew by {grown - 1:.1%})": grown < 1.02,
            f"one program (there are {self.compiled})": self.compiled == 1,
            "parameters and losses are finite": self.finite,
            f"γ is in (0, 1] (it is in {self.gamma})": 0 < self.gamma[0] <= self.gamma[1] <= 1,
            "heads are clipped": self.clipped > 0,
        }
        return [what for what, so in held.items() if not so]


def batch_of(rng: np.random.Generator) -> np.ndarray:
    """Sequences that say a drawn beginning again and again: attention has to look back."""
    beginning = rng.integers(0, CONFIG.vocab_size, (BATCH, 5))
    return np.tile(beginning, (1, 4))[:, : CONFIG.max_length + 1].astype(np.int32)


def make(clips: bool):
    """Parameters, state and the compiled step."""
    graph, params, rest = nnx.split(Decoder(CONFIG, nnx.Rngs(0)), nnx.Param, ...)
    layout = attention_layout(CONFIG)
    recipe = dict(layout=layout, weight_decay=DECAY)
    tx = mc.muonclip(RATE, threshold=THRESHOLD, **recipe) if clips else mc.muon(RATE, **recipe)

    def loss_of(params, tokens):
        model = nnx.merge(graph, params, rest)
        logits, sown = nnx.capture(model, nnx.Intermediate)(tokens[:, :-1])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(), mc.read_max_logits(sown)

    @jax.jit(donate_argnums=(0, 1))
    def step(params, state, tokens):
        (loss, maxima), grads = jax.value_and_grad(loss_of, has_aux=True)(params, tokens)
        updates, state = tx.update(grads, state, params, max_logits=maxima)
        params = optax.apply_updates(params, updates)
        peak = jnp.stack([heads.max() for heads in maxima.values()]).max()
        gamma = jnp.concatenate(jax.tree.leaves(mc.qk_clip_state(state).gamma)) if clips else None
        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(params)]).all()
        return params, state, (loss, peak, gamma, finite)

    return params, tx.init(params), step


def soak(steps: int) -> Figures:
    """The whole chain for so many steps."""
    params, state, step = make(clips=True)
    rng = np.random.default_rng(0)
    live, resident, losses = [], [], []
    peak, smallest, largest, clipped, finite = 0.0, np.inf, -np.inf, 0, True
    for number in range(steps):
        params, state, told = step(params, state, batch_of(rng))
        loss, top, gamma, good = jax.device_get(told)
        peak, finite = max(peak, float(top)), finite and bool(good) and bool(np.isfinite(loss))
        smallest, largest = min(smallest, gamma.min()), max(largest, gamma.max())
        clipped += bool((gamma < 1).any())
        losses.append(float(loss))
        if (number + 1) % max(1, steps // LOOKS) == 0:
            gc.collect()
            live.append(len(jax.live_arrays()))
            resident.append(_resident())
    return Figures(
        steps, live, resident, step._cache_size(), clipped, (float(smallest), float(largest)),
        peak / THRESHOLD, (losses[0], float(np.mean(losses[-20:]))), finite,
    )  # fmt: skip


def steps_until_divergence(most: int) -> tuple[int | None, float]:
    """After how many steps Muon alone has max logits above FAR, or None; and its last one."""
    params, state, step = make(clips=False)
    rng = np.random.default_rng(0)
    peak = 0.0
    for number in range(1, most + 1):
        params, state, (_, top, _, _) = step(params, state, batch_of(rng))
        peak = float(top)
        if not peak < FAR:
            return number, peak
    return None, peak


def _resident() -> float:
    """MiB in memory now; where Linux does not tell, the most that there was."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * resource.getpagesize() / 2**20
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=5000)
    steps = parser.parse_args(args).steps
    start = time.monotonic()
    alone, last = steps_until_divergence(min(steps, 1000))
    jax.clear_caches()
    print(
        f"Muon alone at {RATE}: max logits {last / THRESHOLD:.1f} τ "
        + (f"after {alone} steps" if alone else "at the end: it has not diverged")
    )
    found = soak(steps)
    print(
        f"MuonClip, {found.steps} steps in {time.monotonic() - start:.0f} s: live arrays "
        f"{min(found.live)} to {max(found.live)}, memory {found.resident[0]:.0f} to "
        f"{found.resident[-1]:.0f} MiB, compiled {found.compiled} time(s), clipped in "
        f"{found.clipped} steps, γ from {found.gamma[0]:.3g} to {found.gamma[1]:.3g}, max logits "
        f"up to {found.peak:.2f} τ, loss {found.losses[0]:.2f} to {found.losses[1]:.2f}"
    )
    broken = found.broken() + ([] if alone else ["Muon alone diverges"])
    for what in broken:
        print(f"not held: {what}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
