"""Values to their nearest E2M1 codes under given block scales, by comparing bits.

For one global scale there are few block scales, and under one of them the code of a value only grows with its
magnitude. So the smallest bits of each code (`jaxfp4.formats.thresholds`) are looked up for each block, and its values
are compared with them as integers: the codes are those of `nvfp4.encode_values`, without its arithmetic per value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import exact, nvfp4
from jaxfp4.formats.minifloat import E2M1, E4M3
from jaxfp4.formats.thresholds import code_thresholds

Borders = tuple[Array, ...]
"""Eight arrays, uint32: the smallest magnitudes, as bits of the values' dtype, whose code is 1, 2, .. 7, then the
smallest whose negative is not code 0."""

FEW_BLOCKS = 1 << 12
"""Fewer are coded value by value, which takes longer but compiles in half the time."""

_SCALES = E4M3.sign_mask
_NEVER = 0xFFFFFFFF
_INFINITY = 0x7F800000


def borders(divisor: Array, dtype: jax.typing.DTypeLike) -> Borders:
    """The borders between codes under float32 divisors, as in `code_thresholds`, for values of a dtype.

    Under a NaN all values get code 0 or, negative ones that are not zero, 8.
    """
    found = code_thresholds(divisor)
    unknown = jnp.isnan(divisor)
    reached = (jnp.where(unknown, jnp.uint32(_NEVER), _rounded_up(bits, dtype)) for bits in found.reached)
    return (*reached, jnp.where(unknown, jnp.uint32(1), _rounded_up(found.negative, dtype)))


def border_table(global_scale: Array, dtype: jax.typing.DTypeLike) -> Borders:
    """The borders under all E4M3 codes for one global scale: eight rows `[128]`."""
    scales = nvfp4.decode_scale(jnp.arange(_SCALES, dtype=jnp.uint8))
    return borders(scales * global_scale.reshape(()), dtype)


def borders_of(scales: Array, global_scale: Array, dtype: jax.typing.DTypeLike) -> Borders:
    """The borders of each block, of the shape of `scales`, E4M3 codes as uint8; `global_scale` broadcasts with them.

    Several global scales have no tables: where experts are split over a mesh, XLA would gather these.
    """
    if global_scale.size > 1 or scales.size < _SCALES:
        return _kept(borders(nvfp4.decode_scale(scales) * global_scale, dtype))
    return look_up(border_table(global_scale, dtype), scales)


def look_up(table: Borders, index: Array) -> Borders:
    """The columns of a table, of the shape of `index`. A CPU gathers numbers from rows faster than whole columns."""
    return _kept(tuple(row[index] for row in table))


def _kept(found: Borders) -> Borders:
    """Borders that XLA does not find again for every value of a block."""
    return tuple(lax.optimization_barrier(found))


def quantized(blocks: Array, scales: Array, global_scale: Array, axis: int) -> Array:
    """The codes of blocks along `axis`, packed, under E4M3 codes of size 1 there, uint8."""
    if scales.size < FEW_BLOCKS:
        return nvfp4.pack(nvfp4.encode_values(blocks, nvfp4.decode_scale(scales), global_scale), axis)
    return packed_codes(blocks, borders_of(scales, global_scale, blocks.dtype), axis)


def packed_codes(blocks: Array, limits: Borders, axis: int) -> Array:
    """The codes of blocks, packed: uint8, with half as many entries along `axis` as `blocks`."""
    # Kept before they are packed, or XLA would read a block's values with a stride.
    return nvfp4.pack(lax.optimization_barrier(_codes(blocks, limits)), axis)


def rounded(blocks: Array, scales: Array, global_scale: Array) -> Array:
    """`nvfp4.dequantize` of the codes of blocks, cast to their dtype; NaN where the block scale is."""
    if scales.size < FEW_BLOCKS:
        scale = nvfp4.decode_scale(scales)
        codes = nvfp4.encode_values(blocks, scale, global_scale)
        return exact.cast(nvfp4.dequantize(codes, scale, global_scale), blocks.dtype)
    return rounded_by_borders(blocks, scales, global_scale)


def rounded_by_borders(blocks: Array, scales: Array, global_scale: Array) -> Array:
    """`rounded`, of however many blocks."""
    limits = borders_of(scales, global_scale, blocks.dtype)
    divisor = lax.optimization_barrier(nvfp4.decode_scale(scales) * global_scale)
    return exact.cast(divisor * nvfp4.decode_values(_codes(blocks, limits)), blocks.dtype)


def _codes(blocks: Array, limits: Borders) -> Array:
    """E2M1 codes, uint8."""
    *reached, nonzero = limits
    size = 8 * blocks.dtype.itemsize
    bits = lax.bitcast_convert_type(blocks, jnp.dtype(f"uint{size}")).astype(jnp.uint32)
    sign = jnp.uint32(1 << (size - 1))
    magnitude = bits & (sign - 1)
    index = sum((magnitude >= border).astype(jnp.uint32) for border in reached)
    negative = (bits >= sign) & (magnitude >= nonzero)
    return (index | (negative.astype(jnp.uint32) * E2M1.sign_mask)).astype(jnp.uint8)


def _rounded_up(bits: Array, dtype: jax.typing.DTypeLike) -> Array:
    """The bits of the smallest value of a dtype that is not below a positive float32, uint32."""
    if dtype == jnp.float32:
        return bits
    bits = jnp.minimum(bits, jnp.uint32(_INFINITY))
    if dtype == jnp.bfloat16:
        return (bits + 0xFFFF) >> 16
    nearest = exact.cast(exact.as_float(bits), dtype)
    bits_of_nearest = lax.bitcast_convert_type(nearest, jnp.uint16).astype(jnp.uint32)
    return bits_of_nearest + (exact.as_bits(exact.to_float32(nearest)) < bits).astype(jnp.uint32)
