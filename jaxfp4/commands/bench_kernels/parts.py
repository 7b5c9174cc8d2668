"""Results taken apart, so that those of different functions can be compared entry by entry."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.tensors import NVFP4Tensor

Parts = dict[str, Array]
"""Arrays by name: `packed`, `scales` and `global_scale` of a quantized tensor, `values`, `block_amax`, `amax`."""

RELATIVE = 1e-6
"""Up to this, float results are equal: an approximate quotient's last place, and far below a step of bfloat16."""


def parts_of(result: Any) -> Parts:
    """The parts of what an operation gives."""
    if isinstance(result, NVFP4Tensor):
        return {"packed": result.packed, "scales": result.scales, "global_scale": result.global_scale}
    if isinstance(result, tuple):
        return {"block_amax": result[0], "amax": result[1]}
    if isinstance(result, dict):
        return result
    return {"values": result} if result.ndim else {"amax": result}


def equal_share(ours: Parts, other: Parts) -> float:
    """Over the parts that both have, the least share of equal entries; 0 if they have none in common.

    A packed byte counts as two codes.
    """
    common = [name for name in ours if name in other]
    if not common or any(ours[name].shape != other[name].shape for name in common):
        return 0.0
    return min(_share(ours[name], other[name], name == "packed") for name in common)


def _share(a: Array, b: Array, packed: bool) -> float:
    a, b = _as_codes(a), _as_codes(b)
    return 1 - int(_different(a, b, packed)) / (a.size * (2 if packed else 1))


@functools.partial(jax.jit, static_argnums=2)
def _different(a: Array, b: Array, packed: bool) -> Array:
    """How many entries differ."""
    if packed:
        return jnp.sum((a ^ b) & 15 != 0) + jnp.sum((a ^ b) >> 4 != 0)
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sum(~(jnp.abs(a - b) <= RELATIVE * jnp.abs(a)))


def _as_codes(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.uint8) if x.dtype == jnp.float8_e4m3fn else x
