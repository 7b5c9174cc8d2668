"""Parameters made where they are to be, by programs that parameters of one shape and place share."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Sharding

from jaxfp4.commands.bench_kernels.sizes import DTYPE, STANDARD_DEVIATION

Shape = tuple[int, ...]


def normal(seed: Array, shape: Shape) -> Array:
    """Normal values with the standard deviation of a trained layer."""
    return jax.random.normal(jax.random.key(seed), shape, DTYPE) * jnp.asarray(STANDARD_DEVIATION, DTYPE)


def ones(seed: Array, shape: Shape) -> Array:
    """Ones, whatever the seed."""
    return jnp.ones(shape, DTYPE)


def waves(seed: Array, shape: Shape) -> Array:
    """Irregular values, each from its position alone: quick to compile, and no memory is needed beside them."""
    angle = seed.astype(jnp.float32)
    for axis in range(len(shape)):
        angle = angle + jnp.float32(12.9898 + 65.233 * axis) * jax.lax.broadcasted_iota(jnp.float32, shape, axis)
    return (jnp.float32(STANDARD_DEVIATION * 2**0.5) * jnp.cos(angle)).astype(DTYPE)


def drawn(values: Callable[[Array, Shape], Array], seed: int, shape: Shape, place: Sharding) -> Array:
    """One of these functions' values, bfloat16."""
    return _program(values, shape, place)(jnp.int32(seed))


@functools.cache
def _program(values: Callable[[Array, Shape], Array], shape: Shape, place: Sharding) -> Any:
    return jax.jit(lambda seed: values(seed, shape), out_shardings=place)
