"""A plan as plain data, as JSON holds it, and back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxfp4.recipes.plain_data import from_data, refuse_unless, to_data
from jaxfp4.recipes.plan import Plan, PlannedWeight, digest_of_folding

FORMAT = "jaxfp4 plan"
VERSION = 1


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """The plan in dicts, lists, strings, numbers, booleans and None, from which `plan_from_data` makes an equal one.

    >>> import json, jax.numpy as jnp, jaxfp4
    >>> plan = jaxfp4.plan(lambda w, x: x @ w["kernel"], {"kernel": jnp.ones((32, 8))}, jnp.ones((4, 32)))
    >>> plan_from_data(json.loads(json.dumps(plan_to_data(plan)))) == plan
    True
    """
    return {"format": FORMAT, "version": VERSION, "plan": to_data(plan)}


def plan_from_data(data: Any) -> Plan:
    """The plan that `plan_to_data` gave this data for.

    Raises ValueError for data of something else or of an unknown version, and where a value is missing, unknown, or
    not of its kind; the message names the place, as in `plan.entries[3].weight.shape`.
    """
    found = data.get("format") if isinstance(data, Mapping) else data
    try:
        refuse_unless(found == FORMAT, found, f"the format {FORMAT!r}", "plan")
        if data.get("version") != VERSION:
            raise ValueError(
                f"plan: found version {data.get('version')!r}: wanted {VERSION}, which this jaxfp4 reads; install the "
                "one that wrote it"
            )
        plan: Plan = from_data(data.get("plan"), Plan, "plan")
        _refuse_inconsistent(plan)
    except ValueError as error:
        raise ValueError(f"{error}; or make the plan again with jaxfp4.plan") from error
    return plan


def _refuse_inconsistent(plan: Plan) -> None:
    """What no single value shows: axes beyond the shape, siblings that are not there, folds that were changed."""
    known = {entry.path for entry in plan.entries}
    seen: set[str] = set()
    for i, entry in enumerate(plan.entries):
        where = f"plan.entries[{i}].weight"
        refuse_unless(entry.path not in seen, entry.path, "each path once", f"{where}.path")
        seen.add(entry.path)
        _refuse_inconsistent_entry(entry, known, where)
    digest = "" if plan.folding is None else digest_of_folding(plan.folding)
    refuse_unless(plan.folding_digest == digest, plan.folding_digest, f"{digest!r}, of folding", "plan.folding_digest")


def _refuse_inconsistent_entry(entry: PlannedWeight, known: set[str], where: str) -> None:
    weight = entry.weight
    rank = len(weight.shape)
    for name, axes in (
        ("contracted", weight.contracted),
        ("layer_axes", weight.layer_axes),
        ("expert_axes", weight.expert_axes),
    ):
        fits = all(0 <= axis < rank for axis in axes)
        refuse_unless(fits, axes, f"axes below {rank}, as of {weight.path}", f"{where}.{name}")
    missing = [path for path in weight.siblings if path not in known]
    refuse_unless(not missing, missing, f"paths in the plan, as siblings of {weight.path}", f"{where}.siblings")
