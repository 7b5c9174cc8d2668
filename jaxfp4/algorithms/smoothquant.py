"""Channel scales that share outliers between activation and weights."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array


def smoothquant_scales(activation: Array, weight: Array, alpha: float) -> Array:
    """`activation**alpha / weight**(1 - alpha)`, both amaxes of channels `[.., K]`; activations are divided by it.

    A channel that is zero on either side gets 1: nothing can be shared there. The others are divided by the geometric
    mean of their largest and smallest, and kept within [2^-10, 2^10], so that bfloat16 norms stay in range.

    Source: SmoothQuant, arXiv 2211.10438, with alpha 0.5. In NVFP4 a large channel costs only its own block of 16.

    >>> smoothquant_scales(jnp.array([4.0, 1.0, 0.0]), jnp.array([1.0, 1.0, 1.0]), 0.5)
    Array([1.4142135 , 0.70710677, 1.        ], dtype=float32)
    """
    usable = (activation > 0) & (weight > 0)
    x, w = (jnp.where(usable, side, 1.0) for side in (activation, weight))
    return centred(jnp.exp(alpha * jnp.log(x) - (1 - alpha) * jnp.log(w)), usable)


def centred(scales: Array, usable: Array) -> Array:
    """Scales around 1: divided by `sqrt(max * min)` of those in use, 1 elsewhere, within [2^-10, 2^10]."""
    largest = jnp.max(jnp.where(usable, scales, 0), -1, keepdims=True)
    smallest = jnp.min(jnp.where(usable, scales, jnp.inf), -1, keepdims=True)
    middle = jnp.sqrt(largest) * jnp.sqrt(smallest)
    return jnp.where(usable, jnp.clip(scales / jnp.where(jnp.isfinite(middle), middle, 1.0), 2.0**-10, 2.0**10), 1.0)
