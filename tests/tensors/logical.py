"""What quantizing must give, computed on the logical array by numpy: no mesh, no JAX."""

from collections.abc import Sequence

import numpy as np
import reference
from golden_data import assert_same_bits

BLOCK = reference.BLOCK


def blocks_last(w: np.ndarray, axis: int | Sequence[int]) -> tuple[np.ndarray, int]:
    """`w` as float32 with its contraction last, flattened and padded with zeros, and the place it came from."""
    axes = sorted(a % w.ndim for a in ([axis] if isinstance(axis, int) else axis))
    last = axes[-1]
    w = w.astype(np.float32)
    if len(axes) > 1 and w.shape[last] % BLOCK:
        rest = [a for a in range(w.ndim) if a not in axes]
        w = w.transpose(*rest, *axes).reshape(*(w.shape[a] for a in rest), -1)
        place = last - len(axes) + 1
    else:
        w = np.moveaxis(w, last, -1)
        place = last
    return np.pad(w, [(0, 0)] * (w.ndim - 1) + [(0, -w.shape[-1] % BLOCK)]), place


def expected_block_amax(w: np.ndarray, axis: int | Sequence[int]) -> np.ndarray:
    """The block maxima in the axis order of `w`."""
    flat, place = blocks_last(w, axis)
    return np.moveaxis(np.abs(flat).reshape(*flat.shape[:-1], -1, BLOCK).max(-1), -1, place)


def expected_quantized(
    w: np.ndarray, axis: int | Sequence[int], global_amax: float | None = None
) -> tuple[np.ndarray, np.ndarray, np.float32]:
    """`(packed, scale bytes, global scale)` in the axis order of `w`."""
    flat, place = blocks_last(w, axis)
    packed, scales, global_scale = reference.quantize_last_axis(flat, global_amax)
    return np.moveaxis(packed, -1, place), np.moveaxis(scales, -1, place), global_scale


def expected_per_expert(w: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same with one global scale for each entry of axis 0, which is not the contraction."""
    parts = [expected_quantized(expert, axis - 1) for expert in w]
    packed, scales = (np.stack([part[i] for part in parts]) for i in (0, 1))
    return packed, scales, np.stack([part[2] for part in parts]).reshape(-1, *[1] * (w.ndim - 1))


def expected_values(w: np.ndarray, axis: int, global_amax: float | None = None) -> np.ndarray:
    """The dequantized values, float32, for one contraction axis that is a multiple of 16."""
    flat, place = blocks_last(w, axis)
    return np.moveaxis(reference.dequantize_last_axis(*reference.quantize_last_axis(flat, global_amax)), -1, place)


def assert_quantized(tensor: object, expected: tuple[np.ndarray, np.ndarray, np.ndarray]) -> None:
    """The bytes of an `NVFP4Tensor` are those expected."""
    assert_same_bits(tensor.packed, expected[0])
    assert_same_bits(np.asarray(tensor.scales).view(np.uint8), expected[1])
    assert_same_bits(tensor.global_scale, np.asarray(expected[2], np.float32))
