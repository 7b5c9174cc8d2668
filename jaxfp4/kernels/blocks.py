"""Kernels over blocks: where the blocks of an array lie, and a Pallas call that visits them."""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxfp4.formats import BLOCK_SIZE
from jaxfp4.kernels.calls import call


@dataclasses.dataclass(frozen=True)
class Geometry:
    """An array `[outer, blocks, 16, inner]`, row-major: blocks along its third dimension."""

    outer: int
    """How many parts have a global scale of their own."""
    blocks: int
    inner: int
    """Values from one entry of a block to the next."""

    @property
    def is_minor(self) -> bool:
        """Whether the values of a block are neighbours in memory."""
        return self.inner == 1


@dataclasses.dataclass(frozen=True)
class Launch:
    """How many blocks a program handles, a power of two, and with how many warps."""

    blocks: int
    warps: int


@dataclasses.dataclass(frozen=True)
class Part:
    """An output with `entries` for each block: 16 values, 8 packed bytes or one scale."""

    entries: int
    dtype: Any


Tiles = tuple[Array, ...]
"""Entries of some blocks. Where blocks are minor one array `[T, entries]`, or several with consecutive ones; elsewhere
an array `[T]` for each entry, so that all of a block is in one thread. What is one of each block is `[T, 1]` or `[T]`,
and so broadcasts."""


@dataclasses.dataclass(frozen=True)
class Values:
    """The values of some blocks, the even entries and the odd ones apart, as packed codes want them."""

    even: Tiles
    odd: Tiles

    @property
    def dtype(self) -> Any:
        """Of all arrays."""
        return self.even[0].dtype

    def map(self, function: Callable[[Array], Array]) -> Values:
        """The function of each array."""
        return Values(tuple(map(function, self.even)), tuple(map(function, self.odd)))

    def reduce(self, combine: Callable[[Array, Array], Array], along: Callable[..., Array]) -> Array:
        """Over the entries of a block: `combine` of two arrays and `along` an axis, as `jnp.add` and `jnp.sum`."""
        combined = functools.reduce(combine, (*self.even, *self.odd))
        return along(combined, 1, keepdims=True) if combined.ndim == 2 else combined

    def packed(self) -> Tiles:
        """Bytes of two codes, the even entry in the low nibble, as uint32 with garbage beyond the byte."""
        return tuple((even & 15) | (odd << 4) for even, odd in zip(self.even, self.odd, strict=True))


Body = Callable[[Sequence[Any], Sequence[Array]], Sequence[Any]]
"""`(inputs, constants []) -> outputs`; each is `Values` if it has 16 entries for each block, `Tiles` otherwise."""


def visit(
    body: Body,
    inputs: Sequence[Array],
    constants: Array | None,
    geometry: Geometry,
    parts: Sequence[Part],
    launch: Launch,
    *,
    whole_in_thread: bool = False,
    interpret: bool = False,
) -> list[Array]:
    """`body` of all blocks.

    Inputs and outputs are `[outer, blocks, entries, inner]`; `constants` is float32 `[outer, C]` or None, and the
    body gets the C scalars of its part. Inside a shard_map all of them vary over the same mesh axes.

    `whole_in_thread` is for a body that computes across the values of a block: where blocks are minor their values come
    in tiles of 16 bytes, the most that a thread loads at once, so that one thread has all of a block. It wants at
    least as many blocks as threads.
    """
    minor = geometry.is_minor
    rows = geometry.outer if minor else geometry.outer * geometry.blocks
    length = geometry.blocks if minor else geometry.inner
    width = min(launch.blocks, power_of_two(length))
    columns = -(-length // width)

    def shape(entries: int) -> tuple[int, ...]:
        return (rows, length, entries) if minor else (rows, entries, length)

    tables = [] if constants is None else [constants]

    def kernel(*refs: Any) -> None:
        constants_refs, array_refs = refs[: len(tables)], refs[len(tables) :]
        row, column = pl.program_id(0) // columns, pl.program_id(0) % columns
        outer = row if minor else row // geometry.blocks
        inside = None if length % width == 0 else column * width + jnp.arange(width) < length
        span = pl.ds(column * width, width)
        access: _Minor | Strided = Strided(inside, row, span)
        if minor:
            access = _Minor(inside, row, span, whole_in_thread)
        tiles = [access.load(ref, x.shape[2], x.dtype) for ref, x in zip(array_refs, inputs, strict=False)]
        scalars = [ref[outer, i] for ref in constants_refs for i in range(ref.shape[1])]
        for ref, result in zip(array_refs[len(inputs) :], body(tiles, scalars), strict=True):
            access.store(ref, result)

    varying = jax.typeof(inputs[0]).manual_axis_type
    results = call(
        kernel,
        warps=launch.warps,
        interpret=interpret,
        grid=(rows * columns,),
        out_shape=[jax.ShapeDtypeStruct(shape(part.entries), part.dtype, manual_axis_type=varying) for part in parts],
    )(*tables, *(as_integers(x, interpret).reshape(shape(x.shape[2])) for x in inputs))
    outer_shape = (geometry.outer, geometry.blocks)
    return [r.reshape(*outer_shape, p.entries, geometry.inner) for r, p in zip(results, parts, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Access:
    """Where the blocks of a program lie in arrays; those not `inside` are padding."""

    inside: Array | None

    def _outside(self, ref: Any) -> Array | None:
        # What a masked load gives there is not stored, but it must be something.
        return None if self.inside is None else jnp.zeros((), ref.dtype)


@dataclasses.dataclass(frozen=True)
class _Minor(_Access):
    """Arrays `[rows, length, entries]`."""

    row: Array
    span: Any
    whole_in_thread: bool

    def _mask(self, entries: int) -> Array | None:
        return None if self.inside is None else jnp.broadcast_to(self.inside[:, None], (self.inside.size, entries))

    def load(self, ref: Any, entries: int, dtype: Any) -> Any:
        width = _BYTES_AT_ONCE // ref.dtype.itemsize if self.whole_in_thread and entries == BLOCK_SIZE else entries
        mask, other = self._mask(width), self._outside(ref)
        places = (ref.at[self.row, self.span, pl.ds(first, width)] for first in range(0, entries, width))
        tiles = tuple(_as_values(triton.load(place, mask=mask, other=other), dtype) for place in places)
        return _split(tiles) if entries == BLOCK_SIZE else tiles

    def store(self, ref: Any, result: Any) -> None:
        tiles = _interleaved(result) if isinstance(result, Values) else tuple(result)
        while len(tiles) > 1 and 2 * tiles[0].shape[1] * ref.dtype.itemsize <= _BYTES_AT_ONCE:
            tiles = tuple(_joined(a, b, 1) for a, b in zip(tiles[::2], tiles[1::2], strict=True))
        width = tiles[0].shape[1]
        for i, tile in enumerate(tiles):
            place = ref.at[self.row, self.span, pl.ds(i * width, width)]
            triton.store(place, tile.astype(ref.dtype), mask=self._mask(width))


class BlockEach(_Access, abc.ABC):
    """Arrays of which each thread has all entries of its blocks."""

    @abc.abstractmethod
    def place(self, ref: Any, entry: Array) -> Any:
        """Where an entry of the blocks lies."""

    def load(self, ref: Any, entries: int, dtype: Any) -> Any:
        """`Values` of 16 entries, or `Tiles`."""
        places = (self.place(ref, jnp.int32(i)) for i in range(entries))
        loaded = (triton.load(place, mask=self.inside, other=self._outside(ref)) for place in places)
        tiles = tuple(_as_values(tile, dtype) for tile in loaded)
        return Values(tiles[::2], tiles[1::2]) if entries == BLOCK_SIZE else tiles

    def store(self, ref: Any, result: Any) -> None:
        """What `load` gives."""
        if isinstance(result, Values):
            result = [tile for pair in zip(result.even, result.odd, strict=True) for tile in pair]
        for i, tile in enumerate(result):
            triton.store(self.place(ref, jnp.int32(i)), tile.astype(ref.dtype), mask=self.inside)


@dataclasses.dataclass(frozen=True)
class Strided(BlockEach):
    """Arrays `[rows, entries, length]`."""

    row: Array
    span: Any

    def place(self, ref: Any, entry: Array) -> Any:
        """In a row."""
        return ref.at[self.row, entry, self.span]


def as_integers(x: Array, interpret: bool) -> Array:
    """16-bit floats as integers if kernels are interpreted: XLA on a CPU may flush subnormals in slices of floats."""
    return lax.bitcast_convert_type(x, jnp.uint16) if interpret and x.dtype in _HALVES else x


def _as_values(tile: Array, dtype: Any) -> Array:
    return tile if tile.dtype == dtype else lax.bitcast_convert_type(tile, dtype)


_HALVES = (jnp.bfloat16, jnp.float16)
_BYTES_AT_ONCE = 16
"""The most that one instruction of a thread loads or stores."""


def _split(tiles: Tiles) -> Values:
    """The even and the odd entries of each tile."""
    even, odd = zip(*map(_halves, tiles), strict=True)
    return Values(even, odd)


def _halves(tile: Array) -> tuple[Array, Array]:
    """The halves of `[T, 2n]`. Which entries are even is known when compiling, so nothing is computed."""
    pairs = tile.reshape(tile.shape[0], -1, 2)
    is_odd = lax.broadcasted_iota(jnp.int32, pairs.shape, 2) == 1
    bits = lax.bitcast_convert_type(pairs, f"uint{8 * tile.dtype.itemsize}")
    even, odd = (jnp.sum(jnp.where(is_odd == half, bits, 0), 2, dtype=bits.dtype) for half in (False, True))
    return lax.bitcast_convert_type(even, tile.dtype), lax.bitcast_convert_type(odd, tile.dtype)


def _interleaved(values: Values) -> Tiles:
    """The inverse of `_split`."""
    return tuple(_joined(even, odd, 2) for even, odd in zip(values.even, values.odd, strict=True))


def _joined(first: Array, second: Array, axis: int) -> Array:
    """Of two arrays `[T, n]` one `[T, 2n]`, `jnp.stack` along `axis`: 1 for one behind the other, 2 for alternately."""
    size = (*first.shape[:axis], 2, *first.shape[axis:])
    first, second = (jnp.broadcast_to(lax.expand_dims(half, [axis]), size) for half in (first, second))
    is_second = lax.broadcasted_iota(jnp.int32, size, axis) == 1
    return jnp.where(is_second, second, first).reshape(size[0], -1)


def power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
