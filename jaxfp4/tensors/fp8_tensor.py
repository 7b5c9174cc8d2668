"""Arrays in FP8: E4M3 values and one float32 scale, for the weights and activations that 4 bits are too few for."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.formats import exact, fp8, nvfp4
from jaxfp4.tensors.blocks import normalize_axes
from jaxfp4.tensors.pacing import paced
from jaxfp4.tensors.reductions import as_float_array, global_amax


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["values", "global_scale"], meta_fields=["axes", "dtype"]
)
@dataclasses.dataclass(frozen=True)
class FP8Tensor:
    """A tensor in FP8: `value = global_scale * e4m3`, as Model-Optimizer's FP8 layers are stored.

    A pytree of two arrays, made by `quantize_fp8`; the rest is static and counts axes from the end.
    """

    values: Array
    """float8_e4m3fn, in the shape of the original."""

    global_scale: Array
    """float32 `[]`, or `[E, 1, ..]` with one value per expert: amax / 448."""

    axes: tuple[int, ...]
    """The contraction axes of the original, increasing and negative."""

    dtype: np.dtype
    """The original's dtype."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the original."""
        return tuple(self.values.shape)

    @property
    def ndim(self) -> int:
        """Number of dimensions of the original."""
        return self.values.ndim

    @property
    def sizes(self) -> tuple[int, ...]:
        """The original's sizes along `axes`."""
        return tuple(self.values.shape[a] for a in self.axes)

    @property
    def nbytes(self) -> int:
        """Bytes of the two arrays."""
        return sum(int(np.prod(part.shape)) * part.dtype.itemsize for part in (self.values, self.global_scale))

    def dequantize(self, dtype: jax.typing.DTypeLike | None = None) -> Array:
        """`(global_scale * float32(values)).astype(dtype)`, by default in the original's dtype."""
        return _dequantize(self, jnp.dtype(self.dtype if dtype is None else dtype))

    def __repr__(self) -> str:
        parts = {"values": self.values, "global_scale": self.global_scale}
        if not all(isinstance(part, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)) for part in parts.values()):
            return f"FP8Tensor({', '.join(f'{name}={part!r}' for name, part in parts.items())})"
        axes = self.axes[0] if len(self.axes) == 1 else self.axes
        return f"FP8Tensor(shape={self.shape}, axis={axes}, dtype={np.dtype(self.dtype).name})"


def quantize_fp8(w: Array, axis: int | Sequence[int] = 0, *, amax: Array | None = None) -> FP8Tensor:
    """`e4m3(clip(w / global_scale, -448, 448))`, ties to even, with `global_scale = amax / 448` in IEEE float32.

    An amax of zero, or below 2^-103, has global scale 1.0. NaN or Inf makes the global scale NaN and with it all of the
    result; nothing is raised. `axis` is the contraction, for whoever uses the result. `amax` defaults to that of `w`;
    pass `[E, 1, ..]` for one per expert. Shape and sharding are those of `w`, values the same on every sharding.

    >>> quantize_fp8(jnp.array([448.0, 1.0, -0.3])).dequantize().tolist()
    [448.0, 1.0, -0.3125]
    """
    w = as_float_array(w)
    axes = tuple(a - w.ndim for a in normalize_axes(axis, w.ndim))
    values, scale = _quantize(w, global_amax(w) if amax is None else amax)
    return FP8Tensor(values, scale, axes, np.dtype(w.dtype))


@paced
@jax.jit
def _quantize(w: Array, amax: Array) -> tuple[Array, Array]:
    scale = fp8_scale_of(amax)
    aligned = lax.expand_dims(scale, range(scale.ndim, w.ndim))
    return lax.bitcast_convert_type(fp8.encode(w, aligned), jnp.float8_e4m3fn), scale


@paced
@functools.partial(jax.jit, static_argnums=1)
def _dequantize(tensor: FP8Tensor, dtype: np.dtype) -> Array:
    scale = tensor.global_scale
    codes = lax.bitcast_convert_type(tensor.values, jnp.uint8)
    return exact.cast(fp8.dequantize(codes, lax.expand_dims(scale, range(scale.ndim, tensor.ndim))), dtype)


@paced
@jax.jit
def fp8_scale_of(amax: Array) -> Array:
    """`amax / 448` in IEEE float32; 1.0 where amax is zero or below 2^-103, NaN where it is not finite."""
    return nvfp4.global_scale(amax, fp8.SCALE_DIVISOR)


def fake_quantize_fp8(x: Array, scale: Array | None) -> Array:
    """`quantize_fp8(x).dequantize()` with this scale, float32 `[]`, and the gradient of the identity.

    None takes the scale of `x` itself. What is beyond 448 * scale saturates. Shape, dtype and sharding are those of x.
    """
    x = as_float_array(x)
    return _straight_through(x, fp8_scale_of(global_amax(x)) if scale is None else scale)


@jax.custom_jvp
def _straight_through(x: Array, scale: Array) -> Array:
    return _rounded(x, scale)


@_straight_through.defjvp
def _straight_through_jvp(primals, tangents):  # type: ignore[no-untyped-def]
    return _rounded(*primals), tangents[0]


@paced
@jax.jit
def _rounded(x: Array, scale: Array) -> Array:
    scale = lax.expand_dims(scale, range(x.ndim))
    return exact.cast(fp8.dequantize(fp8.encode(x, scale), scale), x.dtype)
