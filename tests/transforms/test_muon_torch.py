"""Muon against trajectories recorded from torch.optim.Muon (see tests/fixtures/torch_muon.py)."""

import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import muonclip_jax as mc

RECORD = np.load(pathlib.Path(__file__).parent.parent / "fixtures" / "torch_muon.npz")
RULES = {"match_rms_adamw": "match_adam", "original": "jordan"}

# Distance apart over distance travelled.
# float32: the same operations in another order; five quintic steps multiply rounding of 6e-8 by
# some hundreds at worst. Measured: 2e-6.
# bfloat16: factors are rounded to 8 bits at every step, at places that differ by the order of
# sums, and small singular values amplify it. Measured: 1e-2.
TOLERANCE = {"float32": 2e-5, "bfloat16": 3e-2}


def read(prefix):
    """Flax kernels `[in, out]` of PyTorch's recorded `[out, in]` weights."""
    names = [name for name in RECORD.files if name.startswith(prefix + "/")]
    return {name.removeprefix(prefix + "/"): np.swapaxes(RECORD[name], -1, -2) for name in names}


# Two of them show every rule, momentum and precision.
QUICK = [("match_rms_adamw", "nesterov", "float32"), ("original", "plain", "bfloat16")]
ALL = list(itertools.product(RULES, ("nesterov", "plain"), ("float32", "bfloat16")))


@pytest.mark.parametrize(
    ("rule", "momentum", "precision"),
    [pytest.param(*one, marks=() if one in QUICK else pytest.mark.slow) for one in ALL],
)
def test_twenty_steps_equal_torch(rule, momentum, precision):
    tx = optax.chain(
        mc.scale_by_muon(
            float(RECORD["momentum"]),
            nesterov=momentum == "nesterov",
            newton_schulz=mc.NewtonSchulz(mc.schedules.jordan(), precision, "standard"),
        ),
        mc.scale_by_update_rms(RULES[rule]),
        optax.add_decayed_weights(float(RECORD["weight_decay"])),
        optax.scale_by_learning_rate(float(RECORD["learning_rate"])),
    )
    start, gradients = read("initial"), read("gradient")
    params = jax.tree.map(jnp.asarray, start)
    state, update = tx.init(params), jax.jit(tx.update)
    for step in range(int(RECORD["steps"])):
        grads = {name: jnp.asarray(gradient[step]) for name, gradient in gradients.items()}
        updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
    for name, theirs in read(f"final/{rule}/{momentum}/{precision}").items():
        travelled = np.linalg.norm(theirs - start[name])
        apart = np.linalg.norm(np.asarray(params[name]) - theirs)
        assert apart <= TOLERANCE[precision] * travelled, (name, apart / travelled)
