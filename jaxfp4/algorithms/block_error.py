"""Squared errors of blocks under a candidate scale, as integers.

A search compares errors that may differ by little or not at all. Sums of floats depend on their order and on fused
multiply-adds, so the winner would depend on the backend and the layout. Here each element's term is a fixed-point
number, made without an addition of products, and the sums are of integers: exact, in any order, the same everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import exact, nvfp4
from jaxfp4.formats.minifloat import E2M1, E4M3
from jaxfp4.formats.thresholds import code_thresholds
from jaxfp4.tensors.mesh import varying_as

LARGEST_CODE = E4M3.sign_mask - 2
"""The code of 448."""

_LOW_BITS = 13
_HIGH_PART = 2.0**10
_WEIGHTED = 2.0**19
_TINY = 1 << 8


class Error(NamedTuple):
    """A sum of squares as `high + low / 2^13` units, `0 <= low < 2^13`, both int32, and as float32."""

    high: Array
    low: Array
    rounded: Array


def less(left: Error, right: Error) -> Array:
    """Whether one error is smaller than another.

    Of two that are tiny, those of blocks that the format holds almost exactly, the floats tell more than the integers.
    """
    tiny = (left.high < _TINY) & (right.high < _TINY)
    whole = (left.high < right.high) | ((left.high == right.high) & (left.low < right.low))
    return jnp.where(tiny, left.rounded < right.rounded, whole)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Magnitudes of blocks `[.., 16, ..]`, in units of a power of two that makes all of them less than 8.

    Zero is a value under every scale, so no error is larger than the magnitude: 16 squares fit an int32 whatever the
    scale, those of values that saturate and of blocks that have a subnormal E4M3 scale included.
    """

    axis: int
    magnitudes: Array
    largest: Array
    code: Array
    """The E4M3 code of max calibration, uint8; that of NaN for a block that is not finite."""
    global_scale: Array
    unit: Array
    """The inverse of the power of two."""
    weights: Array | None
    """Importance of each value, at least one of a block in [1, 2) unless all are zero."""

    @classmethod
    def of(cls, blocks: Array, global_scale: Array, axis: int, importance: Array | None = None) -> Blocks:
        """From blocks whose axis of 16 is `axis`; arguments as those of `jaxfp4.formats.nvfp4.encode_scale`."""
        magnitudes = exact.as_float(exact.magnitude_bits(blocks))
        amax = jnp.max(exact.magnitude_bits(blocks), axis, keepdims=True)
        code = nvfp4.encode_scale(exact.as_float(amax), global_scale)
        scale = nvfp4.decode_scale(jnp.minimum(code, LARGEST_CODE)) * global_scale
        quarter = jnp.where(code > LARGEST_CODE, 0.0, exact.as_float(amax) * 0.25)
        # A scale is at least the smallest code's, so the unit is finite for the smallest block too.
        unit = exact.inverse_power_of_two(jnp.maximum(quarter, scale))
        scaled = magnitudes * unit
        weights = None if importance is None else _normalized(importance, axis)
        return cls(axis, scaled, jnp.max(scaled, axis, keepdims=True), code, global_scale, unit, weights)

    def scale(self, code: Array) -> Array:
        """The float32 block scale of a code, `scale * global_scale`, in the blocks' units."""
        return (nvfp4.decode_scale(code) * self.global_scale) * self.unit

    def error(self, code: Array) -> Error:
        """The sum over a block of `(x - q(x))^2`, weighted if there are weights, under an E4M3 code."""
        error = Grid.of(self.scale(code)).error(self.magnitudes)
        square = error * error
        if self.weights is None:
            return _total(*_squared(error), square, self.axis)
        return _total(*_fixed(self.weights * square), self.weights * square, self.axis)

    def clipping(self, code: Array) -> Array:
        """A lower bound of the error's high part: that of the values beyond the largest code. Falls as scales grow."""
        limit = Grid.of(self.scale(code)).values[-1]
        if self.weights is None:
            beyond = jnp.maximum(self.largest - limit, 0)
            whole = (beyond * _HIGH_PART).astype(jnp.int32)
            return whole * whole
        beyond = jnp.maximum(self.magnitudes - limit, 0)
        return jnp.sum(_fixed(self.weights * (beyond * beyond))[0], self.axis, keepdims=True)

    @property
    def settled(self) -> Array:
        """Blocks that keep the code of max calibration, those that are zero or not finite."""
        return (self.largest == 0) | (self.code > LARGEST_CODE)

    def stored(self, chosen: Array) -> Array:
        """The codes to store, uint8: `chosen`, where the block is not settled."""
        return jnp.where(self.settled, self.code, chosen).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The magnitudes that codes have under a scale, and for each the smallest float32 that is rounded up to it."""

    values: tuple[Array, ...]
    thresholds: tuple[Array, ...]

    @classmethod
    def of(cls, scale: Array) -> Grid:
        """The grid of a block's float32 scale, which is not subnormal."""
        codes = range(1, len(E2M1.magnitudes))
        values = tuple(scale * float(E2M1.magnitudes[i]) for i in codes)
        return cls(values, tuple(exact.as_float(bits) for bits in code_thresholds(scale).reached))

    def error(self, magnitude: Array) -> Array:
        """The exact distance to the value of the code that the magnitude gets."""
        value = jnp.zeros_like(magnitude)
        for threshold, larger in zip(self.thresholds, self.values, strict=True):
            value = jnp.where(magnitude >= threshold, larger, value)
        return magnitude - value


def search(
    blocks: Blocks, highest: Array, evaluate: Callable[[Array], Error], bound: Callable[[Array], Array]
) -> Array:
    """The code with the least error, the lowest of those that tie, from `highest` downwards.

    Stops when for every block the bound, which grows as codes fall, has passed the best error's high part.
    """
    highest = jnp.minimum(highest.astype(jnp.int32), LARGEST_CODE)
    # Inside a shard_map a loop's state has one type throughout, that of the errors.
    highest = varying_as(highest, evaluate(highest).high)

    def reachable(step: Array, best: Error) -> Array:
        code = highest - step
        return ~blocks.settled & (code >= 1) & (bound(jnp.maximum(code, 1)) <= best.high)

    def proceed(state: tuple[Array, Array, Error]) -> Array:
        step, _, best = state
        return jnp.any(reachable(step, best))

    def advance(state: tuple[Array, Array, Error]) -> tuple[Array, Array, Error]:
        step, chosen, best = state
        error = evaluate(jnp.maximum(highest - step, 1))
        better = reachable(step, best) & ~less(best, error)
        best = Error(*(jnp.where(better, new, old) for new, old in zip(error, best, strict=True)))
        return step + 1, jnp.where(better, highest - step, chosen), best

    most = varying_as(jnp.full(highest.shape, jnp.iinfo(jnp.int32).max), highest)
    worst = Error(most, most, varying_as(jnp.full(highest.shape, jnp.inf), highest))
    first = varying_as(jnp.int32(0), highest)
    chosen = lax.while_loop(proceed, advance, (first, highest, worst))[1]
    return blocks.stored(chosen)


def _normalized(importance: Array, axis: int) -> Array:
    """Importance divided by a power of two near the block's largest; ones where all of a block is zero."""
    largest = jnp.max(importance, axis, keepdims=True)
    usable = largest > 0
    inverse = exact.inverse_power_of_two(jnp.clip(jnp.where(usable, largest, 1.0), 2.0**-126, 2.0**126))
    return jnp.where(usable, importance * inverse, 1.0)


def _squared(error: Array) -> tuple[Array, Array]:
    """Squares as fixed-point numbers: the high part is an integer's square, what is left a product, truncated."""
    whole = jnp.round(error * _HIGH_PART).astype(jnp.int32)
    high = whole.astype(jnp.float32) * (1 / _HIGH_PART)
    rest = error - high
    return whole * whole, (rest * (high * 2 + rest) * (_HIGH_PART**2 * 2**_LOW_BITS)).astype(jnp.int32)


def _fixed(terms: Array) -> tuple[Array, Array]:
    """Float32 terms below 2^7 as fixed-point numbers."""
    scaled = terms * _WEIGHTED
    high = scaled.astype(jnp.int32)
    return high, ((scaled - high.astype(jnp.float32)) * 2.0**_LOW_BITS).astype(jnp.int32)


def _total(high: Array, low: Array, rounded: Array, axis: int) -> Error:
    """The sums along an axis, size 1 kept, carried into the high part."""
    high, low, rounded = (jnp.sum(part, axis, keepdims=True) for part in (high, low, rounded))
    return Error(high + (low >> _LOW_BITS), low & ((1 << _LOW_BITS) - 1), rounded)
