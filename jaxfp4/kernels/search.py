"""Searches over block scales inside a kernel, with the choices of `jaxfp4.algorithms.mse` and `four_over_six`.

There, errors are compared as integers, so that the choice does not depend on a backend's arithmetic. Here a first pass
computes them as floats, in a quarter of the instructions. Where the best two are closer than what the floats may be
off by, which is one block of some thousand, the integers decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import exact, fp8
from jaxfp4.formats.minifloat import E2M1
from jaxfp4.formats.scale_codes import LARGEST_CODE, OCTAVE, WITHOUT_HALF
from jaxfp4.formats.squared_error import Error, Grid, high_square, high_term, less, low_square, low_term
from jaxfp4.kernels.blocks import Launch, Values
from jaxfp4.kernels.quantize import MAGNITUDE, Context, Tuning, amax_bits
from jaxfp4.kernels.rounding import Scales

TUNING = Tuning(minor=Launch(16, 1), strided=Launch(32, 1))
_SMALLEST_NORMAL = 0x00800000
_AT_ONCE = 2
"""Codes that are tried between two looks at whether more can win."""
_TOLERANCE = 2.0**-14
"""More than what float errors are off by, relative to them: 2^-19 for 16 squares of differences."""
_FLOOR = 2.0**-20
"""The same for small errors, in squares of the block scale of max calibration; twice that with weights, up to 2."""


_State = tuple[Any, Array, Array, Array]
"""How many codes were tried, the best, its error and the second best's."""


class Block(NamedTuple):
    """What is common to all codes of a block."""

    amax: Array
    """Bits."""
    calibrated: Scales
    """Those of max calibration."""
    settled: Array
    """Blocks that keep them: zero, too small for a float, or not finite."""
    unit: Array
    """The inverse of a power of two that makes all magnitudes less than 8."""

    @property
    def largest(self) -> Array:
        """The largest magnitude in the block's unit."""
        return exact.as_float(self.amax) * self.unit

    def scale(self, codes: Array, context: Context) -> Array:
        """The block scales of codes, int32, in the block's unit."""
        return (fp8.decode(codes.astype(jnp.uint32)) * context.prepared.global_scale) * self.unit

    def stored(self, chosen: Array) -> Scales:
        """The scales of the chosen codes, where the block is not settled."""
        codes = jnp.where(self.settled, self.calibrated.codes, chosen.astype(jnp.uint32))
        return Scales(codes, fp8.decode(jnp.minimum(codes, jnp.uint32(LARGEST_CODE))))


def prepared_block(values: Values, context: Context) -> tuple[Block, Values]:
    """The blocks of values given as bits, and their magnitudes in their units."""
    prepared = context.prepared
    amax = amax_bits(values)
    calibrated = Scales.of_amax(amax, prepared, context.arithmetic)
    settled = (amax < _SMALLEST_NORMAL) | (calibrated.codes > LARGEST_CODE)
    usable = jnp.where(settled, 1.0, exact.as_float(amax))
    scale = jnp.where(settled, 1.0, calibrated.values * prepared.global_scale)
    unit = exact.inverse_power_of_two(jnp.maximum(usable * 0.25, scale))

    def magnitude(bits: Array) -> Array:
        return exact.as_float(bits & jnp.uint32(MAGNITUDE)) * unit

    return Block(amax, calibrated, settled, unit), values.map(magnitude)


def mse_scales(values: Values, context: Context) -> Scales:
    """`jaxfp4.algorithms.mse.mse_scales` without importance."""
    return _Search.of(values, context, None).scales()


def weighted_mse_scales(values: Values, context: Context) -> Scales:
    """`jaxfp4.algorithms.mse.mse_scales`; the context's table is `importance_table`'s."""
    return _Search.of(values, context, context.table).scales()


def four_over_six_scales(values: Values, context: Context) -> Scales:
    """`jaxfp4.algorithms.four_over_six.four_over_six_scales`."""
    block, magnitudes = prepared_block(values, context)
    larger = exact.as_bits(exact.as_float(block.amax) * 1.5)
    four = Scales.of_amax(larger, context.prepared, context.arithmetic).codes.astype(jnp.int32)
    six = block.calibrated.codes.astype(jnp.int32)
    codes = [jnp.clip(code, 1, LARGEST_CODE) for code in (six, four)]
    at_six, at_four = (_exact_error(magnitudes, None, block.scale(code, context)) for code in codes)
    return block.stored(jnp.where(less(at_four, at_six), codes[1], codes[0]))


class _Search(NamedTuple):
    """For the code with the least error, from the highest that can win downwards."""

    context: Context
    block: Block
    magnitudes: Values
    weights: Values | None
    """Numbers up to 2, for all blocks; None for ones."""
    highest: Array

    @classmethod
    def of(cls, values: Values, context: Context, weights: Sequence[Array] | None) -> _Search:
        block, magnitudes = prepared_block(values, context)
        calibrated = block.calibrated.codes.astype(jnp.int32)
        highest = jnp.minimum(jnp.maximum(calibrated + OCTAVE, WITHOUT_HALF), LARGEST_CODE)
        paired = None if weights is None else Values(tuple(weights[::2]), tuple(weights[1::2]))
        return cls(context, block, magnitudes, paired, highest)

    def scales(self) -> Scales:
        """Those with the least error, the lowest of equals."""
        infinite = jnp.full(self.highest.shape, jnp.inf, jnp.float32)
        start = (jnp.int32(0), self.highest, infinite, infinite)
        steps, chosen, best, second = lax.while_loop(self._proceed, self._advance, start)
        close = jnp.where(self.block.settled, 0, jnp.where(second <= self._at_most(best), 1, 0))

        def by_integers() -> Array:
            return jnp.where(close > 0, self._least(steps), chosen)

        return self.block.stored(lax.cond(jnp.max(close) > 0, by_integers, lambda: chosen))

    def _at_most(self, error: Array) -> Array:
        """What the float of an error may be that is not larger than another of this float."""
        return error * (1 + _TOLERANCE) + (_FLOOR if self.weights is None else 2 * _FLOOR)

    def _proceed(self, state: _State) -> Array:
        step, _, best, _ = state
        code = self.highest - step
        limit = E2M1.max * self.block.scale(jnp.maximum(code, 1), self.context)
        if self.weights is None:
            beyond = jnp.maximum(self.block.largest - limit, 0.0)
            clipped = beyond * beyond
        else:
            squares = self.magnitudes.map(lambda m: jnp.maximum(m - limit, 0.0)).map(lambda b: b * b)
            clipped = _total(_weighted(squares, self.weights))
        may_win = (code >= 1) & (clipped <= self._at_most(best))
        return jnp.max(jnp.where(self.block.settled, 0, jnp.where(may_win, 1, 0))) > 0

    def _advance(self, state: _State) -> _State:
        step, chosen, best, second = state
        for _ in range(_AT_ONCE):
            code = jnp.maximum(self.highest - step, 1)
            error = self._approximate_error(self.block.scale(code, self.context))
            # The lowest code may come more than once, which is no second one.
            error = jnp.where(self.highest - step >= 1, error, jnp.inf)
            better = error <= best
            second = jnp.minimum(second, jnp.where(better, best, error))
            chosen, best = jnp.where(better, code, chosen), jnp.where(better, error, best)
            step = step + 1
        return step, chosen, best, second

    def _approximate_error(self, scale: Array) -> Array:
        """The sum of squared errors as a float."""
        inverse = self.context.arithmetic.estimate(scale)

        def square(magnitude: Array) -> Array:
            quotient = magnitude * inverse
            inside = jnp.minimum(quotient, E2M1.max)
            power = exact.power_of_two(jnp.maximum(inside, 1.0)) * 2.0**22
            error = quotient - ((inside + power) - power)
            return error * error

        return _total(_weighted(self.magnitudes.map(square), self.weights)) * (scale * scale)

    def _least(self, steps: Array) -> Array:
        """Of the codes of the first steps, which fall, the one with the least exact error, the lowest of equals."""

        def advance(step: Array, state: tuple[Array, Error]) -> tuple[Array, Error]:
            chosen, best = state
            code = jnp.maximum(self.highest - step, 1)
            error = _exact_error(self.magnitudes, self.weights, self.block.scale(code, self.context))
            worse = less(best, error)
            kept = [jnp.where(worse, old, new) for old, new in zip(best, error, strict=True)]
            return jnp.where(worse, chosen, code), Error(*kept)

        most = jnp.full(self.highest.shape, jnp.iinfo(jnp.int32).max, jnp.int32)
        worst = Error(most, most, jnp.full(self.highest.shape, jnp.inf, jnp.float32))
        return lax.fori_loop(0, steps, advance, (self.highest, worst))[0]


def _exact_error(magnitudes: Values, weights: Values | None, scale: Array) -> Error:
    """The sum of squared errors as integers, those of `jaxfp4.algorithms.block_error.Blocks.error`."""
    errors = magnitudes.map(Grid.of(scale).error)
    squares = errors.map(lambda e: e * e)
    if weights is None:
        parts = errors.map(high_square), errors.map(low_square), squares
    else:
        terms = _weighted(squares, weights)
        parts = terms.map(high_term), terms.map(low_term), terms
    return Error.of_sums(*map(_total, parts))


def _weighted(values: Values, weights: Values | None) -> Values:
    if weights is None:
        return values
    even, odd = (
        tuple(w * v for w, v in zip(ws, vs, strict=True))
        for ws, vs in ((weights.even, values.even), (weights.odd, values.odd))
    )
    return Values(even, odd)


def _total(parts: Values) -> Array:
    return parts.reduce(jnp.add, jnp.sum)
