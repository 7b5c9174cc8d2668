"""Rotations of groups of channels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, exact
from jaxfp4.tensors.blocks import Blocking, normalize_axes
from jaxfp4.tensors.mesh import Layout, merge_dimensions, place, typed_layout, whole_along
from jaxfp4.tensors.pacing import paced


def hadamard(x: Array, axis: int | Sequence[int] = -1, size: int = 16) -> Array:
    """`x.reshape(.., K // size, size) @ H` along `axis`, H the Hadamard matrix in Sylvester's order over `sqrt(size)`.

    H is symmetric and orthogonal, so the function is its own inverse, and a product of two rotated operands is the
    product of the operands. NaN and Inf spread over their group. `axis` may be several contraction axes, taken
    flattened, the last one minor; shape, dtype and sharding are those of `x`. Computed in float32, whose subnormals a
    backend may take for zero.

    Raises ValueError unless `size` is a power of two that divides K.

    >>> hadamard(jnp.array([4.0, 0.0, 0.0, 0.0]), size=4)
    Array([2., 2., 2., 2.], dtype=float32)
    """
    axes = normalize_axes(axis, x.ndim)
    _refuse_cut_groups(x, axes, size)
    layout = typed_layout(x)
    if layout is not None and _cuts_groups(layout, x.shape, axes, size):
        return place(_hadamard(whole_along(x, axes), axes, size), layout)
    return _hadamard(x, axes, size)


def rotates_blocks(x: Array, axes: tuple[int, ...], size: int) -> bool:
    """Whether groups of `size` along `axes`, 0 for no rotation, are the blocks; ValueError as `hadamard` raises it.

    Then a quantizer rotates them itself: they are whole on each device, and a kernel need not write them.
    """
    if size:
        _refuse_cut_groups(x, axes, size)
    return size == BLOCK_SIZE


def rotated_blocks(x: Array, blocking: Blocking) -> Array:
    """`hadamard` of each block, kept in memory: XLA would rotate again for every value of the block."""
    return lax.optimization_barrier(hadamard(x, blocking.axes, BLOCK_SIZE))


def _refuse_cut_groups(x: Array, axes: tuple[int, ...], size: int) -> None:
    length = math.prod(x.shape[a] for a in axes)
    if size < 2 or size & (size - 1) or length % size:
        raise ValueError(
            f"hadamard: size={size} for a contraction of {length}: wanted a power of two from 2 on that divides it"
        )


def _cuts_groups(layout: Layout, shape: tuple[int, ...], axes: tuple[int, ...], size: int) -> bool:
    """Whether devices hold parts of groups, or groups cross an axis that is split."""
    last = axes[-1]
    if shape[last] % size:
        return any(layout.names[a] for a in axes)
    return shape[last] % (layout.shards(last) * size) != 0


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _hadamard(x: Array, axes: tuple[int, ...], size: int) -> Array:
    return _compiled(x, axes, size)


@paced
@functools.partial(jax.jit, static_argnums=(1, 2))
def _compiled(x: Array, axes: tuple[int, ...], size: int) -> Array:
    return exact.cast(_rotated(exact.to_float32(x), axes, size), x.dtype)


@_hadamard.defjvp
def _hadamard_jvp(axes, size, primals, tangents):  # type: ignore[no-untyped-def]
    return _hadamard(*primals, axes, size), _linear(tangents[0], axes, size)


def _linear(x: Array, axes: tuple[int, ...], size: int) -> Array:
    # Ordinary casts: there are no derivatives through bits.
    return _rotated(x.astype(jnp.float32), axes, size).astype(x.dtype)


def rotated_tangent(tangent: Array, blocking: Blocking) -> Array:
    """The rotation of blocks in a derivative."""
    return _linear(tangent, blocking.axes, BLOCK_SIZE)


def _rotated(x: Array, axes: tuple[int, ...], size: int) -> Array:
    """Groups of the flattened axes rotated, float32."""
    last = axes[-1]
    if x.shape[last] % size == 0:  # no group crosses it
        groups = x.reshape(*x.shape[:last], x.shape[last] // size, size, *x.shape[last + 1 :])
        return _rotated_groups(groups, last + 1).reshape(x.shape)
    others = [a for a in range(x.ndim) if a not in axes]
    order = [*others, *axes]
    moved = jnp.transpose(x, order)
    merged = merge_dimensions(moved, [*(1 for _ in others), len(axes)])
    groups = merged.reshape(*merged.shape[:-1], -1, size)
    rotated = _rotated_groups(groups, groups.ndim - 1).reshape(merged.shape).reshape(moved.shape)
    return jnp.transpose(rotated, [order.index(a) for a in range(x.ndim)])


def _rotated_groups(groups: Array, axis: int) -> Array:
    """The values along `axis` times the matrix: stage by stage sums and differences of values that are `half` apart."""
    size = groups.shape[axis]
    half, stages = size // 2, 0
    while half:
        pairs = groups.reshape(*groups.shape[:axis], size // (2 * half), 2, half, *groups.shape[axis + 1 :])
        layout = typed_layout(pairs)
        sharding = None if layout is None else layout.sharding
        is_lower = lax.broadcasted_iota(jnp.int32, pairs.shape, axis + 1, out_sharding=sharding) == 1
        pairs = lax.rev(pairs, [axis + 1]) + jnp.where(is_lower, -pairs, pairs)
        groups = pairs.reshape(groups.shape)
        half, stages = half // 2, stages + 1
        if half and stages % _STAGES_AT_ONCE == 0:
            groups = lax.optimization_barrier(groups)
    return groups * size**-0.5


_STAGES_AT_ONCE = 4
"""XLA finds all stages again for each value; with more of them at once that would be much."""
