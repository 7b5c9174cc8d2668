"""What is known of the keys and values that a quantized key-value cache holds."""

from __future__ import annotations

import dataclasses
import enum
import functools

import jax
from jax import Array


class CacheFormat(enum.Enum):
    """How keys and values are stored."""

    FP8 = "FP8"
    """E4M3 with one scale, `amax / 448`."""
    NVFP4 = "NVFP4"
    """Blocks of 16 along the last axis, the heads' features, with global scale `amax / 2688`.

    Checkpoints have `amax / 448` all the same, see `jaxfp4.export_checkpoint`."""


@functools.partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class CacheAmax:
    """The absolute maxima, float32 `[]` or one for each layer of a stack, of the keys or values that a weight makes."""

    keys: Array | None
    values: Array | None
    format: CacheFormat
