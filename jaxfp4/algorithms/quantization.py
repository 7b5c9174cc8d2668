"""Parameters, statistics and a plan in, quantized parameters out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxfp4.algorithms.cache import cache_amaxes
from jaxfp4.algorithms.channels import folded
from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.algorithms.inputs import leaves_for
from jaxfp4.algorithms.maximum import shared_amaxes
from jaxfp4.algorithms.moments import moments_for
from jaxfp4.algorithms.statistics import Stats, input_scales, used_stats
from jaxfp4.algorithms.together import quantized_together
from jaxfp4.formats import LeafError
from jaxfp4.formats.errors import leaf as naming_leaf
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.tensors import QuantizedWeight, global_amax, quantize_fp8, quantize_unchecked
from jaxfp4.tensors.cache import CacheAmax
from jaxfp4.tensors.memory import in_host_memory, on_devices
from jaxfp4.tensors.mesh import on_accelerators


def quantize_params(params: Any, plan: Plan, stats: Mapping[str, Any] | None = None, *, donate: bool = False) -> Any:
    """`params` with a `QuantizedWeight` in the place of each weight that the plan quantizes; same tree otherwise.

    Packed codes, block scales and global scales are the same bits for every sharding of `params`. Input scales come
    from `stats`; without them weights are quantized all the same if their method needs none, and `quantized` takes the
    scale of W4A4 activations from each activation as it comes. Weights keep their sharding and are quantized one after
    the other. Where the plan has channel scales to fold, other parameters change too, as `fold_channel_scales` says.

    Parameters in host memory (`memory_kind="pinned_host"`) are brought to the devices one group of siblings after the
    other; the result is in device memory.

    With `donate` each weight's memory is freed once it and its siblings are quantized, so that the peak is that of the
    parameters and one group of siblings; `params` cannot be used afterwards, also after an error.

    Raises `LeafError` with the path of a weight that holds NaN or Inf, that is not as in the plan, or whose
    statistics are missing or unusable. Under jit non-finite weights cannot be reported; they dequantize to NaN. Raises
    ValueError if weights that are traced are to be donated.
    """
    leaves = leaves_for(plan, params)
    used = None if stats is None else used_stats(plan, stats)
    values, used = folded(plan, dict(enumerate(leaves.values)), used)
    release = _Release(leaves.values, values) if donate else None
    quantized = quantize_weights(plan, {e.path: values[e.weight.leaf] for e in plan.quantized}, used, release)
    by_leaf = {e.weight.leaf: quantized[e.path] for e in plan.quantized}
    return leaves.rebuilt([by_leaf[i] if i in by_leaf else on_devices(value) for i, value in values.items()])


class _Release:
    """Frees weights that have been quantized."""

    def __init__(self, leaves: Sequence[Any], values: Mapping[int, Any]) -> None:
        """From the parameters' leaves, and the same by number as they are quantized."""
        if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            raise ValueError(
                "donate=True under jit: wanted parameters that are not traced; leave it out and pass donate_argnums "
                "to jax.jit"
            )
        self._leaves, self._values = leaves, values
        self._uses = Counter(id(leaf) for leaf in leaves)

    def __call__(self, group: Sequence[PlannedWeight]) -> None:
        """Frees the weights of a group, except an array that is a leaf elsewhere too."""
        for entry in group:
            leaf = self._leaves[entry.weight.leaf]
            for array in (leaf, self._values[entry.weight.leaf]):
                if isinstance(array, Array) and self._uses[id(array)] < 2 and not array.is_deleted():
                    array.delete()


def quantize_weights(
    plan: Plan,
    arrays: Mapping[str, Array],
    used: Stats | None,
    release: Callable[[Sequence[PlannedWeight]], None] | None = None,
    *,
    together: bool | None = None,
) -> dict[str, QuantizedWeight]:
    """By path, the weights that the plan quantizes, from arrays by path and the statistics that the plan uses.

    Channels are taken as they are; errors are those of `quantize_params`. `release` is called with each group of
    siblings when their arrays are not needed any more. `together` says whether several weights go into one compiled
    program where that can be; by default not on a CPU, where compiling costs more than launching.
    """
    scales, caches = input_scales(plan, used), cache_amaxes(plan, used)
    groups = _sibling_groups(plan)
    together = on_accelerators(arrays) if together is None else together
    quantized: dict[str, QuantizedWeight] = {}
    # To free weights in between is to wait for each group.
    far = any(map(in_host_memory, arrays.values()))
    one_by_one = release is not None or far
    for batch in [[group] for group in groups] if one_by_one else [groups]:
        near = {e.path: on_devices(arrays[e.path]) for e in batch[0]} if far else arrays
        found = quantized_together(plan, batch if together else [], near)
        done = {path: QuantizedWeight(tensor) for path, tensor in found.tensors.items()}
        for group in batch:
            if group[0].path not in done:
                done.update(_quantized_group(plan, group, near, used))
        if one_by_one:
            jax.block_until_ready(done)
        _refuse_non_finite(near, done, found.finite)
        if release is not None:
            release(batch[0])
        quantized.update(done)
    return {
        e.path: _with_scales(quantized[e.path], scales.get(e.path), caches.get(e.path))
        for group in groups
        for e in group
    }


def _with_scales(weight: QuantizedWeight, input_scale: Array | None, cache: CacheAmax | None) -> QuantizedWeight:
    if input_scale is None and cache is None:
        return weight
    return dataclasses.replace(weight, input_scale=input_scale, cache=cache)


def _quantized_group(
    plan: Plan, group: Sequence[PlannedWeight], arrays: Mapping[str, Array], used: Stats | None
) -> dict[str, QuantizedWeight]:
    """Siblings one after the other, whatever their methods are and wherever they lie."""
    amaxes = shared_amaxes(plan, group, arrays)
    divisor = min(e.method.scales.divisor for e in group)
    return {e.path: _quantized(plan, e, arrays[e.path], amaxes[e.path], divisor, used) for e in group}


def _quantized(
    plan: Plan, entry: PlannedWeight, w: Array, amax: Array, divisor: int, stats: Stats | None
) -> QuantizedWeight:
    """One weight in its format, after what its method does to its channels."""
    if entry.is_fp8:
        with naming_leaf(entry.path):
            values = quantize_fp8(w, entry.weight.contracted, amax=amax)
        return QuantizedWeight(dataclasses.replace(values, dtype=np.dtype(entry.weight.dtype)))
    method = entry.method
    form = max(method.scales.moments, method.rounding.moments, key=lambda form: form.value)
    with naming_leaf(entry.path):
        moments = moments_for(plan, entry, stats, form)
        tensor = quantize_unchecked(
            w,
            entry.weight.contracted,
            global_amax=amax,
            divisor=divisor,
            encoder=encoder_for(method),
            moments=moments,
            rotation=method.rotated,
        )
    tensor = dataclasses.replace(tensor, dtype=np.dtype(entry.weight.dtype))
    return QuantizedWeight(tensor, rotation=method.rotated)


def _sibling_groups(plan: Plan) -> list[tuple[PlannedWeight, ...]]:
    """The quantized entries, each in exactly one group."""
    groups: list[tuple[PlannedWeight, ...]] = []
    seen: set[str] = set()
    for entry in plan.quantized:
        if entry.path not in seen:
            groups.append(plan.siblings(entry))
            seen.update(e.path for e in groups[-1])
    return groups


def _refuse_non_finite(
    arrays: Mapping[str, Array],
    quantized: Mapping[str, QuantizedWeight],
    finite: Sequence[tuple[tuple[str, ...], Array]],
) -> None:
    """A global scale is NaN if its weight or a sibling is not finite; all are read together, so that none waits.

    `finite` says of some of the weights together whether all their global scales are finite.
    """
    flags = jax.device_get([flag for _, flag in finite])
    known = {path for (paths, _), flag in zip(finite, flags, strict=True) if flag for path in paths}
    global_scales = {path: weight.weight.global_scale for path, weight in quantized.items() if path not in known}
    if any(isinstance(scale, jax.core.Tracer) for scale in global_scales.values()):
        return
    for path, scale in jax.device_get(global_scales).items():
        if not np.all(np.isfinite(scale)) and not np.isfinite(np.asarray(global_amax(arrays[path]))):
            raise LeafError(f"{path}: it holds NaN or Inf: wanted finite weights; repair or exclude it")
