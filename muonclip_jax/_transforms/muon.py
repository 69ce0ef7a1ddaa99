"""Muon: momentum, orthogonalized."""

import jax
import optax
from jax.typing import ArrayLike, DTypeLike

from muonclip_jax._core.shardings import Shardings
from muonclip_jax._orthogonalize.newton_schulz import NewtonSchulz
from muonclip_jax._parameters import routing
from muonclip_jax._spread.plan import DevicesPerMatrix
from muonclip_jax._transforms.momentum import momentum_trace
from muonclip_jax._transforms.orthogonalization import check_leaves, scale_by_orthogonalization


def scale_by_muon(
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    newton_schulz: NewtonSchulz = NewtonSchulz(),  # noqa: B008 (frozen)
    *,
    dimension_numbers: routing.DimensionNumbers | None = None,
    bias_correction: bool = False,
    mu_dtype: DTypeLike | None = None,
    shardings: Shardings | None = None,
    devices_per_matrix: DevicesPerMatrix | None = None,
) -> optax.GradientTransformation:
    """Replaces each matrix gradient by its orthogonalized momentum.

        grads ─► optax.trace: M ← μM + G, G + μM ─► scale_by_orthogonalization: msign

    Without Nesterov the second link gets `M` (K. Jordan et al. 2024; Moonlight, arXiv 2502.16982).
    For another momentum, chain it with `scale_by_orthogonalization`, which also says what a step
    costs and how matrices are spread over a mesh. Follow it with `scale_by_update_rms` for a size
    that suits the matrix shape. Every leaf must be a matrix or a batch of matrices: `mc.muon`
    sends the others to another optimizer. Memory: one momentum array per parameter, in the
    parameter's sharding.

    Args:
      momentum: μ in [0, 1).
      nesterov: Orthogonalize `G + μM` instead of `M`.
      newton_schulz: How to orthogonalize: the polynomials, the dtype and the method.
      dimension_numbers: Which axes are input and output of which parameter, as in
        `scale_by_orthogonalization`.
      bias_correction: Weigh Nesterov's two terms as `optax.contrib.muon` does, `β M/(1-β^{t+1})`
        and `G/(1-β^t)`. Without Nesterov it changes nothing, since `msign` ignores scale.
      mu_dtype: The dtype of the momentum; None keeps the parameter's.
      shardings: On meshes with Auto axes, how each parameter is split, as in
        `scale_by_orthogonalization`. Momentum is kept there (over the Explicit axes alone where one
        axis of an array is split over an Auto and then an Explicit axis of a mesh that has both:
        its type says no more). (Under `optax.inject_hyperparams` name it in `static_args`.)
      devices_per_matrix: How many devices make a group, as in `scale_by_orthogonalization`.

    Returns:
      A transformation whose updates have the gradients' shapes and dtypes (what passes between its
      links has the wider of the gradient's dtype and the momentum's). Its state is
      `(optax.TraceState(trace), optax.EmptyState())`; with `bias_correction` the first holds the
      steps taken as well.

    Raises:
      TypeError: An option of the wrong type, when built.
      ValueError: momentum outside [0, 1) when built; at init and update, as
        `scale_by_orthogonalization`; at update, a state of other matrices.

    Example:
        >>> tx = optax.chain(mc.scale_by_muon(), mc.scale_by_update_rms())
        >>> kernels = {"up": jnp.ones((8, 32))}
        >>> updates, _ = tx.update(kernels, tx.init(kernels), kernels)
        >>> updates["up"].shape
        (8, 32)
    """
    links = optax.chain(
        momentum_trace(
            momentum,
            nesterov,
            bias_correction=bias_correction,
            mu_dtype=mu_dtype,
            shardings=shardings,
        ),
        scale_by_orthogonalization(
            newton_schulz,
            dimension_numbers=dimension_numbers,
            shardings=shardings,
            devices_per_matrix=devices_per_matrix,
        ),
    )

    def update(updates, state, params=None):
        check_leaves(newton_schulz, updates)  # before momentum makes floats of whole numbers
        directions, state = links.update(updates, state, params)
        return jax.tree.map(lambda d, g: d.astype(g.dtype), directions, updates), state

    return optax.GradientTransformation(links.init, update)
