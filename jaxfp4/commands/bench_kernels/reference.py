"""What results have to be, in numpy with IEEE division, on rows spread over an array.

Rows are `[rows, K]` with the contraction last, whatever axis it has in the array; a search is tried in float64 with all
126 block scales.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxfp4.commands.bench_kernels.parts import Parts

Floats = NDArray[np.floating[Any]]
Rows = dict[str, NDArray[Any]]
"""Parts as numpy arrays, cut to rows; block scales are their E4M3 bytes."""

ROWS = 48
SEARCHED_VALUES = 1 << 15
"""Of those rows, how many values at most a search is tried on, but two rows at least."""

_BOUNDS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
_SCALES = np.arange(1, 127, dtype=np.uint8)


def rows_of(x: Array, axis: int, count: int = ROWS) -> NDArray[Any]:
    """Rows of an array along its contraction `axis`, -1 or -2, from its start to its end; float8 as bytes."""
    cut: Any = np.asarray(x) if jax.default_backend() == "cpu" else x  # what is on a CPU needs no compiled indexing
    if axis == -2 and x.ndim > 1:
        cut = cut[..., spread(x.shape[-1], count)].swapaxes(-1, -2)
    if x.ndim > 2:
        cut = np.concatenate([np.asarray(cut[0]), np.asarray(cut[-1])])
    values = np.asarray(cut[spread(len(cut), count)])
    return values.view(np.uint8) if values.dtype == ml_dtypes.float8_e4m3fn else values


def spread(size: int, count: int) -> NDArray[np.intp]:
    """Indices from the first to the last, at most `count`."""
    return np.unique(np.linspace(0, size - 1, count).astype(np.intp))


def parts_in_rows(parts: Parts, axis: int, count: int = ROWS) -> Rows:
    """Parts cut to the same rows; a single number is left as it is."""
    return {name: rows_of(part, axis, count) if part.size > 1 else np.asarray(part) for name, part in parts.items()}


def equal_share(ours: Rows, wanted: Rows, tolerance: float = 0.0) -> float:
    """The least share of equal bytes or floats over the parts that are wanted; of packed codes two are one byte.

    `tolerance` is how far they may be apart, relative to the largest magnitude that is wanted.
    """

    def equal(a: Floats, b: Floats) -> float:
        return float(np.mean(np.abs(a - b) <= tolerance * np.max(np.abs(b))))

    return min(equal(ours[name].astype(np.float32), w.astype(np.float32)) for name, w in wanted.items())


def global_scale(amax: Floats, divisor: int = 2688) -> np.float32:
    """`amax / divisor`."""
    return np.float32(np.float32(amax) / np.float32(divisor))


def max_scales(rows: Floats, scale: np.float32, largest_value: float = 6) -> NDArray[np.uint8]:
    """E4M3 bytes of `block_amax / (6 * global_scale)`."""
    amax = np.abs(_blocks(rows)).max(-1)
    return _e4m3_bytes(amax * np.float32(6 / largest_value) / (np.float32(6) * scale))


def encode(rows: Floats, scales: NDArray[np.uint8], scale: np.float32) -> NDArray[np.uint8]:
    """Packed codes under block scales."""
    quotient = _blocks(rows) / (_e4m3_values(scales) * scale)[..., None]
    codes = (_index(np.abs(quotient)) + 8 * (quotient < 0)).astype(np.uint8).reshape(rows.shape)
    return codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))


def decode(packed: NDArray[np.uint8], scales: NDArray[np.uint8], scale: np.float32) -> Floats:
    """The values of packed codes, float32."""
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(*scales.shape, 16)
    values = _VALUES[codes & 7] * np.where(codes >= 8, np.float32(-1), np.float32(1))
    return ((_e4m3_values(scales) * scale)[..., None] * values).reshape(len(packed), -1)


def quantized(rows: Floats, amax: Floats) -> Rows:
    """Max calibration."""
    scale = global_scale(amax)
    scales = max_scales(rows, scale)
    return {"packed": encode(rows, scales, scale), "scales": scales, "global_scale": np.asarray(scale)}


def fake_quantized(rows: Floats, amax: Floats) -> Floats:
    """Max calibration, decoded again."""
    result = quantized(rows, amax)
    return decode(result["packed"], result["scales"], global_scale(amax))


def searched(rows: Floats, amax: Floats, weigh: Callable[[Floats], Floats]) -> Rows:
    """The lowest of the 126 block scales with the least error; `weigh` makes one number of a block's differences."""
    scale, blocks = global_scale(amax), _blocks(rows)
    errors = [weigh(_difference(blocks, np.full(blocks.shape[:-1], code), scale)) for code in _SCALES]
    return {"scales": _SCALES[np.argmin(errors, 0)]}


def four_or_six(rows: Floats, amax: Floats) -> Rows:
    """The better of two block scales; 6 wins a tie."""
    scale, blocks = global_scale(amax, 1536), _blocks(rows)
    six, four = (max_scales(rows, scale, largest) for largest in (6, 4))
    errors = [np.sum(_difference(blocks, scales, scale) ** 2, -1) for scales in (six, four)]
    return {"scales": np.where(errors[1] < errors[0], four, six)}


def rotated(rows: Floats) -> Floats:
    """Groups of 16 times the Hadamard matrix over 4."""
    matrix = np.ones((1, 1))
    for _ in range(4):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return (_blocks(rows) @ (matrix / 4)).reshape(rows.shape).astype(np.float32)


def _difference(blocks: Floats, scales: NDArray[np.uint8], scale: np.float32) -> Floats:
    """Blocks less their nearest values under block scales, float64."""
    step = (_e4m3_values(scales) * scale)[..., None]
    nearest = _VALUES[_index(np.abs(blocks) / step)] * np.where(blocks < 0, -1.0, 1.0)
    return blocks.astype(np.float64) - step.astype(np.float64) * nearest


def _blocks(rows: Floats) -> Floats:
    return np.asarray(rows, np.float32).reshape(len(rows), -1, 16)


def _index(magnitude: Floats) -> NDArray[np.intp]:
    index = np.searchsorted(_BOUNDS, magnitude)
    return index + ((index % 2 == 1) & np.isin(magnitude, _BOUNDS[1::2]))


def _e4m3_bytes(values: Floats) -> NDArray[np.uint8]:
    return np.asarray(np.clip(values, 2.0**-9, 448).astype(ml_dtypes.float8_e4m3fn)).view(np.uint8)


def _e4m3_values(codes: NDArray[np.uint8]) -> Floats:
    return codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
