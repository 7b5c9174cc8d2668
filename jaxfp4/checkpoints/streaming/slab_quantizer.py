"""The quantizer for weights that are streamed: slabs of whole blocks, as bits, under a global scale that is given.

It gives the bytes of `jaxfp4.quantize` because all numbers come from where that takes them; what differs is that the
borders between codes are found once for a tensor and not for each slab (`jaxfp4.tensors.nearest`).
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax import Array

from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.formats import BLOCK_SIZE, nvfp4
from jaxfp4.recipes.methods import Max, Method
from jaxfp4.tensors import nearest
from jaxfp4.tensors.quantize import ChooseScales, RoundToNearest
from jaxfp4.transform.statistics import MomentForm

FLOATS = tuple(np.dtype(dtype) for dtype in (np.float32, np.float16, ml_dtypes.bfloat16))
"""The dtypes of weights that can be quantized."""

_SLAB_VALUES = 1 << 20
_SEARCHED_SLAB_VALUES = 1 << 18
_SMALL_SLAB_VALUES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Scaling:
    """A global scale and what follows from it; arrays on the device that quantizes."""

    global_scale: Array
    """float32 `[]`."""

    table: nearest.Borders
    """The borders between codes under each E4M3 code."""


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
        """The global scale of a finite global amax, and the borders between codes for values of a dtype."""
        return Scaling(*_scaling(jnp.float32(amax), self.divisor, dtype))

    def encode(self, values: np.ndarray, scaling: Scaling) -> tuple[Array, Array]:
        """`(packed uint8 [n / 2], scales uint8 [n / 16])` of n values, whole blocks in a row; not waited for.

        The two may be longer: their last bytes are of zeros that were appended, so that few lengths are compiled.
        """
        dtype = values.dtype
        padded = next((n for n in (_SMALL_SLAB_VALUES, self.slab_values) if n >= values.size), values.size)
        if padded > values.size:
            values = np.concatenate([values, np.zeros(padded - values.size, dtype)])
        blocks = values.reshape(-1, BLOCK_SIZE)
        return _encode(blocks, scaling.global_scale, scaling.table, self.choose_scales)


def amax_of(values: np.ndarray) -> float:
    """`max(abs(values))`; NaN or Inf if one of them is not finite, 0 if there are none."""
    bits = values.view(f"uint{8 * values.dtype.itemsize}")
    largest = np.max(bits & bits.dtype.type(_sign_bit(values.dtype) - 1), initial=0)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return float(np.array(largest, bits.dtype).view(values.dtype))


def _sign_bit(dtype: np.dtype) -> int:
    return 1 << (8 * dtype.itemsize - 1)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _scaling(amax: Array, divisor: int, dtype: np.dtype) -> tuple[Array, nearest.Borders]:
    global_scale = nvfp4.global_scale(amax, divisor)
    return global_scale, nearest.border_table(global_scale, dtype)


@functools.partial(jax.jit, static_argnums=3)
def _encode(
    blocks: Array, global_scale: Array, table: nearest.Borders, choose_scales: ChooseScales
) -> tuple[Array, Array]:
    """Packed codes and block scales, flat, of blocks `[n, 16]`."""
    scales = choose_scales(blocks, global_scale, 1, None)
    packed = nearest.packed_codes(blocks, nearest.look_up(table, scales), 1)
    return packed.reshape(-1), scales.reshape(-1)
