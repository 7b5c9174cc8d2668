"""GPTQ as an encoder of parameters: stacks, several contraction axes and any axis order brought to `[N, K]`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array

from jaxfp4.algorithms.gptq import ChooseScales, Codes, gptq
from jaxfp4.formats import nvfp4
from jaxfp4.recipes.methods import Gptq
from jaxfp4.tensors.accelerated import Kernel
from jaxfp4.tensors.blocks import Blocking
from jaxfp4.tensors.quantize import Encoded


@dataclasses.dataclass(frozen=True)
class GptqEncoder:
    """GPTQ with block scales as `choose_scales` says, for each weight of a stack by itself.

    `moments` are all second moments, `[K, ...]`. The contraction must be whole on each device; what a device has of the
    outputs and of the stack does not matter.
    """

    choose_scales: ChooseScales
    rounding: Gptq
    whole_contraction: bool = True
    kernel: Kernel | None = None

    def __call__(self, w: Array, global_scale: Array, blocking: Blocking, moments: Array | None) -> Encoded:
        """The codes of an array or a shard."""
        if moments is None:
            raise ValueError("gptq without second moments: wanted those of the activation; calibrate first")
        stack = [a for a, n in enumerate(moments.shape[1:]) if n > 1 and a not in blocking.axes]
        outputs = [a for a in range(w.ndim) if a not in (*stack, *blocking.axes)]
        order = [*stack, *outputs, *blocking.axes]
        channels = math.prod(w.shape[a] for a in blocking.axes)
        matrices = jnp.transpose(w, order).reshape(_count(w, stack), -1, channels)
        hessians = jnp.transpose(moments, [*(a + 1 for a in order), 0]).reshape(len(matrices), channels, channels)
        shape = [w.shape[a] if a in stack else 1 for a in range(w.ndim)]
        scale = jnp.transpose(jnp.broadcast_to(global_scale, shape), order).reshape(-1)
        result = jax.vmap(self._one)(matrices, hessians, scale)
        values, scales = (_in_blocks(part, w, stack, outputs, blocking) for part in result)
        return Encoded(nvfp4.pack(values, blocking.axis + 1), scales)

    def _one(self, w: Array, hessian: Array, global_scale: Array) -> Codes:
        rounding = self.rounding
        return gptq(w, hessian, global_scale, self.choose_scales, damping=rounding.damping, order=rounding.order)


def _count(w: Array, axes: Sequence[int]) -> int:
    return math.prod(w.shape[a] for a in axes)


def _in_blocks(part: Array, w: Array, stack: Sequence[int], outputs: Sequence[int], blocking: Blocking) -> Array:
    """Codes `[S, N, K]`, or scales `[S, N, K / 16]`, in the dimensions of `blocking.to_blocks`."""
    inner = part.shape[-1] // (blocking.blocks * _others(blocking))
    contracted = [] if blocking.merged else [w.shape[a] for a in blocking.axes[:-1]]
    sizes = [*(w.shape[a] for a in (*stack, *outputs)), *contracted, blocking.blocks, inner]
    placed = [*stack, *outputs, *(() if blocking.merged else blocking.axes[:-1])]
    # The merged array has lost the leading contraction axes.
    lost = blocking.axes[:-1] if blocking.merged else ()
    places = [a - sum(m < a for m in lost) for a in placed]
    places = [p if p < blocking.axis else p + 1 for p in places] + [blocking.axis, blocking.axis + 1]
    return jnp.transpose(part.reshape(sizes), [places.index(d) for d in range(len(sizes))])


def _others(blocking: Blocking) -> int:
    """Blocks lie along one axis; how many there are of them along the other contraction axes."""
    return 1 if blocking.merged else math.prod(blocking.shape[a] for a in blocking.axes[:-1])
