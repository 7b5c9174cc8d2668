"""Codes by comparing bits, against the codes that `nvfp4.encode_values` computes for each value."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.formats import exact, nvfp4
from jaxfp4.tensors import nearest

HALVES = [jnp.bfloat16, jnp.float16]
NAN_SCALE = 0x7F


find = jax.jit(nearest.borders, static_argnums=1)


@jax.jit
def by_value(blocks, scales, global_scale):
    return nvfp4.encode_values(blocks, nvfp4.decode_scale(scales), global_scale)


@jax.jit
def codes(blocks, scales, global_scale):
    limits = nearest.borders_of(scales, global_scale, blocks.dtype)
    return nvfp4.unpack(nearest.packed_codes(blocks, limits, 1), 1)


@functools.partial(jax.jit, static_argnums=3)
def both_ways(blocks, scales, global_scale, axis):
    """Packed codes and rounded values, each with what it should be."""
    limits = nearest.borders_of(scales, global_scale, blocks.dtype)
    wanted = by_value(blocks, scales, global_scale)
    values = nvfp4.dequantize(wanted, nvfp4.decode_scale(scales), global_scale)
    packed = nearest.packed_codes(blocks, limits, axis), nvfp4.pack(wanted, axis)
    return packed, (nearest.rounded_by_borders(blocks, scales, global_scale), exact.cast(values, blocks.dtype))


@pytest.mark.parametrize("global_scale", [2.0**-114, 3.0e-6, 1 / 3, 2.0**16, 7.0e34])
@pytest.mark.parametrize("dtype", HALVES)
def test_every_value_of_16_bits_under_scales_of_every_exponent(dtype, global_scale):
    every = jnp.arange(1 << 16, dtype=jnp.uint32).astype(jnp.uint16)
    blocks = jax.lax.bitcast_convert_type(every, dtype).reshape(1, -1)
    blocks = jnp.broadcast_to(jnp.where(jnp.isfinite(blocks), blocks, 0), (18, 1 << 16))
    scales = jnp.uint8(range(1, 127, 7))[:, None]
    global_scale = jnp.full((1, 1), global_scale)
    np.testing.assert_array_equal(codes(blocks, scales, global_scale), by_value(blocks, scales, global_scale))


@pytest.mark.parametrize(
    "count, axis, dtype",
    [(1, 1, jnp.float32), (1, 2, jnp.bfloat16), (3, 1, jnp.bfloat16), (3, 2, jnp.float16), (300, 2, jnp.float32)],
)
def test_global_scales_of_experts(count, axis, dtype):
    """One has a table of all block scales, several have not."""
    rng = np.random.default_rng(count)
    blocks = jnp.asarray(rng.normal(size=(count, 16, 40 if count == 300 else 512)), dtype).swapaxes(1, axis)
    scales = jnp.asarray(rng.integers(1, 127, (count, 1, blocks.shape[3 - axis])), jnp.uint8).swapaxes(1, axis)
    global_scale = jnp.asarray(2.0 ** rng.uniform(-12, 1, (count, 1, 1)), jnp.float32)
    for found, wanted in both_ways(blocks, scales, global_scale, axis):
        np.testing.assert_array_equal(np.asarray(found).view(np.uint8), np.asarray(wanted).view(np.uint8))


@pytest.mark.parametrize(
    "blocks, dtype",
    [(3, jnp.float32), (3, jnp.bfloat16), (500, jnp.float16)],
    ids=["few", "few of 16 bits", "with a table"],
)
def test_a_block_whose_scale_is_nan_beside_others(dtype, blocks):
    values = jnp.tile(jnp.array([-jnp.inf, jnp.nan, jnp.inf, -0.0, 0.0, -1.0, 2.0, -jnp.nan], dtype), (blocks, 2))
    scales = jnp.full((blocks, 1), 0x38, jnp.uint8).at[1].set(NAN_SCALE)
    global_scale = jnp.ones((1, 1), jnp.float32)
    found = codes(values, scales, global_scale)
    np.testing.assert_array_equal(found[1], jnp.where(jnp.signbit(values[1]) & (values[1] != 0), 8, 0))
    np.testing.assert_array_equal(found[::2, 3:7], jnp.broadcast_to(jnp.uint8([0, 0, 10, 4]), (len(found[::2]), 4)))
    rounded = jax.jit(nearest.rounded_by_borders)(values, scales, global_scale).astype(jnp.float32)
    assert bool(jnp.all(jnp.isnan(rounded[1]))) and not bool(jnp.any(jnp.isnan(rounded[::2])))


@pytest.mark.parametrize("scale", [2.0**-24, 0.1, 1.0, 6.0e4, 2.0**100])
def test_borders_of_float16_are_the_first_values_not_below_those_of_float32(scale):
    divisor = jnp.float32(scale)
    for wide, narrow in zip(*(find(divisor, dtype) for dtype in (jnp.float32, jnp.float16)), strict=True):
        border = float(np.uint32(wide).view(np.float32))
        every = np.arange(0x7C01, dtype=np.uint16).view(np.float16).astype(np.float64)
        assert int(narrow) == int(np.argmax(every >= border))


@pytest.mark.parametrize("blocks", [nearest.FEW_BLOCKS - 64, nearest.FEW_BLOCKS])
def test_few_blocks_and_many_have_the_same_codes(blocks):
    values = jnp.asarray(np.random.default_rng(0).normal(size=(blocks, 16)), jnp.bfloat16)
    scales = jnp.full((blocks, 1), 0x38, jnp.uint8)
    global_scale = jnp.full((1, 1), 0.3, jnp.float32)
    packed = jax.jit(nearest.quantized, static_argnums=3)(values, scales, global_scale, 1)
    np.testing.assert_array_equal(nvfp4.unpack(packed, 1), by_value(values, scales, global_scale))
    rounded = jax.jit(nearest.rounded)(values, scales, global_scale)
    np.testing.assert_array_equal(rounded, jax.jit(nearest.rounded_by_borders)(values, scales, global_scale))
