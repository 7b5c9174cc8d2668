"""Writes one checkpoint from one process or from several, each of which writes files of its own."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxfp4.checkpoints import claims, writer
from jaxfp4.checkpoints.file_layout import divided
from jaxfp4.checkpoints.pending import PendingTensor


def write_checkpoint(
    out_dir: pathlib.Path,
    tensors: Sequence[PendingTensor],
    complete: Callable[[pathlib.Path], None],
    max_shard_bytes: int | None,
) -> None:
    """Writes the tensors, and what `complete(directory)` adds, to the new directory `out_dir`.

    On several processes every one calls this with the same tensors; `complete` runs on the first of them only. The
    directory appears whole or, if any process fails, not at all.
    """
    if jax.process_count() > 1:
        _write_together(out_dir, tensors, complete, max_shard_bytes)
        return
    with writer.new_directory(out_dir) as directory:
        writer.write_tensors(directory, tensors, max_shard_bytes)
        complete(directory)


def _write_together(
    out_dir: pathlib.Path,
    tensors: Sequence[PendingTensor],
    complete: Callable[[pathlib.Path], None],
    max_shard_bytes: int | None,
) -> None:
    process, first = jax.process_index(), jax.process_index() == 0
    parts = assigned(tensors, jax.process_count())
    files = writer.named_files([divided(part, max_shard_bytes) if part else [] for part in parts])
    sent = [tensor for tensor in sorted(tensors, key=lambda t: t.name) if tensor.holders == ()]
    agreement = _Agreement(out_dir)
    with agreement.step():
        writer.refuse_existing(out_dir)
    token = int(multihost_utils.broadcast_one_to_all(np.uint32(int(claims.new_token(), 16))))
    directory = claims.partial_directory(out_dir, f"{token:08x}")
    with contextlib.ExitStack() as until_done:
        try:
            with agreement.step():
                if first:
                    claims.remove_left_over(out_dir)
                    until_done.enter_context(claims.claimed(directory))
            with agreement.step():
                _write_files(directory, files[process], sent)
            with agreement.step():
                if first:
                    writer.write_index(directory, {name: shard for group in files for name, shard in group.items()})
                    complete(directory)
                    writer.publish(directory, out_dir)
        except BaseException:
            if first:
                shutil.rmtree(directory, ignore_errors=True)
            raise


def assigned(tensors: Sequence[PendingTensor], processes: int) -> list[list[PendingTensor]]:
    """Which tensors each process writes: of those that hold a tensor the one with the fewest bytes so far."""
    parts: list[list[PendingTensor]] = [[] for _ in range(processes)]
    load = [0] * processes
    for tensor in sorted(tensors, key=lambda tensor: (-tensor.nbytes, tensor.name)):
        process = min(tensor.holders or range(processes), key=lambda p: (load[p], p))
        parts[process].append(tensor)
        load[process] += tensor.nbytes
    return parts


def _write_files(
    directory: pathlib.Path, files: Mapping[str, list[PendingTensor]], sent: Sequence[PendingTensor]
) -> None:
    """This process's files, and its part in sending the tensors that no process holds alone, whatever else fails."""
    failure: Exception | None = None
    with contextlib.ExitStack() as stack:
        places: dict[str, writer.TensorFile] = {}
        try:
            for file_name, tensors in files.items():
                file = stack.enter_context(writer.new_file(directory / file_name, tensors))
                places.update((tensor.name, file) for tensor in file.tensors)
                for tensor in file.tensors:
                    if tensor.holders != ():
                        file.write(tensor)
        except Exception as error:
            failure = error
        for tensor in sent:
            values = tensor.fetch()
            if failure is None and tensor.name in places:
                try:
                    places[tensor.name].put(tensor, values)
                except Exception as error:
                    failure = error
        if failure is not None:
            raise failure


class _Agreement:
    """Steps that every process takes; if one fails on any of them, it fails on all."""

    def __init__(self, out_dir: pathlib.Path):
        self._out_dir = out_dir

    @contextlib.contextmanager
    def step(self) -> Any:
        """The block, behind which all processes learn of a failure: each raises its own, or one that names it."""
        failure: Exception | None = None
        try:
            yield
        except Exception as error:
            failure = error
        failed = np.ravel(multihost_utils.process_allgather(np.int32(failure is not None)))
        if isinstance(failure, OSError):
            raise writer.writing_failed(self._out_dir, failure) from failure
        if failure is not None:
            raise failure
        if failed.any():
            raise OSError(
                f"{self._out_dir}: writing failed on process {int(np.argmax(failed))}: wanted success on all; nothing "
                "was left behind; see that process's error"
            )
