"""Contractions of packed weights: which of them are products of matrices, and few rows by the kernel that reads the
weight as it is packed.
"""

from __future__ import annotations

import dataclasses
import functools
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
    product = product_of(meeting, activation, eqn)
    if product is None or product.rows > MOST_ROWS:
        return None
    return differentiable(product.plain, functools.partial(_by_kernel, product))(activation, *product.arrays)


def _by_kernel(product: Product, activation: Array, packed: Array, codes: Array, global_scale: Array) -> Array:
    result = packed_matmul(
        product.matrix(activation),
        packed,
        codes,
        product.by_expert(global_scale),
        contraction_last=product.tensor.axes[0] == -1,
        out_dtype=product.out.dtype,
    )
    return product.result(result)


def product_of(meeting: Meeting, activation: Array, eqn: JaxprEqn) -> Product | None:
    """A contraction as a product of matrices, if it is one of a large packed weight; None for others.

    It is of a weight that is still packed, along its one contraction axis and at most with a leading batch of experts.
    """
    tensor, contraction = meeting.weight.value, meeting.contraction
    if not isinstance(tensor, NVFP4Tensor) or eqn.primitive.name != "dot_general":
        return None
    experts = tensor.ndim - 2
    if experts not in (0, 1) or [w for w, _ in contraction.batched] != list(range(experts)):
        return None
    if len(tensor.axes) != 1 or contraction.weight_contracted != (tensor.ndim + tensor.axes[0],):
        return None
    if tensor.sizes[0] % BLOCK_SIZE or activation.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return None
    scales = (1, tensor.shape[0]) if experts else (1,)
    if tensor.global_scale.size not in scales or eqn.params["out_sharding"] is not None:
        return None
    product = Product(tensor, meeting, eqn, activation.shape)
    return product if product.rows and math.prod(tensor.shape) >= SMALLEST_WEIGHT else None


@dataclasses.dataclass(frozen=True)
class Product:
    """A contraction of a packed weight `[K, N]` or `[N, K]` with rows `[M, K]`, or all with a leading axis of experts.

    The rows are all free dimensions of the activation.
    """

    tensor: NVFP4Tensor
    meeting: Meeting
    eqn: JaxprEqn
    shape: tuple[int, ...]
    """Of the activation."""

    @property
    def _used(self) -> tuple[int, ...]:
        """The activation's batched and contracted dimensions."""
        return tuple(a for _, a in (*self.meeting.contraction.batched, *self.meeting.contraction.contracted))

    @property
    def _experts(self) -> list[int]:
        return [self.shape[d] for d in self._used[:-1]]

    @property
    def rows(self) -> int:
        """How many there are, of each expert."""
        return math.prod(n for d, n in enumerate(self.shape) if d not in self._used)

    @property
    def out(self) -> Any:
        """The type of the result."""
        return self.eqn.outvars[0].aval

    @property
    def arrays(self) -> tuple[Array, Array, Array]:
        """The weight's codes, scales as uint8 and global scale."""
        return self.tensor.packed, lax.bitcast_convert_type(self.tensor.scales, jnp.uint8), self.tensor.global_scale

    def plain(self, activation: Array, packed: Array, codes: Array, global_scale: Array) -> Array:
        """The equation as the model has it, with the dequantized weight."""
        scales = lax.bitcast_convert_type(codes, self.tensor.scales.dtype)
        tensor = dataclasses.replace(self.tensor, packed=packed, scales=scales, global_scale=global_scale)
        operands = [activation, activation]
        operands[self.meeting.contraction.weight] = tensor.dequantize()
        (result,) = jaxprs.bind(self.eqn, operands)
        return result

    def matrix(self, activation: Array) -> Array:
        """The activation as `[M, K]` or `[E, M, K]`."""
        batch, last = self._used[:-1], self._used[-1]
        free = [d for d in range(activation.ndim) if d not in self._used]
        return jnp.transpose(activation, [*batch, *free, last]).reshape(*self._experts, self.rows, -1)

    def by_expert(self, global_scale: Array) -> Array:
        """The weight's global scale `[]` or `[E]`."""
        return jnp.broadcast_to(global_scale.reshape(-1), self._experts) if self._experts else global_scale.reshape(())

    def result(self, matrix: Array) -> Array:
        """The contraction's result from `[M, N]` or `[E, M, N]`."""
        if self.meeting.contraction.weight == 0:
            matrix = jnp.swapaxes(matrix, -1, -2)
        return matrix.reshape(self.out.shape)


def differentiable(plain: Callable[..., Array], cuda: Callable[..., Array]) -> Callable[..., Array]:
    """`cuda` on NVIDIA GPUs; on others, under vmap and in derivatives `plain`.

    Both are functions of the activation, the weight's packed codes, scales and global scale, and maybe more.
    """

    @jax.custom_batching.custom_vmap
    def by_platform(*operands: Array) -> Array:
        return lax.platform_dependent(*operands, cuda=cuda, default=plain)

    @by_platform.def_vmap
    def batched(axis_size: int, in_batched: list[bool], *operands: Array) -> tuple[Array, bool]:
        axes = [0 if b else None for b in in_batched]
        return jax.vmap(plain, axes, axis_size=axis_size)(*operands), True

    @jax.custom_jvp
    def multiply(*operands: Array) -> Array:
        return by_platform(*operands)

    def derivative(primals: tuple[Array, ...], tangents: tuple[Any, ...]) -> tuple[Array, Array]:
        result = multiply(*primals)
        tangent = jnp.zeros_like(result)
        # The activation and the global scale: others are codes, or scales that have no derivative.
        for place in (0, 3):
            if isinstance(tangents[place], SymbolicZero):
                continue

            def along(operand: Array, place: int = place) -> Array:
                return plain(*primals[:place], operand, *primals[place + 1 :])

            tangent = tangent + jax.jvp(along, (primals[place],), (tangents[place],))[1]
        return result, tangent

    multiply.defjvp(derivative, symbolic_zeros=True)
    return multiply
