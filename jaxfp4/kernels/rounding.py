"""Codes and values of blocks in few instructions, with the results of `jaxfp4.formats.nvfp4`.

A value is divided by its block's scale with one multiplication by the reciprocal and a Newton step. The step leaves an
error of 2^-44, which is less than the distance of any quotient of a 16-bit float from a border between codes, but for
a divisor whose mantissa is all ones and a power of two: it is divided by the float below, with which the borders are
the same. For float32 a second step gives the IEEE quotient (Markstein, IBM Journal of Research and Development 34,
1990). The quotient is then rounded by adding a power of two whose last place is a step of the format.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.pallas import triton

from jaxfp4.formats import exact, fp8
from jaxfp4.formats.minifloat import E2M1, E4M3
from jaxfp4.formats.thresholds import least_nonzero

_MANTISSA_BITS = 23
_MANTISSA = (1 << _MANTISSA_BITS) - 1
_BIAS = 127
_INFINITY = 0x7F800000
_NEGATIVE = 1 << 31


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What a backend has to provide beyond JAX's operations; float32 arrays of one shape."""

    residual: Callable[[Array, Array, Array], Array]
    """`(x, q, d) -> x - q * d`, rounded once, for q near x / d."""
    reciprocal: Callable[[Array], Array]
    """`1 / d` as in IEEE float32."""
    estimate: Callable[[Array], Array]
    """`1 / d` with an error of a few units in the last place."""
    saturated: Callable[[Array, Array, float], Array]
    """`(a, b, c) -> clip(a * b + c, 0, 1)`, where products are exact or c is 0; NaN gives 0."""


def _ptx(instruction: str, *args: Array) -> Array:
    """One PTX instruction on float32 arrays of one shape."""
    operands = ", ".join(f"${i}" for i in range(len(args) + 1))
    [result] = triton.elementwise_inline_asm(
        f"{instruction} {operands};",
        args=list(args),
        constraints=",".join(["=f", *("f" for _ in args)]),
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(args[0].shape, jnp.float32)],
    )
    return result


PTX = Arithmetic(
    residual=lambda x, q, d: _ptx("fma.rn.f32", q, -d, x),
    reciprocal=lambda d: _ptx("rcp.rn.f32", d),
    estimate=lambda d: _ptx("rcp.approx.ftz.f32", d),
    saturated=lambda a, b, c: _ptx("fma.rn.sat.f32", a, b, jnp.full(a.shape, c, jnp.float32)),
)
"""On NVIDIA GPUs."""


def _exact_residual(x: Array, q: Array, d: Array) -> Array:
    """The residual by products of 12-bit halves, which are exact."""
    mask = jnp.uint32(0xFFFFF000)
    product = q * d
    q_high, d_high = (exact.as_float(exact.as_bits(v) & mask) for v in (q, d))
    q_low, d_low = q - q_high, d - d_high
    error = ((q_high * d_high - product) + q_high * d_low + q_low * d_high) + q_low * d_low
    return (x - product) - error


EMULATED = Arithmetic(
    residual=_exact_residual,
    reciprocal=lambda d: 1 / d,
    estimate=lambda d: (1 / d) * (1 + 2.0**-22),
    saturated=lambda a, b, c: jnp.clip(jnp.nan_to_num(a * b + c, posinf=1.0), 0.0, 1.0),
)
"""On a CPU, where kernels are interpreted."""


class Prepared(NamedTuple):
    """A global scale and what follows from it; float32 scalars, or one for each part of a tensor."""

    global_scale: Array
    to_units: Array
    """The inverse of the power of two that is nearest below the global scale."""
    unit: Array
    """The global scale in that unit, in [1, 2)."""
    scale_divisor: Array
    """`6 * global_scale` in units of its own power of two."""
    scale_reciprocal: Array
    """`1 / scale_divisor`, IEEE."""
    scale_to_units: Array
    """The inverse of that power of two."""
    least_amax: Array
    """The smallest amax of a block that is not stored as zero; a bit pattern, as float32."""
    is_finite: Array
    """1.0, or 0.0 if the global scale is NaN or Inf, for which the others stand as for 1.0."""

    @classmethod
    def of(cls, global_scale: Array) -> Prepared:
        """From float32 global scales; plain JAX, outside of kernels."""
        is_finite = jnp.isfinite(global_scale)
        finite = jnp.where(is_finite, global_scale, 1.0)
        inverse = exact.inverse_power_of_two(finite)
        six = finite * 4 + finite * 2
        six_inverse = exact.inverse_power_of_two(six)
        divisor = six * six_inverse
        # The product with a power of two that is not exact is that of a number too large for the format.
        guess = 1 / divisor
        reciprocal = _nearest_reciprocal(guess, divisor)
        return cls(
            global_scale,
            inverse,
            finite * inverse,
            divisor,
            reciprocal,
            six_inverse,
            exact.as_float(least_nonzero(six)),
            is_finite.astype(jnp.float32),
        )

    def stacked(self) -> Array:
        """All as one array, the fields along its last axis."""
        return jnp.stack(self, -1)


def _nearest_reciprocal(guess: Array, divisor: Array) -> Array:
    """Of a guess and its four neighbours the one nearest to `1 / divisor`, in any float32 arithmetic."""
    candidates = [exact.as_float(exact.as_bits(guess) + jnp.uint32(i % 2**32)) for i in (-2, -1, 0, 1, 2)]
    errors = [jnp.abs(_exact_residual(jnp.ones_like(divisor), c, divisor)) for c in candidates]
    best, least = candidates[0], errors[0]
    for candidate, error in zip(candidates[1:], errors[1:], strict=True):
        best, least = jnp.where(error < least, candidate, best), jnp.minimum(error, least)
    return best


class Scales(NamedTuple):
    """Block scales: E4M3 codes, uint32, and their float32 values, that of 448 where a block is not finite."""

    codes: Array
    values: Array

    @classmethod
    def of_codes(cls, codes: Array) -> Scales:
        """From E4M3 codes, uint8."""
        wide = codes.astype(jnp.uint32)
        return cls(wide, fp8.decode(jnp.minimum(wide, E4M3.sign_mask - 2)))

    @classmethod
    def of_amax(cls, amax: Array, prepared: Prepared, arithmetic: Arithmetic) -> Scales:
        """`jaxfp4.formats.nvfp4.encode_scale` of block amaxes, given as bits."""
        shape = amax.shape
        magnitude = exact.as_float(amax) * prepared.scale_to_units
        divisor = jnp.broadcast_to(prepared.scale_divisor, shape)
        quotient = _quotient(magnitude, divisor, prepared.scale_reciprocal, arithmetic, steps=2)
        quotient = jnp.maximum(jnp.where(quotient < E4M3.max, quotient, E4M3.max), E4M3.smallest)
        steps, values = _on_grid(quotient, E4M3.smallest_normal, E4M3.mantissa_bits)
        zero = amax < exact.as_bits(prepared.least_amax)
        steps, values = jnp.where(zero, _ONE, steps), jnp.where(zero, 1.0, values)
        is_finite = (amax < _INFINITY) & (prepared.is_finite > 0)
        return cls(jnp.where(is_finite, steps, fp8.NAN), values)


_ONE = E4M3.magnitudes.tolist().index(1.0)


def _quotient(x: Array, divisor: Array, reciprocal: Array, arithmetic: Arithmetic, steps: int) -> Array:
    """`x / divisor` after Newton steps. Not NaN for numbers that are in range."""
    quotient = x * reciprocal
    for _ in range(steps):
        quotient = quotient + arithmetic.residual(x, quotient, divisor) * reciprocal
    return quotient


def _on_grid(x: Array, smallest_normal: float, mantissa_bits: int) -> tuple[Array, Array]:
    """The code, uint32, and the value of the number of a small format nearest to x, ties to even; x is in its range."""
    power = exact.power_of_two(jnp.maximum(x, smallest_normal))
    shift = _MANTISSA_BITS - mantissa_bits
    total = x + power * 2.0**shift  # its last place is a step of the format at x
    bits = exact.as_bits(total)
    # A step more in the last bits is a code more, as is a further eighth of an exponent.
    first = (math.frexp(smallest_normal)[1] - 1 + _BIAS + shift) << mantissa_bits
    code = (bits & ((1 << (mantissa_bits + 2)) - 1)) + (bits >> shift) - jnp.uint32(first)
    return code, total - power * 2.0**shift


@dataclasses.dataclass(frozen=True)
class Coder:
    """Rounds the values of blocks whose scales are chosen. Everything broadcasts against the values."""

    value: Array
    """`scale * global_scale`, NaN for a block that is not finite."""
    divisor: Array
    """Eight times the same in the tensor's unit, or what gives the same codes; a number for any block."""
    reciprocal: Array
    """`1 / divisor`, for 16-bit floats almost."""
    to_units: Array
    least_negative: Array
    """The bits from which a negative float32 keeps its sign; those below underflow to code 0."""
    arithmetic: Arithmetic
    steps: int

    @classmethod
    def of(cls, scales: Scales, prepared: Prepared, arithmetic: Arithmetic, dtype: jax.typing.DTypeLike) -> Coder:
        """For values that were of a dtype."""
        divisor = scales.values * (prepared.unit * _LARGEST)
        steps = 2 if jnp.dtype(dtype) == jnp.float32 else 1
        if steps == 1:
            bits = exact.as_bits(divisor)
            all_ones = (bits & jnp.uint32(_MANTISSA)) == _MANTISSA
            divisor = exact.as_float(jnp.where(all_ones, bits - 1, bits))
            guess = arithmetic.estimate(divisor)
            reciprocal = guess + arithmetic.residual(jnp.ones_like(divisor), guess, divisor) * guess
        else:
            reciprocal = arithmetic.reciprocal(divisor)
        value = scales.values * prepared.global_scale
        least = least_nonzero(scales.values * jnp.where(prepared.is_finite > 0, prepared.global_scale, 1.0))
        value = jnp.where(scales.codes == fp8.NAN, jnp.nan, value)
        return cls(value, divisor, reciprocal, prepared.to_units, least | jnp.uint32(_NEGATIVE), arithmetic, steps)

    def encode(self, bits: Array) -> Array:
        """Integers, uint32, whose low four bits are the E2M1 codes of float32 values, given as bits.

        The codes up to 4 count halves from 0 to 2, the next two ones from 2 to 4, the last twos from 4 to 6. Each part
        of the quotient is cut out by saturation and rounded to an integer by a sum that is large enough.
        """
        quotient = self._quotient(bits)
        start = jnp.where(bits >= self.least_negative, _INTEGER_SUM + E2M1.sign_mask, _INTEGER_SUM)
        total = start
        for code, (low, high) in ((4, (0, 2)), (2, (2, 4)), (1, (4, 6))):
            scale = jnp.full(bits.shape, _LARGEST / (high - low), jnp.float32)
            total = self.arithmetic.saturated(quotient, scale, -low / (high - low)) * code + total
        return exact.as_bits(total)

    def round_trip(self, bits: Array) -> Array:
        """The float32 values of the codes of float32 values, given as bits."""
        quotient = jnp.minimum(self._quotient(bits) * _LARGEST, E2M1.max)
        value = exact.as_bits(_on_grid(quotient, E2M1.smallest_normal, E2M1.mantissa_bits)[1] * self.value)
        return exact.as_float(jnp.where(bits >= self.least_negative, value | jnp.uint32(_NEGATIVE), value))

    def _quotient(self, bits: Array) -> Array:
        """The magnitude over the divisor, in eighths, or a number above 1 if that is."""
        magnitude = exact.as_float(bits & jnp.uint32(_NEGATIVE - 1)) * self.to_units
        divisor, reciprocal = (jnp.broadcast_to(v, bits.shape) for v in (self.divisor, self.reciprocal))
        # Saturated, it is a number also for an infinity, and then so are the steps.
        quotient = self.arithmetic.saturated(magnitude, reciprocal, 0.0)
        for _ in range(self.steps):
            quotient = quotient + self.arithmetic.residual(magnitude, quotient, divisor) * reciprocal
        return quotient


_LARGEST = 8.0
"""Quotients are counted in eighths of it, so that saturation at 1 is beyond the largest code."""
_INTEGER_SUM = 2.0**23
