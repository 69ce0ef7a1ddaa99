"""Whether a layout is the model's own: proved on the model, not by shapes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from muonclip_jax._core import paths
from muonclip_jax._core.sowing import MAX_LOGITS, read_signal
from muonclip_jax._diagnostics.layout_trials import (
    Finding,
    Layer,
    Outcome,
    difference,
    findings,
    shared_pieces,
)
from muonclip_jax._layouts.blocks import Block, Layouts, blocks_with_logits
from muonclip_jax._layouts.roles import Role
from muonclip_jax._layouts.sown import pair
from muonclip_jax._transforms.clip import Clip, ClipState

ModelFn = Callable[[Any, Any], tuple[Any, Any]]


@dataclass(frozen=True)
class LayoutProof:
    """What `check_layout` proved.

    Attributes:
      roles: By attention block, the roles whose pieces are right.
      heads: Query heads of all layers together.
      behind_norm: Blocks with a QK-norm: their pieces are right, and no clip would do anything.
      left_out: Modules that sowed and that the layouts leave out.

    Example:
      >>> proof = mc.LayoutProof({"attn": ("q", "k")}, heads=2, behind_norm=(), left_out=())
      >>> print(proof)
      attn: q, k
      2 heads in all
    """

    roles: dict[str, tuple[str, ...]]
    heads: int
    behind_norm: tuple[str, ...]
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{name}: {', '.join(roles)}{' (behind a QK-norm)' * (name in self.behind_norm)}"
            for name, roles in self.roles.items()
        ]
        lines.append(f"{self.heads} heads in all")
        lines += [f"left out by the layout: {', '.join(self.left_out)}"] * bool(self.left_out)
        return "\n".join(lines)


def check_layout(model_fn: ModelFn, params: Any, layout: Layouts, batch: Any) -> LayoutProof:
    """Proves a layout on the model that it is for, before a training relies on it.

    `find_blocks` and the clips compare shapes, which a wrong layout can have. This scales what the
    layout says is a head's, one layer after the other, and looks at what the model does:

    | pieces | factors | what must follow |
    | --- | --- | --- |
    | queries, keys | QK-Clip at a fraction of each head's max logit, another for each | every max logit falls by its own γ |
    | the same, behind a QK-norm | -1 for some heads | max logits change for these heads only |
    | values, outputs | v × 2ⁿ and o × 2⁻ⁿ, n by key head | the output stays |
    | outputs (values where the layout has no `o`), gates | 0, then q or gate × ±1 | the output stays |
    | what all heads share (MLA's `k_rope`, latents, gains) | -1, and -1 for what it meets | all stays |

    Parameters that are all zero (biases and output kernels at initialization) get small random
    numbers first, as no factor shows of zeros.

    Cost: about ten forward passes a layer, twelve of MLA, compiled once, and a copy of the
    changed kernels; more where something is wrong, to find the head. Use a small batch; one of a
    few tokens will do.

    What this cannot see: queries and keys exchanged, with as many heads (the clip is the same);
    two heads exchanged in every piece and in what is sown; the order of features within a head,
    if it is wrong in both of two that meet; pieces of which the layout has only one side (`v`
    without `o` is tried against the queries, a latent without `v` only in the logits); what enters
    by less than the tolerance, such as a tiny bias; a `block` pattern that leaves attention out
    (`left_out` lists what sowed); and what this batch does not use. A false alarm comes from
    parameters that several layers share, from norms on MLA's latents that add a bias, and from
    values that pass a nonlinearity.

    Args:
      model_fn: `(params, batch) -> (output, sown)`, the forward pass without dropout: any tree with
        float arrays, best the model's last logits, and what was sown, as for `read_max_logits`. It
        is jitted.
      params: The model's parameters.
      layout: The layout, or several as a list.
      batch: What `model_fn` gets: arrays.

    Returns:
      A `LayoutProof`; printed, it says which roles of which blocks were proved.

    Raises:
      TypeError: `model_fn` does not return two things, or no floating point output.
      ValueError: The layout is wrong: for each layer with the pieces, heads, what was measured and
        what it likely comes from (of each layout the first such layer). What `find_blocks` and
        `qk_clip` raise. Outputs that differ between two equal passes. A layer that proves nothing:
        max logits of 0 or none, an output that does not depend on it.

    Example:
      >>> def model_fn(params, batch):
      ...     return model.apply({"params": params}, batch, mutable=["intermediates"])
      >>> print(mc.check_layout(model_fn, params, layout, tokens))
      attn: q, k, v, o
      2 heads in all
    """  # noqa: E501
    blocks = blocks_with_logits(layout, params)
    left_out: list[str] = []
    run = _forward(model_fn, layout, batch, left_out)
    params = _without_zeros(params)
    base = run(params)
    noise = difference(base, run(params))
    if noise > 1e-3 * max(float(jnp.abs(x).max(initial=0)) for x in base.output):
        raise ValueError(
            f"check_layout: two equal forward passes differ by {noise:.3g}. Take dropout and other "
            "random numbers out of model_fn (deterministic=True)."
        )
    wrong: list[Finding] = []
    failed = set()
    for block in blocks:
        for index in np.ndindex(*block.stack):
            if id(block.layout) not in failed:
                found = findings(Layer(run, params, base, noise, block, index))
                wrong += found
                failed |= {id(block.layout)} if found else set()
    if wrong:
        several = "; further layers of the same layout were not tried" if len(blocks) > 1 else ""
        raise ValueError(
            "check_layout: this is not the model's layout. Correct the pieces (axes=, sizes=, "
            "select=, bias=, or the numbers that the layout was made with)"
            f"{several}.\n" + "\n".join(f"- {finding}" for finding in wrong)
        )
    return LayoutProof(
        {block.name: _proved(block) for block in blocks},
        sum(int(np.prod(block.shape)) for block in blocks),
        tuple(block.name for block in blocks if block.qk_norms),
        tuple(left_out),
    )


def _forward(
    model_fn: ModelFn, layout: Layouts, batch: Any, left_out: list[str]
) -> Callable[[Any], Outcome]:
    """The forward pass, compiled once. Tracing it fills `left_out`."""
    # A clip that scales nothing pairs what was sown with the blocks, or says what does not.
    reader = Clip("check_layout", layout, MAX_LOGITS, lambda block, gamma: {}, "head", None, None)
    reader = reader.transformation(ClipState, 1.0)

    def forward(params: Any, batch: Any) -> Outcome:
        result = model_fn(params, batch)
        if not isinstance(result, tuple) or len(result) != 2:
            raise TypeError(
                f"check_layout: model_fn must return (output, what was sown), got {type(result)}. "
                "Linen: model.apply(..., mutable=['intermediates']); NNX: "
                "nnx.capture(model, nnx.Intermediate)(batch)."
            )
        output = [x for x in jax.tree.leaves(result[0]) if jnp.issubdtype(x.dtype, jnp.floating)]
        if not output:
            raise TypeError(
                "check_layout: model_fn's output has no floating point array; return the model's "
                "logits, not tokens or nothing."
            )
        state: Any  # which Optax's types know as a tree only
        _, state = reader.update(params, reader.init(params), params, max_logits=result[1])
        paths_of = read_signal(result[1], MAX_LOGITS)
        paired = pair(layout, blocks_with_logits(layout, params), params, paths_of).modules.values()
        left_out[:] = map(paths.show, paths_of.keys() - {p for some in paired for p in some})
        return Outcome(output, state.maxima[MAX_LOGITS])

    compiled = jax.jit(forward)
    return lambda params: compiled(params, batch)


def _without_zeros(params: Any) -> Any:
    """The parameters with random numbers for those that are all zero."""
    rng = np.random.default_rng(0)

    def filled(leaf: Any) -> Any:
        if not jnp.issubdtype(getattr(leaf, "dtype", int), jnp.floating) or jnp.any(leaf):
            return leaf
        drawn = np.asarray(0.1 * rng.standard_normal(leaf.shape), leaf.dtype)
        return jax.device_put(drawn, leaf.sharding) if isinstance(leaf, jax.Array) else drawn

    return jax.tree.map(filled, params)


def _proved(block: Block) -> tuple[str, ...]:
    """The block's roles, but for those that no trial reaches."""
    roles: dict[Role, None] = dict.fromkeys(part.role for part in block.parts)
    shared = shared_pieces(block)
    return tuple(
        role
        for role in roles
        if (role != "gate" or "o" in roles) and (role not in shared or shared[role])
    )
