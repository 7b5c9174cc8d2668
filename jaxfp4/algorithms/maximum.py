"""Max calibration: global amaxes over whole tensors, shared by siblings; block scales from block amaxes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array

from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.tensors import global_amax
from jaxfp4.tensors.mesh import replicated


def shared_amaxes(plan: Plan, group: Sequence[PlannedWeight], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """For each weight of a group of siblings the global amax that all of them share, shaped to broadcast with it.

    `max` over the siblings of `max(abs(w))`, for each layer of a stack, and for each expert if the recipe says so.
    Serving engines fuse siblings and read one scale for all of them.
    """
    stacks = []
    for entry in group:
        keep = plan.global_scale_axes(entry)
        amax = replicated(global_amax(arrays[entry.path], keep_axes=keep))
        stacks.append(amax.reshape(entry.weight.sizes(keep)))
    shared = functools.reduce(jnp.maximum, stacks)
    result = {}
    for entry in group:
        keep = plan.global_scale_axes(entry)
        shape = [n if a in keep else 1 for a, n in enumerate(entry.weight.shape)]
        result[entry.path] = shared.reshape(shape) if keep else shared
    return result
