"""Statistics of activations as commutative monoids: start, observe, merge, and merge across devices.

States are pytrees of arrays whose leading axes are those of the weight's stack.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Sequence
from typing import Any, Protocol

import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, exact
from jaxfp4.tensors.mesh import (
    AxisNames,
    amax_over_mesh,
    merge_dimensions,
    replicated,
    sum_over_mesh,
    typed_layout,
    whole_along,
)

State = Any


@dataclasses.dataclass(frozen=True)
class Sample:
    """An activation as a planned weight meets it.

    `kept` are its dimensions that tell the weights of a stack apart, `contracted` those of the contraction, in the
    order of the weight's axes.
    """

    activation: Array
    kept: tuple[int, ...] = ()
    contracted: tuple[int, ...] = ()

    def arranged(self) -> Array:
        """The activation with its kept dimensions in front and the contracted ones behind."""
        rest = [d for d in range(self.activation.ndim) if d not in (*self.kept, *self.contracted)]
        return jnp.transpose(self.activation, [*self.kept, *rest, *self.contracted])

    def rows(self) -> Array:
        """The activation as `[*kept, rows, channels]`, in its own dtype."""
        rest = self.activation.ndim - len(self.kept) - len(self.contracted)
        return merge_dimensions(self.arranged(), [*(1 for _ in self.kept), rest, len(self.contracted)])


@dataclasses.dataclass(frozen=True)
class Places:
    """Where in a stack the entries of a sample's kept dimensions belong.

    `index` has an array for each stack axis, broadcastable over the kept dimensions and `shared` more behind them;
    positions beyond the stack belong nowhere.
    """

    index: tuple[Array, ...]
    shared: int


class Statistic(Protocol):
    """A commutative monoid over batches."""

    def init(self, stack: Sequence[int]) -> State:
        """The neutral element for a stack of weights, `stack` long along each of its axes."""
        ...

    def observe(self, sample: Sample) -> State:
        """The state of one activation for each entry of its kept dimensions."""
        ...

    def observe_at(self, state: State, places: Places, sample: Sample) -> State:
        """`state` with the sample merged in at stack positions."""
        ...

    def merge(self, left: State, right: State) -> State:
        """The state of both sets of observations."""
        ...

    def merge_over_mesh(self, state: State, names: AxisNames) -> State:
        """Inside a shard_map, the state merged over devices along these mesh axes."""
        ...


@dataclasses.dataclass(frozen=True)
class AbsoluteMaximum:
    """The largest magnitude seen, float32; NaN once a NaN was seen. Its merge is the maximum, across devices `pmax`."""

    def init(self, stack: Sequence[int]) -> Array:
        """Zeros: nothing seen."""
        return jnp.zeros(tuple(stack), jnp.float32)

    def observe(self, sample: Sample) -> Array:
        """`max(abs(activation))` over all dimensions but the kept ones."""
        return _maximum(sample, sample.kept)

    def observe_at(self, state: Array, places: Places, sample: Sample) -> Array:
        """`state.at[index].max(observed)`."""
        return state.at[places.index].max(_beside(self.observe(sample), sample, places), mode="drop")

    def merge(self, left: Array, right: Array) -> Array:
        """The elementwise maximum."""
        return jnp.maximum(left, right)

    def merge_over_mesh(self, state: Array, names: AxisNames) -> Array:
        """`lax.pmax`, which keeps NaN."""
        return amax_over_mesh(state, names)


@dataclasses.dataclass(frozen=True)
class ChannelMaximum:
    """The largest magnitude seen in each of `channels` channels, as `AbsoluteMaximum`. States end in `[channels]`."""

    channels: int

    def init(self, stack: Sequence[int]) -> Array:
        """Zeros: nothing seen."""
        return jnp.zeros((*stack, self.channels), jnp.float32)

    def observe(self, sample: Sample) -> Array:
        """`max(abs(activation))` over all dimensions but the kept and the contracted ones."""
        _refuse_part(sample, self.channels)
        observed = _maximum(sample, (*sample.kept, *sample.contracted))
        return observed.reshape(*observed.shape[: len(sample.kept)], self.channels)

    def observe_at(self, state: Array, places: Places, sample: Sample) -> Array:
        """`state.at[index].max(observed)`."""
        return state.at[places.index].max(_beside(self.observe(sample), sample, places), mode="drop")

    def merge(self, left: Array, right: Array) -> Array:
        """The elementwise maximum."""
        return jnp.maximum(left, right)

    def merge_over_mesh(self, state: Array, names: AxisNames) -> Array:
        """`lax.pmax`, which keeps NaN."""
        return amax_over_mesh(state, names)


@dataclasses.dataclass(frozen=True)
class ChannelSum:
    """The sum of magnitudes in each of `channels` channels, float32. States end in `[channels]`."""

    channels: int

    def init(self, stack: Sequence[int]) -> Array:
        """Zeros: nothing seen."""
        return jnp.zeros((*stack, self.channels), jnp.float32)

    def observe(self, sample: Sample) -> Array:
        """`sum(abs(activation))` over all dimensions but the kept and the contracted ones."""
        _refuse_part(sample, self.channels)
        return jnp.sum(jnp.abs(exact.to_float32(sample.rows())), -2)

    def observe_at(self, state: Array, places: Places, sample: Sample) -> Array:
        """`state.at[index].add(observed)`."""
        return state.at[places.index].add(_beside(self.observe(sample), sample, places), mode="drop")

    def merge(self, left: Array, right: Array) -> Array:
        """The sum."""
        return left + right

    def merge_over_mesh(self, state: Array, names: AxisNames) -> Array:
        """`lax.psum`."""
        return sum_over_mesh(state, names)


class MomentForm(enum.Enum):
    """Which part of `sum(x x^T)` over the tokens is kept."""

    NONE = 0
    DIAGONAL = 1
    """`[channels]`."""
    BLOCKS = 2
    """The blocks of 16 x 16 on the diagonal, `[channels, 16]`."""
    FULL = 3
    """`[channels, channels]`."""


@dataclasses.dataclass(frozen=True)
class SecondMoments:
    """`sum(x x^T)` over the tokens, float32, or a part of it. States end in the shape of the form.

    A last block that is not full has zeros behind it. The sum's order is the compiler's, so it can differ in the last
    bits between layouts.
    """

    channels: int
    form: MomentForm

    @property
    def _tail(self) -> tuple[int, ...]:
        return {
            MomentForm.NONE: (0,),
            MomentForm.DIAGONAL: (self.channels,),
            MomentForm.BLOCKS: (self.channels, BLOCK_SIZE),
            MomentForm.FULL: (self.channels, self.channels),
        }[self.form]

    def init(self, stack: Sequence[int]) -> Array:
        """Zeros: nothing seen."""
        return jnp.zeros((*stack, *self._tail), jnp.float32)

    def observe(self, sample: Sample) -> Array:
        """The sum over one activation's rows."""
        _refuse_part(sample, self.channels)
        return self._products(sample.rows())

    def observe_at(self, state: Array, places: Places, sample: Sample) -> Array:
        """The sum added for each weight of the stack, over the rows that meet it.

        Rows that are kept apart, as tokens routed to experts are, are summed in a loop over the stack, because the
        products of each row alone would take too much memory.
        """
        stack = state.shape[: len(places.index)]
        kept = math.prod(sample.activation.shape[d] for d in sample.kept)
        if self.form is MomentForm.DIAGONAL or kept <= math.prod(stack):
            return state.at[places.index].add(_beside(self.observe(sample), sample, places), mode="drop")
        _refuse_part(sample, self.channels)
        position = _flat_positions(places, stack)
        rows = replicated(sample.rows())

        def add(entry: Array, flat: Array) -> Array:
            meets = jnp.any(position == entry, tuple(range(position.ndim - places.shared, position.ndim)))
            chosen = jnp.where(lax.expand_dims(meets, [rows.ndim - 2, rows.ndim - 1]), rows, 0)
            return flat.at[entry].add(self._products(chosen.reshape(-1, self.channels)))

        flat = lax.fori_loop(0, math.prod(stack), add, state.reshape(-1, *self._tail))
        return flat.reshape(state.shape)

    def _products(self, rows: Array) -> Array:
        if self.form is MomentForm.DIAGONAL:
            wide = exact.to_float32(rows)
            return jnp.sum(wide * wide, -2)
        if self.form is MomentForm.FULL:
            return _gram(rows)
        padding = -self.channels % BLOCK_SIZE
        rows = whole_along(rows, [rows.ndim - 1])
        rows = jnp.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, padding)])
        blocks = rows.reshape(*rows.shape[:-1], -1, BLOCK_SIZE)
        products = _gram(jnp.moveaxis(blocks, -2, -3))
        return lax.collapse(products, products.ndim - 3, products.ndim - 1)[..., : self.channels, :]

    def merge(self, left: Array, right: Array) -> Array:
        """The sum."""
        return left + right

    def merge_over_mesh(self, state: Array, names: AxisNames) -> Array:
        """`lax.psum`."""
        return sum_over_mesh(state, names)


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Several statistics of the same activation by name; the state is a dict."""

    parts: tuple[tuple[str, Statistic], ...]

    def init(self, stack: Sequence[int]) -> dict[str, State]:
        """The neutral elements."""
        return {name: part.init(stack) for name, part in self.parts}

    def observe(self, sample: Sample) -> dict[str, State]:
        """Each one's state."""
        return {name: part.observe(sample) for name, part in self.parts}

    def observe_at(self, state: dict[str, State], places: Places, sample: Sample) -> dict[str, State]:
        """Each one's state with the sample merged in."""
        return {name: part.observe_at(state[name], places, sample) for name, part in self.parts}

    def merge(self, left: dict[str, State], right: dict[str, State]) -> dict[str, State]:
        """Each one's merge."""
        return {name: part.merge(left[name], right[name]) for name, part in self.parts}

    def merge_over_mesh(self, state: dict[str, State], names: AxisNames) -> dict[str, State]:
        """Each one's merge over devices."""
        return {name: part.merge_over_mesh(state[name], names) for name, part in self.parts}


def _gram(rows: Array) -> Array:
    """`x^T x` over the last but one dimension, in float32; products of bfloat16 values are exact in it."""
    layout = typed_layout(rows)
    return jnp.einsum(
        "...rk,...rl->...kl",
        rows,
        rows,
        precision=lax.Precision.HIGHEST,
        preferred_element_type=jnp.float32,
        # Whole along channels, of which one mesh axis could not split both.
        out_sharding=None if layout is None else layout.restricted(range(rows.ndim - 2)).sharding,
    )


def _maximum(sample: Sample, kept: Sequence[int]) -> Array:
    """The largest magnitude over all dimensions but `kept`, these in the order given."""
    reduced = [d for d in range(sample.activation.ndim) if d not in kept]
    bits = jnp.max(exact.magnitude_bits(sample.activation), reduced, initial=0)
    increasing = sorted(kept)
    return jnp.transpose(exact.as_float(bits), [increasing.index(d) for d in kept])


def _beside(observed: Array, sample: Sample, places: Places) -> Array:
    """Observations with dimensions of size 1 behind the kept ones, for stack axes that share them."""
    first = len(sample.kept)
    return lax.expand_dims(replicated(observed), range(first, first + places.shared))


def _flat_positions(places: Places, stack: Sequence[int]) -> Array:
    """Positions in the flattened stack; -1 for those beyond it."""
    flat: Array = jnp.int32(0)
    inside: Array = jnp.bool_(True)
    for index, n in zip(places.index, stack, strict=True):
        flat = flat * n + jnp.clip(index, 0, n - 1)
        inside = inside & (index >= 0) & (index < n)
    return jnp.where(inside, flat, -1)


def _refuse_part(sample: Sample, channels: int) -> None:
    found = math.prod(sample.activation.shape[d] for d in sample.contracted)
    if found != channels:
        raise ValueError(
            f"a shard_map splits its contraction, {found} of {channels} channels: wanted all of them on each device "
            "for an algorithm that compares channels; split another dimension there, or use max, mse or four_over_six"
        )
