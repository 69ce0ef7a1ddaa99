"""The same work done by Optax, by MaxText and by PyTorch, for comparison.

PyTorch may be missing: then its functions are, and `torch_missing` says why; so may MaxText.
PyTorch's work on JAX's device and return when they are done.
"""

import functools
import os
import timeit
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

try:
    from maxtext.optimizers import muon as maxtext_muon
except ImportError:
    maxtext_muon = None

try:
    import torch
    from torch.optim import _muon as torch_muon
except ImportError:
    torch = None
else:
    torch.set_num_threads(os.cpu_count() or 1)  # as many as XLA has
    # By default it would go on without compiling, after a few shapes, and say so in a log only.
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True

STEPS = 5  # of Newton–Schulz, the default of both
_TOO_MANY_TIMES = 20  # slower than float32; without AVX-512 it was 120 and more

Function = Callable[[], Any]


@jax.jit
def optax_orthogonalize(x: jax.Array) -> jax.Array:
    """`optax.contrib.muon`'s Newton–Schulz iteration, in the dtype of the matrix, as the public
    `scale_by_muon` gives it: without momentum XLA finds nothing else to compute."""
    tx = optax.contrib.scale_by_muon(
        beta=0.0,
        nesterov=False,
        weight_dimension_numbers=optax.contrib.MuonDimensionNumbers(),
    )
    return tx.update(x, tx.init(x))[0]


def maxtext_missing() -> str | None:
    """Why there are no rows of MaxText's own Muon; None if there are."""
    if maxtext_muon is None:
        return "maxtext with a Muon of its own (0.2.5) is not installed: no rows of it."
    return None


def torch_missing() -> str | None:
    """Why there are no rows of PyTorch; None if there are."""
    if torch is None:
        return "torch with torch.optim.Muon (2.9 or later) is not installed: no rows of it."
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return "This torch sees no GPU: no rows of it."
    return _too_slow()


@functools.cache
def _too_slow() -> str | None:
    """Why PyTorch's Muon, which computes in bfloat16, would take hours: without AVX-512 one product
    of 2048×2048 takes a minute."""
    seconds = {dtype: _seconds_of_product(dtype) for dtype in (torch.bfloat16, torch.float32)}
    times = seconds[torch.bfloat16] / seconds[torch.float32]
    if times < _TOO_MANY_TIMES:
        return None
    return f"This torch multiplies bfloat16 {times:.0f} times slower than float32: no rows of it."


def _seconds_of_product(dtype: Any) -> float:
    x = torch.ones(256, 256, dtype=dtype, device=_device())
    return min(timeit.repeat(_waiting(lambda: x @ x), number=1))  # of five: one may be interrupted


def torch_compile_missing() -> str | None:
    """Why there are no rows of torch.compile; None if there are."""
    return torch_missing() or _compile_error()


@functools.cache
def _compile_error() -> str | None:
    try:
        torch.compile(torch.neg)(torch.ones(2, device=_device()))
    except Exception as error:  # of Dynamo, of Inductor, of the compiler that it calls
        return f"torch.compile does not run here: no rows of it. {str(error).splitlines()[0]}"
    return None


TORCH: dict[str, Callable[[], str | None]] = {
    "torch": torch_missing,
    "torch.compile": torch_compile_missing,
}


def missing(names: Collection[str] = tuple(TORCH)) -> list[str]:
    """Why which of them are missing."""
    reasons = [missing() for name, missing in TORCH.items() if name in names]
    return [why for why in dict.fromkeys(reasons) if why]


def _there(names: Collection[str]) -> list[str]:
    return [name for name, missing in TORCH.items() if name in names and not missing()]


def torch_product(x: jax.Array, y: jax.Array) -> dict[str, Function]:
    """`{"torch": x @ y}`, if it is there."""
    if torch_missing():
        return {}
    x, y = as_tensor(x), as_tensor(y)
    return {"torch": _waiting(lambda: x @ y)}


def torch_iterations(
    names: Collection[str] = tuple(TORCH),
) -> dict[str, Callable[[jax.Array], Function]]:
    """`torch.optim.Muon`'s Newton–Schulz iteration, which runs in bfloat16.

    Args:
      names: Of "torch" and "torch.compile" those wanted.

    Returns:
      For those that are there a function from a float32 matrix to the function that orthogonalizes
      it.
    """
    wanted = _there(names)
    if not wanted:
        return {}
    coefficients = torch_muon.DEFAULT_A, torch_muon.DEFAULT_B, torch_muon.DEFAULT_C

    def iteration(x: Any) -> Any:
        return torch_muon._zeropower_via_newtonschulz(x, coefficients, STEPS, torch_muon.EPS)

    def on(x: jax.Array, iteration: Callable[[Any], Any]) -> Function:
        tensor = as_tensor(x)
        return _waiting(lambda: iteration(tensor))

    iterations = {"torch": iteration, "torch.compile": torch.compile(iteration, dynamic=False)}
    return {name: functools.partial(on, iteration=iterations[name]) for name in wanted}


def torch_steps(
    names: Collection[str],
    matrices: Sequence[jax.Array],
    others: Sequence[jax.Array],
    *,
    learning_rate: float,
    weight_decay: float,
) -> dict[str, Function]:
    """A whole step of `torch.optim.Muon` on matrices and of `torch.optim.AdamW` on the others, with
    Moonlight's scale.

    Args:
      names: Of "torch" and "torch.compile" those wanted. The latter's first call compiles.
      matrices: Parameters, which are their own gradients as well; so the others.
      others: Those that are AdamW's.
      learning_rate: Of both.
      weight_decay: Of both.

    Returns:
      Those of the names that are there.
    """
    wanted = _there(names)
    if not wanted:
        return {}
    common = {"lr": learning_rate, "weight_decay": weight_decay}
    muon = torch.optim.Muon(_parameters(matrices), adjust_lr_fn="match_rms_adamw", **common)
    adamw = torch.optim.AdamW(_parameters(others), betas=(0.9, 0.95), **common)

    def step() -> None:
        muon.step()
        adamw.step()

    steps = {"torch": step, "torch.compile": torch.compile(step)}
    return {name: _waiting(steps[name]) for name in wanted}


def _parameters(arrays: Sequence[jax.Array]) -> list[Any]:
    parameters = [torch.nn.Parameter(as_tensor(x)) for x in arrays]
    for parameter in parameters:
        parameter.grad = parameter.detach().clone()
    return parameters


def as_tensor(x: jax.Array) -> Any:
    """A copy on JAX's device."""
    tensor = torch.from_numpy(np.array(x.astype(jnp.float32)))
    return tensor.to(_device(), getattr(torch, x.dtype.name))


def as_array(result: Any) -> jax.Array:
    """A result of JAX or PyTorch, float32."""
    if isinstance(result, jax.Array):
        return result.astype(jnp.float32)
    return jnp.asarray(result.float().cpu().numpy())


def _waiting(function: Function) -> Function:
    def run() -> Any:
        with torch.no_grad():
            result = function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return result

    return run


def _device() -> str:
    return "cuda" if jax.default_backend() == "gpu" else "cpu"
