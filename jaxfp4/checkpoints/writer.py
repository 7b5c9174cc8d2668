"""Writes tensors to safetensors files one at a time, in a directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import pathlib
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxfp4.checkpoints.safetensors_file import DTYPES

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The order in which the safetensors library lays tensors out, the first in the file first.
_LAYOUT = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_DTYPE_NAMES = {DTYPES[name]: name for name in _LAYOUT}
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPE_NAMES)}
_HEADER_ALIGNMENT = 8
_STRIP = 16  # rows that are transposed together: the fastest of 16 to 256 for bytes


def is_storable(dtype: Any) -> bool:
    """Whether safetensors has this dtype."""
    return dtype in _DTYPE_NAMES


@dataclasses.dataclass(frozen=True)
class PendingTensor:
    """A tensor that is known by name, dtype and shape, and whose values are fetched when they are written."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    fetch: Callable[[], np.ndarray]
    """Gives the values, row-major; what it returns is dropped once written."""

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def fetch(array: jax.Array | np.ndarray, index: tuple[int, ...], order: Sequence[int]) -> np.ndarray:
    """`numpy.asarray(array)[index].transpose(order)`, row-major, from every device only the shards that hold it.

    `index` holds integers for leading axes. Nothing stays behind on the host: neither a copy of the whole array nor one
    cached with it.
    """
    order = tuple(order)
    shape = array.shape[len(index) :]
    result = np.empty([shape[axis] for axis in order], array.dtype)
    if isinstance(array, np.ndarray):
        entry: tuple[Any, ...] = (*index, ...)  # the dots make a 0-d array where there would be a scalar
        _copy(result, array[entry].transpose(order))
        return result
    for shard in array.addressable_shards:
        local = _local_index(shard.index, index)
        if shard.replica_id == 0 and local is not None:
            rest = shard.index[len(index) :]
            place = (*(rest[axis] for axis in order), ...)
            entry = (*local, ...)
            if _in_host_memory(shard.data):
                _copy(result[place], np.asarray(shard.data)[entry].transpose(order))
            else:
                # numpy.asarray of the shard itself would stay cached with it for as long as the parameter lives.
                result[place] = np.asarray(_slice(shard.data, local, order))
    return result


def _copy(target: np.ndarray, source: np.ndarray) -> None:
    """`target[...] = source`; a transposed source in strips, which keep both sides within the processor's cache."""
    if source.ndim == 0 or source.strides[-1] == source.itemsize:
        target[...] = source
        return
    for start in range(0, source.shape[-1], _STRIP):
        target[..., start : start + _STRIP] = source[..., start : start + _STRIP]


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


@functools.partial(jax.jit, static_argnums=2)
def _slice(piece: jax.Array, index: tuple[jax.Array, ...], order: tuple[int, ...]) -> jax.Array:
    return jnp.copy(jnp.transpose(piece[index], order))


@contextlib.contextmanager
def new_directory(out_dir: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary directory beside `out_dir`, renamed to it when the block ends and removed when it raises.

    Raises FileExistsError if `out_dir` exists, even empty, and FileNotFoundError if its parent does not. A process that
    is killed leaves `.NAME.XXXXXXXX.partial` behind, never a part of `out_dir`.
    """
    if os.path.lexists(out_dir):
        raise FileExistsError(f"{out_dir} exists already: wanted a directory to create; remove it or name another")
    parent = out_dir.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(
            f"{parent} is no directory: wanted an existing one to create {out_dir.name!r} in; create it"
        )
    partial = parent / f".{out_dir.name}.{secrets.token_hex(4)}.partial"
    try:
        partial.mkdir()
        yield partial
        _sync(partial)
        partial.rename(out_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno is None:
            raise
        raise OSError(
            f"{out_dir}: writing failed: {error.strerror} ({os.path.basename(error.filename or '')}); nothing was left "
            "behind; make room or name another directory"
        ) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync(parent)


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as Model-Optimizer does, indented by 4."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=4)
        _flush(file)


def write_tensors(
    directory: pathlib.Path, tensors: Iterable[PendingTensor], max_shard_bytes: int | None = None
) -> None:
    """Writes `model.safetensors`, or with a size limit several files and their index.

    Tensors are assigned to files in the order of their names; one larger than `max_shard_bytes` has a file of its own.
    If everything fits in one file, there is no index. Only one tensor at a time is in host memory.
    """
    shards = _shards(sorted(tensors, key=lambda tensor: tensor.name), max_shard_bytes)
    if len(shards) == 1:
        _write_file(directory / SINGLE_FILE, shards[0])
        return
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_file(directory / file_name, shard)
        weight_map.update({tensor.name: file_name for tensor in shard})
    total = sum(tensor.nbytes for shard in shards for tensor in shard)
    write_json(directory / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _shards(tensors: list[PendingTensor], limit: int | None) -> list[list[PendingTensor]]:
    shards: list[list[PendingTensor]] = [[]]
    size = 0
    for tensor in tensors:
        if shards[-1] and limit is not None and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def _write_file(path: pathlib.Path, tensors: list[PendingTensor]) -> None:
    """One safetensors file, laid out byte for byte as the safetensors library does."""
    ordered = sorted(tensors, key=lambda tensor: (_DTYPE_RANK[tensor.dtype], tensor.name))
    with path.open("wb") as file:
        file.write(_header(ordered))
        for tensor in ordered:
            values = tensor.fetch()
            if values.dtype != tensor.dtype or values.shape != tensor.shape:
                raise ValueError(
                    f"tensor {tensor.name!r} came as {values.dtype} {values.shape}: wanted {tensor.dtype} "
                    f"{tensor.shape}, as announced"
                )
            file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
            del values
        _flush(file)


def _header(tensors: list[PendingTensor]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync(directory: pathlib.Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
