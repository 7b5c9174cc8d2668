"""NVFP4 arithmetic on plain arrays: `x ~ e2m1 code * E4M3 block scale * float32 global scale`.

Every result equals IEEE float32 arithmetic in the order that Model-Optimizer 0.47 uses, on every backend; see
`jaxfp4.formats.exact` for how. Inputs are float32, bfloat16 or float16. Float32 subnormals are handled as integers
because XLA flushes them on a CPU.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import exact, fp8
from jaxfp4.formats.minifloat import E2M1, E4M3

TENSOR_DIVISOR = int(E2M1.max * E4M3.max)
"""Global amax over global scale: the largest value that a code and a block scale reach together."""

SMALLEST_GLOBAL_AMAX = 2.0**-103
"""A tensor whose amax is below this is stored as zeros: its products of scales would be float32 subnormals."""

_SIGN = E2M1.sign_mask
_E2M1_STEPS = tuple(zip(E2M1.magnitudes[1:-1].tolist(), (0.5, 0.5, 0.5, 0.75, 1.0, 1.5), strict=True))


def global_scale(global_amax: Array, divisor: int = TENSOR_DIVISOR) -> Array:
    """`float32(global_amax) / divisor`, IEEE.

    Zero, and any amax below `SMALLEST_GLOBAL_AMAX`, gives 1.0, so that such a tensor dequantizes to zeros. Inf and NaN
    give NaN, so that every value of the tensor dequantizes to NaN.
    """
    quotient = exact.divide_by_integer(global_amax, divisor)
    quotient = jnp.where(global_amax < SMALLEST_GLOBAL_AMAX, 1.0, quotient)
    return jnp.where(jnp.isfinite(global_amax), quotient, jnp.nan)


def encode_scale(block_amax: Array, global_scale: Array) -> Array:
    """E4M3 codes, uint8, of `clip(block_amax / (6 * global_scale), 2^-9, 448)`, ties to even.

    A zero block gets the code of 1.0. NaN or Inf, in the block or in the global scale, gives the code of NaN. Both
    arguments are float32 and broadcast against each other.
    """
    divisor = global_scale * 4 + global_scale * 2  # float32(6 * global_scale): the parts are exact, one rounding
    divisor, block_amax = jnp.broadcast_arrays(divisor, block_amax)
    inverse = exact.inverse_power_of_two(divisor)
    code = fp8.nearest_code(block_amax * inverse, divisor * inverse, least=E4M3.smallest)
    zero = exact.rounds_to_zero(exact.magnitude_bits(block_amax), divisor)
    one = E4M3.magnitudes.tolist().index(1.0)
    code = jnp.where(zero, one, code)
    finite = jnp.isfinite(block_amax) & jnp.isfinite(divisor)
    return jnp.where(finite, code, fp8.NAN).astype(jnp.uint8)


def decode_scale(codes: Array) -> Array:
    """The float32 value of E4M3 codes given as uint8; NaN for the code 0x7F."""
    return fp8.decode(codes)


def encode_values(x: Array, scale: Array, global_scale: Array) -> Array:
    """E2M1 codes, uint8, of `x / (scale * global_scale)`, ties to the even code, saturating at 6.

    -0.0 and a negative quotient that underflows give code 0; other negative values keep their sign, also when they
    round to zero (0x8). NaN has no code: the caller sees it in the block scale. `scale` is float32 and broadcasts
    against x.
    """
    x = exact.to_float32(x)
    divisor = jnp.broadcast_to(scale * global_scale, x.shape)
    inverse = exact.inverse_power_of_two(divisor)
    unit_divisor = divisor * inverse
    bits = exact.magnitude_bits(x)
    magnitude = exact.as_float(bits) * inverse

    threshold = jnp.full(x.shape, E2M1.magnitudes[1] / 2, jnp.float32)
    index = jnp.zeros(x.shape, jnp.uint32)
    for boundary, step in _E2M1_STEPS:
        above = magnitude >= boundary * unit_divisor
        index += above.astype(jnp.uint32)
        threshold += jnp.where(above, step, 0.0)
    index += exact.rounds_up(magnitude, threshold, unit_divisor, odd=index % 2 == 1).astype(jnp.uint32)

    negative = (exact.as_bits(x) >> 31 == 1) & ~exact.rounds_to_zero(bits, divisor)
    return (index | jnp.where(negative, _SIGN, 0)).astype(jnp.uint8)


def decode_values(codes: Array) -> Array:
    """The float32 value of E2M1 codes given as uint8; the negative zero decodes to -0.0."""
    wide = codes.astype(jnp.uint32)
    index = wide & (_SIGN - 1)
    # Index >= 2 is normal: two exponent bits and one mantissa bit, moved to their float32 places.
    normal = exact.as_float((index + ((127 - E2M1.bias) << E2M1.mantissa_bits)) << (23 - E2M1.mantissa_bits))
    value = jnp.where(index < 2, index.astype(jnp.float32) * E2M1.smallest, normal)
    return exact.as_float(exact.as_bits(value) | ((wide & _SIGN) << 28))


def dequantize(codes: Array, scale: Array, global_scale: Array) -> Array:
    """`(scale * global_scale) * value(code)`, float32. `scale` broadcasts against the codes."""
    return (scale * global_scale) * decode_values(codes)


def pack(codes: Array, axis: int) -> Array:
    """Two codes a byte along `axis`, whose size is even: the even element in the low nibble.

    >>> pack(jnp.array([1, 2, 3, 4], jnp.uint8), axis=0).tolist()
    [33, 67]
    """
    axis %= codes.ndim
    pairs = codes.reshape(*codes.shape[:axis], codes.shape[axis] // 2, 2, *codes.shape[axis + 1 :])
    if axis == codes.ndim - 1:
        words = lax.bitcast_convert_type(pairs, jnp.uint16)
        return (words | (words >> 4)).astype(jnp.uint8)
    low, high = (lax.index_in_dim(pairs, i, axis + 1, keepdims=False) for i in (0, 1))
    return low | (high << 4)


def unpack(packed: Array, axis: int) -> Array:
    """The inverse of `pack`: twice as many codes along `axis`."""
    axis %= packed.ndim
    pairs = jnp.stack([packed & 0xF, packed >> 4], axis + 1)
    return pairs.reshape(*packed.shape[:axis], 2 * packed.shape[axis], *packed.shape[axis + 1 :])
