"""Block scales that put a block's largest value at 6 or at 4."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from jaxfp4.algorithms.block_error import Blocks
from jaxfp4.formats import exact, nvfp4
from jaxfp4.formats.scale_codes import LARGEST_CODE
from jaxfp4.formats.squared_error import less


def four_over_six_scales(blocks: Array, global_scale: Array, axis: int, importance: Array | None = None) -> Array:
    """Of `e4m3(amax / 6 / global_scale)` and `e4m3(amax / 4 / global_scale)` the one with less squared error, uint8.

    6 wins a tie. Zero blocks, blocks that are not finite, and the arguments are as in
    `jaxfp4.algorithms.mse.mse_scales`; `importance` weighs the squares. Between 4 and 6 the format has nothing, so a
    block whose values crowd just below its largest is better off without the gap. Meant for a global scale with
    headroom, `amax / (6 * 256)`: at `amax / 2688` the largest blocks have no larger scale to go to.

    Source: Four Over Six, arXiv 2512.02010.

    >>> block = jnp.array([10.0, 20.0, 30.0, 40.0] * 4)
    >>> scale = four_over_six_scales(block, nvfp4.global_scale(jnp.float32(40), 6 * 256), 0)
    >>> float(nvfp4.decode_scale(scale)[0]) * 40 / (6 * 256)
    10.0
    """
    prepared = Blocks.of(blocks, global_scale, axis, importance)
    six = jnp.minimum(prepared.code, LARGEST_CODE)
    amax = exact.as_float(jnp.max(exact.magnitude_bits(blocks), axis, keepdims=True))
    # At 4 the scale is that of an amax half as large again at 6.
    four = jnp.minimum(nvfp4.encode_scale(amax * 1.5, global_scale), LARGEST_CODE)
    return prepared.stored(jnp.where(less(prepared.error(four), prepared.error(six)), four, six))
