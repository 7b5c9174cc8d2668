"""What a recipe says about the key-value cache, as data."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from jaxfp4.tensors.cache import CacheFormat


@dataclasses.dataclass(frozen=True)
class KvCache:
    """Keys and values are quantized as a cache of this format stores them.

    The model marks them, behind the rotation and in front of the attention, with
    `jax.ad_checkpoint.checkpoint_name(array, name)`; `keys` and `values` are these names. What checkpoints state of an
    NVFP4 cache is a convention that not all tools share, see `jaxfp4.export_checkpoint`.
    """

    format: CacheFormat = CacheFormat.FP8
    keys: str = "keys"
    values: str = "values"

    def __post_init__(self) -> None:
        if self.keys == self.values:
            raise ValueError(f"KvCache(keys={self.keys!r}, values={self.values!r}): wanted two different names")

    @property
    def kinds(self) -> Mapping[str, str]:
        """What the names mark."""
        return {self.keys: "keys", self.values: "values"}
