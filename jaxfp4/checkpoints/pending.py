"""Tensors to be written: what they are called and look like, and how their values come from the devices."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxfp4.checkpoints.safetensors_file import DTYPES


def is_storable(dtype: Any) -> bool:
    """Whether safetensors has this dtype."""
    return dtype in DTYPES.values()


def row_major(values: np.ndarray) -> np.ndarray:
    """A row-major copy, of a transposed array as fast as of any other."""
    result = np.empty(values.shape, values.dtype)
    copy_values(result, values)
    return result


def copy_values(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`; a transposed source in strips, which keep both sides within the processor's cache."""
    if source.ndim == 0 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    strip = 16 * source.itemsize  # among the fastest of 8 to 256, for 1, 2 and 4 bytes
    for start in range(0, source.shape[-1], strip):
        target[..., start : start + strip] = source[..., start : start + strip]


@dataclasses.dataclass(frozen=True)
class PendingTensor:
    """A tensor that is known by name, dtype and shape, and whose values are fetched when they are written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]
    """Gives the values, row-major; what it returns is dropped once written."""
    holders: tuple[int, ...] | None = None
    """The processes whose devices hold all of it, None if every process can fetch it. Without any, `fetch` sends the
    pieces between processes, and all of them have to call it, in the same order."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


def entry_of(
    array: jax.Array | np.ndarray, name: str, index: tuple[int, ...], order: Sequence[int], shape: tuple[int, ...]
) -> PendingTensor:
    """`array[index].transpose(order).reshape(shape)` as a tensor to be written; `index` is for leading axes."""
    holders = _holders(array, index)

    def read() -> np.ndarray:
        if holders == () and isinstance(array, jax.Array):
            return gather(array, index, order).reshape(shape)
        return fetch(array, index, order).reshape(shape)

    return PendingTensor(name, np.dtype(array.dtype), shape, read, holders)


def _holders(array: jax.Array | np.ndarray, index: tuple[int, ...]) -> tuple[int, ...] | None:
    """The processes that hold all of `array[index]`; None if this process has the whole array."""
    if isinstance(array, np.ndarray) or array.is_fully_addressable:
        return None
    size = math.prod(array.shape[len(index) :])
    held: dict[int, set[tuple[tuple[int, int, int], ...]]] = {}
    placed: Mapping[Any, Any] = array.sharding.devices_indices_map(array.shape)
    for device, place in placed.items():
        if _local_index(place, index) is not None:
            rest = zip(place[len(index) :], array.shape[len(index) :], strict=True)
            held.setdefault(device.process_index, set()).add(tuple(part.indices(n) for part, n in rest))
    # Different shards do not overlap, so they are all of it if their sizes add up.
    volumes = {p: sum(math.prod(len(range(*part)) for part in piece) for piece in held[p]) for p in held}
    return tuple(sorted(process for process, volume in volumes.items() if volume == size))


def fetch(array: jax.Array | np.ndarray, index: tuple[int, ...], order: Sequence[int]) -> np.ndarray:
    """`numpy.asarray(array)[index].transpose(order)`, row-major, from every device only the shards that hold it.

    `index` holds integers for leading axes. Nothing stays behind on the host: neither a copy of the whole array nor one
    cached with it. This process's devices must hold all of the entry.
    """
    order = tuple(order)
    shape = array.shape[len(index) :]
    result = np.empty([shape[axis] for axis in order], array.dtype)
    if isinstance(array, np.ndarray):
        entry: tuple[Any, ...] = (*index, ...)  # the dots make a 0-d array where there would be a scalar
        copy_values(result, array[entry].transpose(order))
        return result
    seen = set()
    for shard in array.addressable_shards:
        local = _local_index(shard.index, index)
        piece = str(shard.index)  # slices cannot be hashed before Python 3.12
        if local is not None and piece not in seen:
            seen.add(piece)
            rest = shard.index[len(index) :]
            place = (*(rest[axis] for axis in order), ...)
            entry = (*local, ...)
            if _in_host_memory(shard.data):
                copy_values(result[place], np.asarray(shard.data)[entry].transpose(order))
            else:
                # numpy.asarray of the shard itself would stay cached with it for as long as the parameter lives.
                result[place] = np.asarray(_slice(shard.data, local, order))
    return result


def gather(array: jax.Array, index: tuple[int, ...], order: Sequence[int]) -> np.ndarray:
    """As `fetch`, of an entry that several processes hold together: each of them sends its pieces to all."""
    mesh = array.sharding.mesh if isinstance(array.sharding, NamedSharding) else None
    if mesh is None:
        entry: tuple[Any, ...] = (*index, ...)
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))[entry].transpose(order)
    everywhere = NamedSharding(mesh, PartitionSpec())
    whole = jax.jit(_entry, static_argnums=2, out_shardings=everywhere)(array, index, tuple(order))
    return np.array(whole.addressable_data(0))


def on_every_host(values: jax.Array | np.ndarray | np.float32) -> np.ndarray:
    """The values of a small array; all processes call this for one whose devices belong to several."""
    if not isinstance(values, jax.Array) or values.is_fully_addressable or values.is_fully_replicated:
        return np.asarray(values)
    return np.asarray(multihost_utils.process_allgather(values, tiled=True))


def _local_index(place: tuple[slice, ...], index: tuple[int, ...]) -> tuple[int, ...] | None:
    """`index` counted from the start of a shard at `place`; None if the shard does not hold it."""
    local = []
    for part, number in zip(place, index, strict=False):
        start = part.start or 0
        if number < start or (part.stop is not None and number >= part.stop):
            return None
        local.append(number - start)
    return tuple(local)


def _in_host_memory(piece: jax.Array) -> bool:
    return all(device.platform == "cpu" for device in piece.devices())


def _entry(piece: jax.Array, index: tuple[jax.Array, ...], order: tuple[int, ...]) -> jax.Array:
    return jnp.copy(jnp.transpose(piece[index], order))


_slice = functools.partial(jax.jit, static_argnums=2)(_entry)
