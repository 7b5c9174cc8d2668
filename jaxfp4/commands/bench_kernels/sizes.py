"""The arrays that operations are timed on."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
from jax import Array

DTYPE = jnp.bfloat16
STANDARD_DEVIATION = 0.02
TOKENS = 256


@dataclasses.dataclass(frozen=True)
class Size:
    """A weight by name."""

    name: str
    shape: tuple[int, ...]

    @property
    def is_stack(self) -> bool:
        """Whether it holds experts, along its first axis."""
        return len(self.shape) > 2

    @property
    def nbytes(self) -> int:
        """Bytes of the array."""
        return math.prod(self.shape) * jnp.dtype(DTYPE).itemsize


SIZES = {
    size.name: size
    for size in (
        Size("tiny", (64, 256)),
        Size("tiny_experts", (4, 64, 128)),
        Size("small", (1024, 4096)),
        Size("small_experts", (8, 512, 768)),
        Size("1b", (2048, 8192)),
        Size("8b", (4096, 14336)),
        Size("70b", (8192, 28672)),
        Size("experts", (256, 2048, 768)),
    )
}
"""Layers of models of 1, 8 and 70 billion parameters, a stack of experts, and what a CPU does in little time."""


def weight(size: Size, seed: int) -> Array:
    """Normal values with the standard deviation of a trained layer, bfloat16."""
    return _normal(jax.random.key(seed), size.shape)


def squares(channels: int, seed: int) -> Array:
    """`sum(x**2)` over tokens of the inputs of each channel, float32 `[channels]`, as calibration would collect."""
    return jnp.sum(_activations(channels, seed) ** 2, 0)


def block_products(channels: int, seed: int) -> Array:
    """`sum(x x^T)` over tokens of the 16 inputs of each block, float32 `[16, channels]`, as calibration would collect.

    Entry `[r, k]` belongs to the product of channel k with the r-th of its block.
    """
    blocks = _activations(channels, seed).reshape(TOKENS, -1, 16)
    products = jnp.einsum("tbr,tbk->rbk", blocks, blocks, precision="highest")
    return products.reshape(16, channels)


@functools.partial(jax.jit, static_argnums=1)
def _normal(key: Array, shape: tuple[int, ...]) -> Array:
    return jax.random.normal(key, shape, DTYPE) * jnp.asarray(STANDARD_DEVIATION, DTYPE)


def _activations(channels: int, seed: int) -> Array:
    """Inputs `[tokens, channels]`, some channels larger than others and all correlated."""
    values, shared, spread = jax.random.split(jax.random.key(seed), 3)
    sizes = jnp.exp(jax.random.normal(spread, (channels,)))
    common = jax.random.normal(shared, (TOKENS, 1))
    return (jax.random.normal(values, (TOKENS, channels)) + common) * sizes
