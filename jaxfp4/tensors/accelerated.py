"""Which arrays the GPU kernels take, and the kernels behind the shapes of this layer."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE
from jaxfp4.kernels.blocks import Geometry
from jaxfp4.kernels.groups import Groups
from jaxfp4.kernels.quantize import (
    AS_THEY_ARE,
    ROUNDING,
    KernelScales,
    Preparation,
    Tuning,
    block_amax_blocks,
    dequantize_blocks,
    fake_quantize_blocks,
    max_scales,
    quantize_blocks,
    quantize_in_groups,
)
from jaxfp4.kernels.rotation import rotation
from jaxfp4.tensors.blocks import Blocking
from jaxfp4.tensors.mesh import all_axes_are_manual, varying_as

DTYPES = tuple(np.dtype(dtype) for dtype in (jnp.float32, jnp.bfloat16, jnp.float16))
"""Those that kernels read and write."""


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How an encoder's block scales are chosen inside a kernel."""

    choose: KernelScales
    tuning: Tuning
    table: Callable[[Array, int], Array] | None = None
    """`(moments [R, ...] in blocks, axis of 16) -> float32 [D, ...]`, the table of a choice that wants one.

    The axis has size 1 then, the other dimensions are those of the moments. None if moments are not looked at.
    """


MAX = Kernel(max_scales, ROUNDING)
"""Block scales from block amaxes."""


@functools.cache
def _has_gpu() -> bool:
    return any(device.platform == "gpu" for device in jax.devices())


def can_run(x: Array) -> bool:
    """Whether a kernel may be given `x`: one that lies on one device, wherever the computation is placed.

    XLA does not partition a kernel's call, so an array traced on several devices has to stay with plain JAX, unless it
    is a shard. On a machine without a GPU the kernels are not even traced.
    """
    if not _has_gpu() or x.size == 0 or any(jax.typeof(x).sharding.spec):
        return False
    if isinstance(x, jax.core.Tracer):
        return jax.device_count() == 1 or all_axes_are_manual()
    return len(x.sharding.device_set) == 1


def geometry_of(blocking: Blocking, global_scale: Array) -> Geometry | None:
    """Where the blocks lie; None if the global scale has a value for anything but leading axes."""
    blocks = blocking.blocks_shape
    scales = blocking.align(global_scale).shape if global_scale.ndim else (1,) * len(blocks)
    kept = max((d + 1 for d, n in enumerate(scales) if n > 1), default=0)
    if scales[:kept] != blocks[:kept] or kept > blocking.axis:
        return None
    axis = blocking.axis
    return Geometry(math.prod(blocks[:kept]), math.prod(blocks[kept : axis + 1]), math.prod(blocks[axis + 2 :]))


def groups_of(blocking: Blocking, geometry: Geometry, moments: Array) -> Groups | None:
    """How blocks share moments `[R, ...]` in blocks; None if these differ between outputs behind each other."""
    blocks, axis = blocking.blocks_shape, blocking.axis
    given = moments.shape[1:]
    own = next((d for d in range(axis) if given[d] != blocks[d]), axis)
    if any(n > 1 for n in (*given[own:axis], *given[axis + 2 :])):
        return None
    lead = math.prod(blocks[:own])
    # A global scale for each entry of more axes than the moments have would split `repeat`.
    if lead % geometry.outer:
        return None
    repeat = math.prod(blocks[own:axis])
    return Groups(geometry.outer, lead, repeat, blocks[axis], math.prod(blocks[axis + 2 :]))


def _scales_for(geometry: Geometry | Groups, global_scale: Array, x: Array) -> Array:
    """`[outer]`, of the type of `x` inside a shard_map."""
    return varying_as(global_scale.reshape(geometry.outer), x)


def _shaped(x: Array, geometry: Geometry, entries: int) -> Array:
    return x.reshape(geometry.outer, geometry.blocks, entries, geometry.inner)


def preparation(dtype: jax.typing.DTypeLike, rotated: bool) -> Preparation:
    """Blocks multiplied by the Hadamard matrix and rounded to a dtype, or left as they are."""
    return rotation(np.dtype(dtype)) if rotated else AS_THEY_ARE


def quantize(
    w: Array,
    global_scale: Array,
    blocking: Blocking,
    geometry: Geometry,
    kernel: Kernel,
    prepare: Preparation = AS_THEY_ARE,
) -> tuple[Array, Array]:
    """`(packed, scales as uint8)` in the axis order of `w`, whose blocks are one after the other."""
    packed, scales = quantize_blocks(
        _shaped(blocking.to_blocks(w), geometry, BLOCK_SIZE),
        _scales_for(geometry, global_scale, w),
        geometry,
        kernel.choose,
        kernel.tuning,
        prepare=prepare,
    )
    return _merged(packed, scales, blocking)


def quantize_groups(
    w: Array,
    global_scale: Array,
    blocking: Blocking,
    groups: Groups,
    table: Array,
    kernel: Kernel,
    prepare: Preparation = AS_THEY_ARE,
) -> tuple[Array, Array]:
    """As `quantize`, by a kernel that wants `table`, as it makes it."""
    packed, scales = quantize_in_groups(
        blocking.to_blocks(w).reshape(groups.shape),
        _scales_for(groups, global_scale, w),
        varying_as(jnp.moveaxis(table, 0, -1).reshape(groups.lead, groups.groups, len(table)), w),
        groups,
        kernel.choose,
        kernel.tuning.strided,
        prepare=prepare,
    )
    return _merged(packed, scales, blocking)


def _merged(packed: Array, scales: Array, blocking: Blocking) -> tuple[Array, Array]:
    """Codes and block scales of blocks in the axis order of the array."""
    shape, axis = blocking.blocks_shape, blocking.axis
    leading, rest = shape[:axis], shape[axis + 2 :]
    return (
        packed.reshape(*leading, shape[axis] * (BLOCK_SIZE // 2), *rest),
        scales.reshape(*leading, shape[axis], *rest),
    )


def block_amax(x: Array, blocking: Blocking, prepare: Preparation = AS_THEY_ARE) -> Array:
    """The largest magnitude of each block, the axis of blocks in the place of that of values."""
    blocks = blocking.to_blocks(x)
    shape, axis = blocks.shape, blocking.axis
    geometry = Geometry(1, math.prod(shape[: axis + 1]), math.prod(shape[axis + 2 :]))
    amaxes = block_amax_blocks(_shaped(blocks, geometry, BLOCK_SIZE), geometry, prepare=prepare)
    return amaxes.reshape(*shape[: axis + 1], *shape[axis + 2 :])


def fake_quantize(
    x: Array, global_scale: Array, blocking: Blocking, geometry: Geometry, prepare: Preparation = AS_THEY_ARE
) -> Array:
    """Quantized with max scales and dequantized, in the shape and dtype of `x`."""
    blocks = blocking.to_blocks(x)
    values = fake_quantize_blocks(
        _shaped(blocks, geometry, BLOCK_SIZE), _scales_for(geometry, global_scale, x), geometry, prepare=prepare
    )
    return blocking.from_blocks(values.reshape(blocks.shape))


def dequantize(
    packed: Array, scales: Array, global_scale: Array, blocking: Blocking, geometry: Geometry, dtype: np.dtype
) -> Array:
    """The array of a dtype, in its own shape."""
    codes = lax.bitcast_convert_type(scales, jnp.uint8)
    values = dequantize_blocks(
        _shaped(packed, geometry, BLOCK_SIZE // 2),
        _shaped(codes, geometry, 1),
        _scales_for(geometry, global_scale, packed),
        geometry,
        dtype,
    )
    return blocking.from_blocks(values.reshape(blocking.blocks_shape))
