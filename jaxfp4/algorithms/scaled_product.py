"""W4A4 contractions on tensor cores that multiply FP4 codes: NVIDIA GPUs from compute capability 10.0 on (Blackwell).

Written without such a GPU at hand: on others, where XLA computes the same from the decoded values, results are tested.
Weights alone (W4A16) are not multiplied so: there is no instruction for FP4 times a 16-bit float, XLA would decode the
weight as `dequantize` does.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import Protocol

import jax.numpy as jnp
from jax import Array, lax
from jax.extend.core import JaxprEqn

from jaxfp4.algorithms.activation_rounding import pre_scaled, quantize_activation
from jaxfp4.algorithms.packed_product import Product, differentiable, product_of
from jaxfp4.tensors.quantize import quantize_with_scale
from jaxfp4.transform.sites import Meeting

FIRST_CAPABILITY = (10, 0)


class Device(Protocol):
    """What is asked of a `jax.Device`; `compute_capability` is there for GPUs only."""

    @property
    def platform(self) -> str:
        """Such as "gpu" or "cpu"."""
        ...

    @property
    def compute_capability(self) -> str:
        """Such as "9.0"; other makers have names of another form."""
        ...


def multiply_fp4(devices: Iterable[Device]) -> bool:
    """Whether all devices, of which there is one or more, are GPUs whose tensor cores multiply FP4 codes."""
    return all([_multiplies_fp4(device) for device in devices] or [False])


def _multiplies_fp4(device: Device) -> bool:
    found = re.fullmatch(r"(\d+)\.(\d+)", device.compute_capability) if device.platform == "gpu" else None
    return found is not None and tuple(map(int, found.groups())) >= FIRST_CAPABILITY


def scaled_product(meeting: Meeting, eqn: JaxprEqn) -> Array | None:
    """The result of a W4A4 contraction by `scaled_matmul` on NVIDIA GPUs; None if it is not made for it.

    It is made for the products of `packed_product`, of any number of rows, whose activation has one calibrated input
    scale. On other platforms, under `vmap` and in derivatives it is the contraction of the fake-quantized activation
    with the dequantized weight. The arrays must be on one device.
    """
    input_scale, activation = meeting.weight.scale("input_scale"), pre_scaled(meeting)
    product = product_of(meeting, activation, eqn)
    if product is None or input_scale is None or input_scale.size != 1:
        return None

    def plain(activation: Array, packed: Array, codes: Array, global_scale: Array, input_scale: Array) -> Array:
        return product.plain(quantize_activation(meeting, activation, input_scale), packed, codes, global_scale)

    by_codes = functools.partial(_by_codes, product)
    return differentiable(plain, by_codes)(activation, *product.arrays, input_scale.reshape(()))


def _by_codes(
    product: Product, activation: Array, packed: Array, codes: Array, global_scale: Array, input_scale: Array
) -> Array:
    rows = quantize_with_scale(product.matrix(activation), -1, input_scale, rotation=product.meeting.weight.rotation)
    if product.tensor.axes[0] != -1:  # tensor cores want the contraction of both operands last
        packed, codes = jnp.swapaxes(packed, -1, -2), jnp.swapaxes(codes, -1, -2)
    scales = lax.bitcast_convert_type(codes, jnp.float8_e4m3fn)
    matrix = scaled_matmul(
        rows.packed, rows.scales, input_scale, packed, scales, product.by_expert(global_scale), product.out.dtype
    )
    return product.result(matrix)


def scaled_matmul(
    x_packed: Array,
    x_scales: Array,
    x_global_scale: Array,
    w_packed: Array,
    w_scales: Array,
    w_global_scale: Array,
    dtype: jnp.dtype,
) -> Array:
    """`(xs * x) @ (ws * w).T * w_global_scale * x_global_scale` of E2M1 codes and E4M3 scales, summed in float32.

    NaN scales give NaN in the rows or columns that they are for. Packed codes are uint8 `[M, K/2]` and `[N, K/2]`,
    scales float8_e4m3fn `[M, K/16]` and `[N, K/16]`, global scales float32 `[]`; or all but that of x have a leading
    axis of E experts. The result is `[M, N]` or `[E, M, N]`, cast to `dtype` last.

    Code times scale has at most 6 significant bits and a product of two 12, so they are exact, and only their sum and
    the two factors are rounded: before the cast the result is, to first order, within `(K + 2) * 2^-24` times
    `sum(|x| * |w|)` of real numbers for any order of IEEE additions, and four times that for tensor cores that
    truncate. Simulation rounds both operands to the model's dtype besides.
    """
    last, batch = w_packed.ndim - 1, tuple(range(w_packed.ndim - 2))
    total = lax.scaled_dot(
        _float4(x_packed),
        _float4(w_packed),
        lhs_scale=x_scales,
        rhs_scale=w_scales,
        dimension_numbers=(((last,), (last,)), (batch, batch)),
        preferred_element_type=jnp.float32,
    )
    # One after the other: the product of two small global scales may be too small for a float32.
    return (total * w_global_scale[..., None, None] * x_global_scale).astype(dtype)


def _float4(packed: Array) -> Array:
    """The codes of bytes as float4_e2m1fn along the last axis, the low nibble first. No value is converted."""
    pairs = lax.bitcast_convert_type(packed, jnp.float4_e2m1fn)
    return pairs.reshape(*packed.shape[:-1], 2 * packed.shape[-1])
