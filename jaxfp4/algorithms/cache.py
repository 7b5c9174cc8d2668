"""What calibration saw of keys and values, for the weights that make them."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxfp4.algorithms.statistics import used_stats
from jaxfp4.formats import LeafError
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.tensors.cache import CacheAmax
from jaxfp4.transform.marks import amax_name


def cache_amaxes(plan: Plan, stats: Mapping[str, Mapping[str, Array]] | None) -> dict[str, CacheAmax]:
    """By path, the absolute maxima of the keys and values that each weight makes: `[]`, or `[L]` for stacked layers.

    Without statistics, or a `kv_cache` in the recipe, there are none. Raises `LeafError` where they hold NaN or Inf, or
    are zero for a layer.
    """
    cache = plan.recipe.kv_cache
    if stats is None or cache is None:
        return {}
    stats = used_stats(plan, stats)
    result = {}
    for entry in plan.quantized:
        amaxes = {kind: _over_experts(entry, stats[entry.path][amax_name(kind)]) for kind in entry.cached}
        for kind, amax in amaxes.items():
            _refuse_unusable(entry.path, kind, amax)
        if amaxes:
            result[entry.path] = CacheAmax(amaxes.get("keys"), amaxes.get("values"), cache.format)
    return result


def _over_experts(entry: PlannedWeight, amax: Array) -> Array:
    stack = entry.weight.stack_axes
    return jnp.max(amax, [stack.index(a) for a in entry.weight.expert_axes])


def _refuse_unusable(path: str, kind: str, amax: Array) -> None:
    if isinstance(amax, jax.core.Tracer):
        return
    values = np.asarray(amax)
    if not np.all(np.isfinite(values) & (values > 0)):
        found = values[~(np.isfinite(values) & (values > 0))][0]
        layers = [i[0] for i in np.argwhere(~(values > 0)).tolist() if i]
        where = f" in layers {layers}" if layers else ""
        raise LeafError(
            f"{path}: the largest magnitude of its {kind} was {found}{where} in calibration: wanted finite data, not "
            "all zeros; calibrate on other batches, or leave kv_cache out of the recipe"
        )
