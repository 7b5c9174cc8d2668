"""Borders between E2M1 codes under one divisor: integers with which values are coded by comparing their bits."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from jaxfp4.formats import exact

_OCTAVE = 1 << 23
_ONE = 127 << 23
_MANTISSA = _OCTAVE - 1
_UNDERFLOW = 150
"""A float32 quotient of at most 2^-150 is zero."""
_INTEGERS = 2.0**24


class Thresholds(NamedTuple):
    """Float32 bit patterns, uint32, each of the divisor's shape."""

    reached: tuple[Array, ...]
    """The smallest magnitude whose code is 1, 2, .. 7, in this order."""
    negative: Array
    """The smallest magnitude whose negative is not code 0, because its quotient does not underflow."""


def code_thresholds(divisor: Array) -> Thresholds:
    """The smallest float32 magnitudes whose IEEE quotients `x / divisor` round to each E2M1 code, ties to even.

    `divisor` is float32, positive and normal, at least 2^-124 and at most 2^126. A code's border moves with the divisor
    by powers of two, and so do those of 1.25, 2.5 and 5 and those of 1.75 and 3.5 among each other: three are computed.

    >>> (thresholds,) = code_thresholds(jnp.ones(1))[0][1:2]
    >>> exact.as_float(thresholds)
    Array([0.75], dtype=float32)
    """
    bits = exact.as_bits(divisor)
    unit = exact.as_float((bits & jnp.uint32(_MANTISSA)) | jnp.uint32(_ONE))
    exponent = (bits & jnp.uint32(~_MANTISSA & 0x7FFFFFFF)) - jnp.uint32(_ONE)
    # A quarter of the divisor is a tie that goes to zero, and the next float's quotient is beyond the tie.
    one = bits - jnp.uint32(2 * _OCTAVE - 1)
    two = _border(unit, 0.75, to_upper=True) + exponent
    three = _border(unit, 1.25, to_upper=False) + exponent
    four = _border(unit, 1.75, to_upper=True) + exponent
    octave = jnp.uint32(_OCTAVE)
    reached = (one, two, three, four, three + octave, four + octave, three + 2 * octave)
    return Thresholds(reached, least_nonzero(divisor))


def least_nonzero(divisor: Array) -> Array:
    """The smallest magnitude, as bits, whose float32 quotient by the divisor is not zero."""
    normal = exact.as_bits(divisor) - jnp.uint32(_UNDERFLOW << 23)
    # Below 2^24 times the smallest subnormal, which is an integer number of them.
    subnormal = (jnp.minimum(divisor, _INTEGERS) * 0.5).astype(jnp.int32).astype(jnp.uint32)
    return jnp.where(divisor >= _INTEGERS, normal, subnormal) + 1


def _border(unit: Array, midpoint: float, to_upper: bool) -> Array:
    """The bits of the smallest float32 whose float32 quotient by `unit`, in [1, 2), is rounded up at a midpoint.

    It is within two units in the last place of their product, because the quotient's own rounding moves the border by
    at most one of them. `to_upper` says that the tie goes to the upper code.
    """
    lowest = exact.as_bits(unit * midpoint) - jnp.uint32(to_upper)
    first, second, third = (lowest + jnp.uint32(i) for i in range(3))

    def up(bits: Array) -> Array:
        x = exact.as_float(bits)
        return exact.rounds_up(x, jnp.full_like(x, midpoint), unit, jnp.full(x.shape, to_upper))

    return jnp.where(up(first), first, jnp.where(up(second), second, third))
