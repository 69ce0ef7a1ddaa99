"""The clip of attention's outputs: rescale W_o of the heads, or blocks, that write too much.

Source: Su Jianlin, "QK-Clip" (spaces.ac.cn/archives/11126): the same may be done "wherever it is
unstable".
"""

import jax
import optax

from muonclip_jax._core.masks import Frozen
from muonclip_jax._core.maxima import AxisName
from muonclip_jax._core.sowing import MAX_OUTPUT
from muonclip_jax._layouts.blocks import Block, Layouts
from muonclip_jax._layouts.roles import Role
from muonclip_jax._transforms.clip import Clip, ClipState, Scope, Threshold, check_signal


def max_output_clip(
    layout: Layouts,
    threshold: Threshold,
    *,
    signal: str = MAX_OUTPUT,
    scope: Scope = "head",
    frozen: Frozen | None = None,
    axis_name: AxisName = None,
    heads_axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """Clips what attention heads, or whole blocks, write: the last link of a chain, as QK-Clip.

    With S the largest entry, in size, of what head h writes into the residual stream in this
    step's batch, and `gamma = threshold / S` where S > threshold (else 1), the head's part of W_o
    that the step arrives at is multiplied by `gamma`. What it writes scales by exactly that. The
    bias of W_o is of no head and stays: sow what stands before it is added.

    The model sows S in its attention modules, before a norm that follows:

    | sown as `max_output` | shape | what is bounded | cost of S |
    | --- | --- | --- | --- |
    | `jnp.abs(output).max()[None]` | `[1]` | the block's output; all its heads take one γ | none |
    | `mc.measure_max_output(attended, kernel)` | `[heads]` | each head's part of it | W_o once more, forward only |

    The block's output is at most the sum of its heads' parts. A clip for each of the `out`
    dimensions instead would sow `out` numbers for a block and keep as many in the state (7,168 in
    place of 64 in Kimi K2), and would turn the direction in which a head writes; this one does not.

    For an MLP or experts, give a layout of their last projection alone:
    `Layout("mlp", (Piece("o", "down_proj", "features out"),), softmax=False, block="*/mlp")`, of
    experts `"heads features out"`, with one number for each expert. Several of these, and
    `qk_clip`, may stand at the end of one chain, each with a `signal` of its own name.

    Cost and shardings are those of `qk_clip`: one pass over W_o, fused into the update.

    Args:
      layout: Where W_o is; several layouts as a list. Blocks of linear attention are clipped too.
      threshold: τ > 0, in units of the output's entries, or an Optax schedule of it; see `qk_clip`.
      signal: The name under which S is sown, and of the update's argument.
      scope: `"head"` clips each head by its own factor, `"layer"` all of a layer by the smallest.
      frozen: What nothing moves, see `qk_clip`. A block whose W_o is frozen is left out.
      axis_name: Inside `jax.shard_map` or `jax.pmap`, the axes of the data, see `qk_clip`.
      heads_axis_name: Inside `jax.shard_map`, the axes of the heads, see `qk_clip`.

    Returns:
      A transformation whose `update` needs `params` and the signal; its state is a `ClipState`.

    Raises:
      TypeError: An option of the wrong type.
      ValueError: As `clip_by_signal`; a block whose layout names no output projection.

    Example:
        >>> tx = optax.chain(optax.adamw(1e-3), mc.max_output_clip(layout, 30.0))
        >>> large = {"attn": {"max_output": jnp.array([60.0, 1.0])}}
        >>> _, state = tx.update(grads, tx.init(params), params, max_output=large)
        >>> state[-1].gamma["max_output"]["attn"]
        Array([0.5, 1. ], dtype=float32)
    """  # noqa: E501
    check_signal(signal)

    def factors(block: Block, gamma: jax.Array) -> dict[Role, jax.Array]:
        return {"o": gamma}

    owner, axes = "max_output_clip", (axis_name, heads_axis_name)
    clip = Clip(owner, layout, signal, factors, scope, *axes, frozen, acts_on="factors")
    clip.check(threshold)
    return clip.transformation(ClipState, threshold)
