"""Second moments of activations, brought beside the weight that they are for."""

from __future__ import annotations

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array

from jaxfp4.formats import BLOCK_SIZE
from jaxfp4.recipes.plan import Plan, PlannedWeight
from jaxfp4.transform.statistics import MomentForm


def moments_for(
    plan: Plan, entry: PlannedWeight, stats: Mapping[str, Mapping[str, Array]] | None, form: MomentForm
) -> Array | None:
    """The second moments that a weight's method wants, as `beside` lays them; None if it wants none.

    Raises ValueError without statistics.
    """
    if form is MomentForm.NONE:
        return None
    source, collected = plan.moments_source(entry)
    if stats is None or "moments" not in stats[source]:
        raise ValueError(
            f"{entry.path}: {entry.method} needs the activation's second moments, but there are no statistics: wanted "
            "those of jaxfp4.calibrate; pass them, or choose max, mse or four_over_six"
        )
    return beside(entry, reduced(stats[source]["moments"], collected, form), form)


def reduced(moments: Array, collected: MomentForm, form: MomentForm) -> Array:
    """Moments `[*stack, ...]` of one form as those of a smaller form."""
    if collected is form:
        return moments
    if form is MomentForm.DIAGONAL:
        return jnp.diagonal(moments, axis1=-2, axis2=-1) if collected is MomentForm.FULL else _own_column(moments)
    channels = moments.shape[-1]
    padding = [(0, 0)] * (moments.ndim - 2) + [(0, -channels % BLOCK_SIZE)] * 2
    padded = jnp.pad(moments, padding)
    blocks = padded.shape[-1] // BLOCK_SIZE
    tiles = padded.reshape(*padded.shape[:-2], blocks, BLOCK_SIZE, blocks, BLOCK_SIZE)
    diagonal = jnp.moveaxis(jnp.diagonal(tiles, axis1=-4, axis2=-2), -1, -3)
    return diagonal.reshape(*diagonal.shape[:-3], blocks * BLOCK_SIZE, BLOCK_SIZE)[..., :channels, :]


def _own_column(blocks: Array) -> Array:
    """Of `[.., channels, 16]` each channel's product with itself."""
    channels = jnp.arange(blocks.shape[-2])
    return blocks[..., channels, channels % BLOCK_SIZE]


def beside(entry: PlannedWeight, moments: Array, form: MomentForm) -> Array:
    """Moments `[*stack, channels, ...]` as `[R, ...]` with the weight's own dimensions, 1 along its outputs.

    R is 1 for the diagonal, 16 for blocks and the number of channels for all: `result[r, .., k, ..]` belongs to the
    products of channel k with channel r, or with the r-th of its block.
    """
    weight = entry.weight
    if form is MomentForm.DIAGONAL:
        moments = moments[..., None]
    stack, contracted = weight.stack_axes, weight.contracted
    shaped = moments.reshape(*weight.sizes(stack), *weight.sizes(contracted), moments.shape[-1])
    present = [*stack, *contracted]
    order = [len(present), *(present.index(a) for a in sorted(present))]
    sizes = [n if a in present else 1 for a, n in enumerate(weight.shape)]
    return jnp.transpose(shaped, order).reshape(moments.shape[-1], *sizes)
