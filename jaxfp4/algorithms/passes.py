"""The passes of all batches through a model that is quantized block by block.

Each batch is kept where the block begins that is next, as the values that go from block to block; a pass computes the
model from there.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import Var

from jaxfp4.algorithms.activation_rounding import quantize_activation
from jaxfp4.algorithms.inputs import marks_for, tracked_weight
from jaxfp4.algorithms.layers import Block, Model, as_arguments, kind_of
from jaxfp4.algorithms.statistics import Stats, refuse_non_finite
from jaxfp4.recipes.recipe import Scheme
from jaxfp4.tensors import QuantizedTensor
from jaxfp4.tensors.memory import Layer, abstract, brought, stacks_of
from jaxfp4.tensors.mesh import replicated_beside
from jaxfp4.tensors.pacing import paced
from jaxfp4.transform import jaxprs
from jaxfp4.transform.evaluate import evaluate
from jaxfp4.transform.programs import Program
from jaxfp4.transform.scope import Hooks, original_activation
from jaxfp4.transform.sites import OBSERVED, Meeting, Tracked
from jaxfp4.transform.staged import Stage, Staged
from jaxfp4.transform.statistics import State, Statistic
from jaxfp4.transform.trace import trace

Observed = Callable[["Parameters", tuple[Any, ...]], tuple[Stats, list[Array]]]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["others", "values", "scales", "flags"], meta_fields=[]
)
@dataclasses.dataclass(frozen=True)
class Parameters:
    """All that a pass computes with beside its batch. Arrays are brought to the devices when a pass needs them."""

    others: Sequence[Any]
    """The leaves that are not quantized, arrays or `Layer`s; None in the places of the others."""

    values: Mapping[str, Any]
    """The weights: arrays or `Layer`s, and `QuantizedTensor`s where they are done. Rotated ones are still rotated."""

    scales: Mapping[str, Mapping[str, Array]]
    """Over the layer axes, `done` as 1 or 0, and the `input_scale` of weights that have one, 1 before they are done."""

    flags: Mapping[str, Array]
    """Of stacked weights that are observed, over the layer axes: 1 for the layer of the block, else 0."""

    def flat(self) -> list[Any]:
        """All of it in the order of the traced passes' inputs."""
        return jax.tree.leaves(self, is_leaf=_is_brought)

    def abstract(self) -> Parameters:
        """What the passes are traced with."""
        return jax.tree.map(abstract, self, is_leaf=_is_brought)


def _is_brought(value: object) -> bool:
    return isinstance(value, (Layer, QuantizedTensor))


def _brought(value: Any) -> Array:
    return value.dequantize() if isinstance(value, QuantizedTensor) else brought(value)


def initial_parameters(model: Model) -> Parameters:
    """Before anything is quantized."""
    plan, leaves = model.plan, model.leaves
    by_leaf = {e.weight.leaf: e for e in plan.quantized}
    others = [None if i in by_leaf else value for i, value in enumerate(leaves.values)]
    values = {e.path: leaves.values[e.weight.leaf] for e in plan.quantized}
    sizes = {e.path: e.weight.sizes(e.weight.layer_axes) for e in plan.quantized}
    scales = {path: {"done": jnp.zeros(size)} for path, size in sizes.items()}
    for entry in plan.with_input_scale:
        scales[entry.path]["input_scale"] = jnp.ones(sizes[entry.path])
    flags = {path: jnp.zeros(size) for path, size in sizes.items() if size and path in model.statistics}
    scales, flags = replicated_beside((scales, flags), stacks_of(values))
    return Parameters(others, values, scales, flags)


class Passes:
    """All batches on their way through the model."""

    def __init__(self, model: Model, parameters: Parameters, batches: Sequence[Any], *, quantizes: bool = True):
        """With `quantizes`, activations are quantized where their weight is done."""
        self._model = model
        observed = _observed_fn(model, quantizes)
        traced: dict[Any, Staged] = {}
        self._batches: list[_Batch] = []
        for batch in batches:
            args = as_arguments(batch)
            kind = kind_of(args)
            if kind not in traced:
                traced[kind] = _staged(observed, model.blocks, parameters, args)
            staged = traced[kind]
            self._batches.append(_Batch(staged, dict(zip(staged.data, jax.tree.leaves(args), strict=True))))

        # New functions, with which the compiled programs go: JAX keeps those of a function as long as it lives.
        self._advance = paced(jax.jit(functools.partial(_advance), static_argnums=0))
        self._observe = paced(jax.jit(functools.partial(_observe), static_argnums=(0, 1)))

    def statistics(self, number: int, parameters: Parameters) -> Stats:
        """The statistics of a block's weights over all batches, of its own layer only.

        Blocks before it are done: `parameters` are those after them.
        """
        block = self._model.blocks[number]
        stats: Stats = replicated_beside(_neutral(self._model, block.paths), stacks_of(parameters.values))
        if not stats:
            return stats
        flags = {p: f.at[block.index].set(1) if p in stats else f for p, f in parameters.flags.items()}
        flat = dataclasses.replace(parameters, flags=flags).flat()
        # Programs of several batches share what is brought; it is freed with the block.
        at_hand = functools.cache(lambda i: _brought(flat[i]))
        paths = [path for path in block.paths if path in stats]
        statistics = tuple(self._model.statistics[path] for path in paths)
        states = [stats[path] for path in paths]
        for i, batch in enumerate(self._batches):
            self._batches[i] = batch = batch.at_stage(number, at_hand, self._advance)
            program = batch.staged.observe(number)
            states = self._observe(program, statistics, batch.inputs(program, at_hand), states)
        stats = dict(zip(paths, states, strict=True))
        refuse_non_finite(stats)
        return stats


AtHand = Callable[[int], Array]
"""An input of the traced passes by number, on the devices."""


@dataclasses.dataclass(frozen=True)
class _Batch:
    """A batch on its way."""

    staged: Staged
    values: Mapping[Var, Any]
    """What has been computed of it and is needed further on."""

    stage: int | None = None
    """Where it is; None before the first stage."""

    def at_stage(self, number: int, at_hand: AtHand, advance: Callable[..., list[Any]]) -> _Batch:
        """The batch where a later stage begins."""
        program, wanted = self.staged.advance(self.stage, number), self.staged.carried[number]
        inputs = self.inputs(program, at_hand)
        found = advance(program, inputs) if program.eqns else program(inputs)
        return _Batch(self.staged, dict(zip(wanted, found, strict=True)), number)

    def inputs(self, program: Program, at_hand: AtHand) -> list[Any]:
        """What a program starts from."""
        own = {**self.staged.consts, **self.values}
        return [own[v] if v in own else at_hand(self.staged.parameters[v]) for v in program.inputs]


def _advance(program: Program, inputs: Sequence[Any]) -> list[Any]:
    return program(inputs)


def _observe(
    program: Program, statistics: Sequence[Statistic], inputs: Sequence[Any], states: Sequence[State]
) -> list[State]:
    """`states` with those of a batch merged in."""
    found: list[State] = jax.tree.unflatten(jax.tree.structure(states), program(inputs))
    return [s.merge(state, new) for s, state, new in zip(statistics, states, found, strict=True)]


def _staged(observed: Observed, blocks: Sequence[Block], parameters: Parameters, args: tuple[Any, ...]) -> Staged:
    """The traced passes, one stage for each block."""
    avals = parameters.abstract()
    closed, shapes = jax.make_jaxpr(observed, return_shape=True)(avals, args)
    flat, treedef = jax.tree.flatten(avals)
    inputs: Parameters = jax.tree.unflatten(treedef, range(len(flat)))
    results, _ = jax.tree.unflatten(jax.tree.structure(shapes), range(len(closed.out_avals)))
    stages = []
    for block in blocks:
        settled = [(inputs.values[path], inputs.scales[path]) for path in block.paths]
        wanted = [results[path] for path in block.paths if path in results]
        stages.append(Stage(tuple(jax.tree.leaves(settled)), tuple(jax.tree.leaves(wanted))))
    data = range(len(flat), len(closed.in_avals))
    return Staged(jaxprs.body_of(closed), data, stages)


def _neutral(model: Model, paths: Iterable[str]) -> Stats:
    """The statistics of these weights, as far as they have any, before the first batch; of one layer of a stack."""
    weights = {path: model.plan.by_path[path].weight for path in paths if path in model.statistics}
    return {path: model.statistics[path].init(weight.sizes(weight.expert_axes)) for path, weight in weights.items()}


def _observed_fn(model: Model, quantizes: bool) -> Observed:
    """`(parameters, args) -> (stats, outputs)` of the model, with `quantizes` also of its quantized activations."""
    plan, leaves = model.plan, model.leaves
    by_leaf = {e.weight.leaf: e for e in plan.quantized}

    def replace_activation(meeting: Meeting) -> Array:
        done: Any = meeting.weight.scale("done")
        activation, scale = meeting.activation, meeting.weight.scale("input_scale")
        if by_leaf[meeting.leaf].scheme is Scheme.W4A4:
            activation = quantize_activation(meeting, activation, scale)
        else:
            activation = meeting.rotated(activation)
        return jnp.where(done > 0, activation, meeting.activation)

    def observed(parameters: Parameters, args: tuple[Any, ...]) -> tuple[Stats, list[Array]]:
        inputs: list[Any] = list(parameters.others)
        for leaf, entry in by_leaf.items():
            path, own = entry.path, dict(parameters.scales[entry.path])
            if path in parameters.flags:
                own[OBSERVED] = parameters.flags[path]
            inputs[leaf] = dataclasses.replace(tracked_weight(entry, parameters.values[path]), scales=own)
        plain = tuple(value.value if isinstance(value, Tracked) else value for value in inputs)
        traced = trace(model.apply_fn, dataclasses.replace(leaves, values=plain), args)
        hooks = Hooks(
            replace_activation=replace_activation if quantizes else original_activation,
            statistics={plan.by_path[path].weight.leaf: statistic for path, statistic in model.statistics.items()},
            marks=marks_for(plan, leaves, traced.body),
        )
        outputs, seen = evaluate(traced.body, [*inputs, *jax.tree.leaves(args)], hooks)
        neutral = _neutral(model, model.statistics)
        return {path: seen.get(plan.by_path[path].weight.leaf, state) for path, state in neutral.items()}, outputs

    return observed
