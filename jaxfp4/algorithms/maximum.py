"""Max calibration: global amaxes over whole tensors, shared by siblings; block scales from block amaxes."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
from jax import Array

from jaxfp4.formats.errors import leaf as naming_leaf
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.tensors.mesh import replicated
from jaxfp4.tensors.reductions import rotated_amax


def shared_amaxes(plan: Plan, group: Sequence[PlannedWeight], arrays: Mapping[str, Array]) -> dict[str, Array]:
    """For each weight of a group of siblings the global amax that all of them share, shaped to broadcast with it.

    `max` over the siblings of `max(abs(w))`, for each layer of a stack, and for each expert if the recipe says so; of
    the rotated weight if its method rotates. Serving engines fuse siblings and read one scale for all of them.
    """
    stacks = []
    for entry in group:
        keep = plan.global_scale_axes(entry)
        with naming_leaf(entry.path):
            amax = rotated_amax(arrays[entry.path], entry.weight.contracted, entry.method.rotated, keep_axes=keep)
        amax = replicated(amax)
        stacks.append(amax.reshape(entry.weight.sizes(keep)))
    shared = functools.reduce(jnp.maximum, stacks)
    result = {}
    for entry in group:
        keep = plan.global_scale_axes(entry)
        shape = [n if a in keep else 1 for a, n in enumerate(entry.weight.shape)]
        result[entry.path] = shared.reshape(shape) if keep else shared
    return result
