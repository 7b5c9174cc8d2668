"""The quantizer. Packing, simulation and export all go through an `Encoder`, so they cannot disagree."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import exact, nvfp4
from jaxfp4.tensors import accelerated, nearest
from jaxfp4.tensors.blocks import Blocking, normalize_axes
from jaxfp4.tensors.hadamard import hadamard, rotated_blocks, rotated_tangent, rotates_blocks
from jaxfp4.tensors.mesh import Layout, amax_layout, layout_of, place
from jaxfp4.tensors.nvfp4_tensor import NVFP4Tensor
from jaxfp4.tensors.pacing import paced
from jaxfp4.tensors.reductions import as_float_array, global_amax, local_block_amax, refuse_cut_blocks, rotated_amax


class Encoded(NamedTuple):
    """Blocks as codes: `packed` `[.., blocks, 8, ..]`, two a byte, and `scales` `[.., blocks, 1, ..]`, both uint8."""

    packed: Array
    scales: Array


class Encoder(Protocol):
    """How codes and block scales are chosen. Hashable: it is a static argument of the compiled quantizers."""

    @property
    def whole_contraction(self) -> bool:
        """Whether it needs all values along the contraction on one device, not only whole blocks."""
        ...

    @property
    def kernel(self) -> accelerated.Kernel | None:
        """How it chooses block scales in a GPU kernel that rounds to nearest; None if it does not."""
        ...

    def __call__(self, w: Array, global_scale: Array, blocking: Blocking, moments: Array | None) -> Encoded:
        """The codes of an array or a shard; a shard holds whole blocks.

        `global_scale` is `[]` or has the leading axes of `w`, `moments` `[R, ...]` what is known of the activation, its
        other dimensions those of `w` or 1.
        """
        ...


ChooseScales = Callable[[Array, Array, int, Array | None], Array]
"""`(blocks [.., 16, ..], global_scale, axis of 16, moments [R, ...] in blocks or None) -> E4M3 codes [.., 1, ..]`."""


def max_scales(blocks: Array, global_scale: Array, axis: int, moments: Array | None = None) -> Array:
    """Block scales from block amaxes."""
    return nvfp4.encode_scale(local_block_amax(blocks, axis), global_scale)


@dataclasses.dataclass(frozen=True)
class RoundToNearest:
    """Each value to the nearest code under the scale chosen for its block."""

    choose_scales: ChooseScales = max_scales
    whole_contraction: bool = False
    kernel: accelerated.Kernel | None = None
    """The same choice in a GPU kernel; None if there is none."""

    def __call__(self, w: Array, global_scale: Array, blocking: Blocking, moments: Array | None) -> Encoded:
        """The codes of an array or a shard."""
        blocks, axis = blocking.to_blocks(w), blocking.axis + 1
        global_scale = blocking.align(global_scale)
        scales = self.choose_scales(blocks, global_scale, axis, moments_in_blocks(moments, blocking))
        return Encoded(nearest.quantized(blocks, scales, global_scale, axis), scales)


NEAREST = RoundToNearest(kernel=accelerated.MAX)
"""Max calibration."""


def moments_in_blocks(moments: Array | None, blocking: Blocking) -> Array | None:
    """`[R, ...]` with the dimensions of the array cut into blocks as the array is."""
    if moments is None:
        return None
    inner = Blocking(moments.shape[1:], blocking.axes)
    return jax.vmap(inner.to_blocks)(moments)


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
    w: Array,
    axis: int | Sequence[int] = 0,
    *,
    global_amax: Array | float | None = None,
    divisor: int = nvfp4.TENSOR_DIVISOR,
    encoder: Encoder = NEAREST,
    moments: Array | None = None,
    rotation: int = 0,
) -> NVFP4Tensor:
    """As `quantize`, without waiting for the result to see whether it is finite.

    `divisor` is global amax over global scale, `encoder` chooses codes and block scales, for which it may want
    `moments` of the activation. With a `rotation` it is of `hadamard(w.astype(float32), axis, rotation)`, and so have
    to be the global amax and the moments; the dtype stays that of `w`.
    """
    w = as_float_array(w)
    dtype, blocking = w.dtype, Blocking(w.shape, normalize_axes(axis, w.ndim))
    rotated = rotates_blocks(w, blocking.axes, rotation)
    if rotation and not rotated:
        w = hadamard(exact.to_float32(w), blocking.axes, rotation)
    if global_amax is None and rotated:
        global_amax = rotated_amax(w, blocking.axes, rotation)
    amax = _amax_for(w, blocking, global_amax)
    layout = layout_of(w)
    if layout is None:
        refuse_cut_blocks(w, blocking)
        kernels = accelerated.can_run(w)
        packed, scales, global_scale = quantize_local(w, amax, moments, blocking, divisor, encoder, rotated, kernels)
    else:
        layout = layout.with_whole_blocks(blocking, contraction=encoder.whole_contraction)
        amax = place(amax, amax_layout(amax, layout))
        if moments is not None:
            moments = place(moments, _moments_layout(moments, layout))
        packed, scales, global_scale = _quantize_sharded(
            place(w, layout), amax, moments, blocking, divisor, encoder, rotated, layout
        )
    axes = tuple(a - w.ndim for a in blocking.axes)
    sizes = tuple(w.shape[a] for a in blocking.axes)
    return NVFP4Tensor(packed, scales, global_scale, axes, sizes, dtype)


def quantize_with_scale(x: Array, axis: int, global_scale: Array, *, rotation: int = 0) -> NVFP4Tensor:
    """The codes behind `fake_quantize_with_scale`, of an array on one device.

    With a `rotation` they are of `hadamard(x, axis, rotation)`, in the dtype of `x`.
    """
    x = as_float_array(x)
    blocking = Blocking(x.shape, normalize_axes(axis, x.ndim))
    refuse_cut_blocks(x, blocking)
    if rotation:
        x = hadamard(x, blocking.axes, rotation)
    packed, scales = _encoded(x, global_scale, None, blocking, NEAREST, False, accelerated.can_run(x))
    (axis,) = blocking.axes
    return NVFP4Tensor(packed, scales, global_scale, (axis - x.ndim,), (x.shape[axis],), x.dtype)


def fake_quantize(x: Array, axis: int | Sequence[int] = -1, *, global_amax: Array | float | None = None) -> Array:
    """`quantize(x, axis, global_amax=global_amax).dequantize()`, bit for bit, with the gradient of the identity.

    Special values as in `quantize`; nothing is raised: NaN or Inf in `x` makes its block NaN, and in `global_amax`
    everything NaN. Shape, dtype and sharding are those of `x`.

    >>> fake_quantize(jnp.array([0.1, 1.0, 2.4, 6.0]))
    Array([0., 1., 2., 6.], dtype=float32)
    """
    x = as_float_array(x)
    blocking = Blocking(x.shape, normalize_axes(axis, x.ndim))
    return _straight_through(x, global_scale_of(_amax_for(x, blocking, global_amax)), blocking, rotated=False)


def fake_quantize_with_scale(x: Array, axis: int | Sequence[int], global_scale: Array, *, rotation: int = 0) -> Array:
    """As `fake_quantize` with the global scale itself, for activations whose scale was calibrated.

    With a `rotation` it is of `hadamard(x, axis, rotation)`, whose gradient it has.
    """
    x = as_float_array(x)
    blocking = Blocking(x.shape, normalize_axes(axis, x.ndim))
    rotated = rotates_blocks(x, blocking.axes, rotation)
    if rotation and not rotated:
        x = hadamard(x, blocking.axes, rotation)
    return _straight_through(x, global_scale, blocking, rotated)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _straight_through(x: Array, global_scale: Array, blocking: Blocking, rotated: bool) -> Array:
    layout = layout_of(x)
    if layout is None:
        refuse_cut_blocks(x, blocking)
        return _fake_quantize(x, global_scale, blocking, rotated, accelerated.can_run(x))
    whole = layout.with_whole_blocks(blocking)
    result = _fake_quantize_sharded(
        place(x, whole), place(global_scale, amax_layout(global_scale, whole)), blocking, rotated, whole
    )
    return place(result, layout)


@_straight_through.defjvp
def _straight_through_jvp(blocking: Blocking, rotated: bool, primals, tangents):  # type: ignore[no-untyped-def]
    tangent = rotated_tangent(tangents[0], blocking) if rotated else tangents[0]
    return _straight_through(*primals, blocking, rotated), tangent


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


global_scale_of = paced(jax.jit(nvfp4.global_scale))
"""`jaxfp4.formats.nvfp4.global_scale`, compiled."""


@paced
@jax.jit
def _all_finite(*arrays: Any) -> Array:
    """Whether no entry of the arrays is NaN or Inf."""
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(a.astype(jnp.float32))) for a in jax.tree.leaves(arrays)]))


@paced
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def quantize_local(
    w: Array,
    amax: Array,
    moments: Array | None,
    blocking: Blocking,
    divisor: int,
    encoder: Encoder,
    rotated: bool,
    kernels: bool,
) -> tuple[Array, Array, Array]:
    """`(packed, scales, global_scale)` of an array, or of a shard that holds whole blocks."""
    global_scale = nvfp4.global_scale(amax, divisor)
    packed, scales = _encoded(w, global_scale, moments, blocking, encoder, rotated, kernels)
    return packed, scales, global_scale


@paced
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6))
def _encoded(
    w: Array,
    global_scale: Array,
    moments: Array | None,
    blocking: Blocking,
    encoder: Encoder,
    rotated: bool,
    kernels: bool,
) -> tuple[Array, Array]:
    """Packed codes and E4M3 scales."""

    def plain(w: Array, global_scale: Array) -> tuple[Array, Array]:
        w = rotated_blocks(exact.to_float32(w), blocking) if rotated else w
        encoded = encoder(w, global_scale, blocking, moments)
        packed = lax.collapse(encoded.packed, blocking.axis, blocking.axis + 2)
        return packed, jnp.squeeze(encoded.scales, blocking.axis + 1)

    prepare = accelerated.preparation(jnp.float32, rotated)
    fast = _in_kernel(encoder.kernel, blocking, global_scale, moments, prepare) if kernels else None
    if fast is None:
        packed, scales = plain(w, global_scale)
    else:
        packed, scales = lax.platform_dependent(w, global_scale, cuda=fast, default=plain)
    return packed, lax.bitcast_convert_type(scales, jnp.float8_e4m3fn)


def _in_kernel(
    kernel: accelerated.Kernel | None,
    blocking: Blocking,
    global_scale: Array,
    moments: Array | None,
    prepare: accelerated.Preparation,
) -> Callable[[Array, Array], tuple[Array, Array]] | None:
    """`(w, global_scale) -> (packed, scales)` by a kernel; None if there is none for this choice or layout."""
    geometry = accelerated.geometry_of(blocking, global_scale)
    if kernel is None or geometry is None:
        return None
    if kernel.table is None:
        return functools.partial(
            accelerated.quantize, blocking=blocking, geometry=geometry, kernel=kernel, prepare=prepare
        )
    in_blocks = moments_in_blocks(moments, blocking)
    groups = None if in_blocks is None else accelerated.groups_of(blocking, geometry, in_blocks)
    if in_blocks is None or groups is None:
        return None
    table = kernel.table(in_blocks, blocking.axis + 2)
    return functools.partial(
        accelerated.quantize_groups, blocking=blocking, groups=groups, table=table, kernel=kernel, prepare=prepare
    )


@paced
@functools.partial(jax.jit, static_argnums=(3, 4, 5, 6, 7))
def _quantize_sharded(
    w: Array,
    amax: Array,
    moments: Array | None,
    blocking: Blocking,
    divisor: int,
    encoder: Encoder,
    rotated: bool,
    layout: Layout,
) -> tuple[Array, Array, Array]:
    def local(shard: Array, amax: Array, moments: Array | None) -> tuple[Array, Array, Array]:
        of_shard, kernels = Blocking(shard.shape, blocking.axes), accelerated.can_run(shard)
        return quantize_local(shard, amax, moments, of_shard, divisor, encoder, rotated, kernels)

    amax_spec = amax_layout(amax, layout).spec
    moments_spec = None if moments is None else _moments_layout(moments, layout).spec
    codes_spec = layout.merged(blocking).spec
    return jax.shard_map(
        local,
        mesh=layout.mesh,
        in_specs=(layout.spec, amax_spec, moments_spec),
        out_specs=(codes_spec, codes_spec, amax_spec),
    )(w, amax, moments)


@paced
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _fake_quantize(x: Array, global_scale: Array, blocking: Blocking, rotated: bool, kernels: bool) -> Array:
    def plain(x: Array, global_scale: Array) -> Array:
        x = rotated_blocks(x, blocking) if rotated else x
        blocks, global_scale = blocking.to_blocks(x), blocking.align(global_scale)
        scales = max_scales(blocks, global_scale, blocking.axis + 1)
        return blocking.from_blocks(nearest.rounded(blocks, scales, global_scale))

    geometry = accelerated.geometry_of(blocking, global_scale)
    if not kernels or geometry is None:
        return plain(x, global_scale)
    prepare = accelerated.preparation(x.dtype, rotated)
    fast = functools.partial(accelerated.fake_quantize, blocking=blocking, geometry=geometry, prepare=prepare)
    return lax.platform_dependent(x, global_scale, cuda=fast, default=plain)


@paced
@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _fake_quantize_sharded(x: Array, global_scale: Array, blocking: Blocking, rotated: bool, layout: Layout) -> Array:
    def local(shard: Array, global_scale: Array) -> Array:
        of_shard, kernels = Blocking(shard.shape, blocking.axes), accelerated.can_run(shard)
        return _fake_quantize(shard, global_scale, of_shard, rotated, kernels)

    return jax.shard_map(
        local, mesh=layout.mesh, in_specs=(layout.spec, amax_layout(global_scale, layout).spec), out_specs=layout.spec
    )(x, global_scale)


def _moments_layout(moments: Array, layout: Layout) -> Layout:
    """How moments `[R, ...]` lie beside their tensor: split where they have a value for each entry of an axis."""
    names = [n if size > 1 else () for n, size in zip(layout.names, moments.shape[1:], strict=True)]
    return Layout(layout.mesh, ((), *names))
