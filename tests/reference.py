"""An independent NVFP4 quantizer: plain numpy with IEEE division and lookup tables, written from the formulas."""

import ml_dtypes
import numpy as np

E2M1_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
E2M1_MIDPOINTS = np.array([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5], np.float32)
BLOCK = 16


def e2m1_codes(x):
    """Codes of float32 quotients `x`: nearest value, ties to the even code, the sign of anything below zero."""
    magnitude = np.abs(x)
    index = np.searchsorted(E2M1_MIDPOINTS, magnitude, side="left")
    tie = np.isin(magnitude, E2M1_MIDPOINTS)
    index = index + (tie & (index % 2 == 1))
    return (index + 8 * (x < 0)).astype(np.uint8)


def scale_codes(block_amax, global_scale):
    """E4M3 bytes of the block scales."""
    with np.errstate(all="ignore"):
        scale = block_amax.astype(np.float32) / (np.float32(6) * np.float32(global_scale))
    scale = np.where(scale == 0, np.float32(1), scale)
    return np.clip(scale, np.float32(2**-9), np.float32(448)).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)


def quantize_last_axis(w, global_amax=None):
    """`(packed, scale bytes, global scale)` of `w` in blocks of 16 along its last axis."""
    w = np.asarray(w).astype(np.float32)
    blocks = w.reshape(*w.shape[:-1], -1, BLOCK)
    amax = np.float32(np.abs(w).max() if global_amax is None else global_amax)
    global_scale = np.float32(1) if amax == 0 else amax / np.float32(2688)
    scales = scale_codes(np.abs(blocks).max(-1), global_scale)
    divisor = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * global_scale
    with np.errstate(all="ignore"):
        codes = e2m1_codes(blocks / divisor[..., None]).reshape(w.shape)
    return codes[..., 0::2] | (codes[..., 1::2] << 4), scales, global_scale


def dequantize_last_axis(packed, scales, global_scale):
    """The float32 values of `quantize_last_axis`'s result."""
    codes = np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1, BLOCK)
    values = E2M1_VALUES[codes & 7] * np.where(codes >= 8, np.float32(-1), np.float32(1))
    scale = scales.view(ml_dtypes.float8_e4m3fn).astype(np.float32) * np.float32(global_scale)
    return (scale[..., None] * values).reshape(*packed.shape[:-1], -1)
