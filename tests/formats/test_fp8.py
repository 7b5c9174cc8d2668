"""E4M3 encoding and decoding against ml_dtypes, exhaustively where the inputs can be counted."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_data import assert_same_bits

from jaxfp4.formats import E4M3, fp8

E4M3FN = ml_dtypes.float8_e4m3fn
encode, decode = jax.jit(fp8.encode), jax.jit(fp8.decode)
SCALES = np.float32([1, 2**-9, 0.1, 1 / 3, 7.3e-5, 448, 1.7e30, 3e-33, 2.0**-112, 0.0123])


def reference(x, scale) -> np.ndarray:
    """Codes by numpy's float32 division and ml_dtypes' cast, saturating."""
    with np.errstate(all="ignore"):
        quotient = np.float32(x) / np.float32(scale)
        return np.clip(quotient, np.float32(-448), np.float32(448)).astype(E4M3FN).view(np.uint8)


def assert_same_codes(found, expected):
    """Equal codes; NaN in any of its forms."""
    found, nan = np.asarray(found), expected & 0x7F == 0x7F
    np.testing.assert_array_equal(found & 0x7F == 0x7F, nan)
    np.testing.assert_array_equal(found[~nan], expected[~nan])


def test_decode_every_code(backend):
    codes = np.arange(256, dtype=np.uint8)
    expected = codes.view(E4M3FN).astype(np.float32)
    found, number = np.asarray(decode(codes)), ~np.isnan(expected)
    assert_same_bits(found[number], expected[number])
    assert np.isnan(found[~number]).all()


def test_every_code_encodes_to_itself(backend):
    codes = np.arange(256, dtype=np.uint8)
    assert_same_codes(encode(decode(codes), jnp.ones((1,))), codes)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16], ids=["bfloat16", "float16"])
def test_every_half_precision_value(dtype, backend):
    """All 65,536 bit patterns at all scales."""
    x = np.arange(65536, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        wide = x.astype(np.float32)
    for scale in SCALES:
        assert_same_codes(encode(x, scale[None]), reference(wide, scale))


def test_random_float32_bits(backend):
    x = np.random.default_rng(0).integers(0, 2**32, 65536, dtype=np.uint32).view(np.float32)
    for scale in SCALES:
        assert_same_codes(encode(x, scale[None]), reference(x, scale))


def test_midpoints_and_their_neighbours(backend):
    """Quotients at a tie, and the float32 beside them, at many scales."""
    rng = np.random.default_rng(1)
    scales = np.exp2(rng.uniform(-60, 60, 500)).astype(np.float32)[:, None]
    values = E4M3.magnitudes
    middle = np.concatenate([values, (values[1:] + values[:-1]) / 2, [463.9, 464, 465]]).astype(np.float32) * scales
    x = [middle]
    for towards in (np.inf, -np.inf):
        for _ in range(2):
            x.append(np.nextafter(x[-1], np.float32(towards)))
        x.append(middle)
    x = np.concatenate(x, 1)
    assert_same_codes(encode(np.concatenate([x, -x], 1), scales), reference(np.concatenate([x, -x], 1), scales))


SPECIAL = {
    "zero": (0.0, 1, 0x00), "negative zero": (-0.0, 1, 0x80), "underflow": (-1e-30, 1, 0x80), "inf": (np.inf, 1, 0x7E),
    "-inf": (-np.inf, 1, 0xFE), "beyond": (1e30, 1e-20, 0x7E), "tie to zero": (2.0**-10, 1, 0x00),
    "subnormal": (1.5 * 2.0**-10, 1, 0x01), "nan": (np.nan, 1, 0x7F), "nan scale": (1.0, np.nan, 0x7F),
}  # fmt: skip


@pytest.mark.parametrize("name", SPECIAL)
def test_special_values(name, backend):
    x, scale, code = SPECIAL[name]
    assert encode(jnp.float32([x]), jnp.float32([scale]))[0] == code
