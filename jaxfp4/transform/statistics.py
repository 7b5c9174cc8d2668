"""Statistics of activations as commutative monoids: start, observe, merge, and merge across devices."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array

from jaxfp4.formats import exact
from jaxfp4.tensors.mesh import AxisNames, amax_over_mesh


class Statistic(Protocol):
    """A commutative monoid over batches. States are arrays whose leading axes are those of the weight's stack."""

    def init(self, stack: Sequence[int]) -> Array:
        """The neutral element for a stack of weights, `stack` long along each of its axes."""
        ...

    def observe(self, activation: Array, kept: Sequence[int]) -> Array:
        """The state of one activation for each entry of its dimensions `kept`, in this order."""
        ...

    def merge(self, left: Array, right: Array) -> Array:
        """The state of both sets of observations."""
        ...

    def merge_at(self, state: Array, index: tuple[Any, ...], observed: Array) -> Array:
        """`state` with `observed` merged in at stack positions; positions beyond the stack are dropped."""
        ...

    def merge_over_mesh(self, state: Array, names: AxisNames) -> Array:
        """Inside a shard_map, the state merged over devices along these mesh axes."""
        ...


@dataclasses.dataclass(frozen=True)
class AbsoluteMaximum:
    """The largest magnitude seen, float32; NaN once a NaN was seen. Its merge is the maximum, across devices `pmax`."""

    def init(self, stack: Sequence[int]) -> Array:
        """Zeros: nothing seen."""
        return jnp.zeros(tuple(stack), jnp.float32)

    def observe(self, activation: Array, kept: Sequence[int]) -> Array:
        """`max(abs(activation))` over all dimensions but `kept`."""
        reduced = [d for d in range(activation.ndim) if d not in kept]
        bits = jnp.max(exact.magnitude_bits(activation), reduced, initial=0)
        increasing = sorted(kept)
        return jnp.transpose(exact.as_float(bits), [increasing.index(d) for d in kept])

    def merge(self, left: Array, right: Array) -> Array:
        """The elementwise maximum."""
        return jnp.maximum(left, right)

    def merge_at(self, state: Array, index: tuple[Any, ...], observed: Array) -> Array:
        """`state.at[index].max(observed)`."""
        return state.at[index].max(observed, mode="drop")

    def merge_over_mesh(self, state: Array, names: AxisNames) -> Array:
        """`lax.pmax`, which keeps NaN."""
        return amax_over_mesh(state, names)
