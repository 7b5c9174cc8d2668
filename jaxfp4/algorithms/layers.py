"""The layers of a model: which weights are calibrated together, and stacked ones taken apart and put together."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array

from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.tensors import NVFP4Tensor, QuantizedTensor, QuantizedWeight
from jaxfp4.tensors.memory import stack_layers
from jaxfp4.transform.statistics import State, Statistic
from jaxfp4.transform.trace import ApplyFn, Leaves
from jaxfp4.transform.unrolled import Index, Split, find_split, unrolled


@dataclasses.dataclass(frozen=True)
class Block:
    """Weights that are calibrated together: by path, and which entry of their layer axes."""

    paths: tuple[str, ...]
    index: Index = ()


Place = tuple[str, Index]
"""The path of a weight, and which entry of its layer axes."""


@dataclasses.dataclass(frozen=True)
class Model:
    """A model with the plan for it, whose stacked layers are parameters of their own where that can be."""

    apply_fn: ApplyFn
    plan: Plan
    leaves: Leaves
    blocks: tuple[Block, ...]
    statistics: Mapping[str, Statistic]
    """By path, what is collected of the activation that a weight meets."""

    split: Split
    entries: tuple[PlannedWeight, ...]
    """What is quantized of the model as it was."""

    def joined(self, done: dict[Place, QuantizedWeight]) -> dict[int, QuantizedWeight]:
        """By leaf of the model as it was, the results of this one.

        `done` is emptied, so that layers are freed once they are put together.
        """
        return {e.weight.leaf: _stacked(e, [done.pop(place) for place in self._places(e)]) for e in self.entries}

    def joined_stats(self, found: Mapping[Place, State]) -> dict[str, State]:
        """By path of the model as it was, the states of the statistics of this one."""
        layers = [(e, self._places(e)) for e in self.entries]
        return {
            e.path: _stacked_states(e, [found[place] for place in places]) for e, places in layers if places[0] in found
        }

    def _places(self, entry: PlannedWeight) -> list[Place]:
        """Where the layers of a weight of the model as it was are in this one."""
        apart = entry.weight.leaf in self.split.axes
        indices = np.ndindex(entry.weight.sizes(entry.weight.layer_axes))
        return [(_name(entry.path, i), ()) if apart else (entry.path, i) for i in indices]


def layers_apart(apply_fn: ApplyFn, plan: Plan, leaves: Leaves, batches: Iterable[Any]) -> Model:
    """The model with loops over layers unrolled. It stays as it is where one of them picks its layers by itself."""
    layered = {e.weight.leaf: e.weight.layer_axes for e in plan.quantized if e.weight.layer_axes}
    # Other quantized weights may be scanned over too, as those of cross-attention, which do not follow one another.
    kept = [e.weight.leaf for e in plan.quantized]
    found = [find_split(apply_fn, leaves, args, layered, kept) for args in _kinds(batches)] if layered else []
    splits = [split for split in found if split is not None]
    whole = Split(leaves, {}, {})
    if not layered or len(splits) < len(found):
        return Model(apply_fn, plan, leaves, blocks_of(plan), plan.statistics, whole, plan.quantized)
    axes = {n: axes for split in splits for n, axes in split.axes.items()}
    split = Split(leaves, axes, splits[0].loops, max(split.steps for split in splits))
    values = split.apart()
    places = [(leaf, index) for leaf in range(len(leaves.values)) for index in split.indices(leaf)]
    numbers = {place: number for number, place in enumerate(places)}
    entries = tuple(
        _of_layer(plan, e, index, numbers) for e in plan.quantized for index in split.indices(e.weight.leaf)
    )
    blocks = [Block(tuple(_name(path, block.index) for path in block.paths)) for block in blocks_of(plan, split.loops)]
    paths = (*(_name(leaves.paths[leaf], index) for leaf, index in places), *(f"step {i}" for i in range(split.steps)))
    apart = Leaves(paths, tuple(values), jax.tree.structure(list(range(len(values)))))
    # Of the plan as it was: what folds need is not known of single layers.
    statistics = {
        _name(path, index): statistic
        for path, statistic in plan.statistics.items()
        for index in split.indices(plan.by_path[path].weight.leaf)
    }
    single = dataclasses.replace(plan, entries=entries)
    return Model(unrolled(apply_fn, split), single, apart, tuple(blocks), statistics, split, plan.quantized)


def _kinds(batches: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Arguments of each type among the batches."""
    kinds: dict[Any, tuple[Any, ...]] = {}
    for batch in batches:
        args = as_arguments(batch)
        kinds.setdefault(kind_of(args), args)
    return list(kinds.values())


def as_arguments(batch: Any) -> tuple[Any, ...]:
    """A batch is the tuple of arguments, or the one argument."""
    return batch if isinstance(batch, tuple) else (batch,)


def kind_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """What a function is compiled for."""
    data, treedef = jax.tree.flatten(args)
    return (treedef, *map(jax.typeof, data))


def _name(path: str, index: Index) -> str:
    """The path of one layer of a stack, such as `layers/q[3]`."""
    return f"{path}[{','.join(map(str, index))}]" if index else path


def _of_layer(
    plan: Plan, entry: PlannedWeight, index: Index, numbers: Mapping[tuple[int, Index], int]
) -> PlannedWeight:
    """The entry of one layer, beside those of others of the plan that are quantized."""
    single = without_layers(entry)
    weight = single.weight
    siblings = tuple(_name(path, index) for path in weight.siblings if plan.by_path[path].quantized)
    leaf = numbers[weight.leaf, index]
    moved = dataclasses.replace(weight, path=_name(entry.path, index), leaf=leaf, siblings=siblings)
    return dataclasses.replace(single, weight=moved)


def blocks_of(plan: Plan, loops: Mapping[int, int] | None = None) -> tuple[Block, ...]:
    """The plan's quantized weights in blocks of layers, in the order in which the model uses them.

    Weights whose paths agree up to the first number are a layer, such as `layers/0`; others are one with their
    siblings. Of layers stacked for a scan each is a block of all weights of the stack; `loops` tells weights of several
    scans apart, by leaf.
    """
    groups: dict[object, list[PlannedWeight]] = {}
    for entry in sorted(plan.quantized, key=lambda e: e.weight.first_use):
        first = min(plan.siblings(entry), key=lambda e: e.weight.first_use)
        layers = entry.weight.sizes(entry.weight.layer_axes)
        key: object = _layer(first.path) or first.path
        if layers:
            key = layers, (loops or {}).get(entry.weight.leaf)
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


def _stacked_states(entry: PlannedWeight, states: Sequence[State]) -> State:
    """Statistics with the layer axes of the weight, from those of its layers in order."""
    weight = entry.weight
    if not weight.layer_axes:
        return states[0]
    sizes = weight.sizes(weight.layer_axes)
    places = [weight.stack_axes.index(a) for a in weight.layer_axes]
    return jax.tree.map(lambda *layers: stack_layers(layers, sizes, places), *states)


def without_layers(entry: PlannedWeight) -> PlannedWeight:
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


def _stacked(entry: PlannedWeight, layers: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """The layers' results, in order, as one weight with its layer axes."""
    weight = entry.weight
    if not weight.layer_axes:
        return layers[0]
    sizes = weight.sizes(weight.layer_axes)
    rank = len(weight.shape)
    first = layers[0].weight
    # Merged contraction axes are one in packed codes and scales.
    lost = weight.contracted[:-1] if isinstance(first, NVFP4Tensor) and first.blocking.merged else ()
    places = [a - sum(merged < a for merged in lost) for a in weight.layer_axes]

    def along(axes: Sequence[int], *parts: Array) -> Array:
        return stack_layers(parts, sizes, axes)

    tensors = [layer.weight for layer in layers]
    scales = [t.global_scale.reshape(t.global_scale.shape or (1,) * (rank - len(sizes))) for t in tensors]
    # Global scales have the layer axes of the parameter, the other arrays perhaps fewer axes.
    codes: QuantizedTensor = jax.tree.map(functools.partial(along, places), *map(_without_global_scale, tensors))
    tensor = dataclasses.replace(
        codes,
        global_scale=stack_layers(scales, sizes, weight.layer_axes),
        axes=tuple(a - rank for a in weight.contracted),
    )
    # Beside the tensor there are numbers, one for each layer.
    bare = [dataclasses.replace(layer, weight=None) for layer in layers]  # type: ignore[arg-type]
    numbers: QuantizedWeight = jax.tree.map(functools.partial(along, range(len(sizes))), *bare)
    return dataclasses.replace(numbers, weight=tensor)


def _without_global_scale(tensor: QuantizedTensor) -> QuantizedTensor:
    return dataclasses.replace(tensor, global_scale=None)  # type: ignore[arg-type]
