"""The global amax of an activation, from the largest magnitude and the block amaxes that calibration saw.

The global scale decides only over range: which block scales fit into E4M3, from 448 down to 2^-6 without loss and to
2^-9 with some. So what counts is where the amaxes of the blocks lie, not single values. Any global amax from the
largest block amax to 28672 times the smallest gives the same errors, but for the rounding of block scales, which
averages out.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, E2M1, E4M3
from jaxfp4.recipes.methods import Activations, HeadroomActivations, MaxActivations, PercentileActivations
from jaxfp4.tensors.pacing import paced
from jaxfp4.transform.histogram import BINS, carried, centres, edges, merged

_ANCHOR_RANGE = 1e6
_SHARE_BITS = 17
_ERROR_BITS = 12


@paced
@functools.partial(jax.jit, static_argnums=0)
def activation_amax(method: Activations, amax: Array, histogram: Array | None) -> Array:
    """The global amax `[...]` of activations whose largest magnitude is `amax` `[...]`.

    `histogram` `[..., 512, 2]` is a state of `LogHistogram`, None if the method needs none. An amax that is zero or not
    finite is returned as it is. Made of integers and single roundings, so equal on every backend.
    """
    if histogram is None or isinstance(method, MaxActivations):
        return amax
    flat = jax.vmap(functools.partial(_chosen, method))(amax.reshape(-1), histogram.reshape(-1, BINS, 2))
    return jnp.where((amax > 0) & jnp.isfinite(amax), flat.reshape(amax.shape), amax)


def _chosen(method: Activations, amax: Array, histogram: Array) -> Array:
    if isinstance(method, PercentileActivations):
        return percentile_amax(amax, histogram, method.percentile)
    if isinstance(method, HeadroomActivations):
        return headroom_amax(amax, histogram, method)
    return mse_amax(amax, histogram)


def percentile_amax(amax: Array, histogram: Array, percentile: float) -> Array:
    """The percentile of the block amaxes, at most `amax`; at 100 `amax` itself.

    Percentiles are of blocks and not of values: a block is stored well if the global scale covers its amax, however
    many of its values are small. Zero blocks do not count.
    """
    return jnp.minimum(amax, _percentile(amax, histogram, percentile))


def headroom_amax(amax: Array, histogram: Array, method: HeadroomActivations) -> Array:
    """`max(rho * anchor, upper)`: room above the data, so that larger activations than calibration saw still fit.

    `upper` and `anchor` are percentiles of the block amaxes, the anchor's of those not below upper / 10^6. Blocks down
    to rho / 28672 of the anchor keep block scales without loss. The rule of Model-Optimizer's `nvfp4_act_headroom`.
    """
    upper = _percentile(amax, histogram, method.upper_percentile)
    counted = jnp.asarray((centres().astype(np.float64) * _ANCHOR_RANGE).astype(np.float32)) >= upper
    anchor = _percentile(amax, jnp.where(counted[:, None], histogram, 0), method.anchor_percentile)
    return jnp.maximum(anchor * jnp.float32(method.rho), upper)


def mse_amax(amax: Array, histogram: Array) -> Array:
    """The global amax with the least mean over blocks of `sum((x - q(x))^2) / block_amax^2`; `amax` if none is better.

    Each block counts by its own magnitude. By plain squares the largest blocks would outweigh all others, and `amax`
    itself would be nearly the best. Errors are those of a typical block of normal values whose scale saturates at 448
    or is rounded below 2^-6, averaged over a bin, beyond those of a scale in between.
    """
    shares = _shares(histogram)
    errors = jnp.sum(shares[None] * jnp.asarray(_excess_errors()), 1, dtype=jnp.int32)
    bins = jnp.arange(BINS)
    top = jnp.max(jnp.where(jnp.any(histogram > 0, 1), bins, 0))
    allowed = jnp.where(bins <= top, errors, jnp.iinfo(jnp.int32).max)
    best = jnp.max(jnp.where(allowed == jnp.min(allowed), bins, 0))
    return jnp.where(best == top, amax, jnp.asarray(centres())[best])


def _percentile(amax: Array, histogram: Array, percentile: float) -> Array:
    """The centre of the first bin above which at most `1 - percentile / 100` of the blocks are; `amax` at 100."""
    if percentile == 100:
        return amax
    above = _as_float(carried(lax.cumsum(histogram, 0, reverse=True) - histogram))
    found = above <= _as_float(merged(histogram, [0])) * jnp.float32(1 - percentile / 100)
    return jnp.asarray(centres())[jnp.argmax(found)]


def _as_float(counts: Array) -> Array:
    """Counts in two parts as float32."""
    return counts[..., 1].astype(jnp.float32) * 2.0**16 + counts[..., 0].astype(jnp.float32)


def _shares(histogram: Array) -> Array:
    """Counts `[512]`, int32, divided by a power of two so that their sum is below 2^17."""
    low, high = histogram[:, 0], histogram[:, 1]
    bits = 32 - lax.clz(merged(histogram, [0])[1])
    shift = jnp.where(bits > 0, bits + 16 - _SHARE_BITS, 0)
    small = (high << (16 - jnp.minimum(shift, 16))) + (low >> jnp.minimum(shift, 16))
    return jnp.where(shift <= 16, small, high >> (jnp.maximum(shift, 16) - 16)).astype(jnp.int32)


@functools.cache
def _excess_errors() -> np.ndarray:
    """`[candidate, bin]`: 2^12 times the squared error of a block over the square of its amax, beyond the usual one."""
    width = float(np.log2(edges()[1] / edges()[0]))
    distance = np.arange(1 - BINS, BINS)
    offsets = (np.arange(16) + 0.5) / 16 - 0.5
    ratio = 2.0 ** ((distance[:, None] + np.add.outer(offsets, offsets).ravel()) * width)
    errors = _block_error(_rounded_scale(ratio * E4M3.max) / E4M3.max / ratio).mean(1)
    usual_width = np.log2(E4M3.max / E4M3.smallest_normal) / width
    usual = (distance <= 0) & (distance > -usual_width + 1)
    inner = (distance < -1) & (distance >= -1 - 10 * round(1 / width))
    excess = np.where(usual, 0, np.maximum(errors - errors[inner].mean(), 0))
    table = np.round(excess * 2**_ERROR_BITS).astype(np.int32)
    return table[np.arange(BINS)[None, :] - np.arange(BINS)[:, None] + BINS - 1]


def _rounded_scale(scale: np.ndarray) -> np.ndarray:
    """Block scales as E4M3 stores them, from 2^-9 to 448."""
    values = E4M3.magnitudes[1:]
    return values[np.searchsorted((values[1:] + values[:-1]) / 2, np.clip(scale, values[0], values[-1]))]


def _block_error(largest: np.ndarray) -> np.ndarray:
    """The squared error of a block with amax 1 whose largest representable value is given.

    The block's magnitudes are 16 evenly spaced quantiles of a normal distribution.
    """
    values = np.array([NormalDist().inv_cdf(0.5 + (i + 0.5) / (2 * BLOCK_SIZE)) for i in range(BLOCK_SIZE)])
    unit = largest[..., None] / E2M1.max
    scaled = values / values[-1] / unit
    midpoints = (E2M1.magnitudes[1:] + E2M1.magnitudes[:-1]) / 2
    rounded = E2M1.magnitudes[np.searchsorted(midpoints, scaled)]
    return np.sum(((scaled - rounded) * unit) ** 2, -1)
