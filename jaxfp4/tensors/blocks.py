"""How a tensor divides into blocks of 16 along its contraction axes."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE


@dataclasses.dataclass(frozen=True)
class Blocking:
    """Blocks of 16 along the flattened contraction of an array of `shape`, its last contraction axis minor.

    If the last contraction axis is a multiple of 16, no block crosses it and the axes stay as they are. Otherwise
    several contraction axes are merged into one at the place of the last of them. A contraction that is no multiple of
    16 is padded with zeros. `axes` are increasing and non-negative.
    """

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def merged(self) -> bool:
        """Whether blocks run over several axes, so that these are stored as one."""
        return len(self.axes) > 1 and self.shape[self.axes[-1]] % BLOCK_SIZE != 0

    @property
    def axis(self) -> int:
        """The axis along which blocks lie, in the merged array."""
        return self.axes[-1] - (len(self.axes) - 1 if self.merged else 0)

    @property
    def length(self) -> int:
        """Values along the block axis before padding."""
        axes = self.axes if self.merged else self.axes[-1:]
        return math.prod(self.shape[a] for a in axes)

    @property
    def blocks(self) -> int:
        """Blocks along the block axis."""
        return -(-self.length // BLOCK_SIZE)

    @property
    def _order(self) -> tuple[int, ...]:
        """The permutation that brings merged axes together in front of the last of them."""
        last = self.axes[-1]
        others = [a for a in range(len(self.shape)) if a not in self.axes]
        return (*(a for a in others if a < last), *self.axes, *(a for a in others if a > last))

    @property
    def merged_shape(self) -> tuple[int, ...]:
        """The shape with one contraction axis, before padding."""
        if not self.merged:
            return self.shape
        rest = [n for a, n in enumerate(self.shape) if a not in self.axes]
        return (*rest[: self.axis], self.length, *rest[self.axis :])

    @property
    def blocks_shape(self) -> tuple[int, ...]:
        """The shape that `to_blocks` gives."""
        shape = self.merged_shape
        return (*shape[: self.axis], self.blocks, BLOCK_SIZE, *shape[self.axis + 1 :])

    def to_blocks(self, x: Array) -> Array:
        """`x` with the block axis split in two, `[.., blocks, 16, ..]`; the new axis is `self.axis + 1`."""
        if self.merged:
            x = jnp.transpose(x, self._order).reshape(self.merged_shape)
        padding = self.blocks * BLOCK_SIZE - self.length
        if padding:
            x = lax.pad(x, jnp.zeros((), x.dtype), [(0, padding * (a == self.axis), 0) for a in range(x.ndim)])
        return x.reshape(*x.shape[: self.axis], self.blocks, BLOCK_SIZE, *x.shape[self.axis + 1 :])

    def align(self, scale: Array) -> Array:
        """A value for the tensor, or for each entry of its leading axes, shaped to broadcast with `to_blocks`."""
        scale = lax.expand_dims(scale, range(scale.ndim, len(self.shape)))
        if self.merged:
            scale = lax.squeeze(scale, self.axes[:-1])
        return lax.expand_dims(scale, [self.axis + 1])

    def from_blocks(self, blocks: Array) -> Array:
        """The inverse of `to_blocks`, padding dropped."""
        x = lax.collapse(blocks, self.axis, self.axis + 2)
        if x.shape[self.axis] != self.length:
            x = lax.slice_in_dim(x, 0, self.length, axis=self.axis)
        if not self.merged:
            return x
        order = self._order
        inverse = [order.index(a) for a in range(len(order))]
        return jnp.transpose(x.reshape([self.shape[a] for a in order]), inverse)


def normalize_axes(axis: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Contraction axes as increasing non-negative numbers; ValueError if one is repeated or out of range."""
    given = (int(axis),) if isinstance(axis, int | np.integer) else tuple(axis)
    axes = tuple(sorted(a + ndim if a < 0 else a for a in given))
    if not axes or len(set(axes)) != len(axes) or not all(0 <= a < ndim for a in axes):
        raise ValueError(
            f"axis={axis!r} for an array of {ndim} dimensions: wanted one or more different contraction axes in "
            f"[-{ndim}, {ndim}); pass the axis that the matrix product sums over"
        )
    return axes
