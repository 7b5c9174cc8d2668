"""Quantized arrays as pytrees."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, exact, nvfp4
from jaxfp4.tensors import accelerated
from jaxfp4.tensors.blocks import Blocking
from jaxfp4.tensors.cache import CacheAmax
from jaxfp4.tensors.fp8_tensor import FP8Tensor
from jaxfp4.tensors.mesh import Layout, amax_layout, layout_of, place
from jaxfp4.tensors.pacing import paced


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["packed", "scales", "global_scale"],
    meta_fields=["axes", "sizes", "dtype"],
)
@dataclasses.dataclass(frozen=True)
class NVFP4Tensor:
    """A tensor in NVFP4: `value = (float32(scale) * global_scale) * e2m1`, one scale for 16 values of the contraction.

    It is a pytree of three arrays, so it passes through jit, vmap, scan, `jax.device_put` and an `nnx.Param`. The rest
    is static and counts axes from the end, so leading axes may be mapped or scanned over.
    """

    packed: Array
    """uint8 `[.., K/2, ..]`: two E2M1 codes a byte, the even element in the low nibble. Axis order of the original."""

    scales: Array
    """float8_e4m3fn `[.., K/16, ..]`."""

    global_scale: Array
    """float32 `[]`, or `[E, 1, ..]` with one value per expert."""

    axes: tuple[int, ...]
    """The contraction axes of the original, increasing and negative."""

    sizes: tuple[int, ...]
    """The original's sizes along `axes`, before any padding to a multiple of 16."""

    dtype: np.dtype
    """The original's dtype."""

    @property
    def ndim(self) -> int:
        """Number of dimensions of the original."""
        return self.packed.ndim + (len(self.axes) - 1 if self._merged else 0)

    @property
    def _merged(self) -> bool:
        return len(self.axes) > 1 and self.sizes[-1] % BLOCK_SIZE != 0

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original."""
        if not self._merged:
            shape = list(self.packed.shape)
            # Without padding the size follows from the codes, also for a shard or a concatenation of shards.
            size = self.sizes[-1]
            shape[self.axes[-1]] = size if size % BLOCK_SIZE else 2 * self.packed.shape[self.axes[-1]]
            return tuple(shape)
        ndim = self.ndim
        merged_axis = ndim + self.axes[-1] - (len(self.axes) - 1)
        rest = [n for a, n in enumerate(self.packed.shape) if a != merged_axis]
        sizes = dict(zip(self.axes, self.sizes, strict=True))
        remaining = iter(rest)
        return tuple(sizes[a - ndim] if a - ndim in sizes else next(remaining) for a in range(ndim))

    @property
    def blocking(self) -> Blocking:
        """How the original divides into blocks."""
        return Blocking(self.shape, tuple(a + self.ndim for a in self.axes))

    @property
    def nbytes(self) -> int:
        """Bytes of the three arrays."""
        return sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in jax.tree.leaves(self))

    def dequantize(self, dtype: jax.typing.DTypeLike | None = None) -> Array:
        """`((float32(scales) * global_scale) * e2m1(packed)).astype(dtype)`, by default in the original's dtype.

        The product is float32 in this order and cast last. A block whose scale is NaN gives NaN.
        """
        wanted = jnp.dtype(self.dtype if dtype is None else dtype)
        layout = None if isinstance(self.packed, jax.core.Tracer) else self._layout_of_shards()
        if layout is None:
            return _dequantize(self, wanted, accelerated.can_run(self.packed))
        scale_layout = amax_layout(self.global_scale, layout)
        placed = dataclasses.replace(
            self, scales=place(self.scales, layout), global_scale=place(self.global_scale, scale_layout)
        )
        return _dequantize_sharded(placed, wanted, layout, scale_layout)

    def _layout_of_shards(self) -> Layout | None:
        """How the codes are split; None if not at all, or if a shard is no tensor of its own."""
        layout = layout_of(jnp.asarray(self.packed))
        if layout is None or self.sizes[-1] % BLOCK_SIZE or not layout.blocks_are_whole(self.blocking):
            return None
        return layout

    def __repr__(self) -> str:
        parts = {"packed": self.packed, "scales": self.scales, "global_scale": self.global_scale}
        if not all(isinstance(part, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) for part in parts.values()):
            # A tree of something else about the arrays, such as their shardings.
            return f"NVFP4Tensor({', '.join(f'{name}={part!r}' for name, part in parts.items())})"
        values = int(np.prod(self.shape))
        bits = f"{8 * self.nbytes / values:.2f} bits/value" if values else "empty"
        axes = self.axes[0] if len(self.axes) == 1 else self.axes
        return f"NVFP4Tensor(shape={self.shape}, axis={axes}, dtype={np.dtype(self.dtype).name}, {bits})"


QuantizedTensor = NVFP4Tensor | FP8Tensor


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["weight", "input_scale", "pre_scale", "cache"],
    meta_fields=["rotation"],
)
@dataclasses.dataclass(frozen=True)
class QuantizedWeight:
    """A quantized parameter and what its contraction needs at run time."""

    weight: QuantizedTensor

    input_scale: Array | None = None
    """float32 global scale of the activation that meets the weight; None leaves the activation as it is. Amax / 2688
    for NVFP4, amax / 448 for FP8."""

    pre_scale: Array | None = None
    """Factors for the activation's channels, multiplied in before it is quantized; None for none."""

    rotation: int = 0
    """The size of the groups of channels in which weight and activation are rotated by `hadamard`; 0 for none."""

    cache: CacheAmax | None = None
    """The absolute maxima of keys or values that are the weight's result; None if they are not quantized."""

    def __repr__(self) -> str:
        scales = {"input_scale": self.input_scale, "pre_scale": self.pre_scale}
        parts = [repr(self.weight), *(f"{name}={_short(s)}" for name, s in scales.items() if s is not None)]
        parts += [f"rotation={self.rotation}"] if self.rotation else []
        if self.cache is not None:
            amaxes = {"keys": self.cache.keys, "values": self.cache.values}
            names = [f"{name}={_short(a)}" for name, a in amaxes.items() if a is not None]
            parts.append(f"cache={self.cache.format.value}({', '.join(names)})")
        return f"QuantizedWeight({', '.join(parts)})"


def _short(scale: Any) -> str:
    """A number as it is, a larger array by its type and shape."""
    if not isinstance(scale, (jax.Array, np.ndarray)) or isinstance(scale, jax.core.Tracer):
        return repr(scale)
    return f"{float(scale):.6g}" if scale.ndim == 0 else f"{scale.dtype}{list(scale.shape)}"


@paced
@functools.partial(jax.jit, static_argnums=(1, 2))
def _dequantize(tensor: NVFP4Tensor, dtype: np.dtype, kernels: bool) -> Array:
    blocking = tensor.blocking

    def plain(packed: Array, scales: Array, global_scale: Array) -> Array:
        axis = blocking.axis
        codes = nvfp4.unpack(packed, axis).reshape(blocking.blocks_shape)
        scale = nvfp4.decode_scale(lax.bitcast_convert_type(scales, jnp.uint8))
        values = nvfp4.dequantize(codes, lax.expand_dims(scale, [axis + 1]), blocking.align(global_scale))
        return exact.cast(blocking.from_blocks(values), dtype)

    geometry = accelerated.geometry_of(blocking, tensor.global_scale)
    parts = (tensor.packed, tensor.scales, tensor.global_scale)
    if not kernels or geometry is None or dtype not in accelerated.DTYPES:
        return plain(*parts)
    fast = functools.partial(accelerated.dequantize, blocking=blocking, geometry=geometry, dtype=dtype)
    return lax.platform_dependent(*parts, cuda=fast, default=plain)


@paced
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _dequantize_sharded(tensor: NVFP4Tensor, dtype: np.dtype, layout: Layout, scale_layout: Layout) -> Array:
    def local(packed: Array, scales: Array, global_scale: Array) -> Array:
        shard = dataclasses.replace(tensor, packed=packed, scales=scales, global_scale=global_scale)
        return _dequantize(shard, dtype, accelerated.can_run(packed))

    specs = (layout.spec, layout.spec, scale_layout.spec)
    return jax.shard_map(local, mesh=layout.mesh, in_specs=specs, out_specs=layout.spec)(
        tensor.packed, tensor.scales, tensor.global_scale
    )
