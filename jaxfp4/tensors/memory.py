"""Parameters that are brought to the devices when they are needed: arrays in host memory, layers of stacked ones."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec, Sharding, SingleDeviceSharding

from jaxfp4.tensors.pacing import paced


@dataclasses.dataclass(frozen=True, eq=False)
class Layer:
    """One layer of a stacked array: at `index[a]` along each axis `a` of `index`."""

    stack: Any
    index: Mapping[int, int]

    @property
    def place(self) -> tuple[int | slice, ...]:
        """What indexes the stack."""
        return tuple(self.index.get(a, slice(None)) for a in range(self.stack.ndim))


def stack_layers(layers: Sequence[Array], sizes: Sequence[int], axes: Sequence[int]) -> Array:
    """The array that has layers, given in the order of their indices within `sizes`, along `axes`."""
    if len(axes) == 1:
        return jnp.stack(layers, axes[0])
    in_front = jnp.stack(layers).reshape(*sizes, *layers[0].shape)
    return jnp.moveaxis(in_front, range(len(sizes)), axes)


def in_host_memory(x: object) -> bool:
    """Whether an array lies in another memory than its devices', such as `pinned_host`."""
    if not isinstance(x, Array) or isinstance(x, jax.core.Tracer):
        return False
    kind = x.sharding.memory_kind
    return kind is not None and kind != _device_memory(x.sharding)


def in_memory(sharding: Sharding | None, kind: str) -> Sharding:
    """The same sharding, by default the default device, in a memory such as `pinned_host`."""
    if sharding is None:
        (device,) = jnp.zeros(()).devices()
        sharding = SingleDeviceSharding(device)
    return sharding.with_memory_kind(kind)


def on_devices(tree: Any) -> Any:
    """A tree whose arrays in host memory are copied to the memory of their devices, with the same sharding."""
    return jax.tree.map(lambda x: jax.device_put(x, in_device_memory(x.sharding)) if in_host_memory(x) else x, tree)


def beside(x: Array, other: Any) -> Array:
    """An array moved to host memory if another one is there, with that one's sharding."""
    return jax.device_put(x, other.sharding) if in_host_memory(other) else x


def stacks_of(tree: Any) -> Any:
    """A tree with the whole stacks in the places of layers."""
    return jax.tree.map(lambda x: x.stack if isinstance(x, Layer) else x, tree, is_leaf=lambda x: isinstance(x, Layer))


def brought(value: Array | np.ndarray | Layer) -> Array:
    """An array in the memory of its devices.

    Of a layer whose stack is in host memory only that layer is copied, unless the stack is split by layers.
    """
    if not isinstance(value, Layer):
        return jnp.asarray(on_devices(value))
    stack, sharding = value.stack, _of_layer(value)
    if sharding is not None and _is_split(value):
        return _picked(jax.device_put(stack, _unsplit(value)), value.place)
    if sharding is None or not in_host_memory(stack):
        return _picked(on_devices(stack), value.place)
    parts = [jax.device_put(np.asarray(s.data)[value.place], s.device) for s in stack.addressable_shards]
    return jax.make_array_from_single_device_arrays(_shape(value), sharding, parts)


def abstract(value: Array | np.ndarray | Layer) -> Any:
    """What a function is traced with in the place of what `brought` returns."""
    stack = value.stack if isinstance(value, Layer) else value
    if isinstance(stack, np.ndarray):
        dtype = jnp.asarray(stack.reshape(-1)[:0]).dtype
        return jax.ShapeDtypeStruct(_shape(value) if isinstance(value, Layer) else stack.shape, dtype)
    if isinstance(value, Layer):
        return _abstract(stack, _shape(value), _of_layer(value))
    return _abstract(stack, stack.shape, in_device_memory(stack.sharding)) if in_host_memory(value) else value


def _abstract(x: Array, shape: tuple[int, ...], sharding: Sharding | None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, x.dtype, sharding=sharding, weak_type=jax.typeof(x).weak_type)


@paced
def _picked(stack: Any, place: tuple[int | slice, ...]) -> Array:
    return jnp.asarray(stack[place])


def _shape(layer: Layer) -> tuple[int, ...]:
    return tuple(n for a, n in enumerate(layer.stack.shape) if a not in layer.index)


def _device_memory(sharding: Sharding) -> str:
    return _default_memory(next(iter(sharding.device_set)))


@functools.cache
def _default_memory(device: Any) -> str:
    kind: str = device.default_memory().kind
    return kind


def in_device_memory(sharding: Sharding) -> Sharding:
    """The same sharding in the memory of its devices."""
    return sharding.with_memory_kind(_device_memory(sharding))


def _of_layer(layer: Layer) -> Sharding | None:
    """The sharding of a layer in device memory; None if its stack is no JAX array or placed in an unknown way."""
    if not isinstance(layer.stack, Array):
        return None
    sharding = layer.stack.sharding
    if isinstance(sharding, SingleDeviceSharding):
        return in_device_memory(sharding)
    if not isinstance(sharding, NamedSharding):
        return None
    kept = PartitionSpec(*(names for a, names in enumerate(_names(layer)) if a not in layer.index))
    return in_device_memory(NamedSharding(sharding.mesh, kept))


def _names(layer: Layer) -> list[Any]:
    """What splits each axis of a stack."""
    spec = layer.stack.sharding.spec
    return [*spec, *[None] * (layer.stack.ndim - len(spec))]


def _is_split(layer: Layer) -> bool:
    """Whether each layer lies on some of the devices only."""
    named = isinstance(layer.stack.sharding, NamedSharding)
    return named and any(names for a, names in enumerate(_names(layer)) if a in layer.index)


def _unsplit(layer: Layer) -> Sharding:
    """The sharding of the stack with each layer on all devices."""
    spec = PartitionSpec(*(None if a in layer.index else names for a, names in enumerate(_names(layer))))
    return in_device_memory(NamedSharding(layer.stack.sharding.mesh, spec))
