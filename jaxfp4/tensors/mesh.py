"""The only module that names mesh axes: where an array is split, and reductions across the pieces."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax import Array, lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from jaxfp4.formats import BLOCK_SIZE, exact
from jaxfp4.tensors.blocks import Blocking
from jaxfp4.tensors.memory import in_device_memory
from jaxfp4.tensors.pacing import paced

AxisNames = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and for each array dimension the mesh axes that split it, the first of them slowest."""

    mesh: Mesh | AbstractMesh
    names: tuple[AxisNames, ...]
    written: int = 0
    """Dimensions that the PartitionSpec spells out even where they are whole; specs compare unequal otherwise."""

    @property
    def spec(self) -> PartitionSpec:
        """The same as a PartitionSpec."""
        length = max([self.written, *(d + 1 for d, names in enumerate(self.names) if names)])
        return PartitionSpec(*(n if len(n) > 1 else (n[0] if n else None) for n in self.names[:length]))

    @property
    def sharding(self) -> NamedSharding:
        """The same as a NamedSharding."""
        return NamedSharding(self.mesh, self.spec)

    @property
    def splitting(self) -> AxisNames:
        """All mesh axes that split the array."""
        return tuple(name for names in self.names for name in names)

    def shards(self, dimension: int) -> int:
        """Into how many pieces a dimension is cut."""
        return math.prod(self.mesh.shape[name] for name in self.names[dimension])

    def restricted(self, dimensions: Sequence[int]) -> Layout:
        """The layout with all other dimensions whole, as after a reduction over them that keeps their places."""
        return Layout(self.mesh, tuple(n if d in dimensions else () for d, n in enumerate(self.names)))

    def blocks_are_whole(self, blocking: Blocking) -> bool:
        """Whether every block of 16 lies on one device."""
        split = [a for a in blocking.axes if self.names[a]]
        if not blocking.merged:
            split = [a for a in split if a == blocking.axes[-1]]
        if not split:
            return True
        leading = blocking.axes[0] if blocking.merged else blocking.axes[-1]
        return split == [leading] and blocking.length % (self.shards(leading) * BLOCK_SIZE) == 0

    def with_whole_blocks(self, blocking: Blocking, *, contraction: bool = False) -> Layout:
        """This layout, or one in which the mesh axes that cut blocks split other dimensions, where they fit.

        With `contraction` not only blocks are kept whole, but all of the contraction.
        """
        if contraction:
            cut = blocking.axes
            if not any(self.names[a] for a in cut):
                return self
        elif self.blocks_are_whole(blocking):
            return self
        else:
            cut = blocking.axes if blocking.merged else blocking.axes[-1:]
        moving = [name for a in cut for name in self.names[a]]
        names = [() if d in cut else n for d, n in enumerate(self.names)]
        for name in moving:
            for d in sorted(set(range(len(names))) - set(cut), key=lambda d: -blocking.shape[d]):
                candidate = (*names[d], name)
                if blocking.shape[d] % math.prod(self.mesh.shape[n] for n in candidate) == 0:
                    names[d] = candidate
                    break
        return Layout(self.mesh, tuple(names), self.written)

    def merged(self, blocking: Blocking) -> Layout:
        """The layout of the array after `Blocking` has merged its contraction axes; blocks are whole."""
        if not blocking.merged:
            return self
        rest = [n for a, n in enumerate(self.names) if a not in blocking.axes]
        rest.insert(blocking.axis, self.names[blocking.axes[0]])
        return Layout(self.mesh, tuple(rest), min(self.written, len(rest)))


def layout_of(x: Array) -> Layout | None:
    """The layout of an array whose sharding is known: a concrete one, or one traced on a mesh with Explicit axes.

    None for an array on one device, a tracer on Auto axes (the compiler places it) and inside a shard_map.
    """
    sharding = jax.typeof(x).sharding if isinstance(x, jax.core.Tracer) else x.sharding
    if not isinstance(sharding, NamedSharding) or sharding.mesh.empty:
        return None
    mesh = sharding.mesh
    if isinstance(x, jax.core.Tracer) and not _is_explicit(mesh):
        return None
    return _layout(sharding, x.ndim)


def typed_layout(x: Array) -> Layout | None:
    """The layout that is part of an array's type, as on Explicit axes; None where the compiler places results."""
    layout = layout_of(x)
    return layout if layout is not None and _is_explicit(layout.mesh) else None


def _is_explicit(mesh: Mesh | AbstractMesh) -> bool:
    return all(kind == AxisType.Explicit for kind in mesh.axis_types)


def merge_dimensions(x: Array, runs: Sequence[int]) -> Array:
    """`x` reshaped so that runs of so many successive dimensions are one each, size 1 for a run of none.

    On Explicit axes a merged dimension is split as the first of its run was, and data moves if others were split.
    """
    starts = list(itertools.accumulate(runs, initial=0))[:-1]
    shape = tuple(math.prod(x.shape[start : start + n]) for start, n in zip(starts, runs, strict=True))
    layout = typed_layout(x)
    if layout is None:
        return x.reshape(shape)
    names = tuple(layout.names[start] if n else () for start, n in zip(starts, runs, strict=True))
    return lax.reshape(x, shape, out_sharding=Layout(layout.mesh, names).sharding)


def whole_along(x: Array, dimensions: Sequence[int]) -> Array:
    """On Explicit axes `x` with these dimensions whole on each device; elsewhere `x`."""
    layout = typed_layout(x)
    if layout is None or not any(layout.names[d] for d in dimensions):
        return x
    return place(x, layout.restricted([d for d in range(x.ndim) if d not in dimensions]))


def _layout(sharding: NamedSharding, ndim: int) -> Layout:
    entries = tuple(sharding.spec) + (None,) * (ndim - len(sharding.spec))
    return Layout(sharding.mesh, tuple(_names(entry) for entry in entries), len(sharding.spec))


def amax_layout(amax: Array | jax.ShapeDtypeStruct, layout: Layout) -> Layout:
    """How an amax or a global scale lies beside its tensor: split where it has a value for each entry of an axis."""
    return layout.restricted([d for d, n in enumerate(amax.shape) if n > 1]) if amax.ndim else Layout(layout.mesh, ())


def blockwise_sharding(sharding: NamedSharding, blocking: Blocking) -> NamedSharding:
    """Where the codes and block scales of a weight with this sharding are: on the same devices, without a cut block."""
    return _layout(sharding, len(blocking.shape)).with_whole_blocks(blocking).merged(blocking).sharding


def _names(entry: str | tuple[str, ...] | None) -> AxisNames:
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


@paced
def place(x: Array, layout: Layout) -> Array:
    """`x` moved to `layout`; the same array if it is there already."""
    if isinstance(x, jax.core.Tracer):
        return jax.reshard(x, layout.sharding)
    return jax.device_put(x, layout.sharding)


def varying_axes(x: Array) -> AxisNames:
    """Inside a shard_map, the mesh axes over which `x` may differ between devices; elsewhere none.

    With `check_vma=False` JAX does not say over which axes a value differs, so all manual axes are named: reducing over
    an axis on which the values are equal changes nothing.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if manual and manual[0] not in jax.typeof(lax.axis_index(manual[0])).manual_axis_type.varying:
        return tuple(manual)
    varying = jax.typeof(x).manual_axis_type.varying
    return tuple(name for name in manual if name in varying)


def varying_everywhere(x: Array) -> Array:
    """Inside a shard_map, `x` declared to vary over all its axes, so that it has the type of values that do."""
    varying = varying_axes(x)
    missing = tuple(n for n in jax.sharding.get_abstract_mesh().manual_axes if n not in varying)
    return lax.pcast(x, missing, to="varying") if missing else x


def varying_as(x: Array, *others: Array) -> Array:
    """Inside a shard_map, `x` declared to vary over all axes over which one of the others does."""
    present = varying_axes(x)
    wanted = dict.fromkeys(name for other in others for name in varying_axes(other))
    missing = tuple(name for name in wanted if name not in present)
    return lax.pcast(x, missing, to="varying") if missing else x


def enclosing_axes() -> AxisNames:
    """All axes of the mesh in whose context the code is traced."""
    return tuple(jax.sharding.get_abstract_mesh().axis_names)


def all_axes_are_manual() -> bool:
    """Whether the code is traced inside a shard_map over its whole mesh, so that arrays are those of one device."""
    mesh = jax.sharding.get_abstract_mesh()
    return bool(mesh.axis_names) and set(mesh.manual_axes) == set(mesh.axis_names)


def amax_over_mesh(amax: Array, names: AxisNames) -> Array:
    """`lax.pmax` of float32 magnitudes over the given axes, NaN if any is NaN; `amax` itself if there are no axes.

    The maximum is taken of bit patterns, which are ordered as magnitudes are, NaN above Inf: a maximum of floats across
    devices drops NaN on some backends. No axes at all is refused by some versions of JAX.
    """
    return exact.as_float(lax.pmax(exact.magnitude_bits(amax), names)) if names else amax


def sum_over_mesh(x: Array, names: AxisNames) -> Array:
    """`lax.psum` over the given axes; `x` itself if there are none."""
    return lax.psum(x, names) if names else x


def replicated(x: Array) -> Array:
    """A small array on every device of its mesh, so that arrays split in different ways can be combined."""
    layout = layout_of(x)
    return x if layout is None else place(x, layout.restricted(()))


def moved_beside(small: Any, large: Any) -> Any:
    """A tree of arrays on the devices of another tree: those that are elsewhere are put there, whole on each."""
    there = [x.sharding for x in jax.tree.leaves(large) if isinstance(x, Array) and not isinstance(x, jax.core.Tracer)]
    if not there:
        return small
    target = next((s for s in there if isinstance(s, NamedSharding)), there[0])
    whole = NamedSharding(target.mesh, PartitionSpec()) if isinstance(target, NamedSharding) else target
    whole = in_device_memory(whole)

    def moved(x: Any) -> Any:
        known = isinstance(x, Array) and not isinstance(x, jax.core.Tracer)
        return jax.device_put(x, whole) if known and x.sharding.device_set != target.device_set else x

    return jax.tree.map(moved, small)


def replicated_beside(small: Any, large: Any) -> Any:
    """A tree of small arrays on every device of the mesh on which another tree lives; as it is if there is none."""
    leaves = [x for x in jax.tree.leaves(large) if isinstance(x, Array) and not isinstance(x, jax.core.Tracer)]
    layout = next((found for found in map(layout_of, leaves) if found is not None), None)
    return small if layout is None else jax.device_put(small, NamedSharding(layout.mesh, PartitionSpec()))


def sole_devices(tree: Any) -> frozenset[jax.Device]:
    """The devices of a tree's arrays if each array is known to be on one; none otherwise.

    There are several only where some arrays are not committed to theirs. Traced arrays are on one device where there
    is no other.
    """
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, Array)]
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return frozenset(jax.devices() if jax.device_count() == 1 else ())
    sets = [x.sharding.device_set for x in arrays]
    return frozenset().union(*sets) if all(len(devices) == 1 for devices in sets) else frozenset()


def on_accelerators(tree: Any) -> bool:
    """Whether all arrays of a tree are known to be on devices that are no CPUs."""
    arrays = [x for x in jax.tree.leaves(tree) if isinstance(x, Array)]
    if any(isinstance(x, jax.core.Tracer) for x in arrays):
        return False
    devices: set[Any] = set().union(*(x.sharding.device_set for x in arrays))
    return all(device.platform != "cpu" for device in devices)
