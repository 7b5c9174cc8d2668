"""Writes tensors to safetensors files one at a time, in a directory that appears whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO

import numpy as np

from jaxfp4.checkpoints.claims import claimed, new_token, partial_directory, remove_left_over
from jaxfp4.checkpoints.file_layout import divided, file_layout, index_of, shard_names
from jaxfp4.checkpoints.pending import PendingTensor

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"


@contextlib.contextmanager
def new_directory(out_dir: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary directory beside `out_dir`, renamed to it when the block ends and removed when it raises.

    Raises FileExistsError if `out_dir` exists, even empty, and FileNotFoundError if its parent does not. A process that
    is killed leaves `.NAME.XXXXXXXX.partial` behind, never a part of `out_dir`; the next one that writes `out_dir`
    removes it.
    """
    refuse_existing(out_dir)
    remove_left_over(out_dir)
    partial = partial_directory(out_dir, new_token())
    try:
        with claimed(partial):
            yield partial
            publish(partial, out_dir)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise writing_failed(out_dir, error) from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def refuse_existing(out_dir: pathlib.Path) -> None:
    """FileExistsError if `out_dir` exists, even empty, FileNotFoundError if its parent does not."""
    if os.path.lexists(out_dir):
        raise FileExistsError(f"{out_dir} exists already: wanted a directory to create; remove it or name another")
    parent = out_dir.absolute().parent
    if not parent.is_dir():
        raise FileNotFoundError(
            f"{parent} is no directory: wanted an existing one to create {out_dir.name!r} in; create it"
        )


def publish(partial: pathlib.Path, out_dir: pathlib.Path) -> None:
    """Renames the finished directory, on disk when this returns."""
    sync(partial)
    partial.rename(out_dir)
    sync(out_dir.absolute().parent)


def writing_failed(out_dir: pathlib.Path, error: OSError) -> OSError:
    """One line about an error of the file system; other OSErrors, without a number, say it themselves."""
    if error.errno is None:
        return error
    return OSError(
        f"{out_dir}: writing failed: {error.strerror} ({os.path.basename(error.filename or '')}); nothing was left "
        "behind; make room or name another directory"
    )


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
    files = named_files([divided(tensors, max_shard_bytes)])[0]
    for file_name, shard in files.items():
        with new_file(directory / file_name, shard) as file:
            for tensor in file.tensors:
                file.write(tensor)
    write_index(directory, files)


def named_files(groups: Sequence[list[list[PendingTensor]]]) -> list[dict[str, list[PendingTensor]]]:
    """File name -> tensors, for each of several groups of files that belong to one checkpoint."""
    names = iter(shard_names("model", sum(map(len, groups))))
    return [{next(names): shard for shard in group} for group in groups]


def write_index(directory: pathlib.Path, files: Mapping[str, list[PendingTensor]]) -> None:
    """Writes the index of several files; of a single one there is none."""
    if len(files) > 1:
        write_json(directory / INDEX_FILE, index_of(files))


class TensorFile:
    """A safetensors file being written, laid out byte for byte as the safetensors library does; see `new_file`."""

    def __init__(self, file: BinaryIO, tensors: Iterable[PendingTensor]):
        self._file = file
        self._layout = file_layout(tensors)
        self._file.write(self._layout.header)

    @property
    def tensors(self) -> tuple[PendingTensor, ...]:
        """In the order of the file, in which writing them is fastest."""
        return self._layout.tensors

    def write(self, tensor: PendingTensor) -> None:
        """Fetches the values of one of `tensors` and puts them in their place."""
        self.put(tensor, tensor.fetch())

    def put(self, tensor: PendingTensor, values: np.ndarray) -> None:
        """Puts the values of one of `tensors` in their place."""
        if values.dtype != tensor.dtype or values.shape != tensor.shape:
            raise ValueError(
                f"tensor {tensor.name!r} came as {values.dtype} {values.shape}: wanted {tensor.dtype} "
                f"{tensor.shape}, as announced"
            )
        self._file.seek(self._layout.starts[tensor.name])
        self._file.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)


@contextlib.contextmanager
def new_file(path: pathlib.Path, tensors: Iterable[PendingTensor]) -> Iterator[TensorFile]:
    """A safetensors file for these tensors, each of which is then written once, and flushed to disk at the end."""
    with path.open("wb") as file:
        yield TensorFile(file, tensors)
        _flush(file)


def _flush(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def sync(path: pathlib.Path) -> None:
    """Brings a file or the entries of a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
