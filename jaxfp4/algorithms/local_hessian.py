"""Block scales with the least squared error of the block's contribution to the output."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.algorithms.block_error import Blocks, search
from jaxfp4.formats import BLOCK_SIZE, exact
from jaxfp4.formats.squared_error import Error, Grid

DAMPING = 0.01
ALL_ZERO = 38
"""E4M3 codes from the scale that puts a block's largest value at 6 to one that puts it below 1/4."""


def local_hessian_scales(blocks: Array, global_scale: Array, axis: int, hessian: Array) -> Array:
    """`argmin(code -> d @ H @ d)`, d the block's error `x - q(x; code)`, over all 126 positive E4M3 codes, uint8.

    `hessian` is `sum(x x^T)` over the tokens' 16 inputs of each block, `[16, ...]` with the other dimensions
    broadcasting with `blocks`; a hundredth of its mean diagonal is added to the diagonal, so that no error is free.
    Where it is zero throughout, an expert without tokens, the choice is that of the least squared error. The lowest
    code wins a tie; zero blocks and blocks that are not finite are as in `jaxfp4.algorithms.mse.mse_scales`.

    The search starts where all values round to zero, `6 * scale > 24 * amax`: higher codes give that error again. It
    ends once the clipping of the largest value alone, `damping * (amax - 6s)**2`, exceeds the best error so far.

    Errors are float32 sums: two codes that differ by less than their rounding may change places on another backend.

    AWQ's clipping is a part of this search. For each block it takes the `ratio <= 1` for which the block with its
    values cut at `ratio * amax` gives the least `sum((x @ d)**2)` over tokens, which is `d @ H @ d`. In NVFP4 they are
    cut at `6 * scale`, and a block scale can only be an E4M3 number, so that each ratio stands for one of the codes
    that are searched here: `e4m3(ratio * amax / 6 / global_scale)`, up to the code of max calibration. All the
    others are searched as well. On weights and moments that AWQ has scaled it is the second half of AWQ.

    Source: Model-Optimizer's `local_hessian`, and `awq_clip` for static block scales; AWQ, arXiv 2306.00978.
    """
    prepared = Blocks.of(blocks, global_scale, axis)
    scaled, damping = _damped(hessian, axis)
    negative = exact.as_bits(exact.to_float32(blocks)) >> 31 == 1

    def evaluate(code: Array) -> Error:
        grid = Grid.of(prepared.scale(code))
        error = grid.error(prepared.magnitudes)
        error = jnp.where(negative, -error, error)
        mixed = sum(scaled[j] * lax.index_in_dim(error, j, axis, keepdims=True) for j in range(BLOCK_SIZE))
        return _comparable(jnp.sum(error * mixed, axis, keepdims=True))

    def bound(code: Array) -> Array:
        beyond = jnp.maximum(prepared.largest - Grid.of(prepared.scale(code)).values[-1], 0)
        # Less by more than the rounding of the sums, which must not end the search early.
        return _comparable(beyond * beyond * (damping * 0.999)).high

    return search(prepared, prepared.code.astype(jnp.int32) + ALL_ZERO, evaluate, bound)


def hessian_table(hessian: Array, axis: int) -> Array:
    """What `jaxfp4.kernels.hessian_search.local_hessian_scales` wants, of moments `[16, ...]` with 16 on an axis.

    Row by row the lower triangle of the damped Hessian, twice what is not on its diagonal, and then the damping;
    `[137, ...]` with size 1 on the axis.
    """
    scaled, damping = _damped(hessian, axis - 1)
    rows, columns = np.tril_indices(BLOCK_SIZE)
    factors = np.where(rows == columns, np.float32(1), np.float32(2))
    triangle = jnp.moveaxis(scaled, axis, 1)[columns, rows]
    triangle = triangle * lax.expand_dims(jnp.asarray(factors), range(1, triangle.ndim))
    return jnp.concatenate([jnp.expand_dims(triangle, axis), damping[None]])


def _damped(hessian: Array, axis: int) -> tuple[Array, Array]:
    """The Hessian in units of its blocks' largest diagonal entries, damped, and what was added to its diagonal."""
    at = axis + 1 if axis >= 0 else axis
    shape = [1] * hessian.ndim
    shape[0] = shape[at] = BLOCK_SIZE
    identity = jnp.eye(BLOCK_SIZE, dtype=jnp.float32).reshape(shape)
    diagonal = jnp.sum(hessian * identity, 0)
    largest = jnp.max(diagonal, axis, keepdims=True)
    usable = largest > 0
    inverse = exact.inverse_power_of_two(jnp.clip(jnp.where(usable, largest, 1.0), 2.0**-126, 2.0**126))
    scaled = jnp.where(usable, hessian * inverse, identity)
    damping = jnp.where(usable, DAMPING * jnp.mean(diagonal, axis, keepdims=True) * inverse, DAMPING)
    return scaled + damping * identity, damping


def _comparable(error: Array) -> Error:
    """A non-negative float as integers of the same order."""
    high = lax.bitcast_convert_type(jnp.maximum(error, 0), jnp.int32)
    return Error(high, jnp.zeros_like(high), error)
