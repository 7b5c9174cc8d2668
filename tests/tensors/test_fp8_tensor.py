"""FP8 tensors against ml_dtypes in numpy, on meshes, and their fake quantization."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxfp4.tensors import FP8Tensor, global_amax, quantize_fp8
from jaxfp4.tensors.fp8_tensor import fake_quantize_fp8, fp8_scale_of

from .meshes import mesh, put


def reference(w, amax):
    """Codes and scale in IEEE float32; numpy's division and ml_dtypes' cast round to nearest even."""
    scale = np.float32(amax) / np.float32(448) if amax >= 2.0**-103 else np.float32(1)
    scaled = np.clip(np.asarray(w, np.float32) / scale, -448, 448)
    return scaled.astype(ml_dtypes.float8_e4m3fn), scale


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("kind", ["normal", "grid", "zeros", "tiny"])
def test_equals_numpy(kind, dtype):
    rng = np.random.default_rng(0)
    w = {
        "normal": rng.normal(size=(64, 48)),
        "grid": np.arange(-448, 448, 0.25).reshape(-1, 8),  # every tie of the coarse binades
        "zeros": np.zeros((4, 16)),
        "tiny": rng.normal(size=(8, 16)) * 1e-7,
    }[kind].astype(dtype)
    tensor = quantize_fp8(jnp.asarray(w))
    values, scale = reference(w, np.abs(w.astype(np.float32)).max())
    assert np.asarray(tensor.values).tobytes() == values.tobytes()
    assert tensor.global_scale == scale
    wanted = (scale * values.astype(np.float32)).astype(dtype)
    assert np.asarray(tensor.dequantize()).tobytes() == wanted.tobytes()
    assert (tensor.shape, tensor.axes, tensor.sizes, tensor.dtype) == (w.shape, (-2,), w.shape[:1], w.dtype)
    assert tensor.nbytes == w.size + 4


def test_one_scale_for_each_expert():
    w = np.random.default_rng(0).normal(size=(3, 16, 8)).astype(np.float32) * np.array([1, 10, 0.1]).reshape(3, 1, 1)
    w = w.astype(np.float32)
    tensor = quantize_fp8(jnp.asarray(w), 1, amax=global_amax(jnp.asarray(w), keep_axes=(0,)))
    assert tensor.global_scale.shape == (3, 1, 1)
    for expert in range(3):
        alone = quantize_fp8(jnp.asarray(w[expert]))
        assert np.array_equal(np.asarray(tensor.values)[expert].view(np.uint8), np.asarray(alone.values).view(np.uint8))


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
@pytest.mark.parametrize("name", ["tp8", "tp4 ep2"])
def test_same_bytes_on_every_mesh(name, kind):
    on = mesh(name, kind)
    w = jnp.asarray(np.random.default_rng(0).normal(size=(64, 32)), jnp.bfloat16)
    wanted = quantize_fp8(w)
    for spec in (PartitionSpec(*on.axis_names), PartitionSpec(None, on.axis_names)):
        placed = put(w, on, spec)
        found = quantize_fp8(placed)
        assert found.values.sharding.is_equivalent_to(placed.sharding, 2)
        assert np.asarray(found.values).tobytes() == np.asarray(wanted.values).tobytes()
        assert found.global_scale == wanted.global_scale


def test_fake_quantize_is_dequantize_of_quantize():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 32)), jnp.bfloat16)
    np.testing.assert_array_equal(fake_quantize_fp8(x, None), quantize_fp8(x).dequantize())
    scale = fp8_scale_of(jnp.float32(0.5))
    found = np.asarray(fake_quantize_fp8(x, scale), np.float32)
    assert found.max() == 0.5 and found.min() == -0.5  # what is beyond saturates
    gradient = jax.grad(lambda x: jnp.sum(fake_quantize_fp8(x, scale).astype(jnp.float32) * 3))(x)
    np.testing.assert_array_equal(gradient, jnp.full_like(x, 3))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_makes_everything_nan(bad):
    tensor = quantize_fp8(jnp.ones((16, 2)).at[3, 1].set(bad))
    assert np.isnan(tensor.global_scale) and np.all(np.isnan(tensor.dequantize()))


def test_it_is_a_pytree_of_two_arrays():
    tensor = quantize_fp8(jnp.ones((4, 16)), -1)
    assert len(jax.tree.leaves(tensor)) == 2
    assert repr(tensor) == "FP8Tensor(shape=(4, 16), axis=-1, dtype=float32)"
    assert repr(jax.tree.map(lambda _: "x", tensor)) == "FP8Tensor(values='x', global_scale='x')"
    assert isinstance(jax.jit(lambda t: t)(tensor), FP8Tensor)
