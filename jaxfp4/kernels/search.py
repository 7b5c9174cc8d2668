"""Searches over block scales inside a kernel, with the choices of `jaxfp4.algorithms.mse` and `four_over_six`.

There, errors are compared as integers, so that the choice does not depend on a backend's arithmetic. Here a first pass
computes them as floats, in a quarter of the instructions. Where the best two are closer than what the floats may be
off by, which is one block of some thousand, the integers decide.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import exact, fp8
from jaxfp4.formats.minifloat import E2M1, E4M3
from jaxfp4.formats.thresholds import code_thresholds
from jaxfp4.kernels.blocks import Launch, Values
from jaxfp4.kernels.quantize import MAGNITUDE, Context, Tuning, amax_bits
from jaxfp4.kernels.rounding import Scales

TUNING = Tuning(minor=Launch(16, 1), strided=Launch(32, 1))
LARGEST_CODE = E4M3.sign_mask - 2
OCTAVE = 8
WITHOUT_HALF = 15
_SMALLEST_NORMAL = 0x00800000
_AT_ONCE = 2
"""Codes that are tried between two looks at whether more can win."""
_TOLERANCE = 2.0**-14
"""More than what float errors are off by, relative to them: 2^-19 for 16 squares of differences."""
_FLOOR = 2.0**-20
"""The same for small errors, in squares of the block scale of max calibration."""
_HIGH_PART = 2.0**10
_LOW_BITS = 13
_TINY = 1 << 8
_TO_INTEGER = 1.5 * 2.0**23


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


def _prepared(values: Values, context: Context) -> tuple[Block, Values]:
    """The blocks, and their magnitudes in their units."""
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


def _scale(codes: Array, block: Block, context: Context) -> Array:
    """The block scales of codes, int32, in the blocks' units."""
    return (fp8.decode(codes.astype(jnp.uint32)) * context.prepared.global_scale) * block.unit


def _stored(chosen: Array, block: Block) -> Scales:
    codes = jnp.where(block.settled, block.calibrated.codes, chosen.astype(jnp.uint32))
    values = fp8.decode(jnp.minimum(codes, jnp.uint32(LARGEST_CODE)))
    return Scales(codes, values)


def mse_scales(values: Values, context: Context) -> Scales:
    """`jaxfp4.algorithms.mse.mse_scales` without importance."""
    block, magnitudes = _prepared(values, context)
    largest = exact.as_float(block.amax) * block.unit
    calibrated = block.calibrated.codes.astype(jnp.int32)
    highest = jnp.minimum(jnp.maximum(calibrated + OCTAVE, WITHOUT_HALF), LARGEST_CODE)

    def reaches(code: Array, best: Array) -> Array:
        beyond = jnp.maximum(largest - E2M1.max * _scale(jnp.maximum(code, 1), block, context), 0.0)
        may_win = (code >= 1) & (beyond * beyond <= best * (1 + _TOLERANCE) + _FLOOR)
        return jnp.where(block.settled, 0, jnp.where(may_win, 1, 0))

    def proceed(state: _State) -> Array:
        step, _, best, _ = state
        return jnp.max(reaches(highest - step, best)) > 0

    def advance(state: _State) -> _State:
        step, chosen, best, second = state
        for _ in range(_AT_ONCE):
            code = jnp.maximum(highest - step, 1)
            error = _approximate_error(magnitudes, _scale(code, block, context), context)
            # The lowest code may come more than once, which is no second one.
            error = jnp.where(highest - step >= 1, error, jnp.inf)
            better = error <= best
            second = jnp.minimum(second, jnp.where(better, best, error))
            chosen, best = jnp.where(better, code, chosen), jnp.where(better, error, best)
            step = step + 1
        return step, chosen, best, second

    infinite = jnp.full(highest.shape, jnp.inf, jnp.float32)
    start = (jnp.int32(0), highest, infinite, infinite)
    steps, chosen, best, second = lax.while_loop(proceed, advance, start)
    close = jnp.where(block.settled, 0, jnp.where(second <= best * (1 + _TOLERANCE) + _FLOOR, 1, 0))

    def by_integers() -> Array:
        exactly = _least(lambda step: jnp.maximum(highest - step, 1), steps, magnitudes, block, context)
        return jnp.where(close > 0, exactly, chosen)

    return _stored(lax.cond(jnp.max(close) > 0, by_integers, lambda: chosen), block)


def four_over_six_scales(values: Values, context: Context) -> Scales:
    """`jaxfp4.algorithms.four_over_six.four_over_six_scales`."""
    block, magnitudes = _prepared(values, context)
    larger = exact.as_bits(exact.as_float(block.amax) * 1.5)
    four = Scales.of_amax(larger, context.prepared, context.arithmetic).codes.astype(jnp.int32)
    six = block.calibrated.codes.astype(jnp.int32)
    codes = [jnp.clip(code, 1, LARGEST_CODE) for code in (six, four)]
    at_six, at_four = (_exact_error(magnitudes, _scale(code, block, context)) for code in codes)
    return _stored(jnp.where(_less(at_four, at_six), codes[1], codes[0]), block)


def _approximate_error(magnitudes: Values, scale: Array, context: Context) -> Array:
    """The sum of squared errors as a float."""
    inverse = context.arithmetic.estimate(scale)

    def square(magnitude: Array) -> Array:
        quotient = magnitude * inverse
        inside = jnp.minimum(quotient, E2M1.max)
        power = exact.power_of_two(jnp.maximum(inside, 1.0)) * 2.0**22
        error = quotient - ((inside + power) - power)
        return error * error

    return magnitudes.map(square).reduce(jnp.add, jnp.sum) * (scale * scale)


class Error(NamedTuple):
    """As `jaxfp4.algorithms.block_error.Error`."""

    high: Array
    low: Array
    rounded: Array


def _less(left: Error, right: Error) -> Array:
    tiny = (left.high < _TINY) & (right.high < _TINY)
    whole = (left.high < right.high) | ((left.high == right.high) & (left.low < right.low))
    return jnp.where(tiny, left.rounded < right.rounded, whole)


def _exact_error(magnitudes: Values, scale: Array) -> Error:
    """The sum of squared errors as integers, those of `jaxfp4.algorithms.block_error.Blocks.error`."""
    borders = [exact.as_float(bits) for bits in code_thresholds(scale).reached]
    steps = [scale * float(value) for value in E2M1.magnitudes[1:]]

    def error(magnitude: Array) -> Array:
        value = jnp.zeros_like(magnitude)
        for border, step in zip(borders, steps, strict=True):
            value = jnp.where(magnitude >= border, step, value)
        return magnitude - value

    errors = magnitudes.map(error)
    high = errors.map(lambda e: _whole(e) * _whole(e))
    low = errors.map(_rest)
    lows = _total(low)
    mask = (1 << _LOW_BITS) - 1
    return Error(_total(high) + (lows >> _LOW_BITS), lows & mask, _total(errors.map(lambda e: e * e)))


def _total(parts: Values) -> Array:
    return parts.reduce(jnp.add, jnp.sum)


def _whole(error: Array) -> Array:
    return ((error * _HIGH_PART + _TO_INTEGER) - _TO_INTEGER).astype(jnp.int32)


def _rest(error: Array) -> Array:
    high = _whole(error).astype(jnp.float32) * (1 / _HIGH_PART)
    rest = error - high
    return (rest * (high * 2 + rest) * (_HIGH_PART**2 * 2**_LOW_BITS)).astype(jnp.int32)


def _least(
    code_at: Callable[[Array], Array], steps: Array, magnitudes: Values, block: Block, context: Context
) -> Array:
    """Of the codes at steps 0 to `steps` - 1, which fall, the one with the least exact error, the lowest of equals."""

    def advance(step: Array, state: tuple[Array, Error]) -> tuple[Array, Error]:
        chosen, best = state
        code = code_at(step)
        error = _exact_error(magnitudes, _scale(code, block, context))
        worse = _less(best, error)
        kept = [jnp.where(worse, old, new) for old, new in zip(best, error, strict=True)]
        return jnp.where(worse, chosen, code), Error(*kept)

    first = code_at(jnp.int32(0))
    most = jnp.full(first.shape, jnp.iinfo(jnp.int32).max, jnp.int32)
    worst = Error(most, most, jnp.full(first.shape, jnp.inf, jnp.float32))
    return lax.fori_loop(0, steps, advance, (first, worst))[0]
