"""What a tree of arrays has besides its arrays, as data: containers, static parts of quantized weights, shardings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding

from jaxfp4.checkpoints.placement import Placed, Placement
from jaxfp4.formats import LeafError, path_string
from jaxfp4.tensors import FP8Tensor, NVFP4Tensor, QuantizedTensor, QuantizedWeight
from jaxfp4.tensors.cache import CacheAmax, CacheFormat
from jaxfp4.tensors.mesh import Layout, blockwise_sharding
from jaxfp4.transform.trace import leaves_of

Spec = tuple[tuple[str, ...], ...]
"""For each dimension the mesh axes that split it."""


@dataclasses.dataclass(frozen=True)
class SavedArray:
    """An array; `spec` is None where it was not on a mesh."""

    shape: tuple[int, ...]
    dtype: str
    spec: Spec | None
    on_host: bool
    """Whether JAX would narrow its numbers, so that it stays a NumPy array."""

    def __post_init__(self) -> None:
        try:
            np.dtype(self.dtype)
        except TypeError:
            raise ValueError(f"dtype: found {self.dtype!r}: wanted the name of one") from None


@dataclasses.dataclass(frozen=True)
class SavedTensor:
    """An `NVFP4Tensor`; `spec` is that of the logical tensor."""

    packed: SavedArray
    scales: SavedArray
    global_scale: SavedArray
    axes: tuple[int, ...]
    sizes: tuple[int, ...]
    dtype: str
    spec: Spec | None

    def __post_init__(self) -> None:
        rank = len(self.packed.shape)
        if not self.axes or len(self.axes) != len(self.sizes) or len(self.scales.shape) != rank:
            raise ValueError(f"axes: found {self.axes} of sizes {self.sizes}: wanted a size for each contraction axis")
        if not all(-rank - len(self.axes) < axis < 0 for axis in self.axes):
            raise ValueError(f"axes: found {self.axes}: wanted negative ones of a tensor packed to {rank} dimensions")


@dataclasses.dataclass(frozen=True)
class SavedFP8Tensor:
    """An `FP8Tensor`."""

    values: SavedArray
    global_scale: SavedArray
    axes: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class SavedCache:
    """A `CacheAmax`."""

    keys: SavedArray | None
    values: SavedArray | None
    format: CacheFormat


@dataclasses.dataclass(frozen=True)
class SavedWeight:
    """A `QuantizedWeight`."""

    weight: SavedTensor | SavedFP8Tensor
    input_scale: SavedArray | None
    pre_scale: SavedArray | None
    rotation: int
    cache: SavedCache | None


@dataclasses.dataclass(frozen=True)
class SavedDict:
    """A dict, or another container by the names of its children."""

    keys: tuple[str | int, ...]
    children: tuple[SavedNode, ...]


@dataclasses.dataclass(frozen=True)
class SavedSequence:
    """A list, or a tuple."""

    children: tuple[SavedNode, ...]
    is_tuple: bool


@dataclasses.dataclass(frozen=True)
class SavedNone:
    """None."""


SavedLeaf = SavedArray | SavedTensor | SavedFP8Tensor | SavedWeight
SavedNode = SavedDict | SavedSequence | SavedNone | SavedLeaf


def described(name: str, tree: Any) -> tuple[Any, SavedNode]:
    """The tree in dicts, lists and tuples, without Flax's boxes around arrays, and what is to know besides its arrays.

    LeafError for a leaf that is no array of numbers, ValueError if there are no leaves or two of the same path.
    """
    leaves_of(tree)
    plain, node = _described(tree, name, ())
    flat = jax.tree_util.tree_leaves_with_path(plain)
    names = [jax.tree_util.keystr(keys, simple=True, separator=".") for keys, _ in flat]
    repeated = sorted({other for other in names if names.count(other) > 1}) if len(set(names)) < len(names) else []
    if repeated:
        raise ValueError(f"{name}: two arrays would be stored as {repeated[0]!r}: wanted one; rename a key with a '.'")
    return plain, node


def _described(tree: Any, name: str, path: tuple[str, ...]) -> tuple[Any, SavedNode]:
    if tree is None:
        return None, SavedNone()
    if isinstance(tree, QuantizedWeight):
        return tree, _weight(tree, name, path)
    if isinstance(tree, QuantizedTensor):
        return tree, _tensor(tree, name, path)
    if jax.tree_util.all_leaves([tree]):
        return tree, _array(tree, name, path)
    if type(tree) in (list, tuple):
        pairs = [_described(child, name, (*path, str(i))) for i, child in enumerate(tree)]
        return type(tree)(p for p, _ in pairs), SavedSequence(tuple(n for _, n in pairs), type(tree) is tuple)
    children = _children(tree)
    if len(children) == 1 and not isinstance(tree, dict) and not path_string(children[0][0]):
        return _described(children[0][1], name, path)
    keys = tuple(_key(keys) for keys, _ in children)
    pairs = [_described(child, name, (*path, str(key))) for key, (_, child) in zip(keys, children, strict=True)]
    return dict(zip(keys, (p for p, _ in pairs), strict=True)), SavedDict(keys, tuple(n for _, n in pairs))


def _children(tree: Any) -> list[tuple[tuple[Any, ...], Any]]:
    """One level of a container, None among the children."""
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda child: child is not tree)[0]


def _key(keys: tuple[Any, ...]) -> str | int:
    """The key as JSON holds it: an integer where it is one."""
    key = keys[0]
    is_integer = isinstance(key, jax.tree_util.DictKey) and type(key.key) is int
    return key.key if is_integer else jax.tree_util.keystr(keys, simple=True)


def _weight(weight: QuantizedWeight, name: str, path: tuple[str, ...]) -> SavedWeight:
    cache = None
    if weight.cache is not None:
        keys, values = (_optional(amax, name, path) for amax in (weight.cache.keys, weight.cache.values))
        cache = SavedCache(keys, values, weight.cache.format)
    input_scale, pre_scale = (_optional(scale, name, path) for scale in (weight.input_scale, weight.pre_scale))
    return SavedWeight(_tensor(weight.weight, name, path), input_scale, pre_scale, weight.rotation, cache)


def _tensor(tensor: QuantizedTensor, name: str, path: tuple[str, ...]) -> SavedTensor | SavedFP8Tensor:
    dtype = np.dtype(tensor.dtype).name
    axes = tuple(map(int, tensor.axes))
    if isinstance(tensor, FP8Tensor):
        values, global_scale = (_array(x, name, path) for x in (tensor.values, tensor.global_scale))
        return SavedFP8Tensor(values, global_scale, axes, dtype)
    packed, scales, scale = (_array(x, name, path) for x in (tensor.packed, tensor.scales, tensor.global_scale))
    spec = None if packed.spec is None else _unmerged(packed.spec, tensor)
    return SavedTensor(packed, scales, scale, axes, tuple(map(int, tensor.sizes)), dtype, spec)


def _unmerged(spec: Spec, tensor: NVFP4Tensor) -> Spec:
    """How the logical tensor is split, given how its codes are."""
    blocking, rest = tensor.blocking, list(spec)
    if blocking.merged:
        merged = rest.pop(blocking.axis)
        for axis in blocking.axes:
            rest.insert(axis, merged if axis == blocking.axes[0] else ())
    return tuple(rest)


def logical_sharding(tensor: QuantizedTensor) -> Sharding | None:
    """The sharding of the tensor whose codes are placed as here; None if they are not, or not on a mesh or a device."""
    if isinstance(tensor, FP8Tensor):
        return sharding_of(tensor.values)
    packed = tensor.packed
    if isinstance(packed, jax.Array | jax.ShapeDtypeStruct) and isinstance(packed.sharding, NamedSharding):
        return Layout(packed.sharding.mesh, _unmerged(_names(packed.sharding, packed.ndim), tensor)).sharding
    return sharding_of(packed)


def sharding_of(array: Any) -> Sharding | None:
    """The sharding of an array, abstract or not, if it has one over a mesh or is on one device."""
    if not isinstance(array, jax.Array | jax.ShapeDtypeStruct):
        return None
    return array.sharding if isinstance(array.sharding, NamedSharding | SingleDeviceSharding) else None


def _optional(array: Any, name: str, path: tuple[str, ...]) -> SavedArray | None:
    return None if array is None else _array(array, name, path)


def _array(array: Any, name: str, path: tuple[str, ...]) -> SavedArray:
    where = "/".join((name, *path))
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array | np.ndarray):
        raise LeafError(f"{where}: a {type(array).__name__}: wanted an array with values; save concrete arrays")
    if array.dtype == object or jax.dtypes.issubdtype(array.dtype, jax.dtypes.extended):
        raise LeafError(f"{where}: an array of {array.dtype}: wanted numbers; save jax.random.key_data of keys")
    if not array.size:
        raise LeafError(
            f"{where}: an array of shape {array.shape}: wanted values, as Orbax stores no empty array; drop it"
        )
    narrowed = jax.dtypes.canonicalize_dtype(array.dtype) != array.dtype
    spec = None
    if isinstance(array, jax.Array) and isinstance(array.sharding, NamedSharding):
        spec = _names(array.sharding, array.ndim)
    return SavedArray(tuple(array.shape), array.dtype.name, spec, bool(narrowed))


def _names(sharding: NamedSharding, rank: int) -> Spec:
    entries = (*sharding.spec, *[None] * (rank - len(sharding.spec)))
    return tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)


def abstract(node: SavedNode, placement: Placement, path: tuple[str, ...] = ()) -> Any:
    """The tree that was described, of `jax.ShapeDtypeStruct`s that say where each array goes."""
    if isinstance(node, SavedNone):
        return None
    if isinstance(node, SavedSequence):
        children = [abstract(child, placement, (*path, str(i))) for i, child in enumerate(node.children)]
        return tuple(children) if node.is_tuple else children
    if isinstance(node, SavedDict):
        pairs = zip(node.keys, node.children, strict=True)
        return {key: abstract(child, placement, (*path, str(key))) for key, child in pairs}
    placed = placement.of("/".join(path))
    if isinstance(node, SavedWeight):
        return _abstract_weight(node, placed)
    return _placed_array(node, placed) if isinstance(node, SavedArray) else _abstract_tensor(node, placed)


def _abstract_weight(saved: SavedWeight, placed: Placed) -> QuantizedWeight:
    beside = placed.replicated()

    def optional(array: SavedArray | None) -> Any:
        return None if array is None else _placed_array(array, beside)

    cache = None
    if saved.cache is not None:
        cache = CacheAmax(optional(saved.cache.keys), optional(saved.cache.values), saved.cache.format)
    weight = _abstract_tensor(saved.weight, placed)
    return QuantizedWeight(weight, optional(saved.input_scale), optional(saved.pre_scale), saved.rotation, cache)


def _abstract_tensor(saved: SavedTensor | SavedFP8Tensor, placed: Placed) -> QuantizedTensor:
    if isinstance(saved, SavedFP8Tensor):
        values, scale = _placed_array(saved.values, placed), _placed_array(saved.global_scale, placed.replicated())
        return FP8Tensor(values, scale, saved.axes, np.dtype(saved.dtype))
    tensor = _unplaced(saved)
    codes = _codes(tensor, placed)
    return dataclasses.replace(
        tensor,
        packed=_placed_array(saved.packed, codes),
        scales=_placed_array(saved.scales, codes),
        global_scale=_placed_array(saved.global_scale, placed.replicated()),
    )


def _unplaced(saved: SavedTensor) -> NVFP4Tensor:
    packed, scales, global_scale = (_struct(x, None) for x in (saved.packed, saved.scales, saved.global_scale))
    return NVFP4Tensor(packed, scales, global_scale, saved.axes, saved.sizes, np.dtype(saved.dtype))


def _codes(tensor: NVFP4Tensor, placed: Placed) -> Placed:
    """Where packed codes and block scales go, given where the logical weight does; no block of 16 is cut."""
    placed = placed.fit(tensor.shape)
    if not isinstance(placed.sharding, NamedSharding):
        return placed
    return dataclasses.replace(placed, sharding=blockwise_sharding(placed.sharding, tensor.blocking))


def _placed_array(saved: SavedArray, placed: Placed) -> Any:
    sharding = placed.fit(saved.shape).sharding
    return _struct(saved, _default_device() if sharding is None else sharding)


def _struct(saved: SavedArray, sharding: Sharding | None) -> Any:
    """What stays on the host is an array already, as Orbax then gives one of the same kind."""
    if saved.on_host:
        return np.empty(saved.shape, np.dtype(saved.dtype))
    return jax.ShapeDtypeStruct(saved.shape, np.dtype(saved.dtype), sharding=sharding)


def _default_device() -> Sharding:
    return SingleDeviceSharding(next(iter(jax.numpy.zeros(()).devices())))


def saved_shardings(node: SavedNode, mesh: Mesh) -> dict[str, Sharding]:
    """By path, the shardings that were saved, on another mesh: of each dimension the mesh axes that it has, if they
    divide it.
    """
    found: dict[str, Sharding] = {}
    for path, leaf in _leaves(node, ()):
        saved = leaf.weight if isinstance(leaf, SavedWeight) else leaf
        if isinstance(saved, SavedTensor):
            found[path] = _fitted(saved.spec or (), _unplaced(saved).shape, mesh)
        else:
            array = saved.values if isinstance(saved, SavedFP8Tensor) else saved
            found[path] = _fitted(array.spec or (), array.shape, mesh)
    return found


def _leaves(node: SavedNode, path: tuple[str, ...]) -> Iterator[tuple[str, SavedLeaf]]:
    if isinstance(node, SavedDict | SavedSequence):
        keys: Iterable[str | int] = node.keys if isinstance(node, SavedDict) else range(len(node.children))
        for key, child in zip(keys, node.children, strict=True):
            yield from _leaves(child, (*path, str(key)))
    elif not isinstance(node, SavedNone):
        yield "/".join(path), node


def _fitted(spec: Spec, shape: tuple[int, ...], mesh: Mesh) -> NamedSharding:
    present = [tuple(name for name in names if name in mesh.shape) for names in spec[: len(shape)]]
    sizes = [math.prod(mesh.shape[name] for name in names) for names in present]
    names = tuple(n if shape[d] % size == 0 else () for d, (n, size) in enumerate(zip(present, sizes, strict=True)))
    return Layout(mesh, names).sharding
