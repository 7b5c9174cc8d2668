"""Collecting statistics of activations."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sized
from typing import Any

import jax
from jax import Array
from rich.console import Console
from rich.progress import track

from jaxfp4.algorithms.inputs import leaves_for, marks_for, tracked_inputs
from jaxfp4.algorithms.layers import Place, as_arguments, layers_apart
from jaxfp4.algorithms.passes import Passes, initial_parameters
from jaxfp4.algorithms.statistics import Stats, refuse_non_finite, refuse_wrong_stats, unseen_experts, used_stats
from jaxfp4.recipes.plan import Plan
from jaxfp4.tensors.memory import in_host_memory
from jaxfp4.tensors.mesh import replicated_beside
from jaxfp4.tensors.pacing import paced
from jaxfp4.transform.evaluate import evaluate
from jaxfp4.transform.scope import Hooks
from jaxfp4.transform.statistics import State
from jaxfp4.transform.trace import ApplyFn, trace

CalibrateFn = Callable[..., Stats]
NO_BATCHES = "batches is empty: wanted at least one batch of calibration data"

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
        refuse_wrong_stats(plan, stats)
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

    Parameters in host memory (`memory_kind="pinned_host"`) are brought to the devices block of layers by block, as
    `quantize_sequentially` does it, so that a model larger than the devices' memory can be calibrated; `batches` is
    kept as a list then.

    Raises ValueError if there is no batch, and `LeafError` with the path of the first weight whose activations held NaN
    or Inf. Experts that no token reached are logged as a warning by path; they get their layer's shared scale.
    """
    start = plan.init_stats(params) if stats is None else replicated_beside(used_stats(plan, stats), params)
    by_blocks = any(map(in_host_memory, jax.tree.leaves(params)))
    collected = _by_blocks if by_blocks else _batch_by_batch
    merged_stats = collected(apply_fn, params, batches, plan, start, progress)
    refuse_non_finite(merged_stats)
    for path, experts in unseen_experts(plan, merged_stats).items():
        log.warning("%s: no token reached experts %s; they get their layer's shared scale", path, experts)
    return merged_stats


def _batch_by_batch(
    apply_fn: ApplyFn, params: Any, batches: Iterable[Any], plan: Plan, stats: Stats, progress: bool
) -> Stats:
    calibrate_fn = paced(make_calibrate_fn(apply_fn, plan))
    count = 0
    for batch in tracked_progress(batches, "calibrating", progress):
        stats = calibrate_fn(params, stats, *as_arguments(batch))
        count += 1
    if not count:
        raise ValueError(NO_BATCHES)
    return stats


def _by_blocks(
    apply_fn: ApplyFn, params: Any, batches: Iterable[Any], plan: Plan, stats: Stats, progress: bool
) -> Stats:
    batches = listed(batches)
    model = layers_apart(apply_fn, plan, leaves_for(plan, params), batches)
    parameters = initial_parameters(model)
    passes = Passes(model, parameters, batches, quantizes=False)
    found: dict[Place, State] = {}
    for number, block in enumerate(tracked_progress(model.blocks, "calibrating block by block", progress)):
        states = passes.statistics(number, parameters)
        found.update({(path, block.index): state for path, state in states.items()})
    return {path: plan.statistics[path].merge(stats[path], state) for path, state in model.joined_stats(found).items()}


def listed(batches: Iterable[Any]) -> list[Any]:
    """All batches; ValueError if there are none."""
    found = list(batches)
    if not found:
        raise ValueError(NO_BATCHES)
    return found


def tracked_progress(items: Iterable[Any], task: str, progress: bool) -> Iterable[Any]:
    """The items with a progress bar on standard error."""
    total = len(items) if isinstance(items, Sized) else None
    return track(items, task, total=total, disable=not progress, transient=True, console=Console(stderr=True))
