"""Quantizing a model block by block, each calibrated on what the quantized blocks before it put out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxfp4.algorithms.calibration import calibrate, tracked_progress
from jaxfp4.algorithms.channels import after_folding
from jaxfp4.algorithms.inputs import leaves_for
from jaxfp4.algorithms.passes import Block, Index, Parameters, Passes, initial_parameters
from jaxfp4.algorithms.quantization import quantize_weights
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.recipes.recipe import Scheme
from jaxfp4.tensors import NVFP4Tensor, QuantizedTensor, QuantizedWeight
from jaxfp4.transform.trace import ApplyFn, Leaves


def blocks_of(plan: Plan) -> tuple[Block, ...]:
    """The plan's quantized weights in blocks of layers, in the order in which the model uses them.

    Weights whose paths agree up to the first number are a layer, such as `layers/0`; others are one with their
    siblings. Of layers stacked for a scan each is a block of all weights of the stack.
    """
    groups: dict[object, list[PlannedWeight]] = {}
    for entry in sorted(plan.quantized, key=lambda e: e.weight.first_use):
        first = min(plan.siblings(entry), key=lambda e: e.weight.first_use)
        stacked = entry.weight.sizes(entry.weight.layer_axes)
        key: object = stacked or _layer(first.path) or first.path
        groups.setdefault(key, []).append(entry)
    blocks: list[Block] = []
    for entries in groups.values():
        paths = tuple(entry.path for entry in entries)
        weight = entries[0].weight
        blocks += [Block(paths, index) for index in np.ndindex(weight.sizes(weight.layer_axes))]
    return tuple(blocks)


def _layer(path: str) -> tuple[str, ...]:
    """A path up to its first number; nothing if it has none."""
    parts = path.split("/")
    place = next((i for i, part in enumerate(parts) if part.rsplit("_", 1)[-1].isdigit()), None)
    return () if place is None else tuple(parts[: place + 1])


def quantize_sequentially(
    apply_fn: ApplyFn, params: Any, batches: Iterable[Any], plan: Plan, *, progress: bool = True
) -> Any:
    """As `quantize_params(params, plan, calibrate(apply_fn, params, batches, plan))`, block of layers by block.

    Statistics of a block are taken with all blocks before it as they are once quantized, activations of W4A4 weights
    included, as GPTQ (arXiv 2210.17323) takes them: they are of the activations that the weights will meet. What
    earlier blocks did wrong is not made good. Channel scales are chosen and folded before, on the model as it is; a
    key-value cache is calibrated but not simulated.

    Of each batch the values that enter the next block are kept, so that a block is computed twice, whatever its depth:
    for its statistics, in one jitted pass for all its weights, and once it is quantized. Where blocks are layers of one
    scan, passes go through the whole scan and are compiled once. Memory holds these values of all batches and the
    statistics of one block, one layer's if they are stacked for a scan.

    `batches` is kept as a list. Digests differ from those of `quantize_params` wherever statistics decide.

    Raises what `calibrate` and `quantize_params` raise.
    """
    batches = list(batches)
    if not batches:
        raise ValueError("batches is empty: wanted at least one batch of calibration data")
    if plan.folds:
        stats = calibrate(apply_fn, params, batches, plan, progress=progress)
        params, plan, _ = after_folding(params, plan, stats)
    leaves, blocks = leaves_for(plan, params), blocks_of(plan)
    state = _State.of(plan, leaves)
    passes = Passes(apply_fn, plan, leaves, blocks, state.parameters, batches)
    for number, block in enumerate(tracked_progress(blocks, "quantizing block by block", progress)):
        stats = passes.statistics(number, state.parameters)
        part = _part(plan, block)
        arrays = {e.path: state.values[e.path][_place(plan.by_path[e.path], block.index)] for e in part.quantized}
        state = state.with_block(plan, block, quantize_weights(part, arrays, stats))
    results = {e.weight.leaf: _stacked(e, state.done[e.path]) for e in plan.quantized}
    return leaves.rebuilt([results.get(i, value) for i, value in enumerate(leaves.values)])


@dataclasses.dataclass(frozen=True)
class _State:
    """How far the quantization has come, by path."""

    parameters: Parameters
    done: Mapping[str, Mapping[Index, QuantizedWeight]]
    """By layer, the results."""

    @classmethod
    def of(cls, plan: Plan, leaves: Leaves) -> _State:
        """Nothing is quantized yet."""
        return cls(initial_parameters(plan, leaves), {e.path: {} for e in plan.quantized})

    @property
    def values(self) -> Mapping[str, Array]:
        """The weights as the model now computes with them."""
        return self.parameters.values

    def with_block(self, plan: Plan, block: Block, found: Mapping[str, QuantizedWeight]) -> _State:
        """The state after another block."""
        values, scales, done = dict(self.values), dict(self.parameters.scales), dict(self.done)
        for path, weight in found.items():
            done[path] = {**done[path], block.index: weight}
            place, part = _place(plan.by_path[path], block.index), weight.weight.dequantize()
            values[path] = values[path].at[place].set(part) if block.index else part
            new = {"done": jnp.float32(1)}
            if weight.input_scale is not None:
                new["input_scale"] = weight.input_scale
            scales[path] = {name: scales[path][name].at[block.index].set(number) for name, number in new.items()}
        return _State(dataclasses.replace(self.parameters, values=values, scales=scales), done)


def _place(entry: PlannedWeight, index: Index) -> tuple[Any, ...]:
    """Where a layer is in the stack of its weight."""
    places = dict(zip(entry.weight.layer_axes, index, strict=True))
    return tuple(places.get(a, slice(None)) for a in range(len(entry.weight.shape)))


def _part(plan: Plan, block: Block) -> Plan:
    """The plan of a block alone: its weights without their layer axes, and no others quantized."""
    entries = [
        _without_layers(entry) if entry.path in block.paths else dataclasses.replace(entry, scheme=Scheme.NONE)
        for entry in plan.entries
    ]
    return dataclasses.replace(plan, entries=tuple(entries))


def _without_layers(entry: PlannedWeight) -> PlannedWeight:
    """The entry of one layer of a stacked weight."""
    weight = entry.weight
    kept = [a for a in range(len(weight.shape)) if a not in weight.layer_axes]
    single = dataclasses.replace(
        weight,
        shape=tuple(weight.shape[a] for a in kept),
        contracted=tuple(kept.index(a) for a in weight.contracted),
        expert_axes=tuple(kept.index(a) for a in weight.expert_axes),
        layer_axes=(),
    )
    return dataclasses.replace(entry, weight=single)


def _stacked(entry: PlannedWeight, layers: Mapping[Index, QuantizedWeight]) -> QuantizedWeight:
    """The layers' results as one weight with its layer axes."""
    weight = entry.weight
    if not weight.layer_axes:
        return layers[()]
    sizes = weight.sizes(weight.layer_axes)
    results = [layers[index] for index in sorted(layers)]

    rank = len(weight.shape)
    first = results[0].weight
    # Merged contraction axes are one in packed codes and scales.
    lost = weight.contracted[:-1] if isinstance(first, NVFP4Tensor) and first.blocking.merged else ()
    places = [a - sum(merged < a for merged in lost) for a in weight.layer_axes]

    def in_front(*parts: Array) -> Array:
        return jnp.stack(parts).reshape(*sizes, *parts[0].shape)

    def in_place(*parts: Array) -> Array:
        return jnp.moveaxis(in_front(*parts), range(len(sizes)), places)

    tensors = [result.weight for result in results]
    scales = [t.global_scale.reshape(t.global_scale.shape or (1,) * (rank - len(sizes))) for t in tensors]
    # Global scales have the layer axes of the parameter, the other arrays perhaps fewer axes.
    codes: QuantizedTensor = jax.tree.map(in_place, *map(_without_global_scale, tensors))
    tensor = dataclasses.replace(
        codes,
        global_scale=jnp.moveaxis(in_front(*scales), range(len(sizes)), weight.layer_axes),
        axes=tuple(a - rank for a in weight.contracted),
    )
    # Beside the tensor there are numbers, one for each layer.
    bare = [dataclasses.replace(result, weight=None) for result in results]  # type: ignore[arg-type]
    numbers: QuantizedWeight = jax.tree.map(in_front, *bare)
    return dataclasses.replace(numbers, weight=tensor)


def _without_global_scale(tensor: QuantizedTensor) -> QuantizedTensor:
    return dataclasses.replace(tensor, global_scale=None)  # type: ignore[arg-type]
