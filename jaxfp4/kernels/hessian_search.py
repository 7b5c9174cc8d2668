"""The search of `jaxfp4.algorithms.local_hessian` inside a kernel.

A block's quadratic form is 152 fused multiply-adds when a thread has all 16 differences and the Hessian is numbers.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, exact
from jaxfp4.formats.minifloat import E2M1
from jaxfp4.formats.squared_error import Grid
from jaxfp4.kernels.blocks import Launch, Values
from jaxfp4.kernels.quantize import Context, Tuning
from jaxfp4.kernels.rounding import Scales
from jaxfp4.kernels.search import LARGEST_CODE, Block, prepared_block

TUNING = Tuning(minor=Launch(32, 1), strided=Launch(32, 1))
ALL_ZERO = 38
"""As `jaxfp4.algorithms.local_hessian.ALL_ZERO`."""
_SIGN = 1 << 31


def local_hessian_scales(values: Values, context: Context) -> Scales:
    """`jaxfp4.algorithms.local_hessian.local_hessian_scales`; the context's table is `hessian_table`'s.

    Both compare float32 sums, of which the order differs.
    """
    *triangle, damping = context.table
    block, magnitudes = prepared_block(values, context)
    signs = values.map(lambda bits: bits & jnp.uint32(_SIGN))
    pairs = [(m, s) for side in zip(*_sides(magnitudes, signs), strict=True) for m, s in side]
    highest = jnp.minimum(block.calibrated.codes.astype(jnp.int32) + ALL_ZERO, LARGEST_CODE)

    def error_of(code: Array) -> Array:
        grid = Grid.of(block.scale(code, context))
        differences = [exact.as_float(exact.as_bits(grid.error(m)) ^ s) for m, s in pairs]
        return jnp.maximum(_quadratic_form(triangle, differences), 0.0)

    def proceed(state: tuple[Array, Array, Array]) -> Array:
        step, _, best = state
        return jnp.max(jnp.where(_may_win(block, highest - step, best, damping, context), 1, 0)) > 0

    def advance(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        step, chosen, best = state
        code = jnp.maximum(highest - step, 1)
        error = error_of(code)
        better = error <= best
        return step + 1, jnp.where(better, code, chosen), jnp.where(better, error, best)

    start = (jnp.int32(0), highest, jnp.full(highest.shape, jnp.inf, jnp.float32))
    return block.stored(lax.while_loop(proceed, advance, start)[1])


def _sides(magnitudes: Values, signs: Values) -> tuple[list[tuple[Array, Array]], list[tuple[Array, Array]]]:
    """Pairs of the even entries and of the odd ones."""
    return list(zip(magnitudes.even, signs.even, strict=True)), list(zip(magnitudes.odd, signs.odd, strict=True))


def _may_win(block: Block, code: Array, best: Array, damping: Array, context: Context) -> Array:
    """Whether the clipping of the largest value alone does not exceed the least error so far."""
    limit = E2M1.max * block.scale(jnp.maximum(code, 1), context)
    beyond = jnp.maximum(block.largest - limit, 0.0)
    # Less by more than the rounding of the sums, which must not end the search early.
    return (code >= 1) & (beyond * beyond * (damping * 0.999) <= best) & ~block.settled


def _quadratic_form(triangle: list[Array], d: list[Array]) -> Array:
    """`d @ H @ d` from the lower triangle, row by row, twice what is not on the diagonal."""
    total = jnp.zeros_like(d[0])
    for i in range(BLOCK_SIZE):
        start = i * (i + 1) // 2
        row = triangle[start] * d[0]
        for j in range(1, i + 1):
            row = row + triangle[start + j] * d[j]
        total = total + row * d[i]
    return total
