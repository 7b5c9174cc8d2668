"""Where channel scales of an activation can be folded into parameters, so that none are applied at run time.

If the channels of an activation are divided by positive numbers `s` and the weights that read it are multiplied by `s`
along their contraction, the model computes the same. The division can be folded into the parameter that makes the
activation: the scale and bias of a norm, or the output channels of the weight before it, if nothing in between sees
it. AWQ (Lin et al., 2024) and SmoothQuant (Xiao et al., 2023) scale activations in this way.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from numpy.typing import NDArray

from jaxfp4.formats import exact
from jaxfp4.tensors import QuantizedWeight
from jaxfp4.tensors.memory import beside, on_devices
from jaxfp4.tensors.mesh import layout_of, place, replicated_beside
from jaxfp4.tensors.pacing import paced
from jaxfp4.tensors.reductions import SUPPORTED_DTYPES
from jaxfp4.transform.channel_names import LARGEST
from jaxfp4.transform.channel_scaling import Scaling
from jaxfp4.transform.channel_variables import Names, Variables
from jaxfp4.transform.channel_walk import constrain
from jaxfp4.transform.trace import ApplyFn, Leaves, trace
from jaxfp4.transform.weights import Weight, find_weights


@dataclasses.dataclass(frozen=True)
class Side:
    """One parameter that a fold rescales.

    `index` says which channel of `s` belongs to each place along `axes`, -1 where the parameter is left as it is: a
    part of a fused weight that has nothing to do with the fold. Several places may share a channel, as the query heads
    of a group do. `axes` are in increasing order, without those of size 1; `layer_axes` follow the fold's `layers`.
    """

    leaf: int
    path: str
    axes: tuple[int, ...]
    index: NDArray[np.int64]
    layer_axes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Fold:
    """Parameters that can be rescaled together by any positive `s` of shape `(*layers, channels)`.

    The model's outputs stay the same up to rounding if `producers` are divided by `s` and `consumers` multiplied. Axes
    of neither kind, such as those of experts, share their scales.
    """

    channels: int
    layers: tuple[int, ...]
    producers: tuple[Side, ...]
    consumers: tuple[Side, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `s`."""
        return (*self.layers, self.channels)


@dataclasses.dataclass(frozen=True)
class Folding:
    """The folds of a model. Each weight is a consumer in at most one of them."""

    folds: tuple[Fold, ...]
    reasons: Mapping[str, str]
    """For every path, why no fold multiplies the parameter there; empty if one does."""

    def why_not(self, path: str) -> str:
        """Why no fold multiplies a parameter; empty if one does. Raises ValueError if there is none at `path`."""
        if path not in self.reasons:
            raise ValueError(f"path: found {path!r}, wanted that of a parameter; see the keys of .reasons")
        return self.reasons[path]


def find_folds(
    apply_fn: ApplyFn, leaves: Leaves, args: tuple[Any, ...], weights: Sequence[Weight] | None = None
) -> Folding:
    """The folds of `apply_fn(params, *args)`, found by an abstract trace; nothing is computed.

    Follows a gated or plain MLP, attention with grouped key/value heads, and norms with or without bias, as a function
    of any kind: the names of parameters play no part. A fold is only found where the whole path between producer and
    consumers commutes with positive factors; every other use of the activation rules it out.

    Args:
        apply_fn, leaves, args: as for `find_weights`; leaves and arguments may be abstract.
        weights: the result of `find_weights`, if there is one already.

    >>> import jax
    >>> from jaxfp4.transform.trace import leaves_of
    >>> leaves = leaves_of({"down": jnp.ones((4, 2)), "up": jnp.ones((2, 4))})
    >>> folding = find_folds(lambda p, x: jax.nn.relu(x @ p["up"]) @ p["down"], leaves, (jnp.ones((3, 2)),))
    >>> [(fold.shape, fold.producers[0].path, fold.consumers[0].path) for fold in folding.folds]
    [((4,), 'up', 'down')]
    >>> folding.why_not("up")
    'its activation is scaled by no parameter'
    """
    weights = find_weights(apply_fn, leaves, args) if weights is None else weights
    groups = _groups(leaves, weights)
    variables = Variables(sum(group.names.size for group in groups))
    names = [tuple(group.names for group in groups if group.leaf == leaf) for leaf in range(len(leaves.paths))]
    parameters = [Scaling(factors, is_parameter=True) for factors in names]
    constrain(trace(apply_fn, leaves, args).body, parameters, variables)
    found: list[Fold] = []
    failed: dict[int, str] = {}
    for cluster in _clusters(groups, variables):
        fold = _fold(cluster, leaves.paths)
        if isinstance(fold, Fold):
            found.append(fold)
        else:
            failed |= {group.leaf: fold for group, _ in cluster if group.is_contracted}
    folded = {side.leaf for fold in found for side in fold.consumers}
    reasons = {p: "" if i in folded else "it is contracted with no activation" for i, p in enumerate(leaves.paths)}
    for group in groups:
        if group.is_contracted and group.leaf not in folded:
            why = variables.reason(group.names)
            default = f"its activation {why}" if why else "no parameter can be divided to scale its activation"
            reasons[leaves.paths[group.leaf]] = failed.get(group.leaf, default)
    return Folding(tuple(sorted(found, key=lambda fold: fold.consumers[0].leaf)), reasons)


@dataclasses.dataclass(frozen=True)
class _Group:
    """Axes of a parameter whose places have a variable each, in each layer: its rank, size 1 along other axes."""

    leaf: int
    is_contracted: bool
    axes: tuple[int, ...]
    layer_axes: tuple[int, ...]
    names: Names


def _groups(leaves: Leaves, weights: Sequence[Weight]) -> list[_Group]:
    """Contracted and output axes of weights, and all axes of other parameters."""
    known = {weight.leaf: weight for weight in weights}
    groups: list[_Group] = []
    count = 0
    for leaf, value in enumerate(leaves.values):
        if isinstance(value, QuantizedWeight) or value.dtype.name not in SUPPORTED_DTYPES:
            continue
        for is_contracted, axes, layer_axes in _axes(known.get(leaf), tuple(value.shape)):
            sizes = [n if a in (*axes, *layer_axes) else 1 for a, n in enumerate(value.shape)]
            names = np.arange(count + 1, count + 1 + math.prod(sizes)).reshape(sizes)
            groups.append(_Group(leaf, is_contracted, axes, layer_axes, names))
            count += names.size
    return groups


_MOST_FUSED = 3
"""A stack of so few weights may be one of different weights, such as gate and up, or queries, keys and values."""


def _axes(weight: Weight | None, shape: tuple[int, ...]) -> list[tuple[bool, tuple[int, ...], tuple[int, ...]]]:
    """Whether contracted, axes and layer axes of each group; channels that are only one are left out."""
    groups: list[tuple[bool, tuple[int, ...], tuple[int, ...]]]
    if weight is None or not weight.contracted:
        axes = tuple(range(len(shape)))
        # Of an embedding table the rows have no scales.
        groups = [(False, axes if math.prod(shape) <= LARGEST else axes[-1:], ())]
    else:
        experts = [a for a in weight.expert_axes if shape[a] > _MOST_FUSED]
        rest = tuple(a for a in range(len(shape)) if a not in (*weight.contracted, *weight.layer_axes, *experts))
        groups = [(True, weight.contracted, weight.layer_axes), (False, rest, weight.layer_axes)]
    return [group for group in groups if math.prod(shape[a] for a in group[1]) > 1]


_Cluster = list[tuple[_Group, Names]]
"""Groups with the variables of a fold: positive where they are divided, negative where multiplied, else 0."""


def _clusters(groups: Sequence[_Group], variables: Variables) -> list[_Cluster]:
    """Groups connected by free variables that some weight has along its contraction and some parameter elsewhere."""
    current = [variables.current(group.names) for group in groups]
    total = sum(group.names.size for group in groups) + 1
    seen = {(kind, sign): np.zeros(total, bool) for kind in (True, False) for sign in (1, -1)}
    for group, names in zip(groups, current, strict=True):
        for sign in (1, -1):
            seen[group.is_contracted, sign][np.abs(names[names * sign > 0])] = True
    direction = np.zeros(total, np.int64)
    for sign in (1, -1):
        direction[seen[True, -sign] & seen[False, sign] & ~seen[True, sign]] = sign
    owner = np.zeros(total, np.int64)
    clusters: dict[int, _Cluster] = {}
    for i, (group, names) in enumerate(zip(groups, current, strict=True)):
        names = names * direction[np.abs(names)]
        mine = np.abs(names[names != 0])
        if not mine.size:
            continue
        merged: _Cluster = []
        for other in np.flatnonzero(np.bincount(owner[mine])[1:]):
            earlier = clusters.pop(int(other))
            for _, theirs in earlier:
                owner[np.abs(theirs[theirs != 0])] = i + 1
            merged += earlier
        owner[mine] = i + 1
        clusters[i] = [*merged, (group, names)]
    return list(clusters.values())


@dataclasses.dataclass(frozen=True)
class _Member:
    """A group in a fold: its variables without signs, layers first, then the places along `axes`."""

    leaf: int
    is_divided: bool
    axes: tuple[int, ...]
    layer_axes: tuple[int, ...]
    names: Names


def _fold(cluster: _Cluster, paths: Sequence[str]) -> Fold | str:
    """A cluster as a fold, or why it is none."""
    if any((names > 0).any() and (names < 0).any() for _, names in cluster):
        return "a parameter of its activation would be both multiplied and divided"
    consumers = sorted((m for m in cluster if m[0].is_contracted), key=lambda m: m[0].leaf)
    layers = tuple(consumers[0][0].names.shape[a] for a in consumers[0][0].layer_axes)
    layer_of = _layer_of(consumers, layers)
    members = [] if layer_of is None else [_aligned(group, names, layers, layer_of) for group, names in cluster]
    aligned = sorted((m for m in members if m is not None), key=lambda m: (m.is_divided, m.leaf))
    if len(aligned) < len(cluster):
        return "its layers are not stacked as those of other parameters of its activation are"
    indices = _numbered(aligned)
    if indices is None:
        return "the channels of its activation are not the same in all layers"
    channels = max(int(index.max()) for index in indices) + 1
    if channels == 1:
        return "all channels of its activation would have one scale"
    sides = [
        Side(m.leaf, paths[m.leaf], m.axes, index, m.layer_axes) for m, index in zip(aligned, indices, strict=True)
    ]
    divided = sum(m.is_divided for m in aligned)
    return Fold(channels, layers, tuple(sides[-divided:]), tuple(sides[:-divided]))


_LayerOf = tuple[Names, Names]
"""Variables in increasing order, and for each the number of the layer that it belongs to."""


def _layer_of(consumers: _Cluster, layers: tuple[int, ...]) -> _LayerOf | None:
    """To which layer each variable belongs; None if to several."""
    pairs = []
    for group, names in consumers:
        if tuple(names.shape[a] for a in group.layer_axes) != layers:
            return None
        number = np.zeros(names.shape, np.int64)
        for axis in group.layer_axes:
            number = number * names.shape[axis] + _positions(names.shape, axis)
        pairs.append(np.stack([np.abs(names[names != 0]), number[names != 0]]))
    variables, numbers = np.concatenate(pairs, axis=1)
    order = np.argsort(variables, kind="stable")
    variables, numbers = variables[order], numbers[order]
    again = np.diff(variables, prepend=0) == 0
    return None if (np.diff(numbers, prepend=0)[again] != 0).any() else (variables[~again], numbers[~again])


def _positions(shape: Sequence[int], axis: int) -> Names:
    return np.arange(shape[axis]).reshape([n if a == axis else 1 for a, n in enumerate(shape)])


def _aligned(group: _Group, names: Names, layers: tuple[int, ...], layer_of: _LayerOf) -> _Member | None:
    """A group with its layers in front; None if its variables are not laid out by layers."""
    free = names != 0
    number = layer_of[1][np.searchsorted(layer_of[0], np.abs(names[free]))]
    coordinates = np.unravel_index(number, layers) if layers else ()
    layer_axes: list[int] = []
    for coordinate, size in zip(coordinates, layers, strict=True):
        fitting = (
            a
            for a, n in enumerate(names.shape)
            if n == size
            and a not in layer_axes
            and np.array_equal(np.broadcast_to(_positions(names.shape, a), names.shape)[free], coordinate)
        )
        axis = next(fitting, None)
        if axis is None:
            return None
        layer_axes.append(axis)
    axes = tuple(a for a, n in enumerate(names.shape) if n > 1 and a not in layer_axes)
    order = (*layer_axes, *axes, *(a for a in range(names.ndim) if a not in (*layer_axes, *axes)))
    in_front = np.abs(names).transpose(order).reshape(math.prod(layers), *(names.shape[a] for a in axes))
    return _Member(group.leaf, bool((names > 0).any()), axes, tuple(layer_axes), in_front)


def _numbered(members: Sequence[_Member]) -> list[NDArray[np.int64]] | None:
    """Each member's variables as channel numbers, in order of first appearance; None if layers differ."""
    layers = [_numbers(np.concatenate([m.names[i].ravel() for m in members])) for i in range(len(members[0].names))]
    if any(not np.array_equal(layer, layers[0]) for layer in layers):
        return None
    pieces = np.split(layers[0], np.cumsum([m.names[0].size for m in members])[:-1])
    return [piece.reshape(m.names.shape[1:]) for piece, m in zip(pieces, members, strict=True)]


def _numbers(names: Names) -> NDArray[np.int64]:
    """Numbers from 0 in order of first appearance; -1 for 0."""
    distinct, first, inverse = np.unique(names, return_index=True, return_inverse=True)
    order = np.argsort(np.where(distinct == 0, -1, first))
    numbers = np.empty(len(distinct), np.int64)
    numbers[order] = np.arange(len(distinct)) - int(0 in distinct)
    return numbers[inverse]


def apply_fold(arrays: Mapping[int, Array], fold: Fold, s: Array) -> dict[int, Array]:
    """The parameters of a fold rescaled by `s` of shape `(*layers, channels)`, finite and positive.

    Computed in float32 and rounded once to each array's dtype; a quotient is a product with the float32 reciprocal. To
    apply several folds with one rounding, pass float32 arrays and round the last result. Shardings are kept. Differs
    from the exact result by rounding only, and not at all for powers of two (short of overflow and underflow).

    Args:
        arrays: from leaf number to array; others than the fold's are passed on as they are.
        s: may be traced.

    Raises:
        ValueError: `s` has another shape, or an array of the fold is missing.
    """
    if s.shape != fold.shape:
        raise ValueError(f"s has shape {s.shape}, wanted {fold.shape}: (*layers, channels) of the fold")
    missing = [side.path for side in (*fold.producers, *fold.consumers) if side.leaf not in arrays]
    if missing:
        raise ValueError(f"arrays lacks {missing[0]!r}, wanted every parameter of the fold; pass it by leaf number")
    result = dict(arrays)
    scale = s.astype(jnp.float32)
    for sides, factors in ((fold.producers, 1 / scale), (fold.consumers, scale)):
        for side in sides:
            array = result[side.leaf]
            result[side.leaf] = beside(_rescaled(jnp.asarray(on_devices(array)), side, factors), array)
    return result


@paced
def _rescaled(array: Array, side: Side, factors: Array) -> Array:
    """An array multiplied by factors of shape `(*layers, channels)` along a side's axes."""
    # Index -1 picks the one behind the last channel.
    padded = jnp.concatenate([factors, jnp.ones((*factors.shape[:-1], 1), jnp.float32)], axis=-1)
    picked = padded[..., side.index]
    axes = (*side.layer_axes, *side.axes)
    spread = lax.expand_dims(picked.transpose(np.argsort(axes)), [a for a in range(array.ndim) if a not in axes])
    product = exact.to_float32(array) * replicated_beside(spread, array)
    rounded = exact.cast(product, array.dtype)
    layout = layout_of(array)
    return rounded if layout is None else place(rounded, layout)
