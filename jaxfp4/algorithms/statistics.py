"""Statistics that calibration collected: those that a plan uses, what is wrong with them, and the scales they give."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxfp4.algorithms.activation_scales import activation_amax
from jaxfp4.formats import LeafError
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.tensors.fp8_tensor import fp8_scale_of
from jaxfp4.tensors.quantize import global_scale_of
from jaxfp4.transform.histogram import merged

Stats = dict[str, dict[str, Array]]
"""By path of the weight and name of the statistic, arrays over the stack axes of the weight."""


def input_scales(plan: Plan, stats: Mapping[str, Mapping[str, Array]] | None) -> dict[str, Array]:
    """By path, the float32 global scale of each weight's activation: `[]`, or `[L]` for a stack of layers.

    A global amax divided by 2688, by 448 for FP8: by default the largest magnitude over experts and siblings, else what
    the method's `activations` make of all experts' block amaxes, the largest over siblings. Without statistics there
    are none; what the plan does not use of them is ignored, so one calibration serves several recipes. Raises
    ValueError for statistics of another model, and `LeafError` where they hold NaN or Inf, or only zeros for a layer.
    """
    if stats is None:
        return {}
    stats = used_stats(plan, stats)
    traced = any(isinstance(state, jax.core.Tracer) for state in jax.tree.leaves(stats))
    if not traced:
        refuse_non_finite(stats)
    entries = plan.with_input_scale
    amaxes = {e.path: _activation_amax(e, stats[e.path]) for e in entries}
    scales = {}
    for entry in entries:
        members = [amaxes[other.path] for other in plan.siblings(entry) if other.path in amaxes]
        amax = functools.reduce(jnp.maximum, members)
        if not traced and not np.all(np.asarray(amax) > 0):
            layers = [i for i in np.argwhere(np.asarray(amax) == 0).tolist() if i]
            where = f" in layers {[i[0] for i in layers]}" if layers else ""
            raise LeafError(
                f"{entry.path}: its activations were all zero{where} in calibration: wanted some data to reach it; "
                "calibrate on other batches, or leave its activations unquantized with a W4A16 rule"
            )
        scales[entry.path] = fp8_scale_of(amax) if entry.is_fp8 else global_scale_of(amax)
    return scales


def used_stats(plan: Plan, stats: Mapping[str, Mapping[str, Array]]) -> Stats:
    """The part of the statistics that the plan asks for; an error for what is missing or of the wrong shape."""
    _refuse_bare_arrays(stats)
    known = {e.path for e in plan.entries}
    wanted = jax.eval_shape(plan.init_stats)
    part = {
        path: {name: state for name, state in states.items() if name in wanted.get(path, {})}
        for path, states in stats.items()
        if path in wanted or path not in known
    }
    refuse_wrong_stats(plan, part)
    return part


def unseen_experts(plan: Plan, stats: Mapping[str, Mapping[str, Array]]) -> dict[str, list[Any]]:
    """By path, the experts whose activations were nothing or zeros: `[3]`, or `[[layer, 3]]` in a stack of layers."""
    result = {}
    for entry in plan.observed:
        if entry.weight.expert_axes:
            state = np.asarray(next(iter(stats[entry.path].values())))
            rank = len(entry.weight.stack_axes)
            missing = np.argwhere(np.all(state == 0, tuple(range(rank, state.ndim))))
            if len(missing):
                result[entry.path] = (missing[:, 0] if missing.shape[1] == 1 else missing).tolist()
    return result


def _activation_amax(entry: PlannedWeight, stats: Mapping[str, Array]) -> Array:
    """The global amax of an entry's activation, `[]` or `[L]`, over its experts."""
    stack = entry.weight.stack_axes
    experts = [stack.index(a) for a in entry.weight.expert_axes]
    amax = jnp.max(stats["amax"], experts)
    method = entry.method.activations
    return activation_amax(method, amax, merged(stats["histogram"], experts) if method.histogram else None)


def refuse_wrong_stats(plan: Plan, stats: Mapping[str, Mapping[str, Array]]) -> None:
    """An error for statistics that are not those of the plan."""
    _refuse_bare_arrays(stats)
    wanted = jax.eval_shape(plan.init_stats)
    if set(stats) != set(wanted):
        odd = sorted(set(stats) ^ set(wanted))[0]
        state = "missing from" if odd in wanted else "unknown in"
        raise ValueError(f"stats of another plan: {odd!r} is {state} them; start with plan.init_stats()")
    for path, states in wanted.items():
        for name, state in states.items():
            found = stats[path][name].shape if name in stats[path] else "nothing"
            if found != state.shape:
                raise LeafError(
                    f"{path}: statistics {name!r} of shape {found}: wanted {state.shape}; use plan.init_stats()"
                )


def _refuse_bare_arrays(stats: Mapping[str, Any]) -> None:
    for path, states in stats.items():
        if not isinstance(states, Mapping):
            raise LeafError(
                f"{path}: its statistics are of type {type(states).__name__}: wanted a dict like {{'amax': array}}; "
                "use plan.init_stats() and what calibrate returns"
            )


def refuse_non_finite(stats: Mapping[str, Mapping[str, Array]]) -> None:
    """`LeafError` with the path of the first weight whose statistics hold NaN or Inf."""
    for path, states in stats.items():
        if not all(np.all(np.isfinite(np.asarray(state))) for state in states.values()):
            raise LeafError(
                f"{path}: its activations hold NaN or Inf: wanted finite calibration data; check the batches and that "
                "the model's own outputs are finite"
            )
