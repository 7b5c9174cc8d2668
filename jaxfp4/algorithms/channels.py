"""Channel scales chosen for each fold of a plan, and folded into parameters and statistics."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from numpy.typing import NDArray

from jaxfp4.algorithms.awq import activation_error, awq_scales, output_error
from jaxfp4.algorithms.inputs import leaves_for
from jaxfp4.algorithms.moments import reduced
from jaxfp4.algorithms.smoothquant import smoothquant_scales
from jaxfp4.algorithms.statistics import Stats, used_stats
from jaxfp4.recipes.methods import Awq
from jaxfp4.recipes.plan import ActiveFold, Plan, PlannedWeight
from jaxfp4.recipes.recipe import Scheme
from jaxfp4.tensors import global_amax, quantize_unchecked
from jaxfp4.tensors.memory import on_devices
from jaxfp4.tensors.mesh import moved_beside, replicated
from jaxfp4.tensors.pacing import paced
from jaxfp4.transform.folding import Side, apply_fold
from jaxfp4.transform.statistics import MomentForm


def fold_channel_scales(params: Any, plan: Plan, stats: Mapping[str, Any] | None) -> Any:
    """`params` with the channel scales of SmoothQuant and AWQ folded in: the same function up to rounding.

    Norms, or the weights before, are divided by the scales and all weights that read the activation multiplied. These
    are the weights that `quantize_params` quantizes, and what its result is to be compared with. Without such a method
    in the plan it is `params` as they are. Raises ValueError without statistics.
    """
    return after_folding(params, plan, stats)[0]


Job = tuple[Any, Plan, Mapping[str, Any] | None]
"""The arguments of `quantize_params`."""


def after_folding(params: Any, plan: Plan, stats: Mapping[str, Any] | None) -> Job:
    """The rest of the job: `quantize_params` of the three results is that of the three arguments.

    The parameters are those of `fold_channel_scales`, the plan has no methods for channels any more, and the statistics
    are those of the activations after the folds.
    """
    if not plan.folds:
        return params, plan, stats
    leaves = leaves_for(plan, params)
    used = None if stats is None else used_stats(plan, stats)
    arrays, used = folded(plan, dict(enumerate(leaves.values)), used)
    rebuilt, rest = leaves.rebuilt([arrays[i] for i in range(len(leaves.values))]), _without_channels(plan)
    return rebuilt, rest, None if used is None else _needed_moments(plan, rest, used)


def _needed_moments(plan: Plan, rest: Plan, stats: Stats) -> Stats:
    """Statistics of a plan with the moments that a simpler one wants of them."""
    result = {path: dict(states) for path, states in stats.items()}
    for path, states in result.items():
        form = rest.moments_source(rest.by_path[path])[1]
        if "moments" in states and form is not MomentForm.NONE:
            states["moments"] = reduced(states["moments"], plan.moments_source(plan.by_path[path])[1], form)
    return result


def _without_channels(plan: Plan) -> Plan:
    """The plan of parameters whose channels are scaled already."""
    entries = [dataclasses.replace(e, method=dataclasses.replace(e.method, channels=None)) for e in plan.entries]
    return dataclasses.replace(plan, entries=tuple(entries), folding=None, folding_digest="")


def folded(plan: Plan, arrays: dict[int, Any], stats: Stats | None) -> tuple[dict[int, Any], Stats | None]:
    """Leaves by number and the statistics of their activations, beside them and after all folds of the plan."""
    # They may come from a calibration on other devices.
    stats = moved_beside(stats, arrays)
    for active in plan.folds:
        if stats is None:
            path = active.consumers[0][0].path
            raise ValueError(
                f"{path}: {active.scaling} needs statistics of the activation, but there are none: wanted those of "
                "jaxfp4.calibrate; pass them, or choose a recipe without channel scales"
            )
        scales = replicated(_scales(plan, active, arrays, stats))
        arrays = apply_fold(arrays, active.fold, scales)
        stats = {path: dict(states) for path, states in stats.items()}
        for entry, side in active.consumers:
            if entry.path in stats:
                stats[entry.path] = _divided(entry, stats[entry.path], _per_channel(side, scales))
    return arrays, stats


def _scales(plan: Plan, active: ActiveFold, arrays: Mapping[int, Array], stats: Stats) -> Array:
    """The scales `[*layers, channels]` that a fold's method chooses."""
    name = "channel_sum" if isinstance(active.scaling, Awq) else "channel_amax"
    activation = jnp.zeros(active.fold.shape, jnp.float32)
    weight = jnp.zeros(active.fold.shape, jnp.float32)
    for entry, side in active.consumers:
        observed = _layers_first(entry, side, stats[entry.path][name], maximum=name == "channel_amax")
        activation = _gathered(activation, side, observed)
        weight = _gathered(weight, side, _channel_amax(entry, side, on_devices(arrays[entry.weight.leaf])))
    if not isinstance(active.scaling, Awq):
        return smoothquant_scales(activation, weight, active.scaling.alpha)
    views = [
        _View.of(plan, entry, side, on_devices(arrays[entry.weight.leaf]), stats) for entry, side in active.consumers
    ]
    return _searched(activation, weight, views, active.scaling.steps)


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["matrices", "moments", "index"],
    meta_fields=["quantizes_activation"],
)
@dataclasses.dataclass(frozen=True)
class _View:
    """A consumer as matrices `[*layers, experts, N, K]` with their second moments `[*layers, experts, K, K]`."""

    matrices: Array
    moments: Array
    index: Array
    quantizes_activation: bool

    @classmethod
    def of(cls, plan: Plan, entry: PlannedWeight, side: Side, w: Array, stats: Stats) -> _View:
        """From a weight in its own axes."""
        source, form = plan.moments_source(entry)
        moments = reduced(stats[source]["moments"], form, MomentForm.FULL)
        weight = entry.weight
        layers, experts = side.layer_axes, [a for a in weight.stack_axes if a not in side.layer_axes]
        outputs = [a for a in range(w.ndim) if a not in (*weight.stack_axes, *weight.contracted)]
        sizes, count = weight.sizes(layers), math.prod(weight.sizes(tuple(experts)))
        channels = moments.shape[-1]
        matrices = jnp.transpose(w.astype(jnp.float32), [*layers, *experts, *outputs, *weight.contracted])
        places = [weight.stack_axes.index(a) for a in (*layers, *experts)]
        moved = jnp.transpose(moments, [*places, moments.ndim - 2, moments.ndim - 1])
        return cls(
            replicated(matrices).reshape(*sizes, count, -1, channels),
            moved.reshape(*sizes, count, channels, channels),
            jnp.asarray(side.index.reshape(-1)),
            entry.scheme is Scheme.W4A4,
        )

    def loss(self, scales: Array) -> Array:
        """The squared output errors `[*layers]` of max calibration if the channels are scaled so."""
        factors = _picked(scales, self.index)[..., None, :]
        scaled = self.matrices * factors[..., None, :]
        moments = self.moments / (factors[..., :, None] * factors[..., None, :])
        layers = range(scales.ndim - 1)
        amax = global_amax(scaled, keep_axes=layers) if layers else None
        error = output_error(quantize_unchecked(scaled, -1, global_amax=amax).dequantize() - scaled, moments)
        if self.quantizes_activation:
            error = error + activation_error(scaled, moments)
        return jnp.sum(error, -1)


@paced
@functools.partial(jax.jit, static_argnums=3)
def _searched(activation: Array, weight: Array, views: Sequence[_View], steps: int) -> Array:
    """AWQ's scales for the sum of all consumers' errors."""

    def loss(scales: Array) -> Array:
        return sum((view.loss(scales) for view in views), jnp.zeros(scales.shape[:-1], jnp.float32))

    return awq_scales(activation, weight, steps, loss)


def _layers_first(entry: PlannedWeight, side: Side, state: Array, *, maximum: bool) -> Array:
    """A statistic `[*stack, K]` as `[*layers, K]`, over all experts."""
    stack = entry.weight.stack_axes
    layers = [stack.index(a) for a in side.layer_axes]
    experts = [i for i in range(len(stack)) if i not in layers]
    moved = jnp.transpose(state, [*experts, *layers, len(stack)])
    over = tuple(range(len(experts)))
    return jnp.max(moved, over) if maximum else jnp.sum(moved, over)


def _channel_amax(entry: PlannedWeight, side: Side, w: Array) -> Array:
    """The largest magnitude of each of a weight's channels, `[*layers, K]`."""
    kept = (*side.layer_axes, *entry.weight.contracted)
    amax = replicated(global_amax(w, keep_axes=sorted(kept)))
    others = [a for a in range(w.ndim) if a not in kept]
    ordered = jnp.transpose(amax, [*kept, *others])
    return ordered.reshape(*(w.shape[a] for a in side.layer_axes), -1)


def _gathered(total: Array, side: Side, values: Array) -> Array:
    """`total` `[*layers, channels]` with the maximum over the places `[*layers, K]` of each channel merged in."""
    padded = jnp.concatenate([total, jnp.zeros((*total.shape[:-1], 1), total.dtype)], -1)
    return padded.at[..., side.index.reshape(-1)].max(values)[..., :-1]


def _per_channel(side: Side, scales: Array) -> Array:
    """The scale of each place along a consumer's contraction, `[*layers, K]`; 1 where it takes no part."""
    return _picked(scales, side.index.reshape(-1))


def _picked(scales: Array, index: Array | NDArray[np.int64]) -> Array:
    # Index -1 picks the one behind the last channel.
    padded = jnp.concatenate([scales, jnp.ones((*scales.shape[:-1], 1), scales.dtype)], -1)
    return padded[..., index]


@paced
def _divided(entry: PlannedWeight, states: Mapping[str, Array], factors: Array) -> dict[str, Array]:
    """The statistics of the activation after its channels are divided by factors `[*layers, K]`."""
    stack, layers = entry.weight.stack_axes, entry.weight.layer_axes
    spread = jnp.expand_dims(factors, [i for i, a in enumerate(stack) if a not in layers])
    result = dict(states)
    for name in ("channel_amax", "channel_sum"):
        if name in states:
            result[name] = states[name] / spread
    if "amax" in states and "channel_amax" in states:
        result["amax"] = jnp.max(result["channel_amax"], -1)
    if "moments" in states:
        moments = states["moments"]
        diagonal = moments.ndim == spread.ndim
        result["moments"] = moments / spread**2 if diagonal else _divided_products(moments, spread)
    return result


def _divided_products(moments: Array, factors: Array) -> Array:
    """Products of channels divided: all of them `[.., K, K]`, or those of blocks `[.., K, 16]`."""
    channels, columns = moments.shape[-2:]
    if channels == columns:
        return moments / (factors[..., :, None] * factors[..., None, :])
    padding = [(0, 0)] * (factors.ndim - 1) + [(0, -channels % columns)]
    blocks = jnp.pad(factors, padding, constant_values=1).reshape(*factors.shape[:-1], -1, columns)
    others = jnp.repeat(blocks, columns, axis=-2)[..., :channels, :]
    return moments / (factors[..., :, None] * others)
