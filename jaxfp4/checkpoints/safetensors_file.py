"""Reads safetensors files as memory-mapped arrays, the 8-bit floats included, after checking the whole header.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON ``{name: {dtype, shape,
data_offsets}}``, and the data. Nothing in it is ever executed. The header is not trusted: each shape must account for
exactly its bytes, and the tensors must tile the data section without a gap or an overlap up to the last byte of the
file. (The safetensors library's own numpy readers fail on E4M3.)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

#: safetensors dtype name -> numpy dtype.
DTYPES: Mapping[str, np.dtype[Any]] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}

#: The longest header that is read, in bytes (the format's own limit).
MAX_HEADER_BYTES = 100_000_000

_LENGTH_BYTES = 8
_MAX_DIMENSIONS = 64
_LARGEST_SIZE = 2**63 - 1
_METADATA = "__metadata__"
_SINGLE_FILE = "model.safetensors"
_INDEX_FILE = "model.safetensors.index.json"


class SafetensorsFile:
    """One safetensors file, checked and memory-mapped when it is made.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file breaks the format. The message is one line: file, tensor, what was found, what was wanted.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"{self.path}: there is no such file; wanted a safetensors file")
        size = self.path.stat().st_size
        header, start = _read_header(self.path, size)
        self._entries, self._metadata = _parse_header(self.path, header, size - start)
        # An empty data section cannot be mapped.
        self._data: NDArray[np.uint8] = (
            np.memmap(self.path, np.uint8, mode="r", offset=start) if size > start else np.zeros(0, np.uint8)
        )

    @property
    def metadata(self) -> dict[str, str]:
        """The free text entries of the header's ``__metadata__``; empty if it has none."""
        return dict(self._metadata)

    def names(self) -> tuple[str, ...]:
        """The tensor names, in the order of their data."""
        return tuple(self._entries)

    def info(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """``(dtype, shape)`` of a tensor. KeyError, naming file and tensor, if there is none of that name."""
        dtype, shape, _ = self._entry(name)
        return dtype, shape

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only view of a tensor's bytes in the mapped file: only what is touched is read. KeyError as `info`."""
        dtype, shape, (begin, end) = self._entry(name)
        return self._data[begin:end].view(dtype).reshape(shape)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise KeyError(f"{self.path}: there is no tensor {name!r}; the file has {len(self._entries)} others")
        return self._entries[name]


_Entry = tuple[np.dtype[Any], tuple[int, ...], tuple[int, int]]


def _read_header(path: Path, size: int) -> tuple[bytes, int]:
    """``(header bytes, where the data starts)``, with the length checked against the file's size."""
    with path.open("rb") as file:
        prefix = file.read(_LENGTH_BYTES)
        if len(prefix) < _LENGTH_BYTES:
            raise ValueError(
                f"{path}: the file has {size} bytes, wanted at least the {_LENGTH_BYTES} of the header's length"
            )
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path}: the header's length is {length} bytes, wanted at most {MAX_HEADER_BYTES}")
        if length > size - _LENGTH_BYTES:
            raise ValueError(
                f"{path}: the header's length is {length} bytes, but {size - _LENGTH_BYTES} follow; the file is "
                "truncated or no safetensors file"
            )
        return file.read(length), _LENGTH_BYTES + length


def _parse_header(path: Path, header: bytes, data_bytes: int) -> tuple[dict[str, _Entry], dict[str, str]]:
    try:
        parsed = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: the header is no valid JSON ({_one_line(error)})") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"{path}: the header is a JSON {type(parsed).__name__}, wanted an object")
    metadata = parsed.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError(f"{path}: {_METADATA} is {_short(metadata)}, wanted an object of strings")
    entries = {name: _parse_entry(path, name, entry) for name, entry in parsed.items()}
    ordered = dict(sorted(entries.items(), key=lambda item: item[1][2]))
    _check_tiling(path, ordered, data_bytes)
    return ordered, metadata


def _parse_entry(path: Path, name: str, entry: Any) -> _Entry:
    where = f"{path}: tensor {name!r}"
    if not _is_text(name):
        raise ValueError(f"{where} has a name with half a character (a lone surrogate), wanted Unicode text")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{where} is described by {_short(entry)}, wanted an object of dtype, shape and data_offsets")
    dtype_name, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype_name, str) or dtype_name not in DTYPES:
        raise ValueError(f"{where} has dtype {_short(dtype_name)}, wanted one of {', '.join(DTYPES)}")
    if not _is_sizes(shape) or len(shape) > _MAX_DIMENSIONS or max(shape, default=0) > _LARGEST_SIZE:
        raise ValueError(
            f"{where} has shape {_short(shape)}, wanted at most {_MAX_DIMENSIONS} non-negative integers below 2**63"
        )
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"{where} has data_offsets {_short(offsets)}, wanted [begin, end] with 0 <= begin <= end")
    dtype = DTYPES[dtype_name]
    wanted = math.prod(shape) * dtype.itemsize
    if offsets[1] - offsets[0] != wanted:
        raise ValueError(
            f"{where} spans {offsets[1] - offsets[0]} bytes, wanted {wanted} for {dtype_name} of shape {shape}"
        )
    return dtype, tuple(shape), (offsets[0], offsets[1])


def _check_tiling(path: Path, ordered: Mapping[str, _Entry], data_bytes: int) -> None:
    """The tensors, ordered by their offsets, fill the data section without gap, overlap or rest."""
    position = 0
    for name, (_, _, (begin, end)) in ordered.items():
        if end > data_bytes:
            raise ValueError(
                f"{path}: tensor {name!r} ends at byte {end} of the data, which has {data_bytes}; the file is truncated"
            )
        if begin != position:
            problem = "overlaps the tensor before it" if begin < position else "leaves a gap before it"
            raise ValueError(f"{path}: tensor {name!r} {problem}: it begins at byte {begin}, wanted {position}")
        position = end
    if position != data_bytes:
        raise ValueError(f"{path}: the tensors take {position} bytes, but {data_bytes} follow the header")


def _is_sizes(value: Any) -> bool:
    """Whether `value` is a list of non-negative integers (a JSON true is no integer here)."""
    return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)


def _is_text(name: str) -> bool:
    """Whether it can be written as UTF-8, which JSON's escapes do not ensure."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    """The JSON object; ValueError if a key is there twice (readers would disagree about which counts)."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key!r} is there twice")
            seen.add(key)
    return result


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


class Checkpoint:
    """The tensors of a checkpoint folder under one set of names, whichever file has them; see `open_checkpoint`."""

    def __init__(self, directory: Path, files: Sequence[SafetensorsFile]):
        self.directory = directory
        self._files = {name: file for file in files for name in file.names()}
        self._metadata = {key: value for file in files for key, value in file.metadata.items()}

    @property
    def metadata(self) -> dict[str, str]:
        """The files' metadata together; where two files share a key, that of the later file."""
        return dict(self._metadata)

    def names(self) -> tuple[str, ...]:
        """All tensor names."""
        return tuple(self._files)

    def info(self, name: str) -> tuple[np.dtype[Any], tuple[int, ...]]:
        """``(dtype, shape)`` of a tensor. KeyError, naming folder and tensor, if there is none of that name."""
        return self._file(name).info(name)

    def tensor(self, name: str) -> NDArray[Any]:
        """A read-only memory-mapped view of a tensor. KeyError as `info`."""
        return self._file(name).tensor(name)

    def _file(self, name: str) -> SafetensorsFile:
        if name not in self._files:
            raise KeyError(
                f"{self.directory}: there is no tensor {name!r}; the checkpoint has {len(self._files)} others"
            )
        return self._files[name]


def open_checkpoint(directory: str | Path) -> Checkpoint:
    """Opens ``model.safetensors``, or the shards that ``model.safetensors.index.json`` lists, of a folder.

    The index is checked against the files: it must place every tensor in the file that has it and know every tensor
    of those files. It may name only files of the folder itself, never a path. (A file there may be a link, as in a
    download cache.)

    Raises:
        FileNotFoundError: no such folder, neither file in it, or a shard is missing.
        ValueError: a file breaks the format, or index and files disagree.
    """
    folder = Path(directory)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: there is no such directory; wanted a checkpoint folder")
    index = folder / _INDEX_FILE
    if not index.is_file():
        if not (folder / _SINGLE_FILE).is_file():
            raise FileNotFoundError(f"{folder}: there is neither {_SINGLE_FILE} nor {_INDEX_FILE}; wanted one of them")
        return Checkpoint(folder, [SafetensorsFile(folder / _SINGLE_FILE)])
    weight_map = read_weight_map(index)
    files = {file_name: SafetensorsFile(folder / file_name) for file_name in sorted(set(weight_map.values()))}
    for file_name, file in files.items():
        listed = {name for name, place in weight_map.items() if place == file_name}
        missing, unlisted = sorted(listed - set(file.names())), sorted(set(file.names()) - listed)
        if missing:
            raise ValueError(f"{index}: tensor {missing[0]!r} is said to be in {file_name}, which does not have it")
        if unlisted:
            raise ValueError(
                f"{index}: tensor {unlisted[0]!r} is in {file_name}, but the index does not place it there"
            )
    return Checkpoint(folder, list(files.values()))


def read_weight_map(index: Path) -> dict[str, str]:
    """The index's table from tensor name to file name, with every file name checked to be a bare one."""
    try:
        parsed = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{index}: no valid JSON ({_one_line(error)})") from error
    weight_map = parsed.get("weight_map") if isinstance(parsed, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(
            f"{index}: weight_map is {_short(weight_map)}, wanted an object from tensor names to file names"
        )
    for name, place in weight_map.items():
        if not isinstance(place, str) or not place.endswith(".safetensors") or any(c in place for c in "/\\:\0"):
            raise ValueError(
                f"{index}: tensor {name!r} is placed in {_short(place)}, wanted the name of a .safetensors file of "
                "the folder"
            )
    return weight_map
