"""Absolute maxima over blocks and over whole tensors, exact on any sharding."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, exact
from jaxfp4.tensors import accelerated
from jaxfp4.tensors.blocks import Blocking, normalize_axes
from jaxfp4.tensors.hadamard import hadamard, rotated_blocks, rotates_blocks
from jaxfp4.tensors.mesh import AxisNames, Layout, amax_over_mesh, enclosing_axes, layout_of, place, varying_axes
from jaxfp4.tensors.pacing import paced

SUPPORTED_DTYPES = ("float32", "bfloat16", "float16")


def block_amax(x: Array, axis: int | Sequence[int] = -1) -> Array:
    """The largest magnitude of each block: `jnp.max(jnp.abs(x.reshape(.., K // 16, 16, ..)), axis + 1)`, float32.

    NaN in a block gives NaN, Inf gives Inf, an all-zero block 0. A contraction `K` that is no multiple of 16 is padded
    with zeros. With several axes, blocks run along the flattened contraction, last axis minor; where the last axis is a
    multiple of 16 the result keeps all axes, `[.., K_last / 16, ..]`, otherwise the contraction axes become one.

    Works on sharded arrays without communication if each block lies on one device; blocks that the sharding cuts are
    first brought together by moving the sharding to another dimension. Inside a shard_map it is the local reduction.
    The maximum of the result is the global amax: on a GPU one pass over the memory gives both.

    >>> block_amax(jnp.array([[1.0, -7.0] * 8 + [0.0] * 16]), axis=1)
    Array([[7., 0.]], dtype=float32)
    """
    x = as_float_array(x)
    return _amaxes(x, Blocking(x.shape, normalize_axes(axis, x.ndim)), rotated=False)


def rotated_amax(x: Array, axis: int | Sequence[int], size: int, *, keep_axes: Sequence[int] = ()) -> Array:
    """`global_amax(hadamard(x.astype(float32), axis, size), keep_axes=keep_axes)`; without rotation if `size` is 0.

    For `size` 16 it is the maximum over blocks, each of which is rotated where it lies: a GPU reads `x` once and writes
    the block amaxes only. Raises ValueError if a contraction axis is kept.
    """
    x = as_float_array(x)
    axes, keep = normalize_axes(axis, x.ndim), normalize_axes(keep_axes, x.ndim) if keep_axes else ()
    if set(axes) & set(keep):
        raise ValueError(f"keep_axes={tuple(keep_axes)} of a rotation along {axes}: wanted other axes than these")
    if not rotates_blocks(x, axes, size):
        return global_amax(hadamard(exact.to_float32(x), axes, size) if size else x, keep_axes=keep)
    blocking = Blocking(x.shape, axes)
    merged = axes[:-1] if blocking.merged else ()
    amax = global_amax(_amaxes(x, blocking, rotated=True), keep_axes=[a - sum(m < a for m in merged) for a in keep])
    return amax.reshape([n if a in keep else 1 for a, n in enumerate(x.shape)]) if keep else amax


def global_amax(x: Array, *, keep_axes: Sequence[int] = (), axis_names: AxisNames | None = None) -> Array:
    """The largest magnitude of the whole tensor, float32: `jnp.max(jnp.abs(x))`.

    NaN anywhere gives NaN, else Inf gives Inf; an empty tensor gives 0. `keep_axes` are left unreduced with size 1 for
    the others, so `keep_axes=(0,)` gives `[E, 1, 1]`, one value per expert of `[E, K, N]`.

    The value is the same on every sharding: a local reduction in a shard_map and one `lax.pmax` over the mesh axes that
    split the reduced dimensions. Inside your own shard_map it is `lax.pmax` over `axis_names`, by default all axes over
    which `x` varies; `axis_names` must be given there with `keep_axes`, as only you know which mesh axes split those.

    >>> w = jnp.array([[1.0, -3.0], [2.0, 0.0]])
    >>> global_amax(w), global_amax(w, keep_axes=[0])
    (Array(3., dtype=float32), Array([[3.],
           [2.]], dtype=float32))
    """
    x = as_float_array(x)
    keep = normalize_axes(keep_axes, x.ndim) if keep_axes else ()
    layout = layout_of(x)
    if layout is not None:
        return _global_amax_sharded(x, keep, layout)
    varying = varying_axes(x)
    if axis_names is None and keep and varying:
        raise ValueError(
            f"keep_axes={tuple(keep_axes)} inside a shard_map over {varying}: wanted axis_names, the mesh axes that "
            "split the other dimensions; for experts split over 'ep' pass axis_names=('tp',)"
        )
    unknown = [name for name in axis_names or () if varying and name not in enclosing_axes()]
    if unknown:
        raise ValueError(f"axis_names={axis_names!r} inside a shard_map: wanted axes of its mesh, {enclosing_axes()}")
    names = varying if axis_names is None else tuple(name for name in axis_names if name in varying)
    return amax_over_mesh(local_global_amax(x, keep), names)


def as_float_array(x: Array) -> Array:
    """`x` as a JAX array; TypeError unless it is float32, bfloat16 or float16."""
    x = jnp.asarray(x)
    if x.dtype.name not in SUPPORTED_DTYPES:
        raise TypeError(f"an array of dtype {x.dtype}: wanted one of {', '.join(SUPPORTED_DTYPES)}; cast it first")
    return x


def refuse_cut_blocks(x: Array, blocking: Blocking) -> None:
    """ValueError if, inside a shard_map, the local contraction is no multiple of 16 and so may cut a block."""
    varying = varying_axes(x)
    if varying and blocking.length % BLOCK_SIZE:
        raise ValueError(
            f"a shard with {blocking.length} values along the contraction, inside a shard_map over {varying}: wanted a "
            f"multiple of {BLOCK_SIZE}, or blocks would depend on the layout; split another dimension"
        )


def _amaxes(x: Array, blocking: Blocking, *, rotated: bool) -> Array:
    """The amaxes of blocks, or of blocks rotated in float32."""
    layout = layout_of(x)
    if layout is None:
        refuse_cut_blocks(x, blocking)
        return _block_amax(x, blocking, rotated, accelerated.can_run(x))
    layout = layout.with_whole_blocks(blocking)
    return _block_amax_sharded(place(x, layout), blocking, rotated, layout)


def local_block_amax(blocks: Array, axis: int) -> Array:
    """Magnitude maxima over `axis`, size 1 kept, float32. Integers order bit patterns alike on every backend."""
    if blocks.dtype == jnp.float32:
        return exact.as_float(jnp.max(exact.magnitude_bits(blocks), axis, keepdims=True))
    bits = lax.bitcast_convert_type(blocks, jnp.uint16) & 0x7FFF
    if axis == blocks.ndim - 1:
        # As words of two values: XLA on a CPU is slow at reductions over adjacent 16-bit numbers.
        words = lax.bitcast_convert_type(bits.reshape(*bits.shape[:-1], BLOCK_SIZE // 2, 2), jnp.uint32)
        bits = jnp.maximum(words & 0xFFFF, words >> 16)
    largest = jnp.max(bits, axis, keepdims=True).astype(jnp.uint16)
    return exact.to_float32(lax.bitcast_convert_type(largest, blocks.dtype))


@paced
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _block_amax(x: Array, blocking: Blocking, rotated: bool, kernels: bool) -> Array:
    def plain(x: Array) -> Array:
        x = rotated_blocks(exact.to_float32(x), blocking) if rotated else x
        return jnp.squeeze(local_block_amax(blocking.to_blocks(x), blocking.axis + 1), blocking.axis + 1)

    if not kernels:
        return plain(x)
    prepare = accelerated.preparation(jnp.float32, rotated)
    fast = functools.partial(accelerated.block_amax, blocking=blocking, prepare=prepare)
    return lax.platform_dependent(x, cuda=fast, default=plain)


@paced
@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _block_amax_sharded(x: Array, blocking: Blocking, rotated: bool, layout: Layout) -> Array:
    def local(shard: Array) -> Array:
        return _block_amax(shard, Blocking(shard.shape, blocking.axes), rotated, accelerated.can_run(shard))

    out = layout.merged(blocking).spec
    return jax.shard_map(local, mesh=layout.mesh, in_specs=layout.spec, out_specs=out)(x)


@paced
@functools.partial(jax.jit, static_argnums=1)
def local_global_amax(x: Array, keep: tuple[int, ...]) -> Array:
    """`max(abs(x))` of an array or a shard, with `keep` the other axes kept with size 1, float32."""
    reduced = tuple(a for a in range(x.ndim) if a not in keep)
    return exact.as_float(jnp.max(exact.magnitude_bits(x), reduced, keepdims=bool(keep), initial=0))


@paced
@functools.partial(jax.jit, static_argnums=(1, 2))
def _global_amax_sharded(x: Array, keep: tuple[int, ...], layout: Layout) -> Array:
    kept = layout.restricted(keep)
    names = tuple(name for name in layout.splitting if name not in kept.splitting)

    def local(shard: Array) -> Array:
        return amax_over_mesh(local_global_amax(shard, keep), names)

    out = kept.spec if keep else jax.P()
    return jax.shard_map(local, mesh=layout.mesh, in_specs=layout.spec, out_specs=out)(x)
