"""Channel scales searched for the least error of the output.

The other half of AWQ, the clipping of each block, is the search of `jaxfp4.algorithms.local_hessian` on the scaled
weights and moments: `Method(LocalHessian(), channels=Awq())`, the recipe `nvfp4_awq_clip`. Model-Optimizer calls scales
alone `awq_lite`, clipping alone `awq_clip`, which is `nvfp4_local_hessian` here, and both `awq_full`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.algorithms.smoothquant import centred
from jaxfp4.formats import BLOCK_SIZE

ROUNDING_ERROR = 0.009
"""The relative squared error of max calibration on normal values, 0.00905: that of a quantized activation."""


def awq_scales(activation: Array, weight: Array, steps: int, loss: Callable[[Array], Array]) -> Array:
    """The scales `[.., K]` with the least `loss(scales) [..]` among powers of the activation's mean magnitudes.

    Candidates are `activation**a / weight**(1 - a)` for a = 0, 1 / steps, .., 1, and no scaling at all, which wins
    ties: so the loss is never larger than without. `activation` and `weight` `[.., K]` are mean magnitudes of channels,
    up to a factor; channels that are zero on either side are not scaled. A loss that is NaN never wins.

    Source: AWQ, arXiv 2306.00978, with the weight's magnitudes as Model-Optimizer's `awq_lite` has them.
    """
    usable = (activation > 0) & (weight > 0)
    x, w = (jnp.log(jnp.where(usable, side, 1.0)) for side in (activation, weight))
    neutral = jnp.ones_like(x)

    def step(i: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        scales, least = best
        alpha = i.astype(jnp.float32) / steps
        candidate = centred(jnp.exp(alpha * x - (1 - alpha) * w), usable)
        found = loss(candidate)
        better = found < least
        return jnp.where(better[..., None], candidate, scales), jnp.where(better, found, least)

    return lax.fori_loop(0, steps + 1, step, (neutral, loss(neutral)))[0]


def output_error(error: Array, moments: Array) -> Array:
    """`sum(diag(error @ moments @ error.T))`: squared output errors of `[.., N, K]` under `sum(x x^T)` `[.., K, K]`."""
    mixed = jnp.einsum("...nk,...kl->...nl", error, moments, precision=lax.Precision.HIGHEST)
    return jnp.sum(mixed * error, (-2, -1))


def activation_error(weight: Array, moments: Array) -> Array:
    """What rounding the activation adds to the squared output errors, about, for weights `[.., N, K]`.

    Each channel gets `ROUNDING_ERROR` times the mean square of its block of 16, independently.
    """
    power = jnp.sum(weight * weight, -2)
    energy = jnp.diagonal(moments, axis1=-2, axis2=-1)
    padding = [(0, 0)] * (energy.ndim - 1) + [(0, -energy.shape[-1] % BLOCK_SIZE)]
    blocks = [jnp.pad(side, padding).reshape(*side.shape[:-1], -1, BLOCK_SIZE) for side in (energy, power)]
    return ROUNDING_ERROR * jnp.sum(jnp.mean(blocks[0], -1) * jnp.sum(blocks[1], -1), -1)
