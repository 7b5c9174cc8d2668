"""Quotients and roundings decided without dividing equal numpy's IEEE ones on every backend."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_data import assert_same_bits

from jaxfp4.formats import exact

HALVES = [np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]


def hostile_numbers(rng, divisor):
    """Non-negative float32 with normal quotients by `divisor`: random bits, and values around quotients' midpoints."""
    bits = rng.integers(0, 0x7F800000, 300_000, dtype=np.uint32)
    quotients = (rng.integers(1 << 23, 1 << 25, 100_000) + 0.5) * 2.0 ** rng.integers(-120, 90, 100_000)
    near = (quotients * divisor).astype(np.float32)
    edges = np.float32([2.0**k for k in range(-110, 128)])
    x = np.concatenate(
        [bits.view(np.float32), near, edges, np.nextafter(edges, np.float32(0)), [np.float32(3.4028235e38)]]
    )
    x = np.concatenate([x, np.nextafter(x, np.float32(0)), np.float32([0, 448, 2688, 6, 1])])
    return x[(x == 0) | (x >= np.float32(divisor * 2.0**-126))]


@pytest.mark.parametrize("divisor", [2688, 1536, 448, 7, 21, 1, 2047])
def test_divide_by_integer_is_the_ieee_quotient(backend, divisor):
    x = hostile_numbers(np.random.default_rng(divisor), divisor)
    quotient = jax.jit(exact.divide_by_integer, static_argnums=1)(x, divisor)
    assert_same_bits(quotient, x / np.float32(divisor))


def test_divide_by_integer_of_special_values():
    x = np.float32([0, np.inf, 1.2345, np.nan])
    quotient = np.asarray(jax.jit(exact.divide_by_integer, static_argnums=1)(x, 2688))
    assert_same_bits(quotient[:3], x[:3] / np.float32(2688))
    assert np.isnan(quotient[3])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_to_float32_of_every_value(backend, dtype):
    x = np.arange(65536, dtype=np.uint16).view(dtype)
    x = x[~np.isnan(x.astype(np.float32))]
    assert_same_bits(jax.jit(exact.to_float32)(x), x.astype(np.float32))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cast_rounds_even_where_the_value_is_upcast_again(backend, dtype):
    """XLA may remove `x.astype(bfloat16).astype(float32)`; it may not remove this."""
    rng = np.random.default_rng(0)
    every = np.arange(65536, dtype=np.uint16).view(dtype).astype(np.float32)
    every = np.sort(every[np.isfinite(every)])
    midpoints = (every[1:].astype(np.float64) + every[:-1]).astype(np.float64) / 2
    x = np.concatenate([every, midpoints.astype(np.float32), rng.standard_normal(100_000).astype(np.float32)])
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(-np.inf))])
    x = x[np.isfinite(x) & (np.abs(x) >= 2.0**-126)]  # XLA flushes float32 subnormals on a CPU
    with np.errstate(over="ignore"):
        expected = x.astype(dtype)
    rounded, upcast = jax.jit(lambda x: (exact.cast(x, dtype), exact.to_float32(exact.cast(x, dtype))))(x)
    assert_same_bits(rounded, expected)
    assert_same_bits(upcast, expected.astype(np.float32))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_to_float32_keeps_a_rounding_made_just_before(backend, dtype):
    """The same where a user's own cast comes first."""
    x = np.random.default_rng(0).standard_normal(10_000).astype(np.float32)
    once = jax.jit(lambda x: exact.to_float32(x.astype(dtype)))(x)
    assert_same_bits(once, x.astype(dtype).astype(np.float32))


def test_cast_to_float32_is_the_identity():
    x = jnp.float32([1.1, -0.0])
    assert_same_bits(exact.cast(x, jnp.float32), x)


def test_rounds_to_zero_as_the_ieee_quotient_does(backend):
    rng = np.random.default_rng(0)
    bits = [
        0,
        1,
        2,
        3,
        4,
        0x7FFFFE,
        0x7FFFFF,
        0x800000,
        0x800001,
        0x3F800000,
        0x7F7FFFFF,
        *rng.integers(0, 1 << 26, 200),
    ]
    magnitude = np.array(bits, np.uint32)[:, None]
    mantissas = np.float32(
        [1, np.nextafter(np.float32(1), np.float32(2)), 1.5, np.nextafter(np.float32(2), np.float32(1))]
    )
    divisor = np.concatenate([mantissas * np.float32(2.0**k) for k in range(-124, 127)])[None]
    with np.errstate(under="ignore", over="ignore"):
        expected = magnitude.view(np.float32) / divisor == 0
    magnitude, divisor = (np.array(a) for a in np.broadcast_arrays(magnitude, divisor))
    assert 0 < expected.mean() < 1
    np.testing.assert_array_equal(jax.jit(exact.rounds_to_zero)(magnitude, divisor), expected)


def test_powers_of_two(backend):
    mantissas = np.float32([1, 1.25, np.nextafter(np.float32(2), np.float32(1))])
    exponents = np.arange(-126, 127)
    x = (mantissas[:, None] * np.exp2(exponents.astype(np.float64))).astype(np.float32)
    power = np.broadcast_to(np.exp2(exponents.astype(np.float64)), x.shape).astype(np.float32)
    assert_same_bits(jax.jit(exact.power_of_two)(x), power)
    inverse = jax.jit(exact.inverse_power_of_two)(x)
    assert_same_bits(inverse, (1 / power).astype(np.float32))


def test_magnitude_bits_order_as_magnitudes(backend):
    x = np.float32([0.0, -1e-45, 1e-40, -1.0, 2.0, -np.inf, np.nan])
    bits = np.asarray(jax.jit(exact.magnitude_bits)(x))
    assert (np.diff(bits.astype(np.int64)) > 0).all()
    assert bits[0] == 0 and jax.jit(exact.magnitude_bits)(np.float32([-0.0]))[0] == 0
