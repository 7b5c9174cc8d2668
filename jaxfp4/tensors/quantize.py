"""The quantizer. Packing, simulation and export all go through `_encode`, so they cannot disagree."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import exact, nvfp4
from jaxfp4.tensors.blocks import Blocking, normalize_axes
from jaxfp4.tensors.mesh import Layout, layout_of, place
from jaxfp4.tensors.nvfp4_tensor import NVFP4Tensor
from jaxfp4.tensors.reductions import as_float_array, global_amax, local_block_amax, refuse_cut_blocks


class Encoded(NamedTuple):
    """Blocks as codes: `values` `[.., blocks, 16, ..]` and `scales` `[.., blocks, 1, ..]`, both uint8."""

    values: Array
    scales: Array


def quantize(w: Array, axis: int | Sequence[int] = 0, *, global_amax: Array | float | None = None) -> NVFP4Tensor:
    """NVFP4 of `w` with blocks of 16 along the contraction `axis` (several: flattened, the last one minor).

    `global_scale = amax / 2688`, `scale = e4m3(clip(block_amax / (6 * global_scale), 2^-9, 448))`,
    `code = e2m1(w / (scale * global_scale))`, in IEEE float32, ties to even. An all-zero block stores scale 1.0; an
    all-zero tensor, or one whose amax is below 2^-103, has global scale 1.0. -0.0 gets code 0. A contraction that is no
    multiple of 16 is padded with zeros.

    `global_amax` defaults to that of all of `w`; pass `global_amax(w, keep_axes=(0,))` for one per expert, or the
    maximum over tensors that are to share a scale. Values beyond it saturate at 6 * 448 * global_scale.

    The result is the same, bit for bit, on every sharding, under jit, and on CPU and GPU; it keeps the axis order and
    PartitionSpec of `w`, except where the sharding would cut a block. Nothing is gathered.

    Raises ValueError if `w` or `global_amax` holds NaN or Inf. Under jit nothing can be raised: there such a tensor
    gets global scale NaN, or its block scale NaN, and dequantizes to NaN.

    >>> q = quantize(jnp.arange(32.0).reshape(32, 1), axis=0)
    >>> q
    NVFP4Tensor(shape=(32, 1), axis=-2, dtype=float32, 5.50 bits/value)
    >>> q.dequantize()[-1]
    Array([31.], dtype=float32)
    """
    tensor = quantize_unchecked(w, axis, global_amax=global_amax)
    if not isinstance(tensor.packed, jax.core.Tracer):
        # The amax of all of `w` shows whatever is not finite in it; a given one may not, but then a block scale does.
        scales = () if global_amax is None else tensor.scales
        if not _all_finite(tensor.global_scale, scales):
            raise ValueError(
                "the array or its global amax holds NaN or Inf: wanted finite values; repair or exclude it"
            )
    return tensor


def quantize_unchecked(
    w: Array, axis: int | Sequence[int] = 0, *, global_amax: Array | float | None = None
) -> NVFP4Tensor:
    """As `quantize`, without waiting for the result to see whether it is finite."""
    w = as_float_array(w)
    blocking = Blocking(w.shape, normalize_axes(axis, w.ndim))
    amax = _amax_for(w, blocking, global_amax)
    layout = layout_of(w)
    if layout is None:
        refuse_cut_blocks(w, blocking)
        packed, scales, global_scale = _quantize(w, amax, blocking)
    else:
        layout = layout.with_whole_blocks(blocking)
        packed, scales, global_scale = _quantize_sharded(
            place(w, layout), place(amax, _amax_layout(amax, layout)), blocking, layout
        )
    axes = tuple(a - w.ndim for a in blocking.axes)
    sizes = tuple(w.shape[a] for a in blocking.axes)
    return NVFP4Tensor(packed, scales, global_scale, axes, sizes, w.dtype)


def fake_quantize(x: Array, axis: int | Sequence[int] = -1, *, global_amax: Array | float | None = None) -> Array:
    """`quantize(x, axis, global_amax=global_amax).dequantize()`, bit for bit, with the gradient of the identity.

    Special values as in `quantize`; nothing is raised: NaN or Inf in `x` makes its block NaN, and in `global_amax`
    everything NaN. Shape, dtype and sharding are those of `x`.

    >>> fake_quantize(jnp.array([0.1, 1.0, 2.4, 6.0]))
    Array([0., 1., 2., 6.], dtype=float32)
    """
    x = as_float_array(x)
    blocking = Blocking(x.shape, normalize_axes(axis, x.ndim))
    return _straight_through(x, global_scale_of(_amax_for(x, blocking, global_amax)), blocking)


def fake_quantize_with_scale(x: Array, axis: int | Sequence[int], global_scale: Array) -> Array:
    """As `fake_quantize` with the global scale itself, for activations whose scale was calibrated."""
    x = as_float_array(x)
    blocking = Blocking(x.shape, normalize_axes(axis, x.ndim))
    return _straight_through(x, global_scale, blocking)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _straight_through(x: Array, global_scale: Array, blocking: Blocking) -> Array:
    layout = layout_of(x)
    if layout is None:
        refuse_cut_blocks(x, blocking)
        return _fake_quantize(x, global_scale, blocking)
    whole = layout.with_whole_blocks(blocking)
    result = _fake_quantize_sharded(
        place(x, whole), place(global_scale, _amax_layout(global_scale, whole)), blocking, whole
    )
    return place(result, layout)


@_straight_through.defjvp
def _straight_through_jvp(blocking: Blocking, primals, tangents):  # type: ignore[no-untyped-def]
    return _straight_through(*primals, blocking), tangents[0]


def _amax_for(w: Array, blocking: Blocking, given: Array | float | None) -> Array:
    """The global amax to use: float32 `[]`, or with leading axes of `w` and size 1 from the contraction on."""
    if given is None:
        return global_amax(w)
    amax = jnp.asarray(given, jnp.float32)
    wanted = [n if a not in blocking.axes else 1 for a, n in enumerate(w.shape)]
    if amax.ndim not in (0, w.ndim) or any(n not in (1, wanted[a]) for a, n in enumerate(amax.shape)):
        raise ValueError(
            f"global_amax of shape {amax.shape} for an array of shape {w.shape} contracted over {blocking.axes}: "
            f"wanted a scalar or a shape that broadcasts to {tuple(wanted)}, as global_amax(w, keep_axes=(0,)) gives"
        )
    return amax


def _encode(blocks: Array, global_scale: Array, axis: int) -> Encoded:
    """The one quantizer: codes of `blocks` `[.., blocks, 16, ..]`, whose axis of 16 is `axis`."""
    scales = nvfp4.encode_scale(local_block_amax(blocks, axis), global_scale)
    return Encoded(nvfp4.encode_values(blocks, nvfp4.decode_scale(scales), global_scale), scales)


global_scale_of = jax.jit(nvfp4.global_scale)
"""`jaxfp4.formats.nvfp4.global_scale`, compiled."""


@jax.jit
def _all_finite(*arrays: Any) -> Array:
    """Whether no entry of the arrays is NaN or Inf."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a.astype(jnp.float32))) for a in jax.tree.leaves(arrays)]))


@functools.partial(jax.jit, static_argnums=2)
def _quantize(w: Array, amax: Array, blocking: Blocking) -> tuple[Array, Array, Array]:
    global_scale = nvfp4.global_scale(amax)
    encoded = _encode(blocking.to_blocks(w), blocking.align(global_scale), blocking.axis + 1)
    packed = nvfp4.pack(encoded.values, blocking.axis + 1)
    packed = lax.collapse(packed, blocking.axis, blocking.axis + 2)
    scales = lax.bitcast_convert_type(jnp.squeeze(encoded.scales, blocking.axis + 1), jnp.float8_e4m3fn)
    return packed, scales, global_scale


@functools.partial(jax.jit, static_argnums=(2, 3))
def _quantize_sharded(w: Array, amax: Array, blocking: Blocking, layout: Layout) -> tuple[Array, Array, Array]:
    def local(shard: Array, amax: Array) -> tuple[Array, Array, Array]:
        return _quantize(shard, amax, Blocking(shard.shape, blocking.axes))

    amax_spec = _amax_layout(amax, layout).spec
    codes_spec = layout.merged(blocking).spec
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.spec, amax_spec),
        out_specs=(codes_spec, codes_spec, amax_spec),
    )(w, amax)


@functools.partial(jax.jit, static_argnums=2)
def _fake_quantize(x: Array, global_scale: Array, blocking: Blocking) -> Array:
    axis = blocking.axis + 1
    global_scale = blocking.align(global_scale)
    encoded = _encode(blocking.to_blocks(x), global_scale, axis)
    values = nvfp4.dequantize(encoded.values, nvfp4.decode_scale(encoded.scales), global_scale)
    return exact.cast(blocking.from_blocks(values), x.dtype)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _fake_quantize_sharded(x: Array, global_scale: Array, blocking: Blocking, layout: Layout) -> Array:
    def local(shard: Array, global_scale: Array) -> Array:
        return _fake_quantize(shard, global_scale, Blocking(shard.shape, blocking.axes))

    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=(layout.spec, _amax_layout(global_scale, layout).spec), out_specs=layout.spec
    )(x, global_scale)


def _amax_layout(amax: Array, layout: Layout) -> Layout:
    """How an amax or a global scale lies beside its tensor: split where it has a value for each entry of an axis."""
    return layout.restricted([d for d, n in enumerate(amax.shape) if n > 1]) if amax.ndim else Layout(layout.mesh, ())
