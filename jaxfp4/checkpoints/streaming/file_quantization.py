"""Weight-only quantization of a directory of safetensors files, streamed, without any model code."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from jax import Array

from jaxfp4.checkpoints.carried_files import carried_files, copy_files
from jaxfp4.checkpoints.configs import COMPRESSED_TENSORS, CONFIG_FILE, FORMATS, config_files
from jaxfp4.checkpoints.sibling_names import module_of
from jaxfp4.checkpoints.stored import SUFFIXES, joined
from jaxfp4.checkpoints.streaming.file_plan import FilePlan, method_of
from jaxfp4.checkpoints.streaming.resume import file_identity, finished_file, resumable_directory
from jaxfp4.checkpoints.streaming.shard_files import (
    NewFile,
    NewTensor,
    Start,
    background,
    refuse_too_large,
    write_shards,
)
from jaxfp4.checkpoints.streaming.slab_quantizer import Scaling, SlabQuantizer, amax_of
from jaxfp4.checkpoints.streaming.tensor_source import Reader, StoredTensor, TensorSource
from jaxfp4.checkpoints.writer import write_json
from jaxfp4.formats import BLOCK_SIZE

DEFAULT_SHARD_BYTES = 5_000_000_000

_U8, _F32, _E4M3 = np.dtype(np.uint8), np.dtype(np.float32), np.dtype(ml_dtypes.float8_e4m3fn)
_COPIED_BYTES = 8 << 20
_HELD_BYTES = 224 << 20
_SLABS_AT_A_TIME = 4

Say = Callable[[str], None]
Progress = Callable[[int], None]


def quantize_planned(
    plan: FilePlan,
    out_dir: Path,
    *,
    recipe: str,
    file_format: str,
    max_shard_bytes: int | None = DEFAULT_SHARD_BYTES,
    say: Say = lambda line: None,
    progress: Progress = lambda count: None,
) -> None:
    """Writes what `plan` says of its directory to the new directory `out_dir`; other files are carried along.

    Each weight `[N, K]` has the codes and scales of `jaxfp4.quantize(w, axis=-1, global_amax=amax)`, with the block
    scales that the recipe chooses, where `amax` is the maximum over its group of siblings. All other tensors are copied
    byte for byte. Names, layout and configuration files are those of `jaxfp4.export_checkpoint`.

    Tensors are read, quantized and written in pieces of a few megabytes; weights whose groups have at most 224 MiB are
    read once, larger ones twice. A run that is interrupted goes on behind the last finished file when it is started
    again with the same files and options, and the result is the same, as `resumable_directory` says. `say` gets lines
    about that, `progress` the bytes read since its last call.

    Raises:
        ValueError: unknown format or recipe, or one that needs calibration; a weight holds NaN or Inf.
        OSError: `out_dir` exists or cannot be written, there is too little room, or a source file cannot be read.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format={file_format!r}: wanted one of {', '.join(map(repr, FORMATS))}")
    if max_shard_bytes is not None and max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: wanted a positive number of bytes, or None for one file")
    quantizer = SlabQuantizer.of(method_of(recipe))
    carried = carried_files(plan.source.directory)
    options = {
        "recipe": recipe,
        "format": file_format,
        "max_shard_bytes": max_shard_bytes,
        "exclude": list(plan.exclude),
    }
    job = job_of("quantize", plan.source, carried, options)
    tensors = _new_tensors(plan, file_format)
    with resumable_directory(out_dir, job, say) as directory, Reader() as reader:
        refuse_too_large(directory, out_dir, tensors)
        work = _Work(plan, quantizer, reader, file_format, progress)
        write_shards(directory, plan.source.stem, tensors, max_shard_bytes, work.fill)
        write_rest(directory, plan.source.directory, carried, config_files(plan.modules, plan.config, file_format))


def job_of(command: str, source: TensorSource, carried: Sequence[Path], options: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that the result follows from, for the journal."""
    others = [source.directory / name for name in (Path(CONFIG_FILE), *carried)]
    paths = [path for path in (*source.files, *others) if path.exists()]
    return {
        "jaxfp4": importlib.metadata.version("jaxfp4"),
        "command": command,
        "source": str(source.directory.resolve()),
        "source files": {str(path.relative_to(source.directory)): file_identity(path) for path in paths},
        "options": dict(options),
    }


def write_rest(
    directory: Path, source: Path, carried: tuple[Path, ...], configs: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes configuration files and copies the files that are carried along."""
    copy_files(source, carried, directory)
    for name, content in configs.items():
        with finished_file(directory / name) as path:
            write_json(path, content)


def pieces_of(size: int, length: int) -> Iterator[tuple[int, int]]:
    """`(begin, end)` of pieces of at most `length`."""
    for begin in range(0, size, length):
        yield begin, min(begin + length, size)


def copy_tensor(file: NewFile, name: str, tensor: StoredTensor, reader: Reader, progress: Progress) -> None:
    """Copies a tensor's bytes in pieces."""
    width = tensor.dtype.itemsize
    for begin, end in pieces_of(tensor.size, _COPIED_BYTES // width):
        file.write(name, begin * width, reader.values(tensor, begin, end))
        progress((end - begin) * width)


def _new_tensors(plan: FilePlan, file_format: str) -> list[NewTensor]:
    tensors = [NewTensor(t.name, t.dtype, t.shape, t) for name, t in plan.source.tensors.items() if name in plan.left]
    suffixes = SUFFIXES[file_format]
    scalar = (1,) if file_format == COMPRESSED_TENSORS else ()
    for weight in plan.quantized:
        module, (rows, length) = module_of(weight.name), weight.shape
        tensors += [
            NewTensor(joined(module, suffixes.packed), _U8, (rows, length // 2), weight),
            NewTensor(joined(module, suffixes.scales), _E4M3, (rows, length // BLOCK_SIZE), weight),
            NewTensor(joined(module, suffixes.global_scale), _F32, scalar, weight),
        ]
    return tensors


class _Work:
    """Fills files with copied tensors and quantized weights."""

    def __init__(self, plan: FilePlan, quantizer: SlabQuantizer, reader: Reader, file_format: str, progress: Progress):
        self._left = plan.left
        self._group_of = {tensor.name: group for group in plan.groups for tensor in group}
        self._quantizer = quantizer
        self._reader = reader
        self._format = file_format
        self._progress = progress
        self._amaxes: dict[str, float] = {}
        self._held: dict[str, list[np.ndarray]] = {}
        self._awaited: set[str] = set()

    def fill(self, file: NewFile, tensors: Sequence[NewTensor]) -> None:
        """Writes the tensors of one file, weight by weight."""
        by_source: dict[str, tuple[StoredTensor, list[NewTensor]]] = {}
        for tensor in tensors:
            by_source.setdefault(tensor.origin.name, (tensor.origin, []))[1].append(tensor)
        self._held.clear()
        self._awaited = {name for name in by_source if name not in self._left}
        sources = [source for source, _ in by_source.values()]
        with background(_SLABS_AT_A_TIME) as write_behind:
            for (source, parts), following in zip(by_source.values(), [*sources[1:], None], strict=True):
                if following is not None:
                    self._reader.expect(following)
                if source.name in self._left:
                    copy_tensor(file, parts[0].name, source, self._reader, self._progress)
                else:
                    names = {part.name.rpartition(".")[2]: part.name for part in parts}
                    self._quantize(file, source, names, write_behind)

    def _quantize(self, file: NewFile, weight: StoredTensor, names: Mapping[str, str], write_behind: Start) -> None:
        """Has those parts of a weight written that are in this file, by their last names."""
        suffixes = SUFFIXES[self._format]
        scaling = self._quantizer.scaling(self._amax(self._group_of[weight.name]), weight.dtype)
        if suffixes.global_scale in names:
            scale = np.float32(scaling.global_scale)
            stored = np.float32(1) / scale if self._format == COMPRESSED_TENSORS else scale
            file.write(names[suffixes.global_scale], 0, np.full(1, stored, np.float32))
        if suffixes.packed not in names and suffixes.scales not in names:
            return

        def put(begin: int, end: int, packed: Array, scales: Array) -> None:
            for suffix, array, width in ((suffixes.packed, packed, 2), (suffixes.scales, scales, BLOCK_SIZE)):
                if suffix in names:
                    file.write(names[suffix], begin // width, np.asarray(array)[: (end - begin) // width])

        # Slabs are computed and written while the next ones are read, or the next weights for their amaxes.
        for begin, end, values in self._slabs(weight, scaling):
            write_behind(functools.partial(put, begin, end, *self._quantizer.encode(values, scaling)))

    def _slabs(self, weight: StoredTensor, scaling: Scaling) -> Iterator[tuple[int, int, np.ndarray]]:
        self._awaited.discard(weight.name)
        held = self._held.pop(weight.name, [])
        held.reverse()
        for begin, end in pieces_of(weight.size, self._quantizer.slab_values):
            yield begin, end, held.pop() if held else self._reader.values(weight, begin, end)

    def _amax(self, group: tuple[StoredTensor, ...]) -> float:
        """The largest magnitude of all members, which are kept in memory if they are few and soon needed."""
        key = group[0].name
        if key not in self._amaxes:
            held = sum(values.nbytes for slabs in self._held.values() for values in slabs)
            hold = held + sum(member.nbytes for member in group) <= _HELD_BYTES
            self._amaxes[key] = max(self._member_amax(member, hold) for member in group)
        return self._amaxes[key]

    def _member_amax(self, weight: StoredTensor, hold: bool) -> float:
        amax = 0.0
        self._reader.expect(weight)
        for begin, end in pieces_of(weight.size, self._quantizer.slab_values):
            values = self._reader.values(weight, begin, end)
            largest = amax_of(values)
            if not np.isfinite(largest):
                raise ValueError(
                    f"{weight.path}: tensor {weight.name!r} holds {'NaN' if np.isnan(largest) else 'Inf'}: wanted "
                    "finite weights; repair or exclude it"
                )
            amax = max(amax, largest)
            if hold and weight.name in self._awaited:
                self._held.setdefault(weight.name, []).append(values)
            self._progress(values.nbytes)
        return amax
