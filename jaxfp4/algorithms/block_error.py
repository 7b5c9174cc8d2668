"""Errors of blocks under a candidate scale, and the search for the candidate with the least."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import exact, nvfp4
from jaxfp4.formats.scale_codes import LARGEST_CODE
from jaxfp4.formats.squared_error import Error, Grid, high_part, high_square, high_term, less, low_square, low_term
from jaxfp4.tensors.mesh import varying_as


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
        weights = None if importance is None else normalized(importance, axis)
        return cls(axis, scaled, jnp.max(scaled, axis, keepdims=True), code, global_scale, unit, weights)

    def scale(self, code: Array) -> Array:
        """The float32 block scale of a code, `scale * global_scale`, in the blocks' units."""
        return (nvfp4.decode_scale(code) * self.global_scale) * self.unit

    def error(self, code: Array) -> Error:
        """The sum over a block of `(x - q(x))^2`, weighted if there are weights, under an E4M3 code."""
        error = Grid.of(self.scale(code)).error(self.magnitudes)
        square = error * error
        if self.weights is None:
            return self._total(high_square(error), low_square(error), square)
        term = self.weights * square
        return self._total(high_term(term), low_term(term), term)

    def clipping(self, code: Array) -> Array:
        """A lower bound of the error's high part: that of the values beyond the largest code. Falls as scales grow."""
        limit = Grid.of(self.scale(code)).values[-1]
        if self.weights is None:
            whole = high_part(jnp.maximum(self.largest - limit, 0))
            return whole * whole
        beyond = jnp.maximum(self.magnitudes - limit, 0)
        return jnp.sum(high_term(self.weights * (beyond * beyond)), self.axis, keepdims=True)

    def _total(self, *parts: Array) -> Error:
        return Error.of_sums(*(jnp.sum(part, self.axis, keepdims=True) for part in parts))

    @property
    def settled(self) -> Array:
        """Blocks that keep the code of max calibration, those that are zero or not finite."""
        return (self.largest == 0) | (self.code > LARGEST_CODE)

    def stored(self, chosen: Array) -> Array:
        """The codes to store, uint8: `chosen`, where the block is not settled."""
        return jnp.where(self.settled, self.code, chosen).astype(jnp.uint8)


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


def normalized(importance: Array, axis: int) -> Array:
    """Importance divided by a power of two near the block's largest; ones where all of a block is zero."""
    largest = jnp.max(importance, axis, keepdims=True)
    usable = largest > 0
    inverse = exact.inverse_power_of_two(jnp.clip(jnp.where(usable, largest, 1.0), 2.0**-126, 2.0**126))
    return jnp.where(usable, importance * inverse, 1.0)
