"""Squared errors of blocks under a candidate scale, as integers.

A search compares errors that may differ by little or not at all. Sums of floats depend on their order and on fused
multiply-adds, so the winner would depend on the backend and the layout. Here each element's term is a fixed-point
number, made without an addition of products, and the sums are of integers: exact, in any order, the same everywhere.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, exact, nvfp4
from jaxfp4.formats.minifloat import E4M3

LARGEST_CODE = E4M3.sign_mask - 2
"""The code of 448."""

_LOW_BITS = 13
_HIGH_PART = 2.0**10
_WEIGHTED = 2.0**17
_FARTHEST = 13.0


class Error(NamedTuple):
    """A sum of squares as `high + low / 2^13` units, `0 <= low < 2^13`, both int32."""

    high: Array
    low: Array


def less(left: Error, right: Error) -> Array:
    """Whether one error is smaller than another."""
    return (left.high < right.high) | ((left.high == right.high) & (left.low < right.low))


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Magnitudes of blocks, one array for each of the 16 places, in units of a power of two near the block scale."""

    magnitudes: tuple[Array, ...]
    largest: Array
    code: Array
    """The E4M3 code of max calibration, uint8; that of NaN for a block that is not finite."""
    global_scale: Array
    unit: Array
    """The inverse of the power of two."""
    weights: tuple[Array, ...] | None
    """Importance of each place, at least one of a block in [1, 2) unless all are zero."""

    @classmethod
    def of(cls, blocks: Array, global_scale: Array, axis: int, importance: Array | None = None) -> Blocks:
        """From blocks whose axis of 16 is `axis`; arguments as those of `jaxfp4.formats.nvfp4.encode_scale`."""
        magnitudes = exact.as_float(exact.magnitude_bits(blocks))
        amax = jnp.max(exact.magnitude_bits(blocks), axis, keepdims=True)
        code = nvfp4.encode_scale(exact.as_float(amax), global_scale)
        scale = nvfp4.decode_scale(jnp.minimum(code, LARGEST_CODE)) * global_scale
        unit = exact.inverse_power_of_two(scale)
        scaled = jnp.minimum(magnitudes * unit, _FARTHEST)
        weights = None if importance is None else _places(_normalized(importance, axis), axis)
        return cls(_places(scaled, axis), jnp.max(scaled, axis, keepdims=True), code, global_scale, unit, weights)

    def scale(self, code: Array) -> Array:
        """The float32 block scale of a code, `scale * global_scale`, in the blocks' units."""
        return (nvfp4.decode_scale(code) * self.global_scale) * self.unit

    def error(self, code: Array) -> Error:
        """The sum over a block of `(x - q(x))^2`, weighted if there are weights, under an E4M3 code."""
        grid = Grid.of(self.scale(code))
        if self.weights is None:
            return _total([_squared(grid.error(a)) for a in self.magnitudes])
        terms = [_fixed(h * _square(grid.error(a))) for a, h in zip(self.magnitudes, self.weights, strict=True)]
        return _total(terms)

    def clipping(self, code: Array) -> Array:
        """A lower bound of the error's high part: that of the values beyond the largest code. Falls as scales grow."""
        limit = Grid.of(self.scale(code)).values[-1]
        if self.weights is None:
            beyond = jnp.maximum(self.largest - limit, 0)
            whole = (beyond * _HIGH_PART).astype(jnp.int32)
            return whole * whole
        parts = zip(self.magnitudes, self.weights, strict=True)
        return _total([_fixed(h * _square(jnp.maximum(a - limit, 0))) for a, h in parts]).high

    @property
    def settled(self) -> Array:
        """Blocks that keep the code of max calibration, those that are zero or not finite."""
        return (self.largest == 0) | (self.code > LARGEST_CODE)

    def stored(self, chosen: Array) -> Array:
        """The codes to store, uint8: `chosen`, where the block is not settled."""
        return jnp.where(self.settled, self.code, chosen).astype(jnp.uint8)


@dataclasses.dataclass(frozen=True)
class Grid:
    """The values that codes have under a scale, and the midpoints between them; adds of exact products only."""

    values: tuple[Array, ...]
    midpoints: tuple[Array, ...]

    @classmethod
    def of(cls, scale: Array) -> Grid:
        """The grid of a block's float32 scale."""
        half, quarter, twice = scale * 0.5, scale * 0.25, scale * 2
        values = (half, scale, scale + half, twice, twice + scale, twice * 2, twice * 2 + twice)
        midpoints = (
            quarter,
            half + quarter,
            scale + quarter,
            (scale + half) + quarter,
            twice + half,
            (twice + scale) + half,
            twice * 2 + scale,
        )
        return cls(values, midpoints)

    def error(self, magnitude: Array) -> Array:
        """The exact distance to the nearest value. At a midpoint both neighbours are as far."""
        value = jnp.zeros_like(magnitude)
        for midpoint, larger in zip(self.midpoints, self.values, strict=True):
            value = jnp.where(magnitude > midpoint, larger, value)
        return magnitude - value


def search(
    blocks: Blocks, highest: Array, evaluate: Callable[[Array], Error], bound: Callable[[Array], Array]
) -> Array:
    """The code with the least error, the lowest of those that tie, from `highest` downwards.

    Stops when for every block the bound, which grows as codes fall, has passed the best error's high part.
    """
    highest = jnp.minimum(highest.astype(jnp.int32), LARGEST_CODE)

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

    chosen = lax.while_loop(proceed, advance, (jnp.int32(1), highest, evaluate(highest)))[1]
    return blocks.stored(chosen)


def _places(x: Array, axis: int) -> tuple[Array, ...]:
    return tuple(lax.index_in_dim(x, i, axis, keepdims=True) for i in range(BLOCK_SIZE))


def _normalized(importance: Array, axis: int) -> Array:
    """Importance divided by a power of two near the block's largest; ones where all of a block is zero."""
    largest = jnp.max(importance, axis, keepdims=True)
    usable = largest > 0
    inverse = exact.inverse_power_of_two(jnp.clip(jnp.where(usable, largest, 1.0), 2.0**-126, 2.0**126))
    return jnp.where(usable, importance * inverse, 1.0)


def _square(x: Array) -> Array:
    return x * x


def _squared(error: Array) -> Error:
    """An element's square. Its high part is an integer's; what is left is a product, truncated."""
    whole = jnp.round(error * _HIGH_PART).astype(jnp.int32)
    high = whole.astype(jnp.float32) * (1 / _HIGH_PART)
    rest = error - high
    return Error(whole * whole, (rest * (high * 2 + rest) * (_HIGH_PART**2 * 2**_LOW_BITS)).astype(jnp.int32))


def _fixed(term: Array) -> Error:
    """A float32 term below 2^9 as a fixed-point number."""
    scaled = term * _WEIGHTED
    high = scaled.astype(jnp.int32)
    rest = scaled - high.astype(jnp.float32)
    return Error(high, (rest * 2.0**_LOW_BITS).astype(jnp.int32))


def _total(terms: Sequence[Error]) -> Error:
    """The sum of the terms, carried into its high part."""
    high, low = terms[0]
    for term in terms[1:]:
        high, low = high + term.high, low + term.low
    return Error(high + (low >> _LOW_BITS), low & ((1 << _LOW_BITS) - 1))
