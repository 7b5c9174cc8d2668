"""Keys and values as a cache gives them back, against numpy and ml_dtypes on every layout."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from golden_data import assert_same_bits
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxfp4
from jaxfp4.tensors.cache import CacheAmax, CacheFormat
from jaxfp4.tensors.cache_rounding import fake_quantize_cache

FP8, NVFP4 = CacheFormat.FP8, CacheFormat.NVFP4
DTYPES = [np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16), np.dtype(np.float16)]


def draw(dtype=np.float32, shape=(4, 8, 2, 32)) -> np.ndarray:
    return np.random.default_rng(0).normal(size=shape).astype(np.float32).astype(dtype)


def reference(x, amax) -> np.ndarray:
    """E4M3 of the float32 quotient, times the scale, cast last."""
    scale = np.float32(amax) / np.float32(448)
    codes = np.clip(x.astype(np.float32) / scale, np.float32(-448), np.float32(448)).astype(ml_dtypes.float8_e4m3fn)
    return (scale * codes.astype(np.float32)).astype(x.dtype)


@pytest.mark.parametrize("amax", [1.0, 2.7, 0.3, 448.0, 1e-20, 1e20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fp8(dtype, amax, backend):
    """Also where values saturate or vanish."""
    x = draw(dtype)
    assert_same_bits(fake_quantize_cache(jnp.asarray(x), jnp.float32(amax), FP8), reference(x, amax))


def test_fp8_of_every_bfloat16(backend):
    x = np.arange(65536, dtype=np.uint16).view(ml_dtypes.bfloat16)
    x = x[np.isfinite(x.astype(np.float32))] if backend else x
    for amax in (1.0, 3.1, 100.0):
        with np.errstate(over="ignore"):
            expected = reference(x, amax)
        assert_same_bits(fake_quantize_cache(jnp.asarray(x), jnp.float32(amax), FP8), expected)


def test_nvfp4_is_fake_quantize_along_the_last_axis():
    x = jnp.asarray(draw())
    expected = jaxfp4.fake_quantize(x, -1, global_amax=2.5)
    np.testing.assert_array_equal(fake_quantize_cache(x, jnp.float32(2.5), NVFP4), expected)


@pytest.mark.parametrize("format", CacheFormat)
def test_without_an_amax_it_is_that_of_the_array(format):
    x = jnp.asarray(draw())
    expected = fake_quantize_cache(x, jnp.abs(x).max(), format)
    np.testing.assert_array_equal(fake_quantize_cache(x, None, format), expected)


@pytest.mark.parametrize(
    "x, amax, expected",
    [(0.0, 0.0, 0.0), (5.0, 0.0, 5.0), (1e-33, 1e-33, 0.0), (np.inf, 2.0, 2.0), (-np.inf, 2.0, -2.0),
     (np.nan, 2.0, np.nan), (1.0, np.nan, np.nan), (1.0, np.inf, np.nan)],
)  # fmt: skip
def test_special_values_of_fp8(x, amax, expected):
    np.testing.assert_array_equal(fake_quantize_cache(jnp.float32([x]), jnp.float32(amax), FP8), np.float32([expected]))


@pytest.mark.parametrize("format", CacheFormat)
def test_gradient_is_that_of_the_identity(format):
    x = jnp.asarray(draw())
    gradient = jax.grad(lambda x: (fake_quantize_cache(x, jnp.float32(1.0), format) * x).sum())(x)
    np.testing.assert_allclose(gradient, fake_quantize_cache(x, jnp.float32(1.0), format) + x, rtol=1e-6)


SPECS = [P("tp"), P(None, "tp"), P(None, "ep", "tp"), P(None, None, None, "tp"), P(None, None, None, ("tp", "ep"))]


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("format", CacheFormat)
def test_equal_on_meshes(format, kind):
    """Whether heads, tokens or features are split, blocks cut or not, jitted or not."""
    x = jnp.asarray(draw(ml_dtypes.bfloat16))
    expected = np.asarray(fake_quantize_cache(x, None, format))
    mesh = jax.make_mesh((2, 4), ("tp", "ep"), axis_types=(kind, kind))
    for spec in SPECS:
        with jax.set_mesh(mesh):
            split = jax.device_put(x, NamedSharding(mesh, spec))
            for function in (fake_quantize_cache, jax.jit(fake_quantize_cache, static_argnums=2)):
                assert_same_bits(np.asarray(function(split, None, format)), expected)


def test_repr_of_a_weight_that_makes_keys():
    weight = jaxfp4.tensors.QuantizedWeight(
        jaxfp4.quantize(jnp.ones((16, 2))), cache=CacheAmax(jnp.float32(1.5), None, FP8)
    )
    assert repr(weight).endswith("cache=FP8(keys=1.5))")
    assert len(jax.tree.leaves(weight)) == 4
