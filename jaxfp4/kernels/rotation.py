"""The Hadamard matrix of size 16 times the values of each block, inside a kernel, as `jaxfp4.tensors.hadamard`."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, exact
from jaxfp4.kernels.blocks import Values
from jaxfp4.kernels.quantize import Preparation


@functools.cache
def rotation(dtype: jax.typing.DTypeLike) -> Preparation:
    """Blocks rotated in float32 and rounded to a dtype before anything else is done with them."""
    return Preparation(functools.partial(rotated, dtype=dtype), across=True)


def rotated(values: Values, dtype: jax.typing.DTypeLike) -> Values:
    """The same sums and differences in the same order as plain JAX: of values 8 apart, 4, 2 and 1."""
    values = values.map(exact.to_float32)
    even, odd = list(values.even), list(values.odd)
    for half in (4, 2, 1):  # in pairs of an even and an odd value
        even, odd = _butterfly(even, half), _butterfly(odd, half)
    sums = (a + b for a, b in zip(even, odd, strict=True))
    differences = (a - b for a, b in zip(even, odd, strict=True))
    return Values(tuple(sums), tuple(differences)).map(lambda x: (x * BLOCK_SIZE**-0.5).astype(dtype))


def _butterfly(tiles: list[Array], half: int) -> list[Array]:
    """Sums and differences of entries that are `half` apart, of eight entries in tiles."""
    width = 8 // len(tiles)
    if half < width:
        return [_inside(tile, half) for tile in tiles]
    step = half // width
    return [tiles[i - step] - x if i & step else x + tiles[i + step] for i, x in enumerate(tiles)]


def _inside(tile: Array, half: int) -> Array:
    """The same within `[T, width]`, by reductions over pairs. Where these go is known when compiling."""
    pairs = tile.reshape(-1, 2, half)
    is_lower = lax.broadcasted_iota(jnp.int32, pairs.shape, 1) == 1
    both = (jnp.sum(pairs, 1), jnp.sum(jnp.where(is_lower, -pairs, pairs), 1))
    total, difference = (jnp.broadcast_to(lax.expand_dims(x, [1]), pairs.shape) for x in both)
    return jnp.where(is_lower, difference, total).reshape(tile.shape)
