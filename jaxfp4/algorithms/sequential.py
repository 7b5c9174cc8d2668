"""Quantizing a model block by block, each calibrated on what the quantized blocks before it put out."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp

from jaxfp4.algorithms.calibration import calibrate, listed, tracked_progress
from jaxfp4.algorithms.channels import after_folding
from jaxfp4.algorithms.inputs import leaves_for
from jaxfp4.algorithms.layers import Block, Model, Place, layers_apart, without_layers
from jaxfp4.algorithms.passes import Parameters, Passes, initial_parameters
from jaxfp4.algorithms.quantization import quantize_weights
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.recipes.recipe import Scheme
from jaxfp4.tensors import QuantizedWeight
from jaxfp4.tensors.memory import brought, on_devices
from jaxfp4.transform.trace import ApplyFn
from jaxfp4.transform.unrolled import Index


def quantize_sequentially(
    apply_fn: ApplyFn, params: Any, batches: Iterable[Any], plan: Plan, *, progress: bool = True
) -> Any:
    """As `quantize_params(params, plan, calibrate(apply_fn, params, batches, plan))`, block of layers by block.

    Statistics of a block are taken with all blocks before it as they are once quantized, activations of W4A4 weights
    included, as GPTQ (arXiv 2210.17323) takes them: they are of the activations that the weights will meet. What
    earlier blocks did wrong is not made good. Channel scales are chosen and folded before, on the model as it is; a
    key-value cache is calibrated but not simulated.

    Of each batch the values that enter the next block are kept, so that a block is computed twice, whatever its depth:
    for its statistics, in one jitted pass for all its weights, and once it is quantized. Blocks of one form, as the
    layers of a model are, share one compiled pass, in a list of layers as in a scan. Memory holds these values of all
    batches and the statistics of one block. Parameters in host memory (`memory_kind="pinned_host"`) are brought to the
    devices block by block, so that the model may be larger than the devices' memory; the result is in device memory.
    A loop that picks its layers by itself is passed from its beginning for each of them, all of its weights at hand.

    `batches` is kept as a list. Digests differ from those of `quantize_params` wherever statistics decide.

    Raises what `calibrate` and `quantize_params` raise.
    """
    batches = listed(batches)
    if plan.folds:
        stats = calibrate(apply_fn, params, batches, plan, progress=progress)
        params, plan, _ = after_folding(params, plan, stats)
    leaves = leaves_for(plan, params)
    model = layers_apart(apply_fn, plan, leaves, batches)
    state = _State.of(model)
    passes = Passes(model, state.parameters, batches)
    for number in tracked_progress(range(len(model.blocks)), "quantizing block by block", progress):
        state = state.after(model, number, passes)
    done = dict(state.done)
    del state, passes
    results = model.joined(done)
    return leaves.rebuilt([results[i] if i in results else on_devices(v) for i, v in enumerate(leaves.values)])


@dataclasses.dataclass(frozen=True)
class _State:
    """How far the quantization has come."""

    parameters: Parameters
    done: Mapping[Place, QuantizedWeight]
    """The results."""

    @classmethod
    def of(cls, model: Model) -> _State:
        """Nothing is quantized yet."""
        return cls(initial_parameters(model), {})

    def after(self, model: Model, number: int, passes: Passes) -> _State:
        """The state once a block is quantized. Its statistics and arrays are gone then."""
        plan, block = model.plan, model.blocks[number]
        stats = passes.statistics(number, self.parameters)
        arrays = {path: brought(self.parameters.values[path]) for path in block.paths}
        if block.index:
            arrays = {path: w[_place(plan.by_path[path], block.index)] for path, w in arrays.items()}
        return self._with_block(plan, block, quantize_weights(_part(plan, block), arrays, stats))

    def _with_block(self, plan: Plan, block: Block, found: Mapping[str, QuantizedWeight]) -> _State:
        """The state after another block."""
        values, scales, done = dict(self.parameters.values), dict(self.parameters.scales), dict(self.done)
        for path, weight in found.items():
            done[path, block.index] = weight
            if block.index:
                place = _place(plan.by_path[path], block.index)
                values[path] = brought(values[path]).at[place].set(weight.weight.dequantize())
            else:
                values[path] = weight.weight
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
        without_layers(entry) if entry.path in block.paths else dataclasses.replace(entry, scheme=Scheme.NONE)
        for entry in plan.entries
    ]
    return dataclasses.replace(plan, entries=tuple(entries))
