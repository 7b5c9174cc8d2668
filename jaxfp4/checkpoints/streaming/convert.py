"""Rewrites an NVFP4 checkpoint in the other of the two formats: the same codes and block scales under other names."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxfp4.checkpoints.carried_files import carried_files
from jaxfp4.checkpoints.configs import (
    COMPRESSED_TENSORS,
    FORMATS,
    Kind,
    Modules,
    cache_format,
    cache_module,
    config_files,
)
from jaxfp4.checkpoints.stored import (
    FP8_INPUT_SCALE,
    FP8_SCALE,
    SUFFIXES,
    StoredCheckpoint,
    inverse_of_reciprocal,
    joined,
    open_quantized,
    split_name,
)
from jaxfp4.checkpoints.streaming.file_plan import sign_of_quantization
from jaxfp4.checkpoints.streaming.file_quantization import DEFAULT_SHARD_BYTES, Say, copy_tensor, job_of, write_rest
from jaxfp4.checkpoints.streaming.resume import resumable_directory
from jaxfp4.checkpoints.streaming.shard_files import Metadata, NewFile, NewTensor, refuse_too_large, write_shards
from jaxfp4.checkpoints.streaming.tensor_source import Reader, StoredTensor, TensorSource, open_source
from jaxfp4.tensors.cache import CacheFormat

EXACT_SCALES = "jaxfp4.exact_scales"
"""The entry of a file's metadata with the scales that their reciprocals do not determine: a JSON object from the names
of tensors of the file to the bits of the float32 that the tensor was in the other format, as hexadecimal digits."""

_F32, _E4M3 = np.dtype(np.float32), np.dtype(ml_dtypes.float8_e4m3fn)
CACHE_SCALES = {"k_scale": "k_proj", "v_scale": "v_proj"}
"""Last names of the scales of a key-value cache, and of the modules that make keys and values."""


def convert(
    in_dir: Path,
    out_dir: Path,
    *,
    file_format: str,
    max_shard_bytes: int | None = DEFAULT_SHARD_BYTES,
    say: Say = lambda line: None,
) -> None:
    """Writes the NVFP4 checkpoint in `in_dir` to the new directory `out_dir` in `file_format`, streamed.

    Packed codes, block scales and all other tensors are copied byte for byte, FP8 weights among them, whose scales
    multiply in both formats. compressed-tensors has the IEEE float32
    reciprocals of the global and input scales; back from it comes the float32 whose reciprocal is stored, see
    `jaxfp4.load_checkpoint`. Where that is another one than the original, the original's bits are kept in the metadata
    of the safetensors file (`EXACT_SCALES`), so that a conversion there and back gives the same tensors. Scales of the
    key-value cache, multipliers in both, are `k_proj.k_scale` `[]` in one and `k_scale` `[1]` of the module above in
    the other. config.json and hf_quant_config.json are written anew, other files carried along.

    An interrupted run goes on when it is started again, as `resumable_directory` says.

    Raises:
        ValueError: unknown format, or the one it has already; no NVFP4 checkpoint; a broken file; a `pre_quant_scale`,
            or for compressed-tensors a key-value cache in NVFP4, which the formats cannot express.
        OSError: `out_dir` exists or cannot be written, or a source file cannot be read.
    """
    if file_format not in FORMATS:
        raise ValueError(f"format={file_format!r}: wanted one of {', '.join(map(repr, FORMATS))}")
    stored, source = open_quantized(in_dir), open_source(in_dir)
    if stored.file_format == file_format:
        other = next(name for name in FORMATS if name != file_format)
        raise ValueError(f"{in_dir}: its format is {file_format} already: wanted {other}; nothing is to be done")
    modules = checked_modules(stored, source, file_format)
    tensors, exact = _tensors(stored, source, file_format)
    rewrite(
        source,
        out_dir,
        tensors,
        lambda file, tensor: file.write(tensor.name, 0, np.full(1, tensor.origin, np.float32)),
        config_files(modules, without_quantization(stored.config), file_format),
        file_format=file_format,
        max_shard_bytes=max_shard_bytes,
        metadata=_metadata_for(exact),
        say=say,
    )


def rewrite(
    source: TensorSource,
    out_dir: Path,
    tensors: Sequence[NewTensor],
    write: Callable[[NewFile, NewTensor], None],
    configs: Mapping[str, Mapping[str, Any]],
    *,
    file_format: str,
    max_shard_bytes: int | None,
    metadata: Metadata = lambda tensors: {},
    say: Say,
) -> None:
    """Writes a checkpoint in another format, resumably, and copies the files that are carried along.

    Tensors whose origin is a `StoredTensor` are copied; `write` puts the others into their file.
    """
    carried = carried_files(source.directory)
    job = job_of("convert", source, carried, {"format": file_format, "max_shard_bytes": max_shard_bytes})
    with resumable_directory(out_dir, job, say) as directory, Reader() as reader:
        refuse_too_large(directory, out_dir, tensors)

        def fill(file: NewFile, shard: Sequence[NewTensor]) -> None:
            for tensor in shard:
                if isinstance(tensor.origin, StoredTensor):
                    copy_tensor(file, tensor.name, tensor.origin, reader, lambda count: None)
                else:
                    write(file, tensor)

        write_shards(directory, source.stem, tensors, max_shard_bytes, fill, metadata)
        write_rest(directory, source.directory, carried, configs)


def checked_modules(stored: StoredCheckpoint, source: TensorSource, file_format: str) -> Modules:
    """The modules by what was done to them, told from their tensors. ValueError for what cannot be expressed."""
    suffixes = SUFFIXES[stored.file_format]
    kinds: dict[str, Kind] = {}
    for module in sorted(stored.modules):
        if joined(module, suffixes.pre_scale) in stored.names:
            raise ValueError(
                f"{stored.directory}: tensor {joined(module, suffixes.pre_scale)!r}: wanted none, as {file_format} has "
                "no place for it that engines read; fold it into the layer in front and export again"
            )
        kinds[module] = Kind.W4A4 if joined(module, suffixes.input_scale) in stored.names else Kind.W4A16
    for module in _fp8_modules(stored, source):
        kinds[module] = Kind.FP8
    others = sorted(name for name in stored.plain if split_name(name)[0] not in kinds)
    sign = next(filter(None, (sign_of_quantization(source.tensors[name]) for name in others)), None)
    if sign:
        raise ValueError(
            f"{stored.directory}: not all of it is NVFP4 ({sign}): wanted no other quantization beside it but FP8 with "
            "one scale for a weight and one for its input; quantize again from the unquantized checkpoint"
        )
    cache = cache_format(stored.config)
    if cache is CacheFormat.NVFP4 and file_format == COMPRESSED_TENSORS:
        raise ValueError(
            f"{stored.directory}: its key-value cache is NVFP4, which compressed-tensors cannot state: wanted FP8 or "
            "none; quantize again with another cache"
        )
    matrices = {name: split_name(name)[0] for name in sorted(stored.plain) if len(source.tensors[name].shape) >= 2}
    unknown = next((name for name, module in matrices.items() if module in stored.modules), None)
    if unknown:
        raise ValueError(
            f"{stored.directory}: tensor {unknown!r} beside an NVFP4 weight: wanted none, as {file_format} has no "
            "place for it; quantize again without it"
        )
    return Modules(kinds, sorted(set(matrices.values()) - set(kinds)), cache)


def _tensors(
    stored: StoredCheckpoint, source: TensorSource, file_format: str
) -> tuple[list[NewTensor], dict[str, np.float32]]:
    """The tensors to write, and by name the stored scales that the new ones do not determine."""
    old, new = SUFFIXES[stored.file_format], SUFFIXES[file_format]
    remembered, fp8 = _remembered(source), _fp8_modules(stored, source)
    tensors: list[NewTensor] = []
    exact: dict[str, np.float32] = {}

    def copy(old_name: str, new_name: str) -> None:
        tensor = source.tensors[old_name]
        tensors.append(NewTensor(new_name, tensor.dtype, tensor.shape, tensor))

    def scalar(name: str, value: np.float32) -> None:
        tensors.append(NewTensor(name, _F32, (1,) if file_format == COMPRESSED_TENSORS else (), value))

    for module in sorted(stored.modules):
        weight = stored.weight(module)
        copy(joined(module, old.packed), joined(module, new.packed))
        copy(joined(module, old.scales), joined(module, new.scales))
        scales = {(old.global_scale, new.global_scale): weight.global_scale}
        if weight.input_scale is not None:
            scales[old.input_scale, new.input_scale] = weight.input_scale
        for (old_suffix, new_suffix), scale in scales.items():
            name = joined(module, new_suffix)
            before = np.float32(stored.tensors.tensor(joined(module, old_suffix)).reshape(()))
            after = _converted(before, scale, remembered.get(joined(module, old_suffix)), file_format)
            scalar(name, after)
            if _back(after, file_format) != before:
                exact[name] = before
    for name in sorted(stored.plain):
        module, last = split_name(name)
        is_fp8_scale = module in fp8 and last in (FP8_SCALE, FP8_INPUT_SCALE)
        new_name = name if is_fp8_scale else _cache_scale_name(name, stored, file_format)
        if new_name is None:
            copy(name, name)
        else:
            scalar(new_name, np.float32(stored.tensors.tensor(name).astype(np.float32).reshape(())))
    return tensors, exact


def _fp8_modules(stored: StoredCheckpoint, source: TensorSource) -> frozenset[str]:
    """The modules with an E4M3 matrix, one scale for all of it and one for its input."""

    def is_scalar(name: str) -> bool:
        return name in stored.plain and source.tensors[name].dtype == _F32 and source.tensors[name].size == 1

    return frozenset(
        split_name(name)[0]
        for name in stored.plain
        if (split_name(name)[1], source.tensors[name].dtype, len(source.tensors[name].shape)) == ("weight", _E4M3, 2)
        and all(is_scalar(joined(split_name(name)[0], last)) for last in (FP8_SCALE, FP8_INPUT_SCALE))
    )


def _converted(before: np.float32, scale: np.float32, original: np.float32 | None, file_format: str) -> np.float32:
    """What to store for a scale of which `before` is stored now: its original if that leads to `before`."""
    if original is not None and _back(original, file_format) == before:
        return original
    with np.errstate(all="ignore"):
        return np.float32(1) / scale if file_format == COMPRESSED_TENSORS else scale


def _back(value: np.float32, file_format: str) -> np.float32:
    """What converting `value`, stored in `file_format`, to the other format gives."""
    if file_format == COMPRESSED_TENSORS:
        return inverse_of_reciprocal(value)
    with np.errstate(all="ignore"):
        return np.float32(1) / value


def _cache_scale_name(name: str, stored: StoredCheckpoint, file_format: str) -> str | None:
    """The new name of a scale of keys or values; None if the tensor is none.

    The scale of a module that holds queries, keys and values together stays with it in both formats.
    """
    module, last = split_name(name)
    if last not in CACHE_SCALES or stored.tensors.info(name)[1] not in ((), (1,)):
        return None
    if file_format == COMPRESSED_TENSORS:
        own = split_name(module)[1] == CACHE_SCALES[last]
        return joined(cache_module(file_format, module), last) if own else name
    below = joined(module, CACHE_SCALES[last])
    return joined(below if below in stored.modules or joined(below, "weight") in stored.names else module, last)


def _metadata_for(exact: Mapping[str, np.float32]) -> Callable[[Sequence[NewTensor]], dict[str, str]]:
    def metadata(shard: Sequence[NewTensor]) -> dict[str, str]:
        scales = {t.name: exact[t.name].tobytes()[::-1].hex() for t in shard if t.name in exact}
        return {EXACT_SCALES: json.dumps(dict(sorted(scales.items())), separators=(",", ":"))} if scales else {}

    return metadata


def _remembered(source: TensorSource) -> dict[str, np.float32]:
    """The originals of scales by the tensors' names, from the files' metadata; other entries are passed over."""
    originals: dict[str, np.float32] = {}
    for metadata in source.metadata:
        for name, digits in _object(metadata.get(EXACT_SCALES, "{}")).items():
            if isinstance(digits, str) and len(digits) == 8 and set(digits) <= set("0123456789abcdef"):
                originals[name] = np.frombuffer(bytes.fromhex(digits)[::-1], "<f4")[0]
    return originals


def _object(text: str) -> dict[str, Any]:
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def without_quantization(config: Mapping[str, Any]) -> dict[str, Any]:
    """The model's own config.json."""
    return {key: value for key, value in config.items() if key != "quantization_config"}
