"""The most memory that quantizing a sharded model takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array

import jaxfp4
from jaxfp4.commands.bench_model.decoders import DecoderSize
from jaxfp4.commands.bench_model.scaling import mesh_of


@dataclasses.dataclass(frozen=True)
class MemoryResult:
    """Bytes on the device that holds most, while `quantize_params(donate=True)` quantizes a model split over `tp`."""

    devices: int
    parameters: int
    largest_group: int
    """Of weights that are quantized together because they share a scale, such as queries, keys and values."""
    before: int
    """In use once the parameters are there."""
    peak_before: int
    """Since the process began."""
    peak: int
    """The same after quantization."""
    after: int

    @property
    def added(self) -> int:
        """By how much the peak was above what was in use before; nothing if it was no more than the peak before."""
        return max(0, self.peak - self.before)

    @property
    def holds(self) -> bool:
        """Whether the peak is at most that of the parameters and one group of weights."""
        return self.added <= self.largest_group


def measure_memory(size: DecoderSize, devices: int, recipe: str = "nvfp4_weight_only") -> MemoryResult | None:
    """None where the platform does not say how much memory is in use.

    The peak is that of the process, so this has to come before what takes more.
    """
    if _in_use(devices, "peak_bytes_in_use") is None:
        return None
    apply_fn, params = size.function_and_parameters(mesh_of(devices, 1, jax.devices()))
    jax.block_until_ready(params)
    plan = jaxfp4.plan(apply_fn, params, size.tokens(), recipe=recipe)
    arrays: list[Any] = jax.tree.leaves(params)
    group = max(
        sum(_bytes_per_device(arrays[entry.weight.leaf]) for entry in plan.siblings(first)) for first in plan.quantized
    )
    parameters = sum(map(_bytes_per_device, arrays))
    before, peak_before = _read(devices, "bytes_in_use"), _read(devices, "peak_bytes_in_use")
    qparams = jax.block_until_ready(jaxfp4.quantize_params(params, plan, donate=True))
    peak, after = _read(devices, "peak_bytes_in_use"), _read(devices, "bytes_in_use")
    del qparams
    return MemoryResult(devices, parameters, group, before, peak_before, peak, after)


def _bytes_per_device(array: Array) -> int:
    return max(shard.data.nbytes for shard in array.addressable_shards)


def _in_use(devices: int, name: str) -> int | None:
    """The largest of a figure over the devices; None if one does not tell."""
    stats = [device.memory_stats() for device in _devices(devices)]
    found = [s[name] for s in stats if s is not None and name in s]
    return max(found) if len(found) == devices else None


def _devices(count: int) -> Sequence[Any]:
    return jax.devices()[:count]


def _read(devices: int, name: str) -> int:
    return _in_use(devices, name) or 0
