"""Integer errors: exact parts, whatever the compiler makes of their arithmetic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxfp4.formats.squared_error import LOW_BITS, high_square, high_term, low_square, low_term

UNIT = 2.0**20


def errors(largest):
    generator = np.random.default_rng(0)
    random = generator.uniform(-largest, largest, 20_000)
    halves = (np.arange(-2000, 2000) + 0.5) / 1024
    return np.concatenate([random, random * 1e-3, halves, [0.0, largest, -largest, 2.0**-11, 2.0**-30]]).astype(
        np.float32
    )


def both(high, low, values):
    """The parts, compiled and one operation at a time, as int64."""
    compiled = jax.jit(lambda v: (high(v), low(v)))(jnp.asarray(values))
    with jax.disable_jit():
        eager = high(jnp.asarray(values)), low(jnp.asarray(values))
    for found, wanted in zip(compiled, eager, strict=True):
        np.testing.assert_array_equal(found, wanted)
    return (np.asarray(part).astype(np.int64) for part in compiled)


def test_squares_are_those_of_the_nearest_integer_and_a_rest():
    values = errors(7.99)
    high, low = both(high_square, low_square, values)
    np.testing.assert_array_equal(high, np.rint(values.astype(np.float64) * 1024).astype(np.int64) ** 2)
    found = high + low / 2.0**LOW_BITS
    wanted = values.astype(np.float64) ** 2 * UNIT
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2.0**-LOW_BITS + 2.0**-10)
    assert np.abs(low).max() < 2**27 // 2 + 2**14  # 16 of them fit an int32


def test_terms_are_truncated_twice():
    values = np.abs(errors(127.0))
    high, low = both(high_term, low_term, values)
    exact = values.astype(np.float64) * 2.0**19
    np.testing.assert_array_equal(high, np.floor(exact).astype(np.int64))
    np.testing.assert_array_equal(low, np.floor((exact - np.floor(exact)) * 2.0**LOW_BITS).astype(np.int64))


@pytest.mark.gpu
def test_a_gpu_makes_the_same_integers():
    values = errors(7.99)
    parts = jax.jit(lambda v: (high_square(v), low_square(v)))
    found, wanted = (parts(jax.device_put(values, jax.devices(p)[0])) for p in ("gpu", "cpu"))
    for gpu, cpu in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(gpu, cpu)
