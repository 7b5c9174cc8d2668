"""GPTQ (arXiv 2210.17323): a weight is rounded column by column, and later columns make up for earlier errors."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, exact, nvfp4
from jaxfp4.recipes.methods import Order as Order
from jaxfp4.tensors.blocks import Blocking
from jaxfp4.tensors.pacing import paced
from jaxfp4.tensors.reductions import as_float_array

ChooseScales = Callable[[Array, Array, int, Array | None], Array]
"""`(blocks, global_scale, axis, importance)` to E4M3 codes, uint8, shaped as `blocks` with size 1 at `axis`.

`blocks` has 16 values along `axis`; the global scale and the importance broadcast against it. An importance weighs the
squared error of each value; None weighs all alike.
"""


class Codes(NamedTuple):
    """A rounded matrix: E2M1 codes `[N, K_padded]` and E4M3 codes `[N, K_padded / 16]`, both uint8."""

    values: Array
    scales: Array


class _Feedback(NamedTuple):
    """What a Hessian of `K` channels says, in the order of visits; column `j` reads the errors of columns `i < j`."""

    factor: Array  # [K, K] float32, strictly upper: how much of the error of column i is added to column j
    importance: Array  # [K] float32, in stored order
    visits: Array  # [K] int32: the channel of each visit


def gptq(
    w: Array,
    hessian: Array,
    global_scale: Array,
    choose_scales: ChooseScales,
    *,
    damping: float = 0.01,
    order: Order = Order.STATIC,
    block: int = 32,
) -> Codes:
    """Codes of `w` `[N, K]` that keep `tr((w - q) H (w - q)^T)` small, the squared error of the output `x @ w.T`.

    `hessian` `[K, K]` is `sum x x^T` over tokens; a positive factor does not matter. `damping * mean(diag(H))` is added
    to its diagonal. With `H = R R^T`, R upper triangular, the objective is `sum_j ((w - q) R)_j^2`, and column `j` is
    rounded to the nearest code of `w_j + sum_{i<j} (w - q)_i R_ij / R_jj`; this is GPTQ without the inverse of `H`
    (arXiv 2507.18553). Block scales are those that `choose_scales` finds for the original weights, with the damped
    diagonal of `H` as importance.

    A channel without activations (`H_kk = 0`) is rounded to nearest and neither gives nor takes error; its importance
    is the damping alone. An all-zero Hessian (an expert that saw no token), one that is not positive definite in spite
    of damping, and one with NaN or Inf round everything to nearest, with equal importance. Weights are finite; the
    caller refuses others. `K` that is no multiple of 16 is padded with zeros that influence nothing.

    Returns E2M1 codes `[N, K_padded]` and E4M3 codes `[N, K_padded / 16]`. Each row depends on that row alone, in every
    bit, so rows may be split over devices; `jax.vmap` over experts gives each what it gets alone. `block` columns are
    brought up to date at a time; it changes the speed, and results only by rounding.

    Raises ValueError for shapes, `damping` or `block` that do not fit, TypeError for dtypes.

    >>> from jaxfp4.formats import nvfp4
    >>> def largest(blocks, global_scale, axis, importance):
    ...     return nvfp4.encode_scale(jnp.max(jnp.abs(blocks), axis, keepdims=True), global_scale)
    >>> w = jnp.array([[6.0, 0.8, 0.8]])
    >>> same = jnp.ones((3, 3))  # the three channels always agree: only the sum of the weights, 7.6, matters
    >>> nvfp4.decode_values(gptq(w, same, jnp.float32(1), largest).values)[0, :3]
    Array([6. , 1. , 0.5], dtype=float32)
    """
    w, hessian, global_scale = as_float_array(w), jnp.asarray(hessian), jnp.asarray(global_scale)
    _check(w, hessian, global_scale)
    if not (math.isfinite(damping) and damping > 0):
        raise ValueError(
            f"damping={damping}: wanted a positive number; 0.01 is usual, and more helps where tokens are few"
        )
    if block < BLOCK_SIZE or block % BLOCK_SIZE:
        raise ValueError(f"block={block}: wanted a positive multiple of {BLOCK_SIZE}, such as 32")
    return _gptq(w, hessian, global_scale, choose_scales, float(damping), order, int(block))


def _check(w: Array, hessian: Array, global_scale: Array) -> None:
    if w.ndim != 2:
        raise ValueError(
            f"w of shape {w.shape}: wanted [N, K]; transpose the contraction to the end, vmap over experts"
        )
    if hessian.shape != (w.shape[1], w.shape[1]):
        raise ValueError(
            f"hessian of shape {hessian.shape} for w of shape {w.shape}: wanted {(w.shape[1], w.shape[1])}, the sum of "
            "x x^T over the channels that w contracts"
        )
    if hessian.dtype != jnp.float32:
        raise TypeError(f"hessian of dtype {hessian.dtype}: wanted float32; accumulate it in float32")
    if global_scale.shape != () or global_scale.dtype != jnp.float32:
        raise ValueError(
            f"global_scale of shape {global_scale.shape} and dtype {global_scale.dtype}: wanted a float32 scalar, the "
            "one of this weight"
        )


@paced
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _gptq(
    w: Array,
    hessian: Array,
    global_scale: Array,
    choose_scales: ChooseScales,
    damping: float,
    order: Order,
    block: int,
) -> Codes:
    feedback = _feedback(hessian, damping, order)
    blocks = Blocking(w.shape, (1,)).to_blocks(exact.to_float32(w))
    rows, count, _ = blocks.shape
    padded = count * BLOCK_SIZE
    padding = padded - w.shape[1]
    importance = jnp.pad(feedback.importance, (0, padding)).reshape(1, count, BLOCK_SIZE)
    scales = choose_scales(blocks, global_scale, 2, importance)
    if scales.shape != (rows, count, 1) or scales.dtype != jnp.uint8:
        raise ValueError(
            f"choose_scales returned {scales.dtype} {scales.shape} for blocks {blocks.shape} along axis 2: wanted "
            f"uint8 {(rows, count, 1)}, one E4M3 code a block"
        )
    scales = jnp.squeeze(scales, 2)

    visits = jnp.concatenate([feedback.visits, jnp.arange(w.shape[1], padded)])
    columns = blocks.reshape(rows, padded).T
    column_scales = jnp.repeat(scales.T, BLOCK_SIZE, axis=0)
    if order is not Order.STATIC:
        columns, column_scales = columns[visits], column_scales[visits]
    factor = jnp.pad(feedback.factor, (0, padding))
    codes = _round_columns(columns, column_scales, factor, global_scale, min(block, padded))
    if order is not Order.STATIC:
        codes = jnp.zeros_like(codes).at[visits].set(codes, unique_indices=True)
    return Codes(codes.T, scales)


def _feedback(hessian: Array, damping: float, order: Order) -> _Feedback:
    """The factor and the importance of one Hessian.

    Under vmap Hessians are still factored one by one: solvers of a GPU give a batch other last bits than its members.
    """

    @jax.custom_batching.sequential_vmap
    def one(hessian: Array) -> _Feedback:
        diagonal = jnp.diagonal(hessian)
        size = exact.inverse_power_of_two(jnp.max(diagonal, initial=0.0))  # exact, and nothing overflows in the mean
        diagonal = diagonal * size
        live = diagonal != 0
        mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(live.astype(jnp.float32)), 1)
        damped = diagonal + damping * mean
        visits = jnp.arange(len(diagonal))
        if order is Order.ACTIVATION:
            visits = jnp.argsort(-diagonal, stable=True)

        coupled = live[:, None] & live[None, :] & ~jnp.eye(len(diagonal), dtype=bool)
        matrix = jnp.where(coupled, hessian * size, 0.0) + jnp.diag(jnp.where(live, damped, 1.0))
        root = _upper_root(matrix[visits][:, visits])
        usable = jnp.all(jnp.isfinite(hessian)) & jnp.all(diagonal >= 0) & jnp.all(jnp.isfinite(root))
        factor = jnp.where(usable, jnp.triu(root, 1) / jnp.diagonal(root)[None, :], 0.0)
        importance = jnp.where(usable & jnp.any(live), damped, 1.0)
        return _Feedback(factor, importance, visits)

    return one(hessian)


def _upper_root(matrix: Array) -> Array:
    """The upper triangular R with `R R^T = matrix`, NaN if there is none: the Cholesky factor seen from the far end."""
    return lax.linalg.cholesky(matrix[::-1, ::-1])[::-1, ::-1]


def _round_columns(columns: Array, scales: Array, factor: Array, global_scale: Array, block: int) -> Array:
    """Codes `[K, N]` of the columns of a weight, given as rows `[K, N]`, in their order.

    Sums over earlier columns run in a fixed order, elementwise over rows of the weight. A matrix product would not do:
    its last bits depend on how many rows it has, and so on the layout.
    """
    length = len(columns)
    padding = -length % block
    columns, scales = (jnp.pad(x, ((0, padding), (0, 0))) for x in (columns, scales))
    factor = jnp.pad(factor, ((0, 0), (0, padding)))
    starts = jnp.arange(0, length, block)

    def round_block(errors: Array, start: Array) -> tuple[Array, Array]:
        """`errors` holds `w - q` of the columns before `start`, and the weights themselves from there on."""
        ahead = lax.dynamic_slice_in_dim(factor, start, block, axis=1)
        correction = _earlier(errors, ahead, start)
        inside = lax.dynamic_slice_in_dim(jnp.pad(ahead, ((0, padding), (0, 0))), start, block, axis=0)

        def round_column(correction: Array, column: Any) -> tuple[Array, tuple[Array, Array]]:
            index, weight, code, influence = column
            scale = nvfp4.decode_scale(code)
            change = lax.dynamic_index_in_dim(correction, index, 0, keepdims=False)
            # XLA would flush a subnormal weight in the sum, and with it the sign of its code.
            target = jnp.where(change == 0, weight, weight + change)
            rounded = nvfp4.encode_values(target, scale, global_scale)
            error = weight - nvfp4.dequantize(rounded, scale, global_scale)
            return correction + influence[:, None] * error[None, :], (rounded, error)

        weights, codes = (lax.dynamic_slice_in_dim(x, start, block) for x in (errors, scales))
        _, (rounded, found) = lax.scan(round_column, correction, (jnp.arange(block), weights, codes, inside))
        return lax.dynamic_update_slice_in_dim(errors, found, start, 0), rounded

    _, rounded = lax.scan(round_block, columns, starts)
    return lax.collapse(rounded, 0, 2)[:length]


def _earlier(errors: Array, factor: Array, start: Array) -> Array:
    """`sum_{i < start} factor[i, :, None] * errors[i, None, :]`; `start` is a multiple of 16."""

    def add(group: Array, total: Array) -> Array:
        rows, weights = (lax.dynamic_slice_in_dim(x, group * BLOCK_SIZE, BLOCK_SIZE) for x in (errors, factor))
        for i in range(BLOCK_SIZE):
            total = total + weights[i][:, None] * rows[i][None, :]
        return total

    # Zeros that vary over the same mesh axes as the sum, as the carry of a loop in a shard_map must.
    zeros = jnp.zeros_like(factor[0][:, None] * errors[0][None, :])
    return lax.fori_loop(0, start // BLOCK_SIZE, add, zeros)
