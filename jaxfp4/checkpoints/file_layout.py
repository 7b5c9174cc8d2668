"""Where tensors lie in safetensors files, known before any of them is written."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from jaxfp4.checkpoints.safetensors_file import DTYPES

# The order in which the safetensors library lays tensors out, the first in the file first.
_LAYOUT = (
    *("U64", "I64", "F64", "F32", "U32", "I32", "BF16", "F16", "U16", "I16"),
    *("F8_E8M0", "F8_E4M3", "F8_E5M2", "I8", "U8", "BOOL"),
)
_DTYPE_NAMES = {DTYPES[name]: name for name in _LAYOUT}
_DTYPE_RANK = {dtype: rank for rank, dtype in enumerate(_DTYPE_NAMES)}
_HEADER_ALIGNMENT = 8


class Described(Protocol):
    """What is known of a tensor before it is written."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> np.dtype[Any]: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def nbytes(self) -> int: ...


Tensor = TypeVar("Tensor", bound=Described)


@dataclasses.dataclass(frozen=True)
class FileLayout(Generic[Tensor]):
    """One file, byte for byte as the safetensors library lays it out; see `file_layout`."""

    tensors: tuple[Tensor, ...]
    """In the order of the file, in which writing them is fastest."""

    header: bytes
    starts: Mapping[str, int]
    """Where each tensor begins in the file, by name."""

    size: int
    """Bytes of the whole file."""


def file_layout(tensors: Iterable[Tensor], metadata: Mapping[str, str] | None = None) -> FileLayout[Tensor]:
    """The file that holds these tensors, with free text entries beside the format in its header."""
    ordered = tuple(sorted(tensors, key=lambda tensor: (_DTYPE_RANK[tensor.dtype], tensor.name)))
    header = _header(ordered, metadata or {})
    ends = list(itertools.accumulate((tensor.nbytes for tensor in ordered), initial=len(header)))
    starts = {tensor.name: start for tensor, start in zip(ordered, ends, strict=False)}
    return FileLayout(ordered, header, starts, ends[-1])


def _header(tensors: Sequence[Described], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
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


def divided(tensors: Iterable[Tensor], limit: int | None) -> list[list[Tensor]]:
    """The tensors of each file, in the order of their names, for files of at most `limit` bytes.

    One tensor that is larger has a file of its own.
    """
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in sorted(tensors, key=lambda tensor: tensor.name):
        if shards[-1] and limit is not None and size + tensor.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    return shards


def shard_names(stem: str, count: int) -> list[str]:
    """The names of the files of one checkpoint.

    >>> shard_names("model", 1), shard_names("model", 2)[0]
    (['model.safetensors'], 'model-00001-of-00002.safetensors')
    """
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def index_of(files: Mapping[str, Sequence[Described]]) -> dict[str, Any]:
    """The content of the index of several files."""
    total = sum(tensor.nbytes for shard in files.values() for tensor in shard)
    weight_map = {tensor.name: file_name for file_name, shard in files.items() for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": weight_map}
