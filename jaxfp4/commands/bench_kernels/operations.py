"""The operations that are timed: ours, the naive version, and what a result has to be.

To add one, such as a matmul from packed weights, add an `Operation`: its arguments made from a weight, ours and the
naive function of them, and a numpy reference on rows of the result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import jaxfp4
from jaxfp4.algorithms.encoders import encoder_for
from jaxfp4.commands.bench_kernels import naive, reference, sizes
from jaxfp4.commands.bench_kernels.parts import Parts, parts_of
from jaxfp4.commands.bench_kernels.reference import Rows
from jaxfp4.kernels.matmul import packed_matmul
from jaxfp4.recipes.methods import FourOverSix, LocalHessian, Method, Mse, Scales, WeightedMse
from jaxfp4.tensors import NVFP4Tensor, quantize_unchecked
from jaxfp4.tensors.hadamard import hadamard

Arguments = tuple[Any, ...]
EXACT = 1.0
NEARLY = 0.995
"""Wanted of a search, whose float64 reference may prefer another of two scales that are as good."""


@dataclasses.dataclass(frozen=True)
class Operation:
    """Something to time, on one weight."""

    name: str
    axis: int
    """The contraction, along which blocks lie: -1 or -2."""
    prepare: Callable[[Array, int], Arguments]
    """`(weight, seed) -> arguments` of `ours` and `naive`."""
    ours: Callable[..., Any]
    naive: Callable[..., Any]
    expected: Callable[[Arguments], Rows]
    """Parts of the result on the rows that `reference.rows_of` takes."""
    rows: Callable[[int], int] = lambda channels: reference.ROWS
    """How many rows are looked at, from their length."""
    wanted: float = EXACT
    """The least share of them that has to be as expected."""
    tolerance: float = 0.0
    """How far an entry may be off, relative to the largest: of sums, whose order is free."""
    reads: int = 1
    """How often the weight must be read; twice where its global amax comes before its codes."""
    stacks: bool | None = None
    """Whether it is for stacks of experts alone (True), for layers alone (False), or for both."""
    everywhere: bool = False
    """Whether it is timed on all sizes by default, not only on one."""

    compared: int = 0
    """How many of the arguments, at the end, only `naive` reads."""

    def takes(self, size: sizes.Size) -> bool:
        """Whether it is defined for a weight of this size."""
        return self.stacks is None or self.stacks == size.is_stack

    def share_as_expected(self, arguments: Arguments, result: Any) -> float:
        """The least share of a result's sampled entries that equal the reference."""
        rows = self.rows(arguments[0].shape[self.axis])
        return reference.equal_share(
            reference.parts_in_rows(parts_of(result), self.axis, rows), self.expected(arguments), self.tolerance
        )


def _searched_rows(channels: int) -> int:
    return min(reference.ROWS, max(2, reference.SEARCHED_VALUES // channels))


def _alone(x: Array, seed: int) -> Arguments:
    return (x,)


def _with_amax(x: Array, seed: int) -> Arguments:
    return x, naive.global_amax(x)


def _with_squares(x: Array, seed: int) -> Arguments:
    moments = sizes.squares(x.shape[-1], seed)
    return *_with_amax(x, seed), moments.reshape(1, *[1] * (x.ndim - 1), -1)


def _with_products(x: Array, seed: int) -> Arguments:
    moments = sizes.block_products(x.shape[-1], seed)
    return *_with_amax(x, seed), moments.reshape(16, *[1] * (x.ndim - 1), -1)


def _codes(axis: int) -> Callable[[Array, int], Arguments]:
    def prepare(x: Array, seed: int) -> Arguments:
        parts = naive.quantize(x, axis, naive.global_amax(x))
        return parts["packed"], parts["scales"], parts["global_scale"]

    return prepare


def _rows(x: Array, axis: int, count: int = reference.ROWS) -> Any:
    return reference.rows_of(x, axis, count).astype(np.float32)


def _amax(x: Array) -> Any:
    return np.asarray(_compiled_amax(x))


_compiled_amax = jax.jit(naive.global_amax)
_compiled_rotated_amax = jax.jit(lambda x: naive.global_amax(naive.hadamard(x)))


def _global_amax(arguments: Arguments) -> Rows:
    return {"amax": _amax(arguments[0])}


def _amaxes(arguments: Arguments) -> Rows:
    blocks = np.abs(_rows(arguments[0], -1).reshape(-1, arguments[0].shape[-1] // 16, 16)).max(-1)
    return {"block_amax": blocks, **_global_amax(arguments)}


def _quantized(axis: int) -> Callable[[Arguments], Rows]:
    def expected(arguments: Arguments) -> Rows:
        return reference.quantized(_rows(arguments[0], axis), _amax(arguments[0]))

    return expected


def _fake_quantized(axis: int) -> Callable[[Arguments], Rows]:
    def expected(arguments: Arguments) -> Rows:
        x, amax = arguments
        values = reference.fake_quantized(_rows(x, axis), np.asarray(amax))
        return {"values": values.astype(x.dtype)}

    return expected


def _dequantized(axis: int) -> Callable[[Arguments], Rows]:
    def expected(arguments: Arguments) -> Rows:
        packed, scales, scale = arguments
        values = reference.decode(
            reference.rows_of(packed, axis), reference.rows_of(scales, axis), np.float32(np.asarray(scale))
        )
        return {"values": values.astype(sizes.DTYPE)}

    return expected


def _searched(arguments: Arguments, axis: int = -1) -> Rows:
    x, amax = arguments
    rows = _rows(x, axis, _searched_rows(x.shape[axis]))
    return reference.searched(rows, np.asarray(amax), lambda d: np.sum(d * d, -1))


def _searched_with_squares(arguments: Arguments) -> Rows:
    x, amax, moments = arguments
    importance = np.asarray(moments, np.float64).reshape(-1, 16)
    rows = _rows(x, -1, _searched_rows(x.shape[-1]))
    return reference.searched(rows, np.asarray(amax), lambda d: np.sum(importance * d * d, -1))


def _searched_with_products(arguments: Arguments) -> Rows:
    x, amax, moments = arguments
    hessian = damped(np.asarray(moments, np.float64))
    rows = _rows(x, -1, _searched_rows(x.shape[-1]))
    return reference.searched(rows, np.asarray(amax), lambda d: np.sum(np.einsum("nbi,bij->nbj", d, hessian) * d, -1))


def damped(moments: Any) -> Any:
    """The Hessians `[blocks, 16, 16]` of moments `[16, .., K]`, with what ours adds to the diagonal."""
    hessian = np.moveaxis(moments.reshape(16, -1, 16), 0, 1)
    mean = np.trace(hessian, axis1=1, axis2=2)[:, None, None] / 16
    return hessian + naive.DAMPING * mean * np.eye(16)


def _four_or_six(arguments: Arguments) -> Rows:
    return reference.four_or_six(_rows(arguments[0], -1), np.asarray(arguments[1]))


def _rotated(axis: int) -> Callable[[Arguments], Rows]:
    def expected(arguments: Arguments) -> Rows:
        x = arguments[0]
        amax = np.asarray(_compiled_rotated_amax(x if axis == -1 else jnp.swapaxes(x, -1, -2)))
        result = reference.quantized(reference.rotated(_rows(x, axis)), amax)
        return {name: result[name] for name in ("packed", "scales")}

    return expected


def _experts_quantized(arguments: Arguments) -> Rows:
    """Each of the experts that rows are taken of with its own amax."""
    x = arguments[0]
    parts = [reference.quantized(_rows(x[e], -2), _amax(x[e])) for e in (0, -1)]
    at = reference.spread(2 * len(parts[0]["scales"]), reference.ROWS)
    return {name: np.concatenate([part[name] for part in parts])[at] for name in ("packed", "scales")}


def _block_and_global_amax(x: Array) -> tuple[Array, Array]:
    blocks = jaxfp4.block_amax(x, -1)
    return blocks, jaxfp4.global_amax(blocks)


def _quantize_each(x: Array) -> NVFP4Tensor:
    return quantize_unchecked(x, -2, global_amax=jaxfp4.global_amax(x, keep_axes=(0,)))


def _naive_quantize(x: Array, axis: int) -> Parts:
    return naive.quantize(x, axis, naive.global_amax(x))


def _naive_quantize_each(x: Array) -> Parts:
    amax = jnp.max(jnp.abs(x), (1, 2)).astype(jnp.float32).reshape(-1, 1, 1, 1)
    parts = naive.quantize(x, -2, amax)
    return {**parts, "global_scale": parts["global_scale"].reshape(-1, 1, 1)}


@functools.partial(jax.jit, static_argnums=1)
def _rotate_then_quantize(x: Array, axis: int) -> NVFP4Tensor:
    """What the fused kernels replace: plain jnp writes the rotated array, and the quantizer reads it again."""
    return quantize_unchecked(hadamard(x.astype(jnp.float32), axis, 16), axis)


def _search(scales: Scales, axis: int = -1, divisor: int = 2688) -> Callable[..., Any]:
    """Ours, with a global scale as Model-Optimizer's sweeps have it, so that the block scales can be compared."""
    encoder = encoder_for(Method(scales))

    def search(x: Array, amax: Array, moments: Array | None = None) -> NVFP4Tensor:
        return quantize_unchecked(x, axis, global_amax=amax, divisor=divisor, encoder=encoder, moments=moments)

    return search


def _dequantize(packed: Array, scales: Array, global_scale: Array, axis: int) -> Array:
    size = 2 * packed.shape[axis]
    return NVFP4Tensor(packed, scales, global_scale, (axis,), (size,), np.dtype(sizes.DTYPE)).dequantize()


def _product(rows: int) -> Operation:
    """A few rows times a packed weight, beside the product with the bfloat16 weight that it replaces."""

    def prepare(w: Array, seed: int) -> Arguments:
        packed, scales, global_scale = _codes(-2)(w, seed)
        x = jax.random.normal(jax.random.key(seed), (rows, w.shape[0]), sizes.DTYPE)
        return packed, lax.bitcast_convert_type(scales, jnp.uint8), global_scale.reshape(()), x, w

    def ours(packed: Array, scales: Array, global_scale: Array, x: Array, w: Array) -> Array:
        return lax.platform_dependent(
            x,
            packed,
            scales,
            global_scale,
            cuda=functools.partial(packed_matmul, out_dtype=jnp.float32),
            default=_multiply_dequantized,
        )

    def plain(packed: Array, scales: Array, global_scale: Array, x: Array, w: Array) -> Array:
        return jnp.matmul(x, w, preferred_element_type=jnp.float32)

    def expected(arguments: Arguments) -> Rows:
        packed, scales, scale, x, _ = arguments
        w = reference.decode(
            reference.rows_of(packed, -2), reference.rows_of(scales, -2), np.float32(np.asarray(scale))
        )
        return {"values": w.astype(np.float64) @ np.asarray(x).astype(np.float64).T}

    return Operation(
        f"matmul_{rows}", -2, prepare, ours, plain, expected, tolerance=1e-5, stacks=False, everywhere=True, compared=1
    )


def _multiply_dequantized(x: Array, packed: Array, scales: Array, global_scale: Array) -> Array:
    scales = lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)
    w = NVFP4Tensor(packed, scales, global_scale, (-2,), (2 * packed.shape[0],), np.dtype(np.float32)).dequantize()
    return jnp.matmul(x.astype(jnp.float32), w, precision="highest")


def _along(axis: int, suffix: str) -> tuple[Operation, ...]:
    """The operations that weights of either order need."""
    return (
        Operation(
            f"quantize{suffix}",
            axis,
            _alone,
            functools.partial(quantize_unchecked, axis=axis),
            functools.partial(_naive_quantize, axis=axis),
            _quantized(axis),
            reads=2,
            everywhere=True,
        ),
        Operation(
            f"quantize_given_amax{suffix}",
            axis,
            _with_amax,
            lambda x, amax: quantize_unchecked(x, axis, global_amax=amax),
            lambda x, amax: naive.quantize(x, axis, amax),
            _quantized(axis),
        ),
        Operation(
            f"fake_quantize{suffix}",
            axis,
            _with_amax,
            lambda x, amax: jaxfp4.fake_quantize(x, axis, global_amax=amax),
            lambda x, amax: naive.fake_quantize(x, axis, amax),
            _fake_quantized(axis),
            everywhere=True,
        ),
        Operation(
            f"dequantize{suffix}",
            axis,
            _codes(axis),
            functools.partial(_dequantize, axis=axis),
            functools.partial(naive.dequantize, axis=axis, dtype=np.dtype(sizes.DTYPE)),
            _dequantized(axis),
            everywhere=True,
        ),
        Operation(
            f"mse{suffix}",
            axis,
            _with_amax,
            _search(Mse(), axis),
            functools.partial(naive.mse, axis=axis),
            functools.partial(_searched, axis=axis),
            rows=_searched_rows,
            wanted=NEARLY,
        ),
        Operation(
            f"hadamard_quantize{suffix}",
            axis,
            _alone,
            functools.partial(quantize_unchecked, axis=axis, rotation=16),
            functools.partial(_rotate_then_quantize, axis=axis),
            _rotated(axis),
            wanted=NEARLY,
            reads=2,
        ),
    )


OPERATIONS: dict[str, Operation] = {
    operation.name: operation
    for operation in (
        Operation("global_amax", -1, _alone, jaxfp4.global_amax, naive.global_amax, _global_amax, everywhere=True),
        Operation("block_and_global_amax", -1, _alone, _block_and_global_amax, naive.amaxes, _amaxes),
        *_along(-1, ""),
        *_along(-2, "_leading"),
        Operation(
            "quantize_experts",
            -2,
            _alone,
            _quantize_each,
            _naive_quantize_each,
            _experts_quantized,
            reads=2,
            stacks=True,
            everywhere=True,
        ),
        Operation(
            "four_over_six",
            -1,
            _with_amax,
            _search(FourOverSix(), divisor=1536),
            naive.four_over_six,
            _four_or_six,
            wanted=NEARLY,
        ),
        Operation(
            "weighted_mse",
            -1,
            _with_squares,
            _search(WeightedMse()),
            naive.weighted_mse,
            _searched_with_squares,
            rows=_searched_rows,
            wanted=NEARLY,
            stacks=False,
        ),
        Operation(
            "local_hessian",
            -1,
            _with_products,
            _search(LocalHessian()),
            naive.local_hessian,
            _searched_with_products,
            rows=_searched_rows,
            wanted=NEARLY,
            stacks=False,
        ),
        _product(1),
        _product(16),
    )
}
"""By name, in the order of the table."""
