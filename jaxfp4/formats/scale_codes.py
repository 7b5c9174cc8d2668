"""E4M3 codes of block scales and the distances between them, as searches use them, in plain JAX and in kernels."""

from __future__ import annotations

from jaxfp4.formats.minifloat import E2M1, E4M3

LARGEST_CODE = E4M3.sign_mask - 2
"""The code of 448."""

OCTAVE = 8
"""Codes from a normal scale to its double."""

WITHOUT_HALF = 15
"""The largest code whose scale has no half among the codes."""

ALL_ZERO = 38
"""Codes from the scale that puts a block's largest value at 6 to one that puts it below 1/4."""

LOST = E2M1.smallest / 2 * 0.999
"""Of a scale: what is below rounds to zero."""
