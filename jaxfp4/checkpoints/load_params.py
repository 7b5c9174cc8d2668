"""Puts the tensors of a checkpoint back into the parameter tree of a function."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from jaxfp4.checkpoints.configs import cache_format, cache_module
from jaxfp4.checkpoints.names import TensorName, refuse_unmatched, resolve_name
from jaxfp4.checkpoints.pending import copy_values
from jaxfp4.checkpoints.placement import Placed, Placement, Shardings, place, place_parts
from jaxfp4.checkpoints.stored import StoredCheckpoint, joined
from jaxfp4.formats import BLOCK_SIZE, LeafError, fp8
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.tensors import FP8Tensor, NVFP4Tensor, QuantizedWeight
from jaxfp4.tensors.blocks import Blocking
from jaxfp4.tensors.cache import CacheAmax, CacheFormat
from jaxfp4.tensors.mesh import blockwise_sharding
from jaxfp4.transform.trace import leaves_of

log = logging.getLogger("jaxfp4")

Stack = Mapping[tuple[int, ...], str]
"""Index into the leading axes of a parameter -> checkpoint module."""


def load_params(
    stored: StoredCheckpoint, params: Any, plan: Plan, names: Mapping[str, str | TensorName], shardings: Shardings
) -> Any:
    """The tree of `params` with the checkpoint's values; `load_checkpoint` says what it is and what it raises."""
    leaves = leaves_of(params)
    refuse_unmatched(names, list(leaves.paths))
    _refuse_other_params(plan, leaves.paths, leaves.values)
    placement = Placement(shardings, _shardings_of(leaves.paths, leaves.values))
    used: set[str] = set()
    caches: dict[str, str] = {}
    values = []
    for path, like in zip(leaves.paths, leaves.values, strict=True):
        entry = plan.by_path.get(path)
        quantized = entry is not None and entry.quantized
        name = resolve_name(path, tuple(like.shape), names.get(path), quantized=quantized)
        stack = dict(name.modules(tuple(like.shape)))
        placed = placement.of(path)
        if entry is not None and entry.quantized:
            _refuse_missing(stored, entry, stack)
            parts = stored.fp8_parts if entry.is_fp8 else stored.parts
            used |= parts(stack.values())
            values.append((_fp8 if entry.is_fp8 else _nvfp4)(stored, plan, entry, stack, placed))
            for module in stack.values():
                for kind, scale in _cache_names(stored, module).items():
                    caches.setdefault(scale, path)
                    used |= {scale} if kind in entry.cached else set()
        else:
            used |= {joined(module, name.parameter) for module in stack.values()}
            values.append(_plain(stored, path, like, name, stack, placed))
    placement.refuse_unused()
    if left_out := sorted(caches.keys() - used):
        log.warning(
            "%s: %r and %d more scales of the key-value cache are left out, as the plan does not quantize it; to keep "
            "them make the plan with a recipe that does, such as nvfp4_kv_fp8",
            caches[left_out[0]],
            left_out[0],
            len(left_out) - 1,
        )
    if unused := sorted(stored.names - used - caches.keys()):
        raise ValueError(
            f"{stored.directory}: tensor {unused[0]!r} belongs to no parameter ({len(unused)} such): wanted the "
            "checkpoint of these params; correct names, or load it without params and plan"
        )
    return leaves.rebuilt(values)


def _refuse_other_params(plan: Plan, paths: Sequence[str], values: Sequence[Any]) -> None:
    shapes = {path: tuple(value.shape) for path, value in zip(paths, values, strict=True)}
    for entry in plan.entries:
        found = shapes.get(entry.path)
        if found != entry.weight.shape:
            raise LeafError(
                f"{entry.path}: params has {'nothing' if found is None else f'shape {found}'} there: wanted "
                f"{entry.weight.shape}, as in the plan; pass the parameters that the plan was made for"
            )


def _shardings_of(paths: Sequence[str], values: Sequence[Any]) -> dict[str, Sharding]:
    """Where the parameters themselves are, for those on a mesh."""
    found = {
        path: value.sharding for path, value in zip(paths, values, strict=True) if not isinstance(value, np.ndarray)
    }
    return {path: sharding for path, sharding in found.items() if isinstance(sharding, NamedSharding)}


def _refuse_missing(stored: StoredCheckpoint, entry: PlannedWeight, stack: Stack) -> None:
    modules, kind = (stored.fp8_modules, "FP8") if entry.is_fp8 else (stored.modules, "NVFP4")
    for module in stack.values():
        if module not in modules:
            raise LeafError(
                f"{entry.path}: {stored.directory} has no {kind} weight {module!r}: wanted one by the plan; correct "
                "names, or make the plan with the recipe of the checkpoint"
            )


def _plain(stored: StoredCheckpoint, path: str, like: Any, name: TensorName, stack: Stack, placed: Placed) -> Any:
    """An array that is not quantized, cast to the dtype of the parameter."""
    shape = tuple(like.shape)
    entry = shape[len(name.stack_fields) :]
    wanted = (*entry[:-2], entry[-1], entry[-2]) if name.transpose else entry
    parts: dict[tuple[int, ...], np.ndarray] = {}
    for index, module in stack.items():
        tensor = joined(module, name.parameter)
        if tensor not in stored.names:
            raise LeafError(
                f"{path}: {stored.directory} has no tensor {tensor!r}: wanted one for it; correct names, or make the "
                "plan with the recipe of the checkpoint"
            )
        if name.parameter == "weight" and (module in stored.modules or module in stored.fp8_modules):
            raise LeafError(
                f"{path}: {tensor!r} of {stored.directory} is quantized, but the plan keeps the parameter as it is; "
                "make the plan with the recipe of the checkpoint"
            )
        values = stored.tensors.tensor(tensor)
        if values.shape != wanted:
            raise LeafError(
                f"{path}: tensor {tensor!r} of {stored.directory} has shape {values.shape}: wanted {wanted}; correct "
                "names"
            )
        parts[index] = values.swapaxes(-1, -2) if name.transpose else values
    dtype = np.dtype(like.dtype)
    if not name.stack_fields:
        return place(parts[()] if parts[()].dtype == dtype else parts[()].astype(dtype), placed)
    read = _stack_reader(parts, shape[: len(name.stack_fields)], lambda values: values)
    return place_parts(shape, placed.fit(shape).sharding, lambda index: read(index).astype(dtype))


def _fp8(stored: StoredCheckpoint, plan: Plan, entry: PlannedWeight, stack: Stack, placed: Placed) -> QuantizedWeight:
    """As `_nvfp4`, of a weight in FP8."""
    weight = entry.weight
    rank, sizes = _stack_of(entry, stack)
    parts = {index: stored.fp8_weight(module) for index, module in stack.items()}
    _refuse_other_shapes(stored, entry, stack, {index: part.shape for index, part in parts.items()})
    restore = _axis_order(weight.shape, rank, weight.contracted)
    read = _stack_reader({index: part.values for index, part in parts.items()}, sizes, restore)
    beside = placed.replicated()
    scales = _stacked({index: part.scale for index, part in parts.items()}, sizes)
    tensor = FP8Tensor(
        place_parts(weight.shape, placed.fit(weight.shape).sharding, read),
        place(_global_scale(plan, entry, scales), beside),
        tuple(axis - len(weight.shape) for axis in weight.contracted),
        np.dtype(weight.dtype),
    )
    inputs = {index: part.input_scale for index, part in parts.items()}
    return QuantizedWeight(
        tensor,
        _input_scale(stored, entry, stack, inputs, sizes, beside),
        cache=_cache(stored, plan, entry, stack, sizes, beside),
    )


def _stack_of(entry: PlannedWeight, stack: Stack) -> tuple[int, tuple[int, ...]]:
    """How many leading axes are stacked, and their sizes."""
    weight = entry.weight
    rank = len(next(iter(stack)))
    if any(axis < rank for axis in weight.contracted):
        raise LeafError(
            f"{entry.path}: contracted over axes {weight.contracted} and stored as a stack over the first {rank}: "
            "wanted leading axes that are not contracted; correct names"
        )
    return rank, weight.shape[:rank]


def _refuse_other_shapes(
    stored: StoredCheckpoint, entry: PlannedWeight, stack: Stack, shapes: Mapping[tuple[int, ...], tuple[int, int]]
) -> None:
    weight = entry.weight
    length = math.prod(weight.sizes(weight.contracted))
    wanted = (math.prod(weight.shape[len(next(iter(stack))) :]) // length, length)
    for index, shape in shapes.items():
        if shape != wanted:
            raise LeafError(
                f"{entry.path}: weight {stack[index]!r} of {stored.directory} is [N, K] = {shape}: wanted {wanted}; "
                "correct names"
            )


def _nvfp4(stored: StoredCheckpoint, plan: Plan, entry: PlannedWeight, stack: Stack, placed: Placed) -> QuantizedWeight:
    """A weight in the parameter's own axis order, its stacks together again."""
    weight = entry.weight
    blocking = Blocking(weight.shape, weight.contracted)
    rank, sizes = _stack_of(entry, stack)
    parts = {index: stored.weight(module) for index, module in stack.items()}
    _refuse_other_shapes(stored, entry, stack, {index: part.shape for index, part in parts.items()})
    for index, part in parts.items():
        if part.pre_scale is not None:
            raise LeafError(
                f"{entry.path}: weight {stack[index]!r} of {stored.directory} has a pre_quant_scale: wanted none, as "
                "the plan has no place for it; load the checkpoint without params and plan"
            )
    sharding = placed.sharding
    if sharding is not None:
        placed.fit(weight.shape)
    if isinstance(sharding, NamedSharding):
        sharding = blockwise_sharding(sharding, blocking)

    def stored_array(arrays: Mapping[tuple[int, ...], np.ndarray], per_block: int) -> jax.Array:
        shape = list(blocking.merged_shape)
        shape[blocking.axis] = blocking.blocks * per_block
        axes = (blocking.axis,) if blocking.merged else blocking.axes
        restore = _axis_order(tuple(shape), rank, axes)
        return place_parts(tuple(shape), sharding, _stack_reader(arrays, sizes, restore))

    beside = placed.replicated()
    tensor = NVFP4Tensor(
        stored_array({index: part.packed for index, part in parts.items()}, BLOCK_SIZE // 2),
        stored_array({index: part.scales for index, part in parts.items()}, 1),
        place(_global_scale(plan, entry, _stacked({i: p.global_scale for i, p in parts.items()}, sizes)), beside),
        tuple(axis - len(weight.shape) for axis in weight.contracted),
        weight.sizes(weight.contracted),
        np.dtype(weight.dtype),
    )
    return QuantizedWeight(
        tensor,
        _input_scale(stored, entry, stack, {index: part.input_scale for index, part in parts.items()}, sizes, beside),
        cache=_cache(stored, plan, entry, stack, sizes, beside),
    )


def _axis_order(shape: tuple[int, ...], rank: int, contracted: tuple[int, ...]) -> Callable[[np.ndarray], np.ndarray]:
    """From a stored matrix `[outputs, contraction]` to one entry, of `shape[rank:]`, of the parameter's stack."""
    rest = shape[rank:]
    last = [axis - rank for axis in contracted]
    order = [*(axis for axis in range(len(rest)) if axis not in last), *last]
    return lambda values: values.reshape([rest[axis] for axis in order]).transpose(np.argsort(order))


def _stack_reader(
    parts: Mapping[tuple[int, ...], np.ndarray], sizes: tuple[int, ...], restore: Callable[[np.ndarray], np.ndarray]
) -> Callable[[tuple[Any, ...]], np.ndarray]:
    """Reads the part of a stacked array at an index, touching only the entries and the slices that it names."""
    rank = len(sizes)
    views = {index: restore(values) for index, values in parts.items()}

    def read(index: tuple[slice, ...]) -> np.ndarray:
        chosen = [range(*part.indices(size)) for part, size in zip(index[:rank], sizes, strict=True)]
        grid = np.stack(np.meshgrid(*chosen, indexing="ij"), -1).reshape(-1, rank) if rank else np.zeros((1, 0), int)
        cut: tuple[Any, ...] = (*index[rank:], ...)
        entries = [views[tuple(map(int, entry))][cut] for entry in grid]
        if not rank:
            return entries[0]
        result = np.empty((len(entries), *entries[0].shape), entries[0].dtype)
        for target, source in zip(result, entries, strict=True):
            copy_values(target, source)
        return result.reshape(*map(len, chosen), *entries[0].shape)

    return read


def _stacked(values: Mapping[tuple[int, ...], np.float32], sizes: tuple[int, ...]) -> np.ndarray:
    result = np.empty(sizes, np.float32)
    for index, value in values.items():
        result[index] = value
    return result


def _global_scale(plan: Plan, entry: PlannedWeight, scales: np.ndarray) -> np.ndarray:
    """One for each entry of the stack, or one together where the plan shares it and the checkpoint agrees."""
    separate = plan.global_scale_axes(entry)
    for axis in range(scales.ndim):
        first = scales.take([0], axis)
        if axis not in separate and np.all(scales == first):
            scales = first
    if scales.size == 1 and not separate:
        return scales.reshape(())
    return scales.reshape(*scales.shape, *[1] * (len(entry.weight.shape) - scales.ndim))


def _input_scale(
    stored: StoredCheckpoint,
    entry: PlannedWeight,
    stack: Stack,
    parts: Mapping[tuple[int, ...], np.float32 | None],
    sizes: tuple[int, ...],
    beside: Placed,
) -> jax.Array | None:
    """`[]`, or `[L]` for a stack of layers; the largest over experts, as kernels with one scale for all take it."""
    scales = {index: scale for index, scale in parts.items() if scale is not None}
    if not scales:
        return None
    if len(scales) != len(parts):
        module = next(module for index, module in stack.items() if index not in scales)
        raise LeafError(
            f"{entry.path}: weight {module!r} of {stored.directory} has no input scale, but others of the stack have: "
            "wanted one for all or none; calibrate again"
        )
    return place(_over_layers(entry, _stacked(scales, sizes)), beside)


def _over_layers(entry: PlannedWeight, values: np.ndarray) -> np.ndarray:
    """The largest over all axes of a stack but those of layers."""
    others = tuple(axis for axis in range(values.ndim) if axis not in entry.weight.layer_axes)
    return np.asarray(values.max(others))


def _cache_names(stored: StoredCheckpoint, module: str) -> dict[str, str]:
    """The names under which the checkpoint has scales of the keys and values that a module makes."""
    place = cache_module(stored.file_format, module)
    names = {"keys": joined(place, "k_scale"), "values": joined(place, "v_scale")}
    return {kind: name for kind, name in names.items() if name in stored.names}


def _cache(
    stored: StoredCheckpoint,
    plan: Plan,
    entry: PlannedWeight,
    stack: Stack,
    sizes: tuple[int, ...],
    beside: Placed,
) -> CacheAmax | None:
    """The absolute maxima of keys and values, if the plan quantizes them."""
    recipe = plan.recipe.kv_cache
    if recipe is None or not entry.cached:
        return None
    _refuse_other_cache(stored, entry, recipe.format)
    found: dict[str, jax.Array] = {}
    for kind in entry.cached:
        amaxes = {}
        for index, module in stack.items():
            name = _cache_names(stored, module).get(kind)
            if name is None:
                raise LeafError(
                    f"{entry.path}: {stored.directory} has no scale of the {kind} that {module!r} makes: wanted one by "
                    "the plan; make the plan with a recipe without kv_cache"
                )
            amaxes[index] = amax_of_cache_scale(np.float32(stored.tensors.tensor(name).reshape(())))
        found[kind] = place(_over_layers(entry, _stacked(amaxes, sizes)), beside)
    return CacheAmax(found.get("keys"), found.get("values"), recipe.format)


def _refuse_other_cache(stored: StoredCheckpoint, entry: PlannedWeight, wanted: CacheFormat) -> None:
    found = cache_format(stored.config)
    if found is not wanted:
        raise LeafError(
            f"{entry.path}: config.json of {stored.directory} says that the key-value cache is "
            f"{'not quantized' if found is None else found.value}: wanted {wanted.value}, as in the plan; make the "
            "plan with the recipe of the checkpoint"
        )


def amax_of_cache_scale(scale: np.float32) -> np.float32:
    """The float32 amax whose quotient by 448 is `scale`, exactly; the nearest to `448 * scale` of several.

    448 for an NVFP4 cache too, as `export_checkpoint` says.

    >>> scale = np.float32(0.7) / np.float32(448)
    >>> bool(amax_of_cache_scale(scale) / np.float32(448) == scale)
    True
    """
    divisor = np.float32(fp8.SCALE_DIVISOR)
    near = scale * divisor
    candidates = (near, np.nextafter(near, np.float32(0)), np.nextafter(near, np.float32(np.inf)))
    return next((amax for amax in candidates if amax / divisor == scale), near)
