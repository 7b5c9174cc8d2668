"""Stored codes and block scales as float32 values, by tables, in numpy: for work on files alone."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from jaxfp4.formats import BLOCK_SIZE, E2M1, E4M3

SCALE_VALUES: NDArray[np.float32] = E4M3.values.astype(np.float32)
"""What each of the 256 bytes of a block scale, or of an FP8 weight, stands for."""

_CODE_VALUES = E2M1.values.astype(np.float32)
_BYTES = np.arange(256)
# The two values that a byte of packed codes stands for, the low nibble first, as one item of 64 bits.
_PAIRS = np.stack([_CODE_VALUES[_BYTES & 15], _CODE_VALUES[_BYTES >> 4]], axis=-1).view(np.uint64)[:, 0]


def decoded_blocks(codes: NDArray[np.uint8], scales: NDArray[Any], global_scale: np.float32) -> NDArray[np.float32]:
    """`(block scale * global scale) * code` in float32, `[blocks, 16]`, in the order of the bytes.

    `codes` uint8 `[.., K/2]`, `scales` E4M3 `[.., K/16]`. A NaN scale gives NaN.
    """
    with np.errstate(all="ignore"):
        table = SCALE_VALUES * global_scale
        values: NDArray[np.float32] = _PAIRS.take(codes).view(np.float32).reshape(-1, BLOCK_SIZE)
        values *= table.take(scales.view(np.uint8)).reshape(-1, 1)
    return values
