"""Writes a tree of quantized parameters as a checkpoint that serving engines load."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jaxfp4.checkpoints import writer
from jaxfp4.checkpoints.carried_files import carried_files, copy_files
from jaxfp4.checkpoints.configs import (
    COMPRESSED_TENSORS,
    FORMATS,
    Kind,
    Modules,
    cache_module,
    config_files,
    read_config,
    refuse_unserializable,
)
from jaxfp4.checkpoints.names import TensorName, refuse_unmatched, resolve_name
from jaxfp4.checkpoints.pending import PendingTensor, entry_of, is_storable, on_every_host
from jaxfp4.checkpoints.processes import write_checkpoint
from jaxfp4.checkpoints.stored import FP8_INPUT_SCALE, FP8_SCALE, SUFFIXES, joined
from jaxfp4.formats import BLOCK_SIZE, LeafError, fp8, path_string
from jaxfp4.recipes import Plan
from jaxfp4.tensors import FP8Tensor, NVFP4Tensor, QuantizedTensor, QuantizedWeight
from jaxfp4.tensors.cache import CacheAmax, CacheFormat

_E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
_FLOAT32 = np.dtype(np.float32)


def export_checkpoint(
    qparams: Any,
    out_dir: str | os.PathLike[str],
    *,
    format: str = "modelopt",
    names: Mapping[str, str | TensorName] | None = None,
    config: Mapping[str, Any] | None = None,
    max_shard_bytes: int | None = None,
    source: str | os.PathLike[str] | None = None,
) -> None:
    """Writes `qparams`, a tree of arrays and `QuantizedWeight`, to the new directory `out_dir`.

    A `QuantizedWeight` becomes tensors of one 2-D weight `[N, K]`, whatever its axis order: K is its contraction,
    flattened with the last axis minor, N all other axes, flattened. With `format="modelopt"` these are `MODULE.weight`
    uint8 `[N, K/2]`, `MODULE.weight_scale` float8_e4m3fn `[N, K/16]`, `MODULE.weight_scale_2` float32 `[]` (the global
    scale) and, if there is one, `MODULE.input_scale` float32 `[]`; a weight whose result a quantized key-value cache
    holds also has `MODULE.k_scale` or `MODULE.v_scale` float32 `[]`, amax / 448 for FP8 and for NVFP4. With
    `format="compressed-tensors"` they are `weight_packed`, `weight_scale`, `weight_global_scale` float32 `[1]` and
    `input_global_scale`, the last two IEEE float32 reciprocals, and for the cache `k_scale` and `v_scale` of the
    module above. An FP8 weight is `MODULE.weight` float8_e4m3fn `[N, K]`, `weight_scale` and `input_scale`, multipliers
    in both formats. Other arrays keep dtype and shape.

    On the scales of an NVFP4 cache tools do not agree. amax / 448, as here, is what Model-Optimizer's Hugging Face
    export writes; its export for TensorRT-LLM and auto-round write amax / 2688. `load_checkpoint` reads amax / 448. An
    engine that takes the stored number for the global scale itself sees one 6 times too large; check outputs before
    you serve an NVFP4 cache, or use FP8, on whose scales all agree.

    Args:
        qparams: arrays of JAX, on any mesh, or of numpy.
        out_dir: must not exist, its parent must. It appears whole or, if anything fails, not at all. What a killed
            process has left beside it, `.NAME.XXXXXXXX.partial`, is removed by the next export of that name from the
            same host.
        format: "modelopt" (Model-Optimizer) or "compressed-tensors" (`nvfp4-pack-quantized`).
        names: path of a leaf, components joined by '/', -> checkpoint module name or `TensorName`. A name with
            `{layer}` or
            `{expert}` writes each entry of the leading axes as tensors of its own, with its own global and input scale.
            Leaves that are not mentioned are named after their path, see `jaxfp4.checkpoints.names.default_name`.
        config: the content of the model's config.json, kept in front of the quantization's entry; by default that of
            `source`, if it has one.
        max_shard_bytes: several files of at most this size and an index; by default one `model.safetensors`.
        source: the directory of the original checkpoint, from which the tokenizer and all other files that are no
            weights are copied, as by `carried_files`.

    Tensors are fetched from their devices, written and freed one by one: the host holds one at a time, of a stack one
    entry. On several processes all of them call this, with an `out_dir` on a file system that they share; each writes
    files of its own with tensors that its devices hold, so that only tensors cut across processes are sent, one at a
    time. If one process fails, all raise.

    Raises:
        ValueError: unknown format; no quantized leaf; an NVFP4 key-value cache in compressed-tensors, or two formats
            of cache; a contraction that is no multiple of 16; a `pre_scale`, which
            engines do not apply; a scale that is not positive and finite, or is not one value for each tensor written;
            two tensors of the same name; `names` that match nothing or do not fit. The message begins with the leaf's
            path.
        FileExistsError, FileNotFoundError, OSError: `out_dir` exists, its parent does not, or writing failed.
    """
    if format not in FORMATS:
        raise ValueError(f"format={format!r}: wanted one of {', '.join(map(repr, FORMATS))}")
    if max_shard_bytes is not None and max_shard_bytes <= 0:
        raise ValueError(f"max_shard_bytes={max_shard_bytes}: wanted a positive number of bytes, or None for one file")
    origin = None if source is None else pathlib.Path(source)
    carried = () if origin is None else carried_files(origin)
    if origin is not None and config is None:
        config = read_config(origin)
    refuse_unserializable(config)
    tensors, modules = _tensors_of(qparams, names or {}, format)

    def complete(directory: pathlib.Path) -> None:
        for file_name, content in config_files(modules, config, format).items():
            writer.write_json(directory / file_name, content)
        if origin is not None:
            copy_files(origin, carried, directory)

    write_checkpoint(pathlib.Path(out_dir), tensors, complete, max_shard_bytes)


def refuse_unservable(plan: Plan, *, format: str = "modelopt") -> None:
    """Raises, before anything is computed, the ValueError of `export_checkpoint` that the plan's result would meet.

    These are rotated weights, and an NVFP4 key-value cache in compressed-tensors.
    """
    for entry in plan.quantized:
        _refuse_rotation(entry.path, entry.method.rotated)
        if plan.recipe.kv_cache is not None and entry.cached:
            _only_cache_format({plan.recipe.kv_cache.format: entry.path}, format)


def _tensors_of(
    qparams: Any, names: Mapping[str, str | TensorName], file_format: str
) -> tuple[list[PendingTensor], Modules]:
    """All tensors to write, nothing but scalars fetched yet."""
    leaves = [
        (path_string(keys), leaf)
        for keys, leaf in jax.tree_util.tree_flatten_with_path(
            qparams, is_leaf=lambda node: isinstance(node, QuantizedWeight)
        )[0]
    ]
    refuse_unmatched(names, [path for path, _ in leaves])
    owners: dict[str, str] = {}
    tensors: list[PendingTensor] = []
    kinds: dict[str, Kind] = {}
    cache_formats: dict[CacheFormat, str] = {}
    excluded: set[str] = set()
    for path, leaf in leaves:
        if isinstance(leaf, QuantizedWeight):
            _refuse_unservable_leaf(path, leaf)
            if leaf.cache is not None:
                cache_formats[leaf.cache.format] = path
            name = resolve_name(path, leaf.weight.shape, names.get(path), quantized=True)
            kinds.update((module, _kind(leaf)) for _, module in name.modules(leaf.weight.shape))
            new = list(_quantized_tensors(path, leaf, name, file_format))
        else:
            array = _whole_array(path, leaf)
            name = resolve_name(path, array.shape, names.get(path), quantized=False)
            new = list(_plain_tensors(path, array, name))
            if array.ndim - len(name.stack_fields) >= 2:
                excluded.update(module for _, module in name.modules(array.shape))
        for tensor in new:
            if tensor.name in owners:
                raise LeafError(
                    f"{path}: would be written as {tensor.name!r}, as {owners[tensor.name]} is: wanted one leaf for "
                    "each tensor; give one of them another entry in names"
                )
            owners[tensor.name] = path
        tensors += new
    if not kinds:
        raise ValueError("qparams holds no QuantizedWeight: wanted at least one; quantize the parameters first")
    cache = _only_cache_format(cache_formats, file_format)
    return tensors, Modules(kinds, sorted(excluded - set(kinds)), cache)


def _kind(leaf: QuantizedWeight) -> Kind:
    if isinstance(leaf.weight, FP8Tensor):
        return Kind.FP8
    return Kind.W4A16 if leaf.input_scale is None else Kind.W4A4


def _only_cache_format(found: Mapping[CacheFormat, str], file_format: str) -> CacheFormat | None:
    """The one format of the key-value cache; `found` has a path for each."""
    if len(found) > 1:
        (first, path), (second, other) = list(found.items())[:2]
        raise LeafError(
            f"{path}: its key-value cache is {first.value}, that of {other} {second.value}: wanted one format for the "
            "whole model; quantize with one recipe"
        )
    if CacheFormat.NVFP4 in found and file_format == COMPRESSED_TENSORS:
        raise LeafError(
            f"{found[CacheFormat.NVFP4]}: has scales of a key-value cache in NVFP4, which compressed-tensors cannot "
            "state: wanted format='modelopt', or a recipe with an FP8 cache"
        )
    return next(iter(found), None)


def _refuse_unservable_leaf(path: str, leaf: QuantizedWeight) -> None:
    weight = leaf.weight
    length = int(np.prod(weight.sizes))
    if isinstance(weight, FP8Tensor) and leaf.input_scale is None:
        raise LeafError(
            f"{path}: is FP8 without an input scale, which serving engines need: wanted one; quantize with the "
            "statistics of a calibration"
        )
    if length % BLOCK_SIZE or not length:
        raise LeafError(
            f"{path}: contraction of {length} values: wanted a positive multiple of {BLOCK_SIZE}, as serving engines "
            "require; leave the weight unquantized"
        )
    if leaf.pre_scale is not None:
        raise LeafError(
            f"{path}: has a pre_scale, which serving engines refuse: wanted None; fold it into the layer in front first"
        )
    _refuse_rotation(path, leaf.rotation)
    for part in jax.tree.leaves(leaf):
        _whole_array(path, part)


def _refuse_rotation(path: str, size: int) -> None:
    if size:
        raise LeafError(
            f"{path}: is rotated in groups of {size}, but no serving engine rotates the activation: wanted a weight "
            "without rotation; choose a recipe without hadamard"
        )


def _whole_array(path: str, leaf: Any) -> jax.Array | np.ndarray:
    """The leaf, if all its values can be fetched here."""
    if not isinstance(leaf, jax.Array | np.ndarray) or isinstance(leaf, jax.core.Tracer):
        raise LeafError(
            f"{path}: a leaf of type {type(leaf).__name__}: wanted a JAX or numpy array, or a QuantizedWeight, outside "
            "of jit"
        )
    if not is_storable(leaf.dtype):
        raise LeafError(f"{path}: dtype {leaf.dtype}: wanted one that safetensors has, such as bfloat16; cast it first")
    return leaf


def _plain_tensors(path: str, array: jax.Array | np.ndarray, name: TensorName) -> Iterator[PendingTensor]:
    stacked = len(name.stack_fields)
    order = list(range(array.ndim - stacked))
    if name.transpose:
        order[-2:] = reversed(order[-2:])
    shape = tuple(array.shape[stacked + axis] for axis in order)
    for index, module in name.modules(array.shape):
        yield entry_of(array, joined(module, name.parameter), index, order, shape)


def _quantized_tensors(path: str, leaf: QuantizedWeight, name: TensorName, file_format: str) -> Iterator[PendingTensor]:
    weight = leaf.weight
    stacked = len(name.stack_fields)
    order = _matrix_order(path, weight, stacked, name)
    length = int(np.prod(weight.sizes))
    rows = int(np.prod(weight.shape[stacked:], dtype=np.int64)) // length
    stack = weight.shape[:stacked]
    compressed = file_format == COMPRESSED_TENSORS
    global_scales = _scalars(path, "global scale", weight.global_scale, stack)
    input_scales = None if leaf.input_scale is None else _scalars(path, "input scale", leaf.input_scale, stack)
    cached = _cache_scales(path, leaf.cache, stack)
    if isinstance(weight, FP8Tensor):
        arrays = {"weight": (weight.values, length)}
        scalars = {FP8_SCALE: global_scales, FP8_INPUT_SCALE: input_scales}
    else:
        suffixes = SUFFIXES[file_format]
        arrays = {
            suffixes.packed: (weight.packed, length // 2),
            suffixes.scales: (weight.scales, length // BLOCK_SIZE),
        }
        scalars = {suffixes.global_scale: global_scales, suffixes.input_scale: input_scales}
        if compressed:
            scalars = {last: None if v is None else np.float32(1) / v for last, v in scalars.items()}
    for index, module in name.modules(weight.shape):
        for last, (array, columns) in arrays.items():
            yield entry_of(array, joined(module, last), index, order, (rows, columns))
        for last, values in scalars.items():
            if values is not None:
                yield _scalar_tensor(joined(module, last), values[index], compressed)
        for last, values in cached.items():
            yield _scalar_tensor(joined(cache_module(file_format, module), last), values[index], compressed)


def _cache_scales(path: str, cache: CacheAmax | None, stack: tuple[int, ...]) -> dict[str, np.ndarray]:
    """The scales of keys and values by the last part of their tensors' names, one for each entry of the stack."""
    amaxes = {} if cache is None else {"k_scale": cache.keys, "v_scale": cache.values}
    divisor = np.float32(fp8.SCALE_DIVISOR)
    return {
        suffix: _scalars(path, suffix, on_every_host(amax) / divisor, stack)
        for suffix, amax in amaxes.items()
        if amax is not None
    }


def _matrix_order(path: str, weight: QuantizedTensor, stacked: int, name: TensorName) -> list[int]:
    """The axes of the codes behind the stacked ones, outputs first and the contraction last."""
    merged = isinstance(weight, NVFP4Tensor) and weight.blocking.merged
    ndim = len(weight.shape) - stacked - (len(weight.axes) - 1 if merged else 0)
    contraction = [ndim + axis for axis in (weight.axes[-1:] if merged else weight.axes)]
    if len(weight.shape) - stacked + weight.axes[0] < 0:
        raise LeafError(
            f"{path}: shape {weight.shape} contracted over {weight.axes} for module name {name.module!r}: wanted "
            "leading axes that are not contracted; correct the name"
        )
    return [*(axis for axis in range(ndim) if axis not in contraction), *contraction]


def _scalars(path: str, what: str, values: jax.Array | np.ndarray, stack: tuple[int, ...]) -> np.ndarray:
    """One float32 for each entry of the stack, from an array with some of the leading axes or size 1 in their place."""
    host = on_every_host(values)
    leading = host.shape[: len(stack)] + (1,) * (len(stack) - host.ndim)
    fits = all(n in (1, wanted) for n, wanted in zip(leading, stack, strict=True)) and host.size == np.prod(leading)
    if not fits or host.dtype != np.float32:
        raise LeafError(
            f"{path}: {what} of shape {host.shape} and dtype {host.dtype}: wanted one float32 for each tensor written, "
            f"shape {stack}; a name with {{expert}} or {{layer}} writes a stack as several tensors"
        )
    unusable = ~(np.isfinite(host) & (host >= np.finfo(np.float32).tiny))
    if unusable.any():
        raise LeafError(
            f"{path}: {what} {host[unusable][0]}: wanted a positive, normal and finite value; calibrate again, or "
            "leave it out"
        )
    return np.broadcast_to(host.reshape(leading), stack)


def _scalar_tensor(name: str, value: np.float32, compressed: bool) -> PendingTensor:
    shape = (1,) if compressed else ()
    return PendingTensor(name, _FLOAT32, shape, lambda: np.full(shape, value, np.float32))
