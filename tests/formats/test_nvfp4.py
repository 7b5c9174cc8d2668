"""Encoding and decoding against the numpy reference, exhaustively where the inputs can be counted."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import reference
from golden_data import assert_same_bits

from jaxfp4.formats import E2M1, E4M3, nvfp4

HALVES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]
encode_values = jax.jit(nvfp4.encode_values)
encode_scale = jax.jit(nvfp4.encode_scale)
decode_values = jax.jit(nvfp4.decode_values)
decode_scale = jax.jit(nvfp4.decode_scale)
global_scale = jax.jit(nvfp4.global_scale, static_argnums=1)

E4M3_ONE = 0x38
E4M3_NAN = 0x7F

# (block scale, global scale): one, powers of two, a golden case's, the extremes, and products that round.
SCALES = np.float32(
    [
        (1, 1),
        (2**-9, 1),
        (448, 2**-20),
        (448, float.fromhex("0x1.861862p-10")),
        (2**-9, float.fromhex("0x1.861862p-12")),
        (1.875, 0.1),
        (0.0136718750, 7.3e-5),
        (208, 1.7e30),
        (352, 1e-31),
        (13 * 2**-9, 3.3333333),
    ]
)


def neighbours(x, ulps=2):
    """`x` and the `ulps` float32 on each side of it, on a new last axis."""
    x = np.asarray(x, np.float32)
    up, down = [x], [x]
    for _ in range(ulps):
        up.append(np.nextafter(up[-1], np.float32(np.inf)))
        down.append(np.nextafter(down[-1], np.float32(-np.inf)))
    return np.stack([*down[:0:-1], *up], -1)


@jax.jit
def encode_each(x, scales):
    """Codes `[len(scales), len(x)]` of every x at every pair of scales."""
    return nvfp4.encode_values(jnp.broadcast_to(x[None], (scales.shape[0], x.shape[0])), scales[:, :1], scales[:, 1:])


def reference_codes(x, scales):
    """The same by numpy's division."""
    divisor = (scales[:, 0] * scales[:, 1])[:, None]
    with np.errstate(over="ignore", under="ignore"):
        return reference.e2m1_codes(np.float32(x)[None] / divisor)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_encode_every_half_precision_value(backend, dtype):
    """All 65,536 bit patterns but NaN, which has no code, at all `SCALES`."""
    x = np.arange(65536, dtype=np.uint16).view(dtype)
    x = x[~np.isnan(x.astype(np.float32))]
    assert_same_bits(encode_each(x, SCALES), reference_codes(x, SCALES))


def test_encode_midpoints_and_their_neighbours(backend):
    rng = np.random.default_rng(0)
    scales = np.stack([rng.choice(E4M3.magnitudes[1:], 200), np.exp2(rng.uniform(-60, 60, 200))], -1).astype(np.float32)
    scales = np.concatenate([SCALES, scales])
    boundaries = np.concatenate([reference.E2M1_MIDPOINTS, E2M1.magnitudes]).astype(np.float32)
    x = neighbours(boundaries * (scales[:, 0] * scales[:, 1])[:, None], ulps=3)
    x = np.concatenate([x, -x], -1).reshape(len(scales), -1)
    codes = encode_values(x, scales[:, :1], scales[:, 1:])
    expected = reference.e2m1_codes(x / (scales[:, 0] * scales[:, 1])[:, None])
    assert_same_bits(codes, expected)


def test_encode_random_float32_bits(backend):
    rng = np.random.default_rng(1)
    x = rng.integers(0, 2**32, 65_536, dtype=np.uint32).view(np.float32)
    x = np.where(np.isnan(x), np.float32(0.7), x)
    assert_same_bits(encode_each(x, SCALES), reference_codes(x, SCALES))


@pytest.mark.parametrize(
    ("x", "code"),
    [
        (0.0, 0x0), (-0.0, 0x0), (0.1, 0x0), (-0.1, 0x8), (0.25, 0x0), (-0.25, 0x8), (0.2500001, 0x1), (0.5, 0x1),
        (0.75, 0x2), (-0.75, 0xA), (1.0, 0x2), (1.25, 0x2), (-1.25, 0xA), (1.5, 0x3), (1.75, 0x4), (2.0, 0x4),
        (2.5, 0x4), (-2.5, 0xC), (3.0, 0x5), (3.5, 0x6), (-3.5, 0xE), (4.0, 0x6), (5.0, 0x6), (-5.0, 0xE),
        (5.0000005, 0x7), (6.0, 0x7), (7.0, 0x7), (1e30, 0x7), (np.inf, 0x7), (-np.inf, 0xF),
        (1e-40, 0x0), (-1e-40, 0x8), (-1e-45, 0x8), (5.9, 0x7), (-6.0, 0xF),
    ],
)  # fmt: skip
def test_codes_of_model_optimizer(x, code):
    """numerics.md 5.2 G3 and 1.3, with subnormals; NaN is left out, as it has no code here."""
    one = jnp.float32(1)
    assert int(encode_values(jnp.full((16,), x, jnp.float32), one, one)[0]) == code


def test_a_negative_quotient_that_underflows_has_no_sign():
    """float32(-2^-149 / 448) is -0.0, and -0.0 gets code 0."""
    x = np.array([0x80000001, 0x80000200], np.uint32).view(np.float32)
    codes = encode_values(jnp.asarray(x), jnp.float32(448), jnp.float32(1))
    assert codes.tolist() == [0x0, 0x8]


@pytest.mark.parametrize(
    ("relative", "code"),
    [
        (2**-11, 0x01), (2**-10, 0x01), (1.5 * 2**-10, 0x01), (2**-9, 0x01), (1.5 * 2**-9, 0x02), (2.5 * 2**-9, 0x02),
        (1.0, 0x38), (1.0625, 0x38), (1.1875, 0x3A), (447, 0x7E), (448, 0x7E), (449, 0x7E), (464, 0x7E), (480, 0x7E),
        (1e3, 0x7E), (1e30, 0x7E), (0, E4M3_ONE), (np.inf, E4M3_NAN), (np.nan, E4M3_NAN),
    ],
)  # fmt: skip
def test_scale_codes(relative, code):
    """numerics.md 5.2 G4, but zero gives 1.0, and Inf gives NaN so that it cannot go unseen."""
    amax = jnp.float32(relative * 6)
    assert int(encode_scale(amax, jnp.float32(1))) == code


def test_scale_of_every_half_precision_amax(backend):
    amax = np.concatenate([np.arange(0, 0x7F80, dtype=np.uint16).view(HALVES[0]).astype(np.float32),
                           np.arange(0, 0x7C00, dtype=np.uint16).view(HALVES[1]).astype(np.float32)])  # fmt: skip
    global_scales = np.float32([1, *(SCALES[:, 1]), 0.5 / 2688, 3.0 / 2688, 2.0**-103 / 2688])
    codes = encode_scale(amax[None], global_scales[:, None])
    with np.errstate(over="ignore", under="ignore"):
        expected = [reference.scale_codes(amax, scale) for scale in global_scales]
    assert_same_bits(codes, np.stack(expected))


def test_scale_midpoints_and_their_neighbours(backend):
    rng = np.random.default_rng(0)
    global_scales = np.exp2(rng.uniform(-100, 100, 64)).astype(np.float32)
    midpoints = (E4M3.magnitudes[1:] + E4M3.magnitudes[:-1]) / 2
    boundaries = np.concatenate([midpoints, E4M3.magnitudes[1:]])
    divisor = np.float32(6) * global_scales
    amax = neighbours(boundaries * divisor[:, None], ulps=3).reshape(len(divisor), -1)
    codes = encode_scale(amax, global_scales[:, None])
    expected = [reference.scale_codes(row, scale) for row, scale in zip(amax, global_scales, strict=True)]
    assert_same_bits(codes, np.stack(expected))


def test_a_block_amax_that_underflows_is_a_zero_block():
    tiny = jnp.asarray(np.array([0, 1, 0x200], np.uint32).view(np.float32))
    assert encode_scale(tiny, jnp.float32(64)).tolist() == [E4M3_ONE, E4M3_ONE, 0x01]


def test_a_global_scale_that_is_no_number_makes_every_scale_nan():
    assert encode_scale(jnp.float32([0, 1]), jnp.float32(np.nan)).tolist() == [E4M3_NAN] * 2


def test_decode_scale_of_every_code(backend):
    codes = np.arange(128, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    decoded = np.asarray(decode_scale(codes))
    assert_same_bits(decoded[:-1], expected[:-1])
    assert np.isnan(decoded[-1])


def test_decode_values_of_every_code(backend):
    codes = np.arange(16, dtype=np.uint8)
    expected = codes.view(ml_dtypes.float4_e2m1fn).astype(np.float32)
    assert_same_bits(decode_values(codes), expected)


def test_every_value_encodes_to_its_own_code():
    codes = np.delete(np.arange(16, dtype=np.uint8), 8)  # 0x8 decodes to -0.0, which gets code 0
    one = jnp.float32(1)
    assert_same_bits(encode_values(decode_values(jnp.asarray(codes)), one, one), codes)
    scales = np.arange(1, 127, dtype=np.uint8)
    assert_same_bits(encode_scale(decode_scale(jnp.asarray(scales)) * 6, one), scales)


def test_dequantize_multiplies_the_scales_first(backend):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (64, 4, 16), dtype=np.uint8)
    scales = rng.integers(0, 127, (64, 4), dtype=np.uint8)
    tensor_scale = np.float32(0.1 / 3)
    values = jax.jit(nvfp4.dequantize)(codes, decode_scale(jnp.asarray(scales))[..., None], tensor_scale)
    packed = codes.reshape(64, 64)
    expected = reference.dequantize_last_axis(packed[:, 0::2] | packed[:, 1::2] << 4, scales, tensor_scale)
    assert_same_bits(values.reshape(64, 64), expected)


@pytest.mark.parametrize("axis", [0, 1, 2, -1, -3])
def test_pack_puts_the_even_element_in_the_low_nibble(axis):
    codes = np.random.default_rng(0).integers(0, 16, (4, 6, 8), dtype=np.uint8)
    packed = nvfp4.pack(jnp.asarray(codes), axis)
    even, odd = (np.take(codes, range(start, codes.shape[axis], 2), axis) for start in (0, 1))
    assert_same_bits(packed, even | odd << 4)
    assert_same_bits(nvfp4.unpack(packed, axis), codes)


def test_every_byte_unpacks_and_packs_again():
    packed = jnp.arange(256, dtype=jnp.uint8)
    assert_same_bits(nvfp4.pack(nvfp4.unpack(packed, 0), 0), packed)


@pytest.mark.parametrize("divisor", [2688, 1536, 448])
def test_global_scale_is_the_ieee_quotient(backend, divisor):
    rng = np.random.default_rng(divisor)
    amax = rng.integers(0x0C000000, 0x7F800000, 200_000, dtype=np.uint32).view(np.float32)  # from 2^-103 up
    halves = np.arange(0x0C00, 0x7F80, dtype=np.uint16).view(HALVES[0]).astype(np.float32)
    amax = np.concatenate([amax, halves])
    assert_same_bits(global_scale(amax, divisor), amax / np.float32(divisor))


@pytest.mark.parametrize(
    ("amax", "scale"),
    [
        (0.0, 1.0),
        (2.0**-103, 2.0**-103 / 2688),
        (np.nextafter(np.float32(2.0**-103), np.float32(0)), 1.0),
        (1e-45, 1.0),
        (2688.0, 1.0),
        (np.inf, np.nan),
        (np.nan, np.nan),
    ],
)
def test_global_scale_of_special_values(amax, scale):
    np.testing.assert_array_equal(global_scale(jnp.float32(amax)), np.float32(scale))


def test_products_of_scales_are_never_subnormal():
    """Above the smallest amax the least scale product times the least value is normal, so that nothing is flushed."""
    assert nvfp4.SMALLEST_GLOBAL_AMAX / nvfp4.TENSOR_DIVISOR * E4M3.smallest * E2M1.smallest >= 2.0**-126
    assert nvfp4.TENSOR_DIVISOR == 2688
