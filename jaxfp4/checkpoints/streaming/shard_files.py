"""Safetensors files whose tensors are written in pieces and in any order, because all sizes are known beforehand."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from jaxfp4.checkpoints.file_layout import divided, file_layout, index_of, shard_names
from jaxfp4.checkpoints.streaming.resume import finished_file
from jaxfp4.checkpoints.writer import write_json


@dataclasses.dataclass(frozen=True)
class NewTensor:
    """A tensor to write, and what it is made of."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    origin: Any

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class NewFile:
    """A safetensors file that is being written; its header is there, the tensors come in any order."""

    def __init__(self, file: BinaryIO, tensors: Sequence[NewTensor], metadata: Mapping[str, str]):
        layout = file_layout(tensors, metadata)
        self._file = file
        self._starts = layout.starts
        file.truncate(layout.size)
        self._write_at(0, layout.header)

    def write(self, name: str, begin: int, values: np.ndarray) -> None:
        """Writes contiguous values from byte `begin` of a tensor on; several threads may."""
        self._write_at(self._starts[name] + begin, values.reshape(-1).view(np.uint8).data)

    def _write_at(self, offset: int, data: bytes | memoryview) -> None:
        rest = memoryview(data)
        while len(rest):
            count = os.pwrite(self._file.fileno(), rest, offset)
            rest, offset = rest[count:], offset + count


Fill = Callable[[NewFile, Sequence[NewTensor]], None]
"""Writes all tensors of a file."""

Metadata = Callable[[Sequence[NewTensor]], Mapping[str, str]]
"""The free text entries of a file with these tensors, beside its format."""


def write_shards(
    directory: Path,
    stem: str,
    tensors: Sequence[NewTensor],
    max_shard_bytes: int | None,
    fill: Fill,
    metadata: Metadata = lambda tensors: {},
) -> None:
    """Writes `STEM.safetensors`, or files of at most `max_shard_bytes` and their index, as `write_tensors` does.

    Files that are there already, from an earlier run, are not written again. A file is brought to the disk while the
    next one is filled.
    """
    shards = divided(tensors, max_shard_bytes)
    files = dict(zip(shard_names(stem, len(shards)), shards, strict=True))
    with background(1) as finish:
        for name, shard in files.items():
            if not (directory / name).is_file():
                _write_file(directory / name, shard, fill, metadata(shard), finish)
    if len(files) > 1:
        with finished_file(directory / f"{stem}.safetensors.index.json") as path:
            write_json(path, index_of(files))


def _write_file(
    path: Path,
    tensors: Sequence[NewTensor],
    fill: Fill,
    metadata: Mapping[str, str],
    finish: Start,
) -> None:
    with contextlib.ExitStack() as stack:
        unfinished = stack.enter_context(finished_file(path))
        with unfinished.open("wb", buffering=0) as file:
            fill(NewFile(file, tensors, metadata), tensors)
        finish(stack.pop_all().close)


Start = Callable[[Callable[[], Any]], None]
"""Has a function run in the background."""


@contextlib.contextmanager
def background(most: int) -> Iterator[Start]:
    """Runs functions one behind the other on a thread, while at most `most` of them are not finished.

    One more waits for the first of them. An error of one is raised at a later one, or at the end. If the block raises,
    what has not begun is left out.
    """
    pending: collections.deque[concurrent.futures.Future[Any]] = collections.deque()
    executor = concurrent.futures.ThreadPoolExecutor(1)

    def start(function: Callable[[], Any]) -> None:
        while len(pending) >= most:
            pending.popleft().result()
        pending.append(executor.submit(function))

    try:
        yield start
        while pending:
            pending.popleft().result()
    finally:
        executor.shutdown(cancel_futures=True)


def refuse_too_large(directory: Path, out_dir: Path, tensors: Sequence[NewTensor]) -> None:
    """OSError if the file system has no room for the tensors beside the files that are finished already."""
    needed = sum(tensor.nbytes for tensor in tensors) - sum(path.stat().st_size for path in directory.iterdir())
    status = os.statvfs(directory)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise OSError(
            f"{out_dir}: needs {needed / 1e9:.2f} GB, but {free / 1e9:.2f} GB are free: wanted room for all of it; "
            "make room or name another directory"
        )
