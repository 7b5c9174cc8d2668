"""E4M3 arithmetic on plain arrays: `x ~ scale * value(code)` with one float32 scale, as key-value caches are stored.

Every result equals IEEE float32 arithmetic on every backend; see `jaxfp4.formats.exact` for how.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxfp4.formats import exact
from jaxfp4.formats.minifloat import E4M3

SCALE_DIVISOR = int(E4M3.max)
"""Absolute maximum over scale."""

NAN = E4M3.sign_mask - 1
"""The code of NaN, without a sign."""

_SHIFT = 23 - E4M3.mantissa_bits
_REBIAS = (127 - E4M3.bias) << E4M3.mantissa_bits


def nearest_code(numerator: Array, divisor: Array, least: float = 0.0) -> Array:
    """The code, uint32, nearest to `clip(numerator / divisor, least, 448)`, ties to even.

    Both are float32 and not negative, the divisor in [1, 2). Inf gives 448; the code for NaN is not defined.
    """
    estimate = jnp.clip(numerator / divisor, least, E4M3.max)
    normal = estimate >= E4M3.smallest_normal
    kept_bits = jnp.uint32((1 << 32) - (1 << _SHIFT))
    truncated = exact.as_float(exact.as_bits(estimate) & kept_bits)
    lower = jnp.where(normal, truncated, jnp.floor(estimate / E4M3.smallest) * E4M3.smallest)
    code = jnp.where(normal, (exact.as_bits(lower) >> _SHIFT) - _REBIAS, (lower / E4M3.smallest).astype(jnp.uint32))
    step = jnp.where(normal, exact.power_of_two(lower) * 2.0**-E4M3.mantissa_bits, E4M3.smallest)
    up = exact.rounds_up(numerator, lower + step / 2, divisor, odd=code % 2 == 1)
    return jnp.minimum(code + up.astype(jnp.uint32), NAN - 1)


def encode(x: Array, scale: Array) -> Array:
    """E4M3 codes, uint8, of `clip(x / scale, -448, 448)`, ties to even.

    Inf saturates at 448 and the sign of zero stays. NaN, in `x` or in `scale`, gives the code of NaN. `x` is float32,
    bfloat16 or float16, `scale` float32, positive and at least 2^-112, and broadcasts against x.

    >>> [hex(code) for code in encode(jnp.array([1.0, -0.3, 500.0]), jnp.array([1.0])).tolist()]
    ['0x38', '0xaa', '0x7e']
    """
    x = exact.to_float32(x)
    divisor = jnp.broadcast_to(scale, x.shape)
    inverse = exact.inverse_power_of_two(divisor)
    magnitude = exact.as_float(exact.magnitude_bits(x))
    code = nearest_code(magnitude * inverse, divisor * inverse)
    code = jnp.where(jnp.isnan(x) | jnp.isnan(divisor), NAN, code)
    return (code | ((exact.as_bits(x) >> 31) * E4M3.sign_mask)).astype(jnp.uint8)


def decode(codes: Array) -> Array:
    """The float32 value of E4M3 codes given as uint8; NaN for 0x7F and 0xFF, -0.0 for 0x80."""
    wide = codes.astype(jnp.uint32)
    magnitude = wide & NAN
    normal = exact.as_float((magnitude + _REBIAS) << _SHIFT)
    subnormal = magnitude.astype(jnp.float32) * E4M3.smallest
    value = jnp.where(magnitude < 1 << E4M3.mantissa_bits, subnormal, normal)
    value = jnp.where(magnitude == NAN, jnp.nan, value)
    return exact.as_float(exact.as_bits(value) | ((wide >> 7) << 31))


def dequantize(codes: Array, scale: Array) -> Array:
    """`scale * value(code)`, float32. `scale` broadcasts against the codes."""
    return scale * decode(codes)
