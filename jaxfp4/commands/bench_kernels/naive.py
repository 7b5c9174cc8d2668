"""The same operations as one would write them in a few lines of jnp, to be timed beside ours.

Quotients are XLA's, so on some backends a value near the middle between two codes gets the other one. Block scales are
rounded with arithmetic, because XLA removes a cast to float8 and back on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.commands.bench_kernels.parts import Parts

BOUNDS = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
CANDIDATES = 126
DAMPING = 0.01


def global_amax(x: Array) -> Array:
    """`max(abs(x))`."""
    return jnp.max(jnp.abs(x)).astype(jnp.float32)


def amaxes(x: Array) -> tuple[Array, Array]:
    """Of blocks along the last axis and of everything."""
    blocks = jnp.max(jnp.abs(x.reshape(*x.shape[:-1], -1, 16)), -1).astype(jnp.float32)
    return blocks, jnp.max(blocks)


def quantize(x: Array, axis: int, amax: Array, divisor: int = 2688) -> Parts:
    """Codes and block scales of max calibration."""
    blocks, scale = _blocks(x, axis), amax / divisor
    scales = _rounded(jnp.max(jnp.abs(blocks), axis, keepdims=True) / (6 * scale))
    return _packed(blocks, scales, scale, axis)


def fake_quantize(x: Array, axis: int, amax: Array) -> Array:
    """The values that codes and block scales of max calibration stand for."""
    blocks, scale = _blocks(x, axis), amax / 2688
    block_scale = _rounded(jnp.max(jnp.abs(blocks), axis, keepdims=True) / (6 * scale)) * scale
    magnitude = jnp.take(jnp.array(VALUES), _index(jnp.abs(blocks) / block_scale))
    return (jnp.sign(blocks) * magnitude * block_scale).reshape(x.shape).astype(x.dtype)


def dequantize(packed: Array, scales: Array, global_scale: Array, axis: int, dtype: jnp.dtype) -> Array:
    """Values from a table of codes."""
    at = packed.ndim + axis
    pairs = jnp.stack([packed & 15, packed >> 4], at + 1)
    shape = (*packed.shape[:at], packed.shape[at] // 8, 16, *packed.shape[at + 1 :])
    table = jnp.array([*VALUES, *(-value for value in VALUES)], jnp.float32)
    scale = lax.expand_dims(scales.astype(jnp.float32) * global_scale, [at + 1])
    values = jnp.take(table, pairs.reshape(shape)) * scale
    return values.reshape(*packed.shape[:at], -1, *packed.shape[at + 1 :]).astype(dtype)


def mse(x: Array, amax: Array, axis: int) -> Parts:
    """The best of all 126 block scales by squared error."""
    return search(x, amax, axis, lambda error: jnp.sum(error * error, axis, keepdims=True))


def weighted_mse(x: Array, amax: Array, moments: Array) -> Parts:
    """By squared error weighted for each channel, along the last axis."""
    importance = _blocks(moments[0], -1)
    return search(x, amax, -1, lambda error: jnp.sum(importance * error * error, -1, keepdims=True))


def local_hessian(x: Array, amax: Array, moments: Array) -> Parts:
    """By `d @ H @ d` for each block, along the last axis; H damped as ours."""
    hessian = jnp.moveaxis(moments.reshape(16, -1, 16), 0, 1)
    mean = jnp.trace(hessian, axis1=1, axis2=2)[:, None, None] / 16
    hessian = hessian + DAMPING * mean * jnp.eye(16)

    def error_of(error: Array) -> Array:
        mixed = jnp.einsum("nbi,bij->nbj", error, hessian, precision="highest")
        return jnp.sum(mixed * error, -1, keepdims=True)

    return search(x, amax, -1, error_of)


def four_over_six(x: Array, amax: Array) -> Parts:
    """The better of the scales that put a block's largest value at 6 and at 4, along the last axis."""
    blocks, scale = _blocks(x, -1), amax / 1536
    largest = jnp.max(jnp.abs(blocks), -1, keepdims=True)
    six, four = _rounded(largest / (6 * scale)), _rounded(largest / (4 * scale))
    errors = [jnp.sum((blocks - _nearest(blocks, s * scale)) ** 2, -1, keepdims=True) for s in (six, four)]
    return _packed(blocks, jnp.where(errors[1] < errors[0], four, six), scale, -1)


def search(x: Array, amax: Array, axis: int, error_of: Callable[[Array], Array]) -> Parts:
    """The lowest of the block scales with the least error, tried one after the other."""
    blocks, scale = _blocks(x, axis), amax / 2688
    candidates = lax.bitcast_convert_type(jnp.arange(1, CANDIDATES + 1, dtype=jnp.uint8), jnp.float8_e4m3fn)
    candidates = candidates.astype(jnp.float32)

    def advance(i: int, state: tuple[Array, Array]) -> tuple[Array, Array]:
        best, chosen = state
        error = error_of(blocks - _nearest(blocks, candidates[i] * scale))
        return jnp.minimum(best, error), jnp.where(error < best, candidates[i], chosen)

    shape = jax.eval_shape(error_of, blocks).shape
    start = jnp.full(shape, jnp.inf), jnp.ones(shape)
    return _packed(blocks, lax.fori_loop(0, CANDIDATES, advance, start)[1], scale, axis)


def hadamard(x: Array) -> Array:
    """Groups of 16 along the last axis times the Hadamard matrix, float32."""
    matrix = jnp.ones((1, 1))
    for _ in range(4):
        matrix = jnp.block([[matrix, matrix], [matrix, -matrix]])
    groups = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 16)
    return jnp.matmul(groups, matrix / 4, precision="highest").reshape(x.shape)


def _blocks(x: Array, axis: int) -> Array:
    """Float32 with the axis split in two; the new axis of 16 is the last for -1, the last but one for -2."""
    at = x.ndim + axis
    return x.astype(jnp.float32).reshape(*x.shape[:at], -1, 16, *x.shape[at + 1 :])


def _rounded(scale: Array) -> Array:
    """To E4M3 numbers, in float32."""
    scale = jnp.clip(scale, 2.0**-9, 448)
    step = 2.0 ** (jnp.maximum(jnp.floor(jnp.log2(scale)), -6) - 3)
    return jnp.round(scale / step) * step


def _index(magnitude: Array) -> Array:
    """The index of the nearest value, ties to even."""
    above = [(magnitude >= b) if i % 2 else (magnitude > b) for i, b in enumerate(BOUNDS)]
    return sum((a.astype(jnp.uint8) for a in above), jnp.zeros(magnitude.shape, jnp.uint8))


def _nearest(blocks: Array, block_scale: Array) -> Array:
    """The nearest values under a scale."""
    quotient = blocks / block_scale
    value = jnp.zeros_like(quotient)
    for i, bound in enumerate(BOUNDS):
        magnitude = jnp.abs(quotient)
        value = jnp.where((magnitude >= bound) if i % 2 else (magnitude > bound), VALUES[i + 1], value)
    return jnp.sign(blocks) * value * block_scale


def _packed(blocks: Array, scales: Array, global_scale: Array, axis: int) -> Parts:
    """Codes two a byte, and the block scales as float8."""
    quotient = blocks / (scales * global_scale)
    codes = _index(jnp.abs(quotient)) | ((quotient < 0).astype(jnp.uint8) << 3)
    at = blocks.ndim + axis
    codes = lax.collapse(codes, at - 1, at + 1)
    low, high = (lax.slice_in_dim(codes, i, None, 2, axis=at - 1) for i in (0, 1))
    return {
        "packed": low | (high << 4),
        "scales": jnp.squeeze(scales, at).astype(jnp.float8_e4m3fn),
        "global_scale": global_scale,
    }
