"""Collecting statistics of activations, and the input scales that follow from them."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from rich.console import Console
from rich.progress import track

from jaxfp4.algorithms.activation_scales import activation_amax
from jaxfp4.algorithms.inputs import leaves_for, marks_for, tracked_inputs
from jaxfp4.formats import LeafError
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.tensors.fp8_tensor import fp8_scale_of
from jaxfp4.tensors.mesh import replicated_beside
from jaxfp4.tensors.pacing import paced
from jaxfp4.tensors.quantize import global_scale_of
from jaxfp4.transform.evaluate import evaluate
from jaxfp4.transform.histogram import merged
from jaxfp4.transform.scope import Hooks
from jaxfp4.transform.trace import ApplyFn, trace

Stats = dict[str, dict[str, Array]]
CalibrateFn = Callable[..., Stats]

log = logging.getLogger("jaxfp4")


def observed(apply_fn: ApplyFn, plan: Plan) -> Callable[..., tuple[Any, Stats]]:
    """`(params, *args) -> (apply_fn(params, *args), stats)`: the outputs unchanged, and what the plan's weights met.

    A statistic is a reduction over the logical activation: for an absolute maximum `max(abs(x))`, for each layer and
    expert of a stack. NaN stays NaN. Experts that met no token have the neutral element, 0.
    """

    def observed_fn(params: Any, *args: Any) -> tuple[Any, Stats]:
        leaves = leaves_for(plan, params)
        traced = trace(apply_fn, leaves, args)
        inputs = [*tracked_inputs(plan, leaves, plan.observed), *jax.tree.leaves(args)]
        statistics = {e.weight.leaf: plan.statistics[e.path] for e in plan.observed}
        hooks = Hooks(statistics=statistics, marks=marks_for(plan, leaves, traced.body))
        results, seen = evaluate(traced.body, inputs, hooks)
        stats = {e.path: seen[e.weight.leaf] for e in plan.observed if e.weight.leaf in seen}
        return jax.tree.unflatten(traced.out_tree, results), {**plan.init_stats(), **stats}

    return observed_fn


def make_calibrate_fn(apply_fn: ApplyFn, plan: Plan) -> CalibrateFn:
    """A jitted `(params, stats, *args) -> stats` that merges what one batch shows into the statistics.

    It compiles once for each shape of the arguments, and computes the forward pass only as far as the last statistic
    needs it. Works on parameters with any sharding; the reductions across devices are the compiler's, over the whole
    batch. Start with `plan.init_stats()`.

    It does not wait for its result. With jaxlib 0.10 on several CPU devices a process hangs once more than 32 programs
    are in flight: call `jax.block_until_ready` on the statistics there every few batches, as `calibrate` does.
    """
    observed_fn = observed(apply_fn, plan)

    @jax.jit
    def calibrate_fn(params: Any, stats: Stats, *args: Any) -> Stats:
        _refuse_wrong_stats(plan, stats)
        _, seen = observed_fn(params, *args)
        return {path: plan.statistics[path].merge(state, seen[path]) for path, state in stats.items()}

    return calibrate_fn


def calibrate(
    apply_fn: ApplyFn,
    params: Any,
    batches: Iterable[Any],
    plan: Plan,
    *,
    stats: Mapping[str, Mapping[str, Array]] | None = None,
    progress: bool = True,
) -> Stats:
    """Statistics over all batches, with a progress bar. A batch is the tuple of arguments, or the one argument.

    `stats` of earlier batches, such as `jaxfp4.restore` gives, are continued: the result is that of all batches.

    Raises ValueError if there is no batch, and `LeafError` with the path of the first weight whose activations held NaN
    or Inf. Experts that no token reached are logged as a warning by path; they get their layer's shared scale.
    """
    calibrate_fn = paced(make_calibrate_fn(apply_fn, plan))
    merged_stats = plan.init_stats(params) if stats is None else replicated_beside(used_stats(plan, stats), params)
    count = 0
    for batch in tracked_progress(batches, "calibrating", progress):
        merged_stats = calibrate_fn(params, merged_stats, *(batch if isinstance(batch, tuple) else (batch,)))
        count += 1
    if not count:
        raise ValueError("batches is empty: wanted at least one batch of calibration data")
    refuse_non_finite(merged_stats)
    for path, experts in unseen_experts(plan, merged_stats).items():
        log.warning("%s: no token reached experts %s; they get their layer's shared scale", path, experts)
    return merged_stats


def tracked_progress(items: Iterable[Any], task: str, progress: bool) -> Iterable[Any]:
    """The items with a progress bar on standard error."""
    total = len(items) if isinstance(items, Sized) else None
    return track(items, task, total=total, disable=not progress, transient=True, console=Console(stderr=True))


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
    _refuse_wrong_stats(plan, part)
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


def _refuse_wrong_stats(plan: Plan, stats: Mapping[str, Mapping[str, Array]]) -> None:
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
