"""The quantizer for weights that are streamed: slabs of whole blocks, as bits, under a global scale that is given.

It gives the bytes of `jaxfp4.quantize` because all numbers come from `jaxfp4.formats.nvfp4`; what differs is how often
that is asked. For one global scale there are 126 block scales, and under one of them the code of a value only grows
with its magnitude. So `nvfp4.encode_values` is asked by bisection for the smallest bit pattern of each code, 126 x 8
numbers for a tensor, and values are then coded by comparing integers: memory-bound, where the exact division of each
value is not. (2.5 GB/s of bfloat16 on two cores, instead of 0.15.)
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array, lax

from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.formats import BLOCK_SIZE, exact, nvfp4
from jaxfp4.formats.minifloat import E2M1, E4M3
from jaxfp4.recipes.methods import Max, Method
from jaxfp4.tensors.quantize import ChooseScales, RoundToNearest
from jaxfp4.transform.statistics import MomentForm

FLOATS = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16))
"""The dtypes of weights that can be quantized."""

_CODES = len(E2M1.magnitudes)
_SLAB_VALUES = 1 << 20
_SEARCHED_SLAB_VALUES = 1 << 18
_SMALL_SLAB_VALUES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A global scale and what follows from it; arrays on the device that quantizes."""

    global_scale: Array
    """float32 `[]`."""

    thresholds: Array
    """uint32 `[127, 8]`: for each E4M3 code the smallest magnitudes, as bits, whose E2M1 code is 1 to 7, and the
    smallest whose negative is not code 0."""


@dataclasses.dataclass(frozen=True)
class SlabQuantizer:
    """Quantizes slabs of weights by a method that needs no data."""

    choose_scales: ChooseScales
    divisor: int
    """Global amax over global scale."""
    slab_values: int
    """How many values to hand over at a time."""

    @classmethod
    def of(cls, method: Method) -> SlabQuantizer:
        """The quantizer of a method. ValueError if the method needs calibration data or more than one slab."""
        encoder = encoder_for(method)
        plain = method.channels is None and method.rotation is None and method.moments is MomentForm.NONE
        if not plain or not isinstance(encoder, RoundToNearest):
            raise ValueError(f"method {method}: wanted one that needs no calibration data; choose max or mse scales")
        searched = not isinstance(method.scales, Max)
        return cls(encoder.choose_scales, method.scales.divisor, _SEARCHED_SLAB_VALUES if searched else _SLAB_VALUES)

    def scaling(self, amax: float, dtype: np.dtype) -> Scaling:
        """The global scale of a finite global amax, and the thresholds for values of a dtype."""
        return Scaling(*_scaling(jnp.float32(amax), self.divisor, dtype))

    def encode(self, values: np.ndarray, scaling: Scaling) -> tuple[Array, Array]:
        """`(packed uint8 [n / 2], scales uint8 [n / 16])` of n values, whole blocks in a row; not waited for.

        The two may be longer: their last bytes are of zeros that were appended, so that few lengths are compiled.
        """
        dtype = values.dtype
        padded = next((n for n in (_SMALL_SLAB_VALUES, self.slab_values) if n >= values.size), values.size)
        words = np.zeros(padded * dtype.itemsize // 4, np.uint32) if padded > values.size else None
        if words is None:
            words = values.view(np.uint32)
        else:
            words.view(dtype)[: values.size] = values
        shape = (-1, BLOCK_SIZE // 2) if dtype.itemsize == 2 else (-1, BLOCK_SIZE // 2, 2)
        return _encode(words.reshape(shape), scaling.global_scale, scaling.thresholds, self.choose_scales, dtype)


def amax_of(values: np.ndarray) -> float:
    """`max(abs(values))`; NaN or Inf if one of them is not finite, 0 if there are none."""
    bits = values.view(f"uint{8 * values.dtype.itemsize}")
    largest = np.max(bits & bits.dtype.type(_sign_bit(values.dtype) - 1), initial=0)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return float(np.array(largest, bits.dtype).view(values.dtype))


def _sign_bit(dtype: np.dtype) -> int:
    return 1 << (8 * dtype.itemsize - 1)


def _as_values(bits: Array, dtype: np.dtype) -> Array:
    """Bits in uint32 as values of the dtype."""
    return lax.bitcast_convert_type(bits.astype(f"uint{8 * dtype.itemsize}"), dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _scaling(amax: Array, divisor: int, dtype: np.dtype) -> tuple[Array, Array]:
    global_scale = nvfp4.global_scale(amax, divisor)
    scales = nvfp4.decode_scale(jnp.arange(E4M3.sign_mask - 1, dtype=jnp.uint8))[:, None]

    def code(bits: Array, sign: int) -> Array:
        return nvfp4.encode_values(_as_values(bits | jnp.uint32(sign), dtype), scales, global_scale)

    codes = jnp.arange(1, _CODES, dtype=jnp.uint8)
    positive = _smallest(lambda bits: code(bits, 0) >= codes, (scales.shape[0], _CODES - 1), dtype)
    negative = _smallest(lambda bits: code(bits, _sign_bit(dtype)) >= E2M1.sign_mask, scales.shape, dtype)
    return global_scale, jnp.concatenate([positive, negative], 1)


def _smallest(holds, shape: tuple[int, ...], dtype: np.dtype) -> Array:  # type: ignore[no-untyped-def]
    """The smallest bits, uint32, up to those of infinity, for which a monotone condition holds."""
    infinity = int(np.array(np.inf, dtype).view(f"uint{8 * dtype.itemsize}"))

    def halve(_: int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = low + (high - low) // 2
        found = holds(middle)
        return jnp.where(found, low, middle + 1), jnp.where(found, middle, high)

    start = (jnp.zeros(shape, jnp.uint32), jnp.full(shape, infinity, jnp.uint32))
    return lax.fori_loop(0, infinity.bit_length(), halve, start)[1]


@functools.partial(jax.jit, static_argnums=(3, 4))
def _encode(
    words: Array, global_scale: Array, thresholds: Array, choose_scales: ChooseScales, dtype: np.dtype
) -> tuple[Array, Array]:
    """Packed codes and block scales, flat, of `[blocks, 8]` pairs of 16-bit floats or `[blocks, 8, 2]` float32."""
    even, odd = (words & 0xFFFF, words >> 16) if words.ndim == 2 else (words[..., 0], words[..., 1])
    magnitude = jnp.uint32(_sign_bit(dtype) - 1)
    if choose_scales is _CHOOSE_MAX:
        amax = jnp.max(jnp.maximum(even & magnitude, odd & magnitude), -1, keepdims=True)
        scales = nvfp4.encode_scale(exact.to_float32(_as_values(amax, dtype)), global_scale)
    else:
        values = jnp.stack([even, odd], -1).reshape(-1, BLOCK_SIZE)
        scales = choose_scales(_as_values(values, dtype), global_scale, 1, None)
    limits = thresholds[scales]

    def code(bits: Array) -> Array:
        reached = [(bits & magnitude >= limits[..., i]).astype(jnp.uint32) for i in range(_CODES)]
        negative = (bits > magnitude).astype(jnp.uint32) & reached[-1]
        return sum(reached[:-1], negative * E2M1.sign_mask)

    packed = (code(even) | (code(odd) << 4)).astype(jnp.uint8)
    return packed.reshape(-1), scales.reshape(-1)


_CHOOSE_MAX = RoundToNearest().choose_scales
