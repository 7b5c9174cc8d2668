"""Small floating-point formats as records; every constant of NVFP4 is derived from them.

Sources: OCP Microscaling Formats v1.0 (E2M1), OCP 8-bit Floating Point v1.0 (E4M3).
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

BLOCK_SIZE = 16
"""Consecutive values along the contraction that share one E4M3 scale."""


@dataclasses.dataclass(frozen=True)
class MinifloatFormat:
    """A sign bit, `exponent_bits` and `mantissa_bits`, most significant first.

    There are no infinities. If `has_nan`, the code with all exponent and mantissa bits set is NaN; otherwise every
    code is a number. Exponent field 0 holds zero and the subnormals.

    >>> E2M1.magnitudes.tolist()
    [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    >>> E4M3.max, E4M3.smallest
    (448.0, 0.001953125)
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    has_nan: bool

    @property
    def bits(self) -> int:
        """Width of a code, sign included."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def sign_mask(self) -> int:
        """The bit that marks a negative code."""
        return 1 << (self.bits - 1)

    @property
    def smallest_normal(self) -> float:
        """The least value with exponent field 1."""
        return 2.0 ** (1 - self.bias)

    @property
    def smallest(self) -> float:
        """The least positive value, a subnormal."""
        return 2.0 ** (1 - self.bias - self.mantissa_bits)

    @property
    def max(self) -> float:
        """The largest finite value."""
        return float(self.magnitudes[-1])

    @functools.cached_property
    def magnitudes(self) -> np.ndarray:
        """The non-negative finite values in the order of their codes, float64."""
        codes = np.arange(self.sign_mask - self.has_nan)
        exponent, mantissa = codes >> self.mantissa_bits, codes % (1 << self.mantissa_bits)
        fraction = mantissa / (1 << self.mantissa_bits)
        normal = (1 + fraction) * 2.0 ** (exponent - self.bias)
        return np.where(exponent == 0, fraction * self.smallest_normal, normal)

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The value of every code, float64; NaN where the code is no number, -0.0 for the negative zero."""
        positive = np.concatenate([self.magnitudes, [np.nan] * self.has_nan])
        return np.concatenate([positive, -positive])


E2M1 = MinifloatFormat("E2M1", exponent_bits=2, mantissa_bits=1, bias=1, has_nan=False)
E4M3 = MinifloatFormat("E4M3", exponent_bits=4, mantissa_bits=3, bias=7, has_nan=True)
