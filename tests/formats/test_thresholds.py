"""Borders between codes in closed form, against the codes themselves on both sides of every border."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.formats import exact, nvfp4
from jaxfp4.formats.minifloat import E2M1, E4M3
from jaxfp4.formats.thresholds import code_thresholds

BLOCK_SCALES = E4M3.sign_mask - 2
SMALLEST, LARGEST = 2.0**-124, 2.0**126


@jax.jit
def codes_at(divisor, bits):
    """The codes of the values with these bits `[R, n]` and `[n]` divisors."""
    return nvfp4.encode_values(exact.as_float(bits), divisor, jnp.float32(1))


find = jax.jit(code_thresholds)


def assert_borders(divisor):
    divisor = np.asarray(divisor, np.float32)
    assert np.all((divisor >= SMALLEST) & (divisor <= LARGEST))
    found = find(divisor)
    for code, border in enumerate(map(np.asarray, found.reached), start=1):
        below, reached = np.asarray(codes_at(divisor, np.stack([border - 1, border])))
        assert border.dtype == np.uint32 and border.shape == divisor.shape
        # An infinite value reaches every code, and a border beyond it is one that no value reaches.
        assert np.all(below[border <= INFINITY] < code) and np.all(reached[border < INFINITY] >= code)
    negative = np.asarray(found.negative)
    below, reached = np.asarray(codes_at(divisor, np.stack([negative - 1, negative]) | np.uint32(SIGN)))
    assert np.all(below == 0) and np.all(reached >= E2M1.sign_mask)


INFINITY = 255 << 23
SIGN = 1 << 31


@pytest.mark.parametrize("global_scale", [2.0**-115, 1.1754942e-34, 3.0e-20, 1 / 2688, 1.0, 2 - 2.0**-23, 7e19, 1e35])
def test_every_block_scale_under_a_global_scale(global_scale):
    """Those of the smallest and of the largest global amax, powers of two and a mantissa of all ones among them."""
    scales = nvfp4.decode_scale(jnp.arange(1, 1 + BLOCK_SCALES, dtype=jnp.uint8))
    assert_borders(scales * jnp.float32(global_scale))


def test_divisors_of_every_exponent():
    exponents = np.arange(-124, 126)[:, None]
    mantissas = np.random.default_rng(0).uniform(1, 2, (250, 500))
    mantissas[:, :2] = 1.0, 2 - 2.0**-23
    assert_borders(np.append((mantissas * 2.0**exponents).astype(np.float32).clip(SMALLEST, LARGEST), LARGEST))


def test_every_upper_half_of_a_mantissa():
    """With the lower half empty and full: products with midpoints that are exact, and their neighbours."""
    upper = np.arange(1 << 12, dtype=np.uint32) << 11
    bits = np.concatenate([upper, upper | 0x7FF, upper | 1]) | np.uint32(127 << 23)
    assert_borders(bits.view(np.float32))


def test_borders_of_one():
    found = code_thresholds(jnp.float32(1))
    after = np.nextafter(np.float32([0.25, 1.25, 2.5, 5.0]), np.float32(np.inf), dtype=np.float32)
    wanted = np.float32([after[0], 0.75, after[1], 1.75, after[2], 3.5, after[3]])
    # A quotient just below a midpoint that is a tie to the upper code is no tie: float32 holds it.
    np.testing.assert_array_equal(np.asarray(found.reached), wanted.view(np.uint32))
    assert int(found.negative) == 1


@pytest.mark.parametrize("exponent, least", [(1, 2), (2, 3), (20, 2**19 + 1), (23, 2**22 + 1), (24, 2**23 + 1)])
def test_negatives_that_underflow(exponent, least):
    """`x / 2^exponent` is zero up to 2^-150, the tie: `x` is at most `2^(exponent - 150)`, in units of 2^-149."""
    assert int(code_thresholds(jnp.float32(2.0**exponent)).negative) == least
