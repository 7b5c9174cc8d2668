"""Counts over the codes and block scales of a stored weight, read in pieces."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from jaxfp4.formats import BLOCK_SIZE, E2M1, E4M3

# A block of 16 codes is one 64-bit word; each constant holds its nibble 16 times.
_ONES = 0x1111111111111111
_MAGNITUDES = np.uint64(0x7 * _ONES)
_CARRIES = np.uint64(0x8 * _ONES)
_LEVELS = len(E2M1.magnitudes)
_FOUR = E2M1.magnitudes.tolist().index(4.0)
_SIX = E2M1.magnitudes.tolist().index(6.0)
_PIECE = 1 << 15  # blocks at a time: 256 KiB of codes stay in the processor's cache

_SIGN = E4M3.sign_mask
_NAN = _SIGN - 1
_SATURATED = _NAN - 1
_FIRST_NORMAL = 1 << E4M3.mantissa_bits


@dataclasses.dataclass(frozen=True)
class BlockStatistics:
    """Of one weight, or of several together: see `merged`."""

    scale_counts: NDArray[np.int64]
    """`[256]`: how many blocks have each E4M3 code as their scale."""

    dead: int
    """Blocks whose codes are all zero."""

    lost: int
    """Blocks whose scale is zero, but not all of their codes."""

    largest_below_six: int
    """Blocks, not dead, whose largest code is below 6."""

    largest_below_four: int

    code_counts: NDArray[np.int64] | None
    """`[8]`: how many codes have each magnitude, 0 to 6; None if they were not counted."""

    @property
    def blocks(self) -> int:
        """All blocks."""
        return int(self.scale_counts.sum())

    @property
    def live(self) -> int:
        """Blocks that are not dead."""
        return self.blocks - self.dead

    @property
    def nan(self) -> int:
        """Blocks whose scale is NaN."""
        return int(self.scale_counts[_NAN] + self.scale_counts[_SIGN + _NAN])

    @property
    def negative(self) -> int:
        """Blocks whose scale is below zero."""
        return int(self.scale_counts[_SIGN + 1 : _SIGN + _NAN].sum())

    @property
    def negative_zero(self) -> int:
        """Blocks whose scale is -0."""
        return int(self.scale_counts[_SIGN])

    @property
    def saturated(self) -> int:
        """Blocks whose scale is 448, the largest."""
        return int(self.scale_counts[_SATURATED])

    @property
    def subnormal(self) -> int:
        """Blocks whose scale is positive and below 2^-6, with less than 4 significant bits."""
        return int(self.scale_counts[1:_FIRST_NORMAL].sum())

    @property
    def largest_scale(self) -> float:
        """The largest finite block scale; 0 without any."""
        present = np.flatnonzero(self.scale_counts[:_NAN])
        return float(E4M3.magnitudes[present[-1]]) if present.size else 0.0

    @property
    def code_entropy(self) -> float:
        """`-sum(p * log2(p))` over the magnitudes, in bits: at most 3. NaN if they were not counted."""
        if self.code_counts is None:
            return float("nan")
        p = self.code_counts[self.code_counts > 0] / self.code_counts.sum()
        return float(-(p * np.log2(p)).sum()) + 0.0


def block_statistics(
    codes: NDArray[np.uint8], scales: NDArray[np.uint8], *, count_codes: bool = False
) -> BlockStatistics:
    """Of packed codes `[N, K/2]` and the bytes of their block scales `[N, K/16]`.

    Only a piece of 256 KiB is copied at a time. Without `count_codes` it is about four times as fast.
    """
    words = codes.reshape(-1)
    scale_bytes = scales.reshape(-1)
    levels = range(1, _LEVELS) if count_codes else (_FOUR, _SIX)
    reaching_blocks, reaching_codes = np.zeros(_LEVELS, np.int64), np.zeros(_LEVELS, np.int64)
    scale_counts = np.zeros(256, np.int64)
    dead = lost = 0
    piece = np.empty(_PIECE, np.uint64)
    for start in range(0, scale_bytes.size, _PIECE):
        of_piece = scale_bytes[start : start + _PIECE]
        block = piece[: of_piece.size]
        # Copied, because the file need not hold the codes at a multiple of 8 bytes.
        block.view(np.uint8)[:] = words[start * BLOCK_SIZE // 2 : (start + of_piece.size) * BLOCK_SIZE // 2]
        block &= _MAGNITUDES
        scale_counts += np.bincount(of_piece, minlength=256)
        dead += of_piece.size - int(np.count_nonzero(block))
        zero_scale = of_piece & (_SIGN - 1) == 0
        if zero_scale.any():
            lost += int(np.count_nonzero(block[zero_scale]))
        for level in levels:
            # A nibble of at least `level` carries into its sign bit.
            hits = (block + np.uint64((8 - level) * _ONES)) & _CARRIES
            reaching_blocks[level] += np.count_nonzero(hits)
            if count_codes:
                reaching_codes[level] += int(np.bitwise_count(hits).sum(dtype=np.int64))
    live = scale_bytes.size - dead
    code_counts = None
    if count_codes:
        reaching_codes[0] = scale_bytes.size * BLOCK_SIZE
        code_counts = reaching_codes - np.append(reaching_codes[1:], 0)
    below_six, below_four = live - int(reaching_blocks[_SIX]), live - int(reaching_blocks[_FOUR])
    return BlockStatistics(scale_counts, dead, lost, below_six, below_four, code_counts)


def merged(first: BlockStatistics, second: BlockStatistics) -> BlockStatistics:
    """The statistics of both weights together."""
    counted = first.code_counts is not None and second.code_counts is not None
    return BlockStatistics(
        first.scale_counts + second.scale_counts,
        first.dead + second.dead,
        first.lost + second.lost,
        first.largest_below_six + second.largest_below_six,
        first.largest_below_four + second.largest_below_four,
        first.code_counts + second.code_counts if counted else None,  # type: ignore[operator]
    )
