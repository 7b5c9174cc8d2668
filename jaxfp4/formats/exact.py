"""Correctly rounded quotients, decided without dividing.

The format is defined by IEEE float32 quotients, but XLA multiplies by a reciprocal and GPUs divide approximately, so a
division's result depends on the backend. Here every decision is the sign of a residual `x - t * d` whose terms are
exact in float32: `d` is split into two halves of 12 bits and `t` has at most 12 bits, so no product rounds, and a
fused multiply-add changes nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

_HIGH_HALF = 0xFFFFF000
_EXPONENT = 0x7F800000
_MANTISSA_BITS = 23
_HALF_SHIFT = 13  # float32's mantissa bits beyond float16's
_HALF_INFINITY = 0x7C00


def to_float32(x: Array) -> Array:
    """`x.astype(float32)`, keeping bfloat16 subnormals and any rounding before it that XLA would optimize away.

    On a GPU, XLA removes pairs of casts such as float32 to float16 and back; it does not see through the bits.
    """
    if x.dtype == jnp.float32:
        return x
    bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32)
    if x.dtype == jnp.bfloat16:
        return as_float(bits << 16)
    magnitude = bits & 0x7FFF
    exponent = jnp.where(magnitude >= _HALF_INFINITY, 255 - 31, 127 - 15).astype(jnp.uint32)
    normal = as_float((magnitude << _HALF_SHIFT) + (exponent << _MANTISSA_BITS))
    subnormal = magnitude.astype(jnp.float32) * 2.0**-24
    value = jnp.where(magnitude < 1 << (_MANTISSA_BITS - _HALF_SHIFT), subnormal, normal)
    return as_float(as_bits(value) | ((bits >> 15) << 31))


def cast(x: Array, dtype: jax.typing.DTypeLike) -> Array:
    """`x.astype(dtype)` for float32 `x`, with a rounding that XLA cannot remove together with a later upcast."""
    dtype = jnp.dtype(dtype)
    if dtype in (jnp.bfloat16, jnp.float16):
        info = jnp.finfo(dtype)
        rounded = lax.reduce_precision(x, exponent_bits=info.nexp, mantissa_bits=info.nmant)
        if dtype == jnp.float16:  # reduce_precision flushes its subnormals, which are normal in float32
            subnormal = jnp.round(x * 2.0**24) * 2.0**-24
            rounded = jnp.where(jnp.abs(x) < float(info.smallest_normal), subnormal, rounded)
        x = rounded
    return x.astype(dtype)


def as_bits(x: Array) -> Array:
    """The bits of a float32 array as uint32."""
    return lax.bitcast_convert_type(x, jnp.uint32)


def as_float(bits: Array) -> Array:
    """The float32 array with these uint32 bits."""
    return lax.bitcast_convert_type(bits, jnp.float32)


def magnitude_bits(x: Array) -> Array:
    """Bits of |x|. As integers they are ordered as the magnitudes are, NaN above Inf, on every backend."""
    return as_bits(to_float32(x)) & 0x7FFFFFFF


def power_of_two(x: Array) -> Array:
    """The largest power of two that is not above x, for positive normal x."""
    return as_float(as_bits(x) & _EXPONENT)


def inverse_power_of_two(x: Array) -> Array:
    """`1 / power_of_two(x)` for 2^-126 <= x < 2^127."""
    exponent = as_bits(x) & _EXPONENT
    return as_float(jnp.uint32(254 << _MANTISSA_BITS) - exponent)


def residual(x: Array, threshold: Array, divisor: Array) -> Array:
    """`x - threshold * divisor`: exact when the quotient is near the threshold, of the right sign always.

    The threshold has at most 12 significant bits and the divisor lies in [1, 2). Near the threshold the first
    difference is exact by Sterbenz' lemma and the second is a small multiple of the operands' last places.
    """
    high = as_float(as_bits(divisor) & jnp.uint32(_HIGH_HALF))
    low = divisor - high
    return (x - threshold * high) - threshold * low


def rounds_up(x: Array, threshold: Array, divisor: Array, odd: Array) -> Array:
    """Whether float32(x / divisor) rounds above `threshold`, the midpoint between two neighbouring codes.

    A tie goes to the even code, so up if the lower code is `odd`. The float32 quotient equals the threshold within half
    a unit in the last place around it, and the threshold's last bit is zero, so it also takes both ends of that range.
    """
    half_unit = power_of_two(threshold) * 2.0 ** -(_MANTISSA_BITS + 1) * divisor
    remainder = residual(x, threshold, divisor)
    return jnp.where(odd, remainder >= -half_unit, remainder > half_unit)


def rounds_to_zero(magnitude: Array, divisor: Array) -> Array:
    """Whether float32(magnitude / divisor) is 0: for zero, or a quotient of at most 2^-150. `magnitude` is in bits."""
    shift = 75
    subnormal = magnitude >> _MANTISSA_BITS == 0
    # A subnormal is an integer times 2^-149; XLA on a CPU would flush it, so the integer is converted instead.
    from_integer = magnitude.astype(jnp.float32) * 2.0 ** (shift - 149)
    shifted = jnp.where(subnormal, from_integer, as_float(magnitude) * 2.0**shift)
    return (magnitude == 0) | (shifted <= divisor * 2.0**-shift)


def divide_by_integer(x: Array, divisor: int) -> Array:
    """The IEEE float32 quotient `x / divisor` for non-negative x with a normal quotient, and 0, Inf and NaN.

    `divisor` is odd below 2^11 times a power of two. Its odd part never makes a tie: that would need a dividend of
    more than 24 bits.

    >>> import numpy as np
    >>> x = np.float32([0.7, 3.0, 1e30])
    >>> bool(np.all(divide_by_integer(jnp.array(x), 2688) == x / np.float32(2688)))
    True
    """
    shift = (divisor & -divisor).bit_length() - 1
    odd = float(divisor >> shift)
    scale = power_of_two(jnp.clip(x, 2.0**-126, 2.0**126))
    unit = x * inverse_power_of_two(scale)
    guess = unit * jnp.float32(1 / odd)
    high = as_float(as_bits(guess) & jnp.uint32(_HIGH_HALF))
    remainder = (unit - odd * high) - odd * (guess - high)
    half_unit = power_of_two(guess) * (2.0 ** -(_MANTISSA_BITS + 1) * odd)
    step = (remainder > half_unit).astype(jnp.int32) - (remainder < -half_unit).astype(jnp.int32)
    quotient = as_float(as_bits(guess) + step.astype(jnp.uint32))
    result = quotient * (scale * 2.0**-shift)
    return jnp.where((x == 0) | ~jnp.isfinite(x), x, result)
