"""Block scales with the least squared error."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxfp4.algorithms.block_error import Blocks, normalized, search
from jaxfp4.formats.scale_codes import OCTAVE, WITHOUT_HALF


def mse_scales(blocks: Array, global_scale: Array, axis: int, importance: Array | None = None) -> Array:
    """`argmin(code -> sum(importance * (x - q(x; code))**2, axis))` over all 126 positive E4M3 codes, uint8.

    The lowest code wins a tie. A zero block, and one that is not finite, gets the code of max calibration. Without
    `importance` all values count alike; a block whose importance is zero throughout is searched as if it were one.
    `importance` is finite, not negative and broadcasts with `blocks`, whose axis of 16 is `axis` and has size 1 in the
    result. Values beyond the global amax saturate.

    Only codes that can win are evaluated. Let a be the block's amax and let a code clip if `6 * scale < a`.

    - Upwards: if neither a scale s nor its double clips, 2s never wins. Every |x| is at most 6s, and the values of 2s
      up to 6s, `2s * {0, .5, 1, 1.5, 2, 3}`, are values of s as well, so each x is at least as near to a value of s (8s
      is farther from it than 6s). Ties go to s, the lower code. From code 16 on, half a scale is 8 codes below. The
      code nearest to a / 6, where max calibration rounds, is at most one below the lowest that does not clip, so
      nothing above that code + 8 can win; nor, as odd codes below 16 have no half, above 15 if that is larger.
    - Downwards: the error is at least that of the clipped values alone, `sum(importance * max(|x| - 6s, 0)**2)`, which
      grows as s falls; once it exceeds the best error so far no lower code can win. Unweighted, the largest value alone
      is used for it.

    Errors are compared as exact integers (`jaxfp4.algorithms.block_error`), so the choice is the same on every layout.
    Without importance they resolve 2^-31 of the squared scale, as long as nothing saturates; the bounds are those of
    ScaleSweep, arXiv 2606.07618, as far as its abstract tells.
    """
    prepared = Blocks.of(blocks, global_scale, axis, importance)
    highest = jnp.maximum(prepared.code.astype(jnp.int32) + OCTAVE, WITHOUT_HALF)
    return search(prepared, highest, prepared.error, prepared.clipping)


def importance_table(moments: Array, axis: int) -> Array:
    """What `jaxfp4.kernels.search.weighted_mse_scales` wants, of importance `[1, ...]` whose axis of 16 is `axis`.

    The weights of the plain search, `[16, ...]` with size 1 on the axis.
    """
    return jnp.expand_dims(jnp.moveaxis(normalized(moments[0], axis - 1), axis - 1, 0), axis)
