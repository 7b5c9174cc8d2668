"""Kernels over blocks: where the blocks of an array lie, and a Pallas call that visits tiles of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxfp4.formats import BLOCK_SIZE


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
class Tile:
    """How much a program handles, and with how many warps."""

    values: int
    """A power of two."""
    warps: int


@dataclasses.dataclass(frozen=True)
class Part:
    """An output with `entries` for each block: 16 values, 8 packed bytes or one scale."""

    entries: int
    dtype: Any


Body = Callable[[Sequence[Array], Sequence[Array], int], Sequence[Array]]
"""`(tiles of the inputs [.., entries, ..], constants [], axis of the entries) -> tiles of the outputs`."""


def visit(
    body: Body,
    inputs: Sequence[Array],
    constants: Array,
    geometry: Geometry,
    parts: Sequence[Part],
    tile: Tile,
    *,
    interpret: bool = False,
) -> list[Array]:
    """`body` of all blocks.

    Inputs and outputs are `[outer, blocks, entries, inner]`; `constants` is float32 `[outer, C]`, of which the body
    gets the C scalars of its part.
    """
    minor = geometry.is_minor
    rows = geometry.outer if minor else geometry.outer * geometry.blocks
    length = geometry.blocks if minor else geometry.inner
    width = min(max(tile.values // BLOCK_SIZE, 1), _power_of_two(length))
    columns = -(-length // width)
    count = constants.shape[1]

    def shape(entries: int) -> tuple[int, ...]:
        return (rows, length, entries) if minor else (rows, entries, length)

    def kernel(constants_ref: Any, *refs: Any) -> None:
        row, column = pl.program_id(0) // columns, pl.program_id(0) % columns
        outer = row if minor else row // geometry.blocks
        span = pl.ds(column * width, width)
        inside = None if length % width == 0 else column * width + jnp.arange(width) < length

        def at(ref: Any) -> Any:
            return ref.at[row, span, :] if minor else ref.at[row, :, span]

        def mask(entries: int) -> Array | None:
            if inside is None:
                return None
            size = (width, entries) if minor else (entries, width)
            return jnp.broadcast_to(inside[:, None] if minor else inside[None, :], size)

        tiles = []
        for ref, x in zip(refs, inputs, strict=False):
            # A masked load without a value for the rest is undefined there; its results are not stored.
            outside = None if inside is None else jnp.zeros((), x.dtype)
            tiles.append(triton.load(at(ref), mask=mask(x.shape[2]), other=outside))
        scalars = [constants_ref[outer, i] for i in range(count)]
        results = body(tiles, scalars, 1 if minor else 0)
        for ref, part, result in zip(refs[len(inputs) :], parts, results, strict=True):
            triton.store(at(ref), result.astype(part.dtype), mask=mask(part.entries))

    results = pl.pallas_call(
        kernel,
        grid=(rows * columns,),
        out_shape=[jax.ShapeDtypeStruct(shape(part.entries), part.dtype) for part in parts],
        compiler_params=triton.CompilerParams(num_warps=tile.warps),
        interpret=interpret,
    )(constants, *(x.reshape(shape(x.shape[2])) for x in inputs))
    outer_shape = (geometry.outer, geometry.blocks)
    return [r.reshape(*outer_shape, p.entries, geometry.inner) for r, p in zip(results, parts, strict=True)]


def _power_of_two(n: int) -> int:
    """The smallest power of two that is not below n."""
    return 1 << (n - 1).bit_length()
