"""Rotations of groups of channels."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxfp4.formats import exact
from jaxfp4.tensors.blocks import normalize_axes


def hadamard(x: Array, axis: int | Sequence[int] = -1, size: int = 16) -> Array:
    """`x.reshape(.., K // size, size) @ H` along `axis`, H the Hadamard matrix in Sylvester's order over `sqrt(size)`.

    H is symmetric and orthogonal, so the function is its own inverse, and a product of two rotated operands is the
    product of the operands. NaN and Inf spread over their group. `axis` may be several contraction axes, taken
    flattened, the last one minor; shape, dtype and sharding are those of `x`. Computed in float32.

    Raises ValueError unless `size` is a power of two that divides K.

    >>> hadamard(jnp.array([4.0, 0.0, 0.0, 0.0]), size=4)
    Array([2., 2., 2., 2.], dtype=float32)
    """
    axes = normalize_axes(axis, x.ndim)
    length = math.prod(x.shape[a] for a in axes)
    if size < 2 or size & (size - 1) or length % size:
        raise ValueError(
            f"hadamard: size={size} for a contraction of {length}: wanted a power of two from 2 on that divides it"
        )
    return _hadamard(x, axes, size)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _hadamard(x: Array, axes: tuple[int, ...], size: int) -> Array:
    others = [a for a in range(x.ndim) if a not in axes]
    order = [*others, *axes]
    moved = jnp.transpose(exact.to_float32(x), order)
    groups = moved.reshape(*moved.shape[: len(others)], -1, size)
    half = size // 2
    while half:
        pairs = groups.reshape(*groups.shape[:-1], size // (2 * half), 2, half)
        upper, lower = pairs[..., 0, :], pairs[..., 1, :]
        groups = jnp.stack([upper + lower, upper - lower], -2).reshape(groups.shape)
        half //= 2
    rotated = (groups * size**-0.5).reshape(moved.shape)
    return exact.cast(jnp.transpose(rotated, [order.index(a) for a in range(x.ndim)]), x.dtype)
