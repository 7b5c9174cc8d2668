"""Block scales with the least squared error of the block's contribution to the output."""

from __future__ import annotations

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.algorithms.block_error import Blocks
from jaxfp4.formats import BLOCK_SIZE, exact
from jaxfp4.formats.minifloat import E2M1
from jaxfp4.formats.scale_codes import ALL_ZERO, LARGEST_CODE, LOST, OCTAVE
from jaxfp4.formats.squared_error import Grid
from jaxfp4.tensors.mesh import varying_as

DAMPING = 0.01
_SAFETY = 0.9
"""Bounds are less than they might be by more than the rounding of what they are compared with."""


def local_hessian_scales(blocks: Array, global_scale: Array, axis: int, hessian: Array) -> Array:
    """`argmin(code -> d @ H @ d)`, d the block's error `x - q(x; code)`, over all 126 positive E4M3 codes, uint8.

    `hessian` is `sum(x x^T)` over the tokens' 16 inputs of each block, `[16, ...]` with the other dimensions
    broadcasting with `blocks`; a hundredth of its mean diagonal is added to the diagonal, so that no error is free.
    Where it is zero throughout, an expert without tokens, the choice is that of the least squared error. The lowest
    code wins a tie; zero blocks and blocks that are not finite are as in `jaxfp4.algorithms.mse.mse_scales`.

    Only codes that can win are evaluated, first from the double of max calibration's scale downwards, then upwards.

    - Downwards: a value beyond `6s` is clipped, `d_i = |x_i| - 6s`, more as s falls. Whatever the other differences
      are, `d @ H @ d >= d_i**2 / inv(H)_ii`.
    - Upwards: a value below `s / 4` is lost, `d_i = x_i`, and these become more as s grows. With `H = S C S`, S the
      square root of its diagonal, `d @ H @ d >= sum(H_ii * d_i**2) / norm(inv(C))` for any norm of the inverse, here
      the largest row sum. From `6 * scale > 24 * amax` on all values are lost, and higher codes give that error again.

    Where one of these bounds exceeds the best error so far, no code farther that way can win.

    Errors are float32 sums: two codes that differ by less than their rounding may change places on another backend.

    AWQ's clipping is a part of this search. For each block it takes the `ratio <= 1` for which the block with its
    values cut at `ratio * amax` gives the least `sum((x @ d)**2)` over tokens, which is `d @ H @ d`. In NVFP4 they are
    cut at `6 * scale`, and a block scale can only be an E4M3 number, so that each ratio stands for one of the codes
    that are searched here: `e4m3(ratio * amax / 6 / global_scale)`, up to the code of max calibration. All the
    others are searched as well. On weights and moments that AWQ has scaled it is the second half of AWQ.

    Source: Model-Optimizer's `local_hessian`, and `awq_clip` for static block scales; AWQ, arXiv 2306.00978.
    """
    prepared = Blocks.of(blocks, global_scale, axis)
    damped = _damped(hessian, axis)
    alone, together = _certain(damped, axis)
    negative = exact.as_bits(exact.to_float32(blocks)) >> 31 == 1

    def evaluate(code: Array) -> Array:
        error = Grid.of(prepared.scale(code)).error(prepared.magnitudes)
        error = jnp.where(negative, -error, error)
        mixed = sum(damped[j] * lax.index_in_dim(error, j, axis, keepdims=True) for j in range(BLOCK_SIZE))
        return jnp.maximum(jnp.sum(error * mixed, axis, keepdims=True), 0)

    def clipped(code: Array) -> Array:
        beyond = jnp.maximum(prepared.magnitudes - E2M1.max * prepared.scale(code), 0)
        return jnp.max(alone * (beyond * beyond), axis, keepdims=True)

    def lost(code: Array) -> Array:
        magnitudes = prepared.magnitudes
        small = jnp.where(magnitudes < prepared.scale(code) * LOST, magnitudes, 0)
        return jnp.sum(together * (small * small), axis, keepdims=True)

    calibrated = prepared.code.astype(jnp.int32)
    highest = jnp.minimum(calibrated + ALL_ZERO, LARGEST_CODE)
    first = jnp.minimum(calibrated + OCTAVE, highest)
    # Inside a shard_map a loop's state has one type throughout, that of the errors.
    first = varying_as(first, evaluate(first))
    best = first, varying_as(jnp.full(first.shape, jnp.inf), first)
    for sign, bound in ((-1, clipped), (1, lost)):
        best = _walk(~prepared.settled, first + (sign > 0), highest, sign, evaluate, bound, best)
    return prepared.stored(best[0])


def _walk(
    live: Array,
    first: Array,
    highest: Array,
    sign: int,
    evaluate: Callable[[Array], Array],
    bound: Callable[[Array], Array],
    best: tuple[Array, Array],
) -> tuple[Array, Array]:
    """The best code and its error, among a best one so far and those from `first` on, upwards or downwards.

    Ends when for every block that is `live` the bound, which grows on the way, has passed the best error.
    """

    def reachable(step: Array, error: Array) -> Array:
        code = first + sign * step
        inside = live & (code >= 1) & (code <= highest)
        return inside & (bound(jnp.clip(code, 1, highest)) <= error)

    def proceed(state: tuple[Array, Array, Array]) -> Array:
        step, _, error = state
        return jnp.any(reachable(step, error))

    def advance(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        step, chosen, least = state
        code = jnp.clip(first + sign * step, 1, highest)
        error = evaluate(code)
        # The lower code wins a tie.
        better = reachable(step, least) & ((error < least) | ((error == least) & (sign < 0)))
        return step + 1, jnp.where(better, code, chosen), jnp.where(better, error, least)

    return lax.while_loop(proceed, advance, (varying_as(jnp.int32(0), first), *best))[1:]


def hessian_table(hessian: Array, axis: int) -> Array:
    """What `jaxfp4.kernels.hessian_search.local_hessian_scales` wants, of moments `[16, ...]` with 16 on an axis.

    Row by row the lower triangle of the damped Hessian, twice what is not on its diagonal, then what a squared
    difference adds to any error at least, 16 times alone and 16 times together with others; `[168, ...]` with size 1 on
    the axis.
    """
    damped = _damped(hessian, axis - 1)
    rows, columns = np.tril_indices(BLOCK_SIZE)
    factors = np.where(rows == columns, np.float32(1), np.float32(2))
    triangle = jnp.moveaxis(damped, axis, 1)[columns, rows]
    triangle = triangle * lax.expand_dims(jnp.asarray(factors), range(1, triangle.ndim))
    certain = (jnp.moveaxis(part, axis - 1, 0) for part in _certain(damped, axis - 1))
    return jnp.expand_dims(jnp.concatenate([triangle, *certain]), axis)


def _damped(hessian: Array, axis: int) -> Array:
    """The Hessian in units of its blocks' largest diagonal entries, damped; the identity where it is zero."""
    diagonal = _diagonal(hessian, axis)
    largest = jnp.max(diagonal, axis, keepdims=True)
    usable = largest > 0
    inverse = exact.inverse_power_of_two(jnp.clip(jnp.where(usable, largest, 1.0), 2.0**-126, 2.0**126))
    identity = _identity(hessian.ndim, axis)
    scaled = jnp.where(usable, hessian * inverse, identity)
    damping = jnp.where(usable, DAMPING * jnp.mean(diagonal, axis, keepdims=True) * inverse, DAMPING)
    return scaled + damping * identity


def _identity(ndim: int, axis: int) -> Array:
    """Ones where the entry of the first dimension is that of the axis of 16, which counts without the first."""
    shape = [1] * ndim
    shape[0] = shape[_own(axis)] = BLOCK_SIZE
    return jnp.eye(BLOCK_SIZE, dtype=jnp.float32).reshape(shape)


def _own(axis: int) -> int:
    """The axis of 16 of an array with one more dimension in front."""
    return axis + 1 if axis >= 0 else axis


def _diagonal(hessian: Array, axis: int) -> Array:
    return jnp.sum(hessian * _identity(hessian.ndim, axis), 0)


def _certain(damped: Array, axis: int) -> tuple[Array, Array]:
    """What the square of each difference adds to any error at least: of one alone, and of all together.

    `H_ii / inv(C)_ii` and `H_ii / max(sum(abs(inv(C)), 0))`, C the correlations; 0 where these are singular.
    """
    diagonal = _diagonal(damped, axis)
    inverse = _inverse(damped, axis)
    own = _diagonal(inverse, axis)
    norm = jnp.max(jnp.sum(jnp.abs(inverse), 0), axis, keepdims=True)
    usable = jnp.isfinite(norm) & (jnp.min(own, axis, keepdims=True) > 0)
    certain = jnp.where(usable, _SAFETY * diagonal, 0)
    return certain / jnp.where(usable, own, 1), certain / jnp.where(usable, norm, 1)


def _inverse(damped: Array, axis: int) -> Array:
    """Of the correlations, by the sweep operator (Goodnight, The American Statistician 33, 1979)."""
    identity, at = _identity(damped.ndim, axis), _own(axis)

    def column(row: Array) -> Array:
        """A row as the first dimension has it."""
        return jnp.sum(identity * row, at, keepdims=True)

    size = lax.rsqrt(_diagonal(damped, axis))
    correlations = damped * size * column(size)

    def sweep(k: Array, matrix: Array) -> Array:
        row, here = (lax.dynamic_index_in_dim(of, k, 0) for of in (matrix, identity))
        pivot = jnp.sum(row * here, at, keepdims=True)
        ratio = row / pivot
        swept = jnp.where(here > 0, column(ratio), matrix - column(row) * ratio)
        return jnp.where(column(here) > 0, jnp.where(here > 0, -1 / pivot, ratio), swept)

    return -lax.fori_loop(0, BLOCK_SIZE, sweep, correlations)
