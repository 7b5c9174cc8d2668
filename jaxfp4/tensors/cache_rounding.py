"""Rounding of keys and values to what a quantized key-value cache gives back."""

from __future__ import annotations

from jax import Array

from jaxfp4.tensors.cache import CacheFormat
from jaxfp4.tensors.fp8_tensor import fake_quantize_fp8, fp8_scale_of
from jaxfp4.tensors.quantize import fake_quantize_with_scale, global_scale_of
from jaxfp4.tensors.reductions import as_float_array, global_amax


def fake_quantize_cache(x: Array, amax: Array | None, format: CacheFormat) -> Array:
    """Keys or values as they come back from a cache of this format, with the gradient of the identity.

    `amax` is float32 `[]`, None for that of `x` itself; what is beyond it saturates. An amax of zero, or below 2^-103,
    gives zeros (FP8: scale 1), and one that is not finite NaN. Shape, dtype and sharding are those of `x`, and the
    values the same on every sharding.

    >>> import jax.numpy as jnp
    >>> fake_quantize_cache(jnp.array([0.1, 1.0, 2.4, 7.0]), jnp.float32(7.0), CacheFormat.FP8)
    Array([0.1015625, 1.       , 2.5      , 7.       ], dtype=float32)
    """
    x = as_float_array(x)
    amax = global_amax(x) if amax is None else amax
    if format is CacheFormat.NVFP4:
        return fake_quantize_with_scale(x, -1, global_scale_of(amax))
    return fake_quantize_fp8(x, fp8_scale_of(amax))
