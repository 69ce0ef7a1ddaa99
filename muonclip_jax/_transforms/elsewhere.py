"""States of other libraries' Muon, in the form of this one's."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import optax

from muonclip_jax._core import paths
from muonclip_jax._core.dtypes import accumulation_dtype
from muonclip_jax._core.options import check_count, check_number
from muonclip_jax._core.paths import Path
from muonclip_jax._transforms.momentum import CorrectedTraceState
from muonclip_jax._transforms.quantized import QuantizedTrace, floats_like, quantized
from muonclip_jax._transforms.upgrade import all_as_like, as_like

_OF_TORCH = ("momentum_buffer", "exp_avg", "exp_avg_sq")


def from_optax_muon(old: Any, like: optax.OptState, *, beta: float) -> optax.OptState:
    """The state of `optax.contrib.muon`, and so of MaxText's Muon, in this library's form.

    Optax averages gradients, `M ← βM + (1−β)G`, and this library adds them up, `M ← βM + G`: the
    momentum is divided by 1 − β. Adam's moments and all counts of steps are as they were. What
    Optax's state does not have (QK-Clip's, QuacK's) is as in `like`.

    The steps that follow are those that Optax would have taken, to rounding, with the options that
    docs/how-to/elsewhere.md lists. One is no option of `muon`: Optax weighs the two
    terms of Nesterov's momentum by 1 − βᵗ⁺¹ and 1 − βᵗ, as `scale_by_muon(bias_correction=True)`
    does; after 16 / (1 − β) steps, 320 with 0.95, float32 does not tell.

    Cost: the state is copied once.

    Args:
      old: The state: live, from an `nnx.Optimizer` too, or as Orbax restores it without a target,
        dicts and lists of arrays.
      like: `tx.init(params)` of the optimizer that goes on, in any chain.
      beta: Optax's `beta`, which its state does not hold.

    Returns:
      A state with the structure, dtypes and shardings of `like`.

    Raises:
      ValueError: `old` is no such state, or not of the same parameters; a parameter that was Muon's
        and is not now, or the other way round: Optax takes every parameter of two axes. With paths.

    Example:
        >>> theirs = optax.contrib.muon(1e-3)
        >>> kernels = {"up": {"kernel": jnp.ones((4, 8)), "bias": jnp.ones(8)}}
        >>> _, old = theirs.update(kernels, theirs.init(kernels), kernels)
        >>> state = mc.from_optax_muon(old, mc.muon(1e-3).init(kernels), beta=0.95)
        >>> jax.tree.structure(state) == jax.tree.structure(mc.muon(1e-3).init(kernels))
        True
    """
    nodes = list(_nodes(old))
    found = [node for node in nodes if {"count", "mu", "ns_coeffs"} <= node.keys()]
    if len(found) != 1:
        raise ValueError(
            f"Expected one state of optax.contrib.muon, found {len(found)}. Give its whole "
            "optimizer state, or what Orbax restored of it."
        )
    adam: dict[str, Any] = next(
        (node for node in nodes if {"count", "mu", "nu"} <= node.keys()), {}
    )
    source = _Source(
        _by_path(found[0]["mu"]),
        _by_path(adam.get("mu")),
        _by_path(adam.get("nu")),
        beta,
        int(jax.tree.leaves(found[0]["count"])[0]),
    )
    return source.fill(like)


def from_torch_muon(
    old: Mapping[str, Any], like: optax.OptState, *, momentum: float, step: int
) -> optax.OptState:
    """The state of `torch.optim.Muon`, and of an AdamW beside it, in this library's form.

    PyTorch's buffer is an average, `B ← μB + (1−μ)G`: it is divided by 1 − μ. There is no bias
    correction on either side. What its state does not have is as in `like`.

    Args:
      old: For each kind of buffer a tree of parameters, named, laid out and transposed as the
        parameters are here: `{"momentum_buffer": ...}`, and `"exp_avg"` and `"exp_avg_sq"` of
        AdamW's. A buffer has its weight's shape, so what converted the weights converts it.
      like: `tx.init(params)` of the optimizer that goes on, in any chain.
      momentum: μ of the old optimizer.
      step: How many steps it took; for schedules and Adam.

    Returns:
      A state with the structure, dtypes and shardings of `like`.

    Raises:
      ValueError: Another key, buffers of other parameters or shapes, with their paths.

    Example:
        >>> kernels = {"up": jnp.ones((4, 8))}
        >>> old = {"momentum_buffer": {"up": jnp.full((4, 8), 0.5)}}
        >>> like = mc.scale_by_muon(0.75).init(kernels)
        >>> trace, _ = mc.from_torch_muon(old, like, momentum=0.75, step=100)
        >>> float(trace.trace["up"][0, 0])
        2.0
    """
    if not isinstance(old, Mapping) or not old.keys() or set(old) - set(_OF_TORCH):
        told = sorted(map(str, old)) if isinstance(old, Mapping) else old
        raise ValueError(
            f"Expected a tree of parameters for {', '.join(_OF_TORCH)}, the last two only if there "
            f"was an AdamW, got {told!r}."
        )
    buffers, averages, squares = (_by_path(old.get(name)) for name in _OF_TORCH)
    return _Source(buffers, averages, squares, momentum, step).fill(like)


@dataclass
class _Source:
    """What a state holds, whoever kept it.

    Attributes:
      momentum: The averaged gradients of Muon's parameters.
      mu: Adam's first moments.
      nu: Adam's second moments.
      beta: How much of the average is kept in a step.
      step: How many steps were taken.
      used: What a new state took.
    """

    momentum: Mapping[Path, Any]
    mu: Mapping[Path, Any]
    nu: Mapping[Path, Any]
    beta: float
    step: int
    used: set[Path] = field(default_factory=set)

    def __post_init__(self):
        check_number("beta or momentum", self.beta, lambda x: 0 <= x < 1, "in [0, 1)")
        check_count("step", self.step, least=0)

    def fill(self, like: optax.OptState) -> optax.OptState:
        """`like` with all that is known.

        Raises:
          ValueError: Something is left, or lacking.
        """
        counted = jax.tree_util.tree_map_with_path(self._counted, like)
        kinds = optax.TraceState | CorrectedTraceState | optax.ScaleByAdamState
        filled = jax.tree.map(self._node, counted, is_leaf=lambda node: isinstance(node, kinds))
        left = {*self.momentum, *self.mu} - self.used
        if left:
            raise ValueError(
                f"The old state has momentum of {paths.some(sorted(left))}, which this optimizer "
                "does not keep; give `like` of the same parameters, with an Adam as the other "
                "optimizer."
            )
        return filled

    def _counted(self, keys: Any, leaf: Any) -> Any:
        last: Any = keys[-1] if keys else None
        of_state = isinstance(last, jax.tree_util.GetAttrKey) and last.name == "count"
        if of_state and jnp.ndim(leaf) == 0 and jnp.issubdtype(paths.dtype_of(leaf), jnp.integer):
            return as_like(self.step, leaf, ("count",))
        return leaf

    def _node(self, node: Any) -> Any:
        match node:
            case optax.TraceState():
                return node._replace(trace=self._trace(node.trace))
            case CorrectedTraceState():
                step = as_like(self.step, node.step, ("step",))
                return node._replace(trace=self._trace(node.trace), step=step)
            case optax.ScaleByAdamState():
                mu, nu = (
                    self._tree(tree, values, 1, "Adam's moments")
                    for tree, values in ((node.mu, self.mu), (node.nu, self.nu))
                )
                return node._replace(mu=mu, nu=nu)
        return node

    def _trace(self, tree: Any) -> Any:
        in_bits = isinstance(tree, QuantizedTrace)
        wanted = floats_like(tree) if in_bits else tree
        found = self._tree(wanted, self.momentum, 1 / (1 - self.beta), "Muon's momentum")
        return all_as_like(quantized(found), tree) if in_bits else found

    def _tree(self, tree: Any, values: Mapping[Path, Any], scale: float, what: str) -> Any:
        wanted = [path for path, _ in paths.leaves(tree)]
        if lacking := [path for path in wanted if path not in values]:
            raise ValueError(
                f"The old state has not {what} of {paths.some(lacking)}; it has them of "
                f"{paths.some(values, none='nothing')}. Each parameter must go to the "
                "same optimizer as before: give this one dimension_numbers= or rules= that say so "
                "(optax.contrib.muon without dimension numbers takes all of two axes, embeddings "
                "too, and no others)."
            )
        self.used.update(wanted)

        def filled(path: Path, leaf: Any) -> jax.Array:
            value = jnp.asarray(values[path])
            return as_like(scale * value.astype(accumulation_dtype(value.dtype)), leaf, path)

        return paths.map_with_path(filled, tree)


def _by_path(tree: Any) -> dict[Path, Any]:
    return dict(paths.leaves(tree))


def _nodes(state: Any) -> Iterator[dict[str, Any]]:
    """The nodes of a state that have names for what they hold, the outermost of those with moments
    and not what is in them."""
    if hasattr(state, "_asdict"):
        state = state._asdict()
    if isinstance(state, Mapping):
        named = {str(key): value for key, value in state.items()}
        if {"count", "mu"} <= named.keys():
            yield named
            return
        state = list(named.values())
    for inner in state if isinstance(state, list | tuple) else ():
        yield from _nodes(inner)
