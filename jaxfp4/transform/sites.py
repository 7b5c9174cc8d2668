"""A weight on its way through the evaluation, and the activation that it meets."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.tensors import QuantizedTensor
from jaxfp4.tensors.hadamard import hadamard
from jaxfp4.tensors.mesh import AxisNames, varying_axes, varying_everywhere, whole_along
from jaxfp4.transform.contractions import Contraction
from jaxfp4.transform.statistics import Places, Sample, State, Statistic
from jaxfp4.transform.views import View, contraction_order

OBSERVED = "observed"
"""Among the scales of a weight, 1 for the one layer whose activations are observed and 0 for the others."""


@dataclasses.dataclass(frozen=True)
class Tracked:
    """A value that is a view of a planned weight.

    `stack` holds the sizes, in this scope, of the parameter axes along which weights are stacked, but for scanned ones.
    `scales` are arrays that go with the weight; their leading axes are `layer_axes`, as far as not scanned.
    With `OBSERVED` among them statistics are those of one layer and have no layer axes.
    """

    value: Array | QuantizedTensor
    view: View
    stack: Mapping[int, int]
    layer_axes: tuple[int, ...]
    scales: Mapping[str, Array]
    rotation: int = 0
    split: AxisNames = ()
    """In a shard_map, the mesh axes that split the stack."""

    @property
    def observed_stack(self) -> Mapping[int, int]:
        """The part of `stack` along which statistics are kept apart."""
        if OBSERVED not in self.scales:
            return self.stack
        return {a: n for a, n in self.stack.items() if a not in self.layer_axes}

    def array(self) -> Array:
        """The weight's values."""
        return self.value.dequantize() if isinstance(self.value, QuantizedTensor) else self.value

    def packed_by_layer(self) -> bool:
        """Whether the value is still quantized, with a global scale for each entry of its leading axis."""
        value = self.value
        return isinstance(value, QuantizedTensor) and value.global_scale.ndim > 0 and len(value.global_scale) > 1

    def scale(self, name: str) -> Array | None:
        """One of the scales for the layer that the view has picked from a stack."""
        scale = self.scales.get(name)
        if scale is None or not self.layer_axes:
            return scale
        return scale[tuple(self.view.starts.get(axis, slice(None)) for axis in self.layer_axes)]


@dataclasses.dataclass(frozen=True)
class Meeting:
    """A tracked weight and the activation that it is contracted with."""

    weight: Tracked
    contraction: Contraction
    activation: Array
    group_sizes: Array | None

    @property
    def leaf(self) -> int:
        """The parameter's number."""
        return self.weight.view.leaf

    @property
    def activation_dimensions(self) -> tuple[int, ...]:
        """The activation's contracted dimensions, in the order of the parameter's axes, slowest first."""
        order = contraction_order(self.weight.view, self.contraction.weight_contracted)
        return tuple(self.contraction.contracted[i][1] for i in order)

    def rotated(self, activation: Array) -> Array:
        """An activation of this meeting rotated as the weight is, or is going to be."""
        size = self.weight.rotation
        if not size:
            return activation
        return along(activation, self.activation_dimensions, lambda x, axes: hadamard(x, axes, size))

    def observe(self, statistic: Statistic) -> State:
        """The statistic of the activation for each weight of the stack; neutral for those that it did not meet."""

        def of_stack(weight: Tracked) -> State:
            return dataclasses.replace(self, weight=weight)._of_stack(statistic)

        return observe_layer(self.weight, statistic, of_stack)

    def _of_stack(self, statistic: Statistic) -> State:
        stack = [self.weight.stack[a] for a in sorted(self.weight.stack)]
        neutral = jax.tree.map(varying_everywhere, statistic.init(stack))
        seen = self._observed(statistic, neutral)
        return jax.tree.map(self._once, seen, neutral)

    def _once(self, seen: Array, neutral: Array) -> Array:
        """Of devices of a shard_map that see the same activation only the first one's, so that sums count it once.

        Which these are is known from the types of values only: not with `check_vma=False`, nor for an axis that splits
        the weight's outputs, over which the activation is cast to vary. There each of them counts.
        """
        varying = (*varying_axes(self.activation), *self.weight.split)
        repeated = [n for n in varying_axes(seen) if n not in varying]
        if not repeated:
            return seen
        first = functools.reduce(operator.and_, (lax.axis_index(n) == 0 for n in repeated))
        return jnp.where(first, seen, neutral)

    def _observed(self, statistic: Statistic, state: State) -> State:
        contracted = self.activation_dimensions
        activation = self.rotated(self.activation)
        if not self.weight.stack:
            observed = statistic.observe(Sample(activation, (), contracted))
            # On Explicit axes states have one type, whatever the activations have.
            return statistic.merge(state, jax.tree.map(lambda s: whole_along(s, range(s.ndim)), observed))
        kept = self._kept_dimensions()
        shared = self._shared_axes()
        rank = len(kept) + len(shared)
        index = tuple(
            _along(jnp.arange(self.weight.stack[axis]), len(kept) + shared.index(axis), rank)
            if axis in shared
            else self._stack_index(axis, kept, rank)
            for axis in sorted(self.weight.stack)
        )
        sample = Sample(activation, tuple(kept), contracted)
        return statistic.observe_at(state, Places(index, len(shared)), sample)

    def _shared_axes(self) -> list[int]:
        """Stack axes whose weights all meet the same activation: they are among the free dimensions of the weight."""
        inner = {*self.contraction.weight_contracted, *self.contraction.weight_stacked}
        free = [d for i, d in enumerate(self.weight.view.dimensions) if i not in inner]
        return sorted({f.axis for d in free for f in d if f.axis in self.weight.stack and f.index_dimension is None})

    def _pairs(self) -> list[tuple[int, int]]:
        """Pairs of a weight's dimension that holds separate weights and the activation's that selects among them."""
        pairs = list(self.contraction.batched)
        if self.contraction.group_dimension is not None and self.contraction.ragged_dimension is not None:
            pairs.append((self.contraction.group_dimension, self.contraction.ragged_dimension))
        return pairs

    def _kept_dimensions(self) -> list[int]:
        """The activation's dimensions that tell which weight of the stack an entry meets."""
        dimensions = self.weight.view.dimensions
        return [a for w, a in self._pairs() if any(f.axis in self.weight.stack for f in dimensions[w])]

    def _stack_index(self, axis: int, kept: list[int], rank: int) -> Any:
        """Positions along one stack axis, broadcastable over the kept dimensions of the activation."""
        view, start = self.weight.view, self.weight.view.starts.get(axis, 0)
        index: Any = 0 if np.ndim(start) > 0 else start
        gathered: dict[int, int] = {}
        for w, a in self._pairs():
            remaining = math.prod(f.size for f in view.dimensions[w])
            for i, factor in enumerate(view.dimensions[w]):
                remaining //= factor.size
                if factor.axis != axis:
                    continue
                if factor.index_dimension is not None:
                    gathered[factor.index_dimension] = kept.index(a)
                    continue
                position = self._positions(w, a) // remaining
                if i > 0:
                    position = position % factor.size
                index = index + _along(position * factor.stride, kept.index(a), rank)
        if gathered:
            index = index + _spread(start[..., 0], gathered, rank)
        return jnp.asarray(index)

    def _positions(self, weight_dimension: int, activation_dimension: int) -> Array:
        """For each entry of an activation's dimension, the weight's entry that it meets."""
        length = self.activation.shape[activation_dimension]
        if weight_dimension != self.contraction.group_dimension or self.group_sizes is None:
            return jnp.arange(length)
        ends = jnp.cumsum(self.group_sizes)
        groups = math.prod(f.size for f in self.weight.view.dimensions[weight_dimension])
        entries = jnp.searchsorted(ends, jnp.arange(length), side="right")
        # Rows behind the last group meet no weight: a position far outside drops them.
        return jnp.where(entries < groups, entries, jnp.iinfo(jnp.int32).max // 2)


def observe_layer(weight: Tracked, statistic: Statistic, observe: Callable[[Tracked], State]) -> State:
    """`observe(weight)`, the state over its stack; of the observed layer alone, neutral in others, if one is chosen.

    Others are not computed where the layer is known, as it is in a scan over layers.
    """
    flags = weight.scales.get(OBSERVED)
    if flags is None:
        return observe(weight)
    starts = [weight.view.starts.get(axis) for axis in weight.layer_axes]
    rest = weight.observed_stack

    def of_this() -> State:
        return observe(dataclasses.replace(weight, stack=rest))

    def of_one_among_all() -> State:
        place = dict(zip(weight.layer_axes, jnp.unravel_index(jnp.argmax(flags), flags.shape), strict=True))
        picked = tuple(place.get(a, slice(None)) for a in sorted(weight.stack))
        return jax.tree.map(lambda s: s[picked], observe(weight))

    if all(start is not None and np.ndim(start) == 0 for start in starts):
        chosen, observed = flags[tuple(starts)], of_this
    else:
        chosen, observed = jnp.max(flags), of_one_among_all
    neutral = jax.tree.map(varying_everywhere, statistic.init([rest[a] for a in sorted(rest)]))
    return lax.cond(chosen > 0, observed, lambda: neutral)


def along(x: Array, dimensions: Sequence[int], function: Callable[[Array, tuple[int, ...]], Array]) -> Array:
    """`function(x, dimensions)` for a function that takes increasing axes, flattened in the order of `dimensions`."""
    if list(dimensions) == sorted(dimensions):
        return function(x, tuple(dimensions))
    order = [d for d in range(x.ndim) if d not in dimensions] + list(dimensions)
    result = function(jnp.transpose(x, order), tuple(range(x.ndim - len(dimensions), x.ndim)))
    return jnp.transpose(result, [order.index(d) for d in range(x.ndim)])


def _along(values: Array, position: int, rank: int) -> Array:
    """A vector as an array of `rank` dimensions that runs along one of them."""
    return lax.expand_dims(values, [d for d in range(rank) if d != position])


def _spread(indices: Array, positions: Mapping[int, int], rank: int) -> Array:
    """An index array with its dimensions moved to `positions` among `rank`; the others are of size 1."""
    ordered = sorted(positions, key=lambda d: positions[d])
    others = [d for d in range(indices.ndim) if d not in positions]
    moved = lax.squeeze(jnp.transpose(indices, [*others, *ordered]), range(len(others)))
    return lax.expand_dims(moved, [d for d in range(rank) if d not in positions.values()])
