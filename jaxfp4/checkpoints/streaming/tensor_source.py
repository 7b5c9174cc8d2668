"""Reads the tensors of a directory piece by piece with explicit reads, so that no mapped page stays in memory."""

from __future__ import annotations

import dataclasses
import io
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxfp4.checkpoints.safetensors_file import SafetensorsFile, read_weight_map
from jaxfp4.checkpoints.writer import INDEX_FILE, SINGLE_FILE

_SUFFIX = ".safetensors"
_INDEX_SUFFIX = ".safetensors.index.json"
_LARGEST_READ = 1 << 30
_MOST_OPEN_FILES = 8


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is: row-major at a byte of a file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def size(self) -> int:
        """Number of values."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.size * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class TensorSource:
    """The tensors of a directory, by name; see `open_source`."""

    directory: Path
    tensors: Mapping[str, StoredTensor]
    files: tuple[Path, ...]
    stem: str
    """The first part of the files' names, "model" mostly."""
    metadata: tuple[Mapping[str, str], ...]
    """The free text entries of each file."""


def open_source(directory: Path) -> TensorSource:
    """Opens the safetensors files of a directory and checks their headers; nothing of the tensors is read.

    `model.safetensors.index.json`, or the one index there is, says which files count; else `model.safetensors` does,
    else all `*.safetensors` together. The index may name files of the directory only, never a path; a file may be a
    link, as in a download cache.

    Raises:
        FileNotFoundError: there is no such directory or no safetensors file in it, or one that the index names.
        ValueError: a file breaks the format, index and files disagree, or two files have the same tensor.
    """
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory}: there is no such directory; wanted a checkpoint folder")
    index = _index_of(directory)
    weight_map = read_weight_map(index) if index else None
    if weight_map is not None:
        files = tuple(directory / name for name in sorted(set(weight_map.values())))
    elif (directory / SINGLE_FILE).is_file():
        files = (directory / SINGLE_FILE,)
    else:
        files = tuple(sorted(path for path in directory.glob("*" + _SUFFIX) if path.is_file()))
    if not files:
        raise FileNotFoundError(f"{directory}: there is no {SINGLE_FILE} and no other *{_SUFFIX}; wanted a checkpoint")
    tensors: dict[str, StoredTensor] = {}
    metadata: list[Mapping[str, str]] = []
    for path in files:
        file = SafetensorsFile(path)
        metadata.append(file.metadata)
        for tensor in _tensors_of(file):
            if tensor.name in tensors:
                first = tensors[tensor.name].path.name
                raise ValueError(
                    f"{path}: tensor {tensor.name!r} is in {first} as well: wanted it once; remove one of the files"
                )
            tensors[tensor.name] = tensor
    if index and weight_map is not None:
        _refuse_other_index(index, weight_map, {name: tensor.path.name for name, tensor in tensors.items()})
    stem = index.name.removesuffix(_INDEX_SUFFIX) if index else files[0].name.removesuffix(_SUFFIX)
    stem = stem if index or len(files) == 1 else "model"
    return TensorSource(directory, tensors, files, stem, tuple(metadata))


def _index_of(directory: Path) -> Path | None:
    if (directory / INDEX_FILE).is_file():
        return directory / INDEX_FILE
    indices = sorted(directory.glob("*" + _INDEX_SUFFIX))
    if len(indices) > 1:
        raise ValueError(f"{directory}: {indices[0].name} and {indices[1].name}: wanted one index; remove the other")
    return indices[0] if indices else None


def _tensors_of(file: SafetensorsFile) -> Iterator[StoredTensor]:
    """The tensors of a file, whose header is checked: they tile its end without a gap."""
    infos = {name: file.info(name) for name in file.names()}
    offset = file.path.stat().st_size - sum(_nbytes(*info) for info in infos.values())
    for name, (dtype, shape) in infos.items():
        yield StoredTensor(name, dtype, shape, file.path, offset)
        offset += _nbytes(dtype, shape)


def _nbytes(dtype: np.dtype[Any], shape: tuple[int, ...]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * dtype.itemsize


def _refuse_other_index(index: Path, listed: Mapping[str, str], found: Mapping[str, str]) -> None:
    for name in sorted({*listed, *found}):
        if name not in found:
            raise ValueError(f"{index}: tensor {name!r} is said to be in {listed[name]}, which does not have it")
        if name not in listed:
            raise ValueError(f"{index}: tensor {name!r} is in {found[name]}, but the index does not place it there")
        if listed[name] != found[name]:
            raise ValueError(f"{index}: tensor {name!r} is said to be in {listed[name]}, but it is in {found[name]}")


class Reader:
    """Reads pieces of tensors, each file opened once. A context manager."""

    def __init__(self) -> None:
        self._files: dict[Path, io.FileIO] = {}

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *error: object) -> None:
        for file in self._files.values():
            file.close()

    def values(self, tensor: StoredTensor, begin: int, end: int) -> np.ndarray:
        """Values `begin` to `end` of the flattened tensor. OSError if the file has become shorter."""
        result = np.empty(end - begin, tensor.dtype)
        buffer = result.view(np.uint8).data
        try:
            done = self._read(tensor.path, tensor.offset + begin * tensor.dtype.itemsize, buffer)
        except OSError as error:
            raise OSError(
                f"{tensor.path}: tensor {tensor.name!r} cannot be read: {error.strerror}; check the file and its disk"
            ) from error
        if done < len(buffer):
            raise OSError(
                f"{tensor.path}: tensor {tensor.name!r} ends {len(buffer) - done} bytes early: wanted {tensor.nbytes}; "
                "the file was changed while it was read"
            )
        return result

    def _read(self, path: Path, offset: int, buffer: memoryview) -> int:
        """Fills the buffer as far as the file goes; the number of bytes."""
        file = self._file(path)
        file.seek(offset)
        done = 0
        while done < len(buffer):
            count = file.readinto(buffer[done : done + _LARGEST_READ])
            if not count:
                break
            done += count
        return done

    def expect(self, tensor: StoredTensor) -> None:
        """Lets the operating system read a tensor ahead."""
        if sys.platform == "linux" and tensor.nbytes:
            descriptor = self._file(tensor.path).fileno()
            os.posix_fadvise(descriptor, tensor.offset, tensor.nbytes, os.POSIX_FADV_WILLNEED)

    def _file(self, path: Path) -> io.FileIO:
        if path not in self._files:
            if len(self._files) == _MOST_OPEN_FILES:
                oldest = next(iter(self._files))
                self._files.pop(oldest).close()
            self._files[path] = io.FileIO(path, "rb")
        return self._files[path]
