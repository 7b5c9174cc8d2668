"""Kernels over blocks that share what is known of their activations: numbers for each group of 16 channels."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl

from jaxfp4.formats import BLOCK_SIZE
from jaxfp4.kernels.blocks import BlockEach, Launch, Part, Strided, Values, as_integers, power_of_two
from jaxfp4.kernels.calls import call


@dataclasses.dataclass(frozen=True)
class Groups:
    """An array `[lead, repeat, groups, 16, inner]`, row-major: blocks along its fourth dimension."""

    outer: int
    """How many parts of `lead`, which it divides, have a global scale of their own."""
    lead: int
    repeat: int
    """How many blocks, apart by all groups, have the same channels."""
    groups: int
    inner: int
    """How many blocks next to each other have the same channels."""

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the array."""
        return (self.lead, self.repeat, self.groups, BLOCK_SIZE, self.inner)


Body = Callable[[Values, Sequence[Array], Sequence[Array]], Sequence[Any]]
"""`(values, constants [], table []) -> outputs`, the latter as those of `jaxfp4.kernels.blocks.Body`."""


def visit_groups(
    body: Body,
    x: Array,
    constants: Array,
    table: Array,
    groups: Groups,
    parts: Sequence[Part],
    launch: Launch,
    *,
    interpret: bool = False,
) -> list[Array]:
    """`body` of all blocks of `x`, whose shape is that of `groups`; outputs are alike, with their own entries.

    `constants` is float32 `[outer, C]`, `table` float32 `[lead, groups, D]`. All threads of a program have blocks of
    the same channels, so that what is known of these are numbers. Inside a shard_map all arguments vary over the same
    mesh axes.
    """
    strided = groups.inner > 1
    length = groups.inner if strided else groups.repeat
    width = min(launch.blocks, power_of_two(length))
    columns = -(-length // width)
    rows = groups.lead * groups.repeat * groups.groups

    def shape(entries: int) -> tuple[int, ...]:
        if strided:
            return (rows, entries, groups.inner)
        return (groups.lead, groups.repeat, groups.groups, entries)

    def kernel(constants_ref: Any, table_ref: Any, x_ref: Any, *out_refs: Any) -> None:
        program = pl.program_id(0)
        access: BlockEach
        if strided:
            column, row = program % columns, program // columns
            lead, group = row // (groups.repeat * groups.groups), row % groups.groups
        else:
            # Groups are neighbours in memory, so they are visited one after the other.
            group, row = program % groups.groups, program // groups.groups
            column, lead = row % columns, row // columns
        inside = None if length % width == 0 else column * width + jnp.arange(width) < length
        span = pl.ds(column * width, width)
        access = Strided(inside, row, span) if strided else _Repeated(inside, lead, group, span)
        outer = lead // (groups.lead // groups.outer)
        scalars = [constants_ref[outer, i] for i in range(constants.shape[1])]
        numbers = [table_ref[lead, group, i] for i in range(table.shape[2])]
        results = body(access.load(x_ref, BLOCK_SIZE, x.dtype), scalars, numbers)
        for ref, result in zip(out_refs, results, strict=True):
            access.store(ref, result)

    varying = jax.typeof(x).manual_axis_type
    results = call(
        kernel,
        warps=launch.warps,
        interpret=interpret,
        grid=(rows * columns if strided else groups.lead * columns * groups.groups,),
        out_shape=[jax.ShapeDtypeStruct(shape(part.entries), part.dtype, manual_axis_type=varying) for part in parts],
    )(constants, table, as_integers(x, interpret).reshape(shape(BLOCK_SIZE)))
    lead = groups.shape[:3]
    return [r.reshape(*lead, part.entries, groups.inner) for r, part in zip(results, parts, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Repeated(BlockEach):
    """Arrays `[lead, repeat, groups, entries]`, of which a thread's blocks have a lead and a group in common."""

    lead: Array
    group: Array
    span: Any

    def place(self, ref: Any, entry: Array) -> Any:
        """In all rows of a span."""
        return ref.at[self.lead, self.span, self.group, entry]
