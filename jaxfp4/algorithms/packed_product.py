"""Contractions of packed weights with few rows, by the kernel that reads the weight as it is packed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.custom_derivatives import SymbolicZero
from jax.extend.core import JaxprEqn

from jaxfp4.formats import BLOCK_SIZE
from jaxfp4.kernels.matmul import MOST_ROWS, packed_matmul
from jaxfp4.tensors import NVFP4Tensor
from jaxfp4.transform import jaxprs
from jaxfp4.transform.sites import Meeting

SMALLEST_WEIGHT = 1 << 20
"""Fewer values than these are read so fast that nothing is gained."""


def packed_product(meeting: Meeting, activation: Array, eqn: JaxprEqn) -> Array | None:
    """The result of a contraction, on NVIDIA GPUs by `packed_matmul`; None if that kernel is not made for it.

    It is made for a `dot_general` of a weight that is still packed, along its one contraction axis and at most with a
    leading batch of experts, and an activation of few rows. On other platforms, under `vmap` and in derivatives it is
    the contraction with the dequantized weight. The arrays must be on one device.
    """
    tensor = meeting.weight.value
    if not isinstance(tensor, NVFP4Tensor) or not _is_small_product(meeting, tensor, activation, eqn):
        return None
    product = _Product(tensor, meeting, eqn)
    codes = lax.bitcast_convert_type(tensor.scales, jnp.uint8)
    return _differentiable(product)(activation, tensor.packed, codes, tensor.global_scale)


def _is_small_product(meeting: Meeting, tensor: NVFP4Tensor, activation: Array, eqn: JaxprEqn) -> bool:
    contraction = meeting.contraction
    if eqn.primitive.name != "dot_general" or eqn.params["out_sharding"] is not None:
        return False
    experts = tensor.ndim - 2
    if experts not in (0, 1) or [w for w, _ in contraction.batched] != list(range(experts)):
        return False
    if len(tensor.axes) != 1 or contraction.weight_contracted != (tensor.ndim + tensor.axes[0],):
        return False
    if tensor.sizes[0] % BLOCK_SIZE or activation.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return False
    used = math.prod(activation.shape[d] for d in _activation_dimensions(meeting))
    rows = activation.size // used if used else 0
    large = math.prod(tensor.shape) >= SMALLEST_WEIGHT
    scales = (1, tensor.shape[0]) if experts else (1,)
    return large and 0 < rows <= MOST_ROWS and tensor.global_scale.size in scales


def _activation_dimensions(meeting: Meeting) -> tuple[int, ...]:
    """The activation's batched and contracted dimensions."""
    return tuple(a for _, a in (*meeting.contraction.batched, *meeting.contraction.contracted))


@dataclasses.dataclass(frozen=True)
class _Product:
    """The contraction as a function of the activation and the weight's arrays, in two forms."""

    tensor: NVFP4Tensor
    meeting: Meeting
    eqn: JaxprEqn

    def plain(self, activation: Array, packed: Array, codes: Array, global_scale: Array) -> Array:
        """The equation as the model has it, with the dequantized weight."""
        scales = lax.bitcast_convert_type(codes, self.tensor.scales.dtype)
        tensor = dataclasses.replace(self.tensor, packed=packed, scales=scales, global_scale=global_scale)
        operands = [activation, activation]
        operands[self.meeting.contraction.weight] = tensor.dequantize()
        (result,) = jaxprs.bind(self.eqn, operands)
        return result

    def packed(self, activation: Array, packed: Array, codes: Array, global_scale: Array) -> Array:
        """By the kernel. The rows of x are all free dimensions of the activation."""
        used = _activation_dimensions(self.meeting)
        batch, last = used[:-1], used[-1]
        free = [d for d in range(activation.ndim) if d not in used]
        experts = [activation.shape[d] for d in batch]
        rows = [activation.shape[d] for d in free]
        x = jnp.transpose(activation, [*batch, *free, last]).reshape(*experts, math.prod(rows), -1)
        global_scale = jnp.broadcast_to(global_scale.reshape(-1), experts) if experts else global_scale.reshape(())
        out: Any = self.eqn.outvars[0].aval
        result = packed_matmul(
            x,
            packed,
            codes,
            global_scale,
            contraction_last=self.tensor.axes[0] == -1,
            out_dtype=out.dtype,
        )
        if self.meeting.contraction.weight == 0:
            result = jnp.swapaxes(result, -1, -2)
        return result.reshape(out.shape)


def _differentiable(product: _Product) -> Callable[..., Array]:
    """The product with the derivatives of its plain form, which also serves under vmap."""

    @jax.custom_batching.custom_vmap
    def by_platform(*operands: Array) -> Array:
        return lax.platform_dependent(*operands, cuda=product.packed, default=product.plain)

    @by_platform.def_vmap
    def batched(axis_size: int, in_batched: list[bool], *operands: Array) -> tuple[Array, bool]:
        axes = [0 if b else None for b in in_batched]
        return jax.vmap(product.plain, axes, axis_size=axis_size)(*operands), True

    @jax.custom_jvp
    def multiply(*operands: Array) -> Array:
        return by_platform(*operands)

    def derivative(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        result = multiply(*primals)
        tangent = jnp.zeros_like(result)
        for place in (0, 3):  # the activation and the global scale: the others are codes
            if isinstance(tangents[place], SymbolicZero):
                continue

            def along(operand: Array, place: int = place) -> Array:
                activation, packed, codes, global_scale = primals
                if place == 0:
                    return product.plain(operand, packed, codes, global_scale)
                return product.plain(activation, packed, codes, operand)

            tangent = tangent + jax.jvp(along, (primals[place],), (tangents[place],))[1]
        return result, tangent

    multiply.defjvp(derivative, symbolic_zeros=True)
    return multiply
