"""Parameters matched with a plan, and handed to the evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxfp4.formats import LeafError
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.tensors import QuantizedWeight
from jaxfp4.transform import jaxprs
from jaxfp4.transform.jaxprs import EqnPath
from jaxfp4.transform.marks import Mark, amax_name, find_marks
from jaxfp4.transform.scope import Value
from jaxfp4.transform.sites import Tracked
from jaxfp4.transform.trace import Leaves, leaves_of
from jaxfp4.transform.views import whole


def leaves_for(plan: Plan, params: Any) -> Leaves:
    """The leaves of parameters that the plan was made for; `LeafError` if a weight is missing, moved or reshaped."""
    leaves = leaves_of(params)
    for entry in plan.entries:
        weight = entry.weight
        found = leaves.paths[weight.leaf] if weight.leaf < len(leaves.paths) else "nothing"
        if found != weight.path:
            raise LeafError(
                f"{weight.path}: params has {found!r} in its place; wanted the tree that the plan was made for"
            )
        shape = _shape(leaves.values[weight.leaf])
        if shape != weight.shape:
            raise LeafError(f"{weight.path}: shape {shape}: wanted {weight.shape}, as in the plan")
    return leaves


def marks_for(plan: Plan, leaves: Leaves, body: jaxprs.Body) -> dict[EqnPath, Mark]:
    """The values of a traced model that its key-value cache holds; none if the recipe does not quantize it."""
    if plan.recipe.kv_cache is None:
        return {}
    marks = find_marks(body, leaves.paths, plan.recipe.kv_cache.kinds)
    for mark in marks.values():
        path = leaves.paths[mark.leaf]
        if path not in plan.by_path or mark.kind not in plan.by_path[path].cached:
            raise LeafError(
                f"{path}: it makes {mark.kind} for the key-value cache here, but did not where the plan was made; "
                "make the plan of the same function"
            )
    return marks


def _shape(value: Any) -> tuple[int, ...]:
    return tuple(value.weight.shape if isinstance(value, QuantizedWeight) else value.shape)


def tracked_inputs(plan: Plan, leaves: Leaves, entries: Sequence[PlannedWeight]) -> list[Value]:
    """The leaves as inputs of the evaluation, those of `entries` tracked to their contractions."""
    tracked = {entry.weight.leaf: entry for entry in entries}
    return [tracked_weight(tracked[i], v) if i in tracked else v for i, v in enumerate(leaves.values)]


def tracked_weight(entry: PlannedWeight, value: Any) -> Tracked:
    """A planned weight, quantized or not, to be tracked to its contractions."""
    weight = entry.weight
    stack = {a: weight.shape[a] for a in weight.stack_axes}
    view = whole(weight.leaf, weight.shape)
    if not isinstance(value, QuantizedWeight):
        return Tracked(value, view, stack, weight.layer_axes, {}, entry.method.rotated)
    scales = {"input_scale": value.input_scale, "pre_scale": value.pre_scale}
    if value.cache is not None:
        scales |= {amax_name("keys"): value.cache.keys, amax_name("values"): value.cache.values}
    present = {name: s for name, s in scales.items() if s is not None}
    return Tracked(value.weight, view, stack, weight.layer_axes, present, value.rotation)
