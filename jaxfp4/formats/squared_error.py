"""Squared errors of values under a block scale, as integers; for plain JAX and for kernels alike.

A search compares errors that may differ by little or not at all. Sums of floats depend on their order and on fused
multiply-adds, so the winner would depend on the backend and the layout. Here each value's term is a fixed-point number,
made without an addition of products, and the sums are of integers: exact, in any order, the same everywhere.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.formats import exact
from jaxfp4.formats.minifloat import E2M1
from jaxfp4.formats.thresholds import code_thresholds

LOW_BITS = 13
"""Bits of the low part of a fixed-point number."""

_HIGH_PART = 2.0**10
_WEIGHTED = 2.0**19
_TO_INTEGER = 1.5 * 2.0**23
"""Added to a float32 below 2^22 it leaves an integer, ties to even, in the last bits."""
_INTEGER_BITS = int(np.float32(_TO_INTEGER).view(np.int32))
"""That constant's bits. To subtract it as a float would not do: some versions of XLA remove the pair."""
_TINY = 1 << 8


class Error(NamedTuple):
    """A sum of squares as `high + low / 2^13` units, `0 <= low < 2^13`, both int32, and as float32."""

    high: Array
    low: Array
    rounded: Array

    @classmethod
    def of_sums(cls, high: Array, low: Array, rounded: Array) -> Error:
        """From sums of the three, the low part carried into the high one."""
        return cls(high + (low >> LOW_BITS), low & ((1 << LOW_BITS) - 1), rounded)


def less(left: Error, right: Error) -> Array:
    """Whether one error is smaller than another.

    Of two that are tiny, those of blocks that the format holds almost exactly, the floats tell more than the integers.
    """
    tiny = (left.high < _TINY) & (right.high < _TINY)
    whole = (left.high < right.high) | ((left.high == right.high) & (left.low < right.low))
    return jnp.where(tiny, left.rounded < right.rounded, whole)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The magnitudes that codes have under a scale, and for each the smallest float32 that is rounded up to it."""

    values: tuple[Array, ...]
    thresholds: tuple[Array, ...]

    @classmethod
    def of(cls, scale: Array) -> Grid:
        """The grid of a block's float32 scale, which is not subnormal."""
        values = tuple(scale * float(value) for value in E2M1.magnitudes[1:])
        return cls(values, tuple(exact.as_float(bits) for bits in code_thresholds(scale).reached))

    def up_to(self, largest: int) -> Grid:
        """The grid for magnitudes whose codes are at most `largest`."""
        return Grid(self.values[:largest], self.thresholds[:largest])

    def error(self, magnitude: Array) -> Array:
        """The exact distance to the value of the code that the magnitude gets."""
        value = jnp.zeros_like(magnitude)
        for threshold, larger in zip(self.thresholds, self.values, strict=True):
            value = jnp.where(magnitude >= threshold, larger, value)
        return magnitude - value


def high_square(error: Array) -> Array:
    """The high part, int32, of the square of a float32 below 2^12: the square of an integer."""
    whole = _whole(error)
    return whole * whole


def low_square(error: Array) -> Array:
    """What `high_square` leaves, int32: a product, truncated."""
    high = _whole(error).astype(jnp.float32) * (1 / _HIGH_PART)
    rest = error - high
    return (rest * (high * 2 + rest) * (_HIGH_PART**2 * 2**LOW_BITS)).astype(jnp.int32)


def high_part(magnitude: Array) -> Array:
    """An integer, int32, whose square is no more than the high part of the square of a magnitude."""
    return (magnitude * _HIGH_PART).astype(jnp.int32)


def high_term(term: Array) -> Array:
    """The high part, int32, of a float32 that is not negative and below 2^7, such as a weighted square."""
    return (term * _WEIGHTED).astype(jnp.int32)


def low_term(term: Array) -> Array:
    """What `high_term` leaves, int32, truncated."""
    scaled = term * _WEIGHTED
    return ((scaled - high_term(term).astype(jnp.float32)) * 2.0**LOW_BITS).astype(jnp.int32)


def _whole(error: Array) -> Array:
    bits = lax.bitcast_convert_type(error * _HIGH_PART + _TO_INTEGER, jnp.int32)
    return bits - _INTEGER_BITS
