"""Many arrays quantized by one compiled program, with one reduction across devices for all of their global amaxes.

Launching a program for each array costs the host more time than a GPU needs for most weights, the more so on several
devices, and each reduction across devices a wait.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.tensors import accelerated
from jaxfp4.tensors.blocks import Blocking
from jaxfp4.tensors.mesh import AxisNames, Layout, amax_layout, amax_over_mesh, layout_of, varying_as, varying_axes
from jaxfp4.tensors.nvfp4_tensor import NVFP4Tensor
from jaxfp4.tensors.pacing import paced
from jaxfp4.tensors.quantize import Encoder, quantize_local
from jaxfp4.tensors.reductions import SUPPORTED_DTYPES, local_global_amax

Siblings = tuple[Array, ...]


@dataclasses.dataclass(frozen=True)
class Order:
    """How one array is to be quantized."""

    axes: tuple[int, ...]
    """The contraction, increasing and not negative."""
    keep: tuple[int, ...]
    """The axes along which it has separate global scales; those of siblings have the same sizes."""
    divisor: int
    encoder: Encoder


@dataclasses.dataclass(frozen=True)
class Placed:
    """An order for an array of a shape in its place. Equal ones share a program."""

    order: Order
    shape: tuple[int, ...]
    dtype: str
    layout: Layout | None
    """None for an array on one device."""
    device: jax.Device | None
    kernels: bool

    @property
    def blocking(self) -> Blocking:
        """How the array divides into blocks."""
        return Blocking(self.shape, self.order.axes)

    @property
    def amax_shape(self) -> tuple[int, ...]:
        """`[]`, or with size 1 for all axes that are not kept."""
        keep = self.order.keep
        return tuple(n if a in keep else 1 for a, n in enumerate(self.shape)) if keep else ()

    @property
    def amax_layout(self) -> Layout | None:
        """Where the global amax is."""
        if self.layout is None:
            return None
        return amax_layout(jax.ShapeDtypeStruct(self.amax_shape, jnp.float32), self.layout)


def placed(arrays: Sequence[Array], orders: Sequence[Order]) -> tuple[Placed, ...] | None:
    """What `quantize_together` has to know of siblings; None if it does not take them.

    It takes arrays that are all on one device, or all on one mesh with blocks whole and kept axes split alike.
    """
    found = tuple(_placed(w, order) for w, order in zip(arrays, orders, strict=True))
    known = [one for one in found if one is not None]
    if len(known) < len(found) or len({(one.device, one.layout and one.layout.mesh) for one in known}) > 1:
        return None
    splits = {one.layout and tuple(one.layout.names[a] for a in one.order.keep) for one in known}
    return tuple(known) if len(splits) == 1 else None


def _placed(w: Array, order: Order) -> Placed | None:
    if not isinstance(w, Array) or isinstance(w, jax.core.Tracer) or w.dtype.name not in SUPPORTED_DTYPES:
        return None
    layout = layout_of(w)
    if layout is None:
        if len(w.sharding.device_set) > 1:
            return None
        (device,) = w.sharding.device_set
        return Placed(order, w.shape, w.dtype.name, None, device, accelerated.can_run(w))
    blocking = Blocking(w.shape, order.axes)
    whole = layout.with_whole_blocks(blocking, contraction=order.encoder.whole_contraction)
    return Placed(order, w.shape, w.dtype.name, layout, None, False) if whole == layout else None


def quantize_together(
    groups: Sequence[Siblings], siblings: tuple[Placed, ...]
) -> tuple[list[tuple[NVFP4Tensor, ...]], Array]:
    """Groups of arrays, all placed alike, each as `quantize_unchecked` gives it with the global amax of its siblings.

    Beside them, whether all global scales are finite, which is so if all arrays are.
    """
    parts, finite = _programs(tuple(groups), siblings)
    return [tuple(map(_tensor, siblings, group)) for group in parts], finite


def _tensor(one: Placed, parts: tuple[Array, Array, Array]) -> NVFP4Tensor:
    axes, ndim = one.order.axes, len(one.shape)
    sizes = tuple(one.shape[a] for a in axes)
    return NVFP4Tensor(*parts, tuple(a - ndim for a in axes), sizes, jnp.dtype(one.dtype))


@paced
@functools.partial(jax.jit, static_argnums=1)
def _programs(groups: tuple[Siblings, ...], siblings: tuple[Placed, ...]) -> tuple[list[list[Siblings]], Array]:
    layouts = [one.layout for one in siblings if one.layout is not None]
    local = functools.partial(_quantized, siblings=siblings)
    if layouts:
        codes = [layout.merged(one.blocking).spec for one, layout in zip(siblings, layouts, strict=True)]
        amaxes = [one.amax_layout.spec for one in siblings if one.amax_layout is not None]
        out = [(c, c, a) for c, a in zip(codes, amaxes, strict=True)]
        specs = tuple(layout.spec for layout in layouts)
        local = jax.shard_map(
            local, mesh=layouts[0].mesh, in_specs=((specs,) * len(groups),), out_specs=[out] * len(groups)
        )
    parts = local(groups)
    finite = [jnp.all(jnp.isfinite(global_scale)) for group in parts for _, _, global_scale in group]
    return parts, jnp.all(jnp.stack(finite))


def _quantized(groups: tuple[Siblings, ...], siblings: tuple[Placed, ...]) -> list[list[Siblings]]:
    """Arrays or shards."""
    shared = [_shared_amax(group, siblings) for group in groups]
    names = tuple(dict.fromkeys(name for amax in shared for name in varying_axes(amax)))
    kept = siblings[0].amax_layout
    amaxes = _over_mesh(shared, tuple(name for name in names if kept is None or name not in kept.splitting))
    return [
        [
            _one(w, amax, one, kernels=one.kernels or (one.layout is not None and accelerated.can_run(w)))
            for w, one in zip(group, siblings, strict=True)
        ]
        for group, amax in zip(groups, amaxes, strict=True)
    ]


def _one(w: Array, amax: Array, one: Placed, *, kernels: bool) -> Siblings:
    keep = one.order.keep
    shaped = lax.expand_dims(amax, [a for a in range(w.ndim) if a not in keep]) if keep else amax
    blocking = Blocking(w.shape, one.order.axes)
    return quantize_local(w, shaped, None, blocking, one.order.divisor, one.order.encoder, False, kernels)


def _shared_amax(group: Siblings, siblings: tuple[Placed, ...]) -> Array:
    """The largest over siblings, with the kept axes only, of what is on this device."""
    amaxes = []
    for w, one in zip(group, siblings, strict=True):
        keep = one.order.keep
        amax = local_global_amax(w, keep)
        amaxes.append(lax.squeeze(amax, [a for a in range(w.ndim) if a not in keep]) if keep else amax)
    return functools.reduce(_maximum, amaxes)


def _maximum(one: Array, other: Array) -> Array:
    return jnp.maximum(varying_as(one, other), varying_as(other, one))


def _over_mesh(amaxes: Sequence[Array], names: AxisNames) -> Iterable[Array]:
    """All of them reduced at once; they have one shape."""
    if not names:
        return amaxes
    return tuple(amax_over_mesh(jnp.stack(amaxes), names))
