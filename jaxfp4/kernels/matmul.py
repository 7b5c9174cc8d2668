"""`x @ dequantize(w)` with the NVFP4 weight read from memory as it is packed, for a few rows of `x`, on Hopper.

A small batch is bounded by reading the weight, 4.5 bits a value here in place of 16, if decoding keeps up with the
memory. It takes 3 to 3.5 instructions a weight, because no value moves between threads: the order of the values along
the contraction is free if `x` has the same, and so is that of the columns, hence each thread loads 16 bytes and decodes
them to the very registers in which the tensor cores want them. A warp's 32 threads are 8 groups of columns times 4
parts of the contraction. An E2M1 code `s eem` whose bits lie in a bfloat16 at 15 and at 8 to 6 is 2^-126 times its
value, subnormals included; times 2^119 times the E4M3 scale, one instruction for two, it is `e2m1 * scale * 2^-7`: at
most 6 significant bits, hence exact. The tensor cores sum products of these and `x` in float32, the global scale
multiplies the sum.

The bound is not reached. Of 25.5 us for 16 rows by 8192 by 8192 on an H100, whose memory needs 12.6 us, this kernel
takes 21.5 to 22.5 us, the sum of its parts 2.1 us, the gaps between kernels the rest. The same loads without anything
else take 15.4 to 18.5 us, without the decoding it is 21 us; integer pipes are a third busy. Twice the warps, or tiles
that wait in registers in place of shared memory, two ahead, end within 5 % of that.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxfp4.formats import BLOCK_SIZE
from jaxfp4.kernels.calls import call
from jaxfp4.kernels.decoding import PRODUCT_FACTOR, decode_pairs, decode_pairs_plainly

_GROUPS, _PARTS = 8, 4
"""A warp's threads: thread `4 * g + q` holds columns of group g and values q of the contraction, as tensor cores do."""

_VECTOR = 8
"""Values of x that a thread loads at once: 16 bytes of bfloat16."""


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. All but `programs` and `stages` are powers of two."""

    columns: int
    """Columns of the weight in a tile, at least 32 for each warp."""
    programs: int
    """The contraction is split until there are at least so many programs; a second step sums the parts, in order."""
    warps: int
    """Each has columns of its own."""
    stages: int = 1
    """Tiles in flight."""


TILES: Mapping[int, Tiles] = {
    16: Tiles(columns=256, programs=256, warps=4, stages=3),
    32: Tiles(columns=64, programs=1024, warps=1, stages=1),
    64: Tiles(columns=32, programs=1024, warps=1, stages=1),
}
"""By the most rows that they are for.

Those for 16 rows were the fastest of 40 measured on an H100, over several weights of 8192 by 8192 in one program: 27 us
for 16 rows and 23 us for one, where the bfloat16 product takes 55 and 51 us; at 8192 by 28672 77 us to its 165 us. The
others have not been compared.
"""

TILES_CONTRACTION_LAST: Mapping[int, Tiles] = {
    16: Tiles(columns=256, programs=256, warps=8, stages=1),
    32: Tiles(columns=64, programs=1024, warps=1, stages=1),
    64: Tiles(columns=32, programs=1024, warps=1, stages=1),
}
"""For weights whose contraction is their last axis: 35 us to 58 us in the same measure, of 15 measured."""

MOST_ROWS = max(TILES)
"""The most rows of x for which there are tiles."""


def tiles_for(rows: int, contraction_last: bool) -> Tiles:
    """The tiles for so many rows; ValueError if there are too many."""
    for most, tiles in sorted((TILES_CONTRACTION_LAST if contraction_last else TILES).items()):
        if rows <= most:
            return tiles
    raise ValueError(f"x has {rows} rows: wanted at most {MOST_ROWS}; multiply more by the dequantized weight")


def packed_matmul(
    x: Array,
    packed: Array,
    scales: Array,
    global_scale: Array,
    *,
    contraction_last: bool = False,
    out_dtype: jax.typing.DTypeLike | None = None,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Array:
    """`x @ ((float32(scales) * global_scale) * e2m1(packed))`, summed in float32, then cast, by default to x's dtype.

    The weight is not rounded to bfloat16 as `dequantize` in that dtype would: products of `x` with code times block
    scale are exact, their float32 sum is multiplied by the global scale. Before the cast the result differs from that
    in real numbers by at most `(K + 8) * 2^-22 * sum(|x| * |w|)`, given that no sum of `x * e2m1 * scale` leaves the
    range of normal float32 numbers. A NaN scale, in a block or global, gives NaN in the columns that it is for; NaN or
    Inf in `x` goes through the row. Results do not depend on the run: parts are summed in a fixed order.

    `x` is `[M, K]`, bfloat16, float16 or float32 (exactly, as two or three bfloat16 parts), of at most `MOST_ROWS`
    rows. `packed` is uint8 `[K/2, N]`, the even value in the low nibble, `scales` uint8 E4M3 codes `[K/16, N]`;
    with `contraction_last` `[N, K/2]` and `[N, K/16]`. `global_scale` is a float32 scalar. Or all have a leading
    axis of E experts, `global_scale` `[E]`. K is a multiple of 16. The result is `[M, N]` or `[E, M, N]`.
    """
    if x.ndim == 2:
        stacked = (a[None] for a in (x, packed, scales, jnp.asarray(global_scale).reshape(())))
        return packed_matmul(
            *stacked, contraction_last=contraction_last, out_dtype=out_dtype, tiles=tiles, interpret=interpret
        )[0]
    problem = _problem(x, packed, scales, global_scale, contraction_last, tiles, interpret)
    out_dtype = x.dtype if out_dtype is None else jnp.dtype(out_dtype)
    parts = call(
        functools.partial(_kernel, problem),
        warps=problem.tiles.warps,
        stages=problem.tiles.stages,
        interpret=interpret,
        grid=(problem.column_tiles * problem.splits, problem.experts),
        out_shape=jax.ShapeDtypeStruct(
            (problem.experts, problem.splits, problem.rows, problem.columns),
            jnp.float32 if problem.splits > 1 else out_dtype,
        ),
        name="nvfp4_matmul",
    )(x, packed, scales, global_scale)
    if problem.splits == 1:
        return parts[:, 0]
    return (jnp.sum(parts, 1) * (global_scale / PRODUCT_FACTOR)[:, None, None]).astype(out_dtype)


@dataclasses.dataclass(frozen=True)
class _Problem:
    """Sizes, all static."""

    experts: int
    rows: int
    columns: int
    length: int
    contraction_last: bool
    tiles: Tiles
    interpret: bool

    @property
    def depth(self) -> int:
        """Values along the contraction in a tile: for each thread a block, or two that lie together."""
        return _PARTS * BLOCK_SIZE * (2 if self.contraction_last else 1)

    @property
    def groups(self) -> int:
        """Groups of columns that lie together, where they do."""
        return _GROUPS * self.tiles.warps

    @property
    def column_tiles(self) -> int:
        return -(-self.columns // self.tiles.columns)

    @property
    def splits(self) -> int:
        """Into how many parts the contraction is cut: a power of two."""
        steps = -(-self.length // self.depth)
        wanted = self.tiles.programs / (self.column_tiles * self.experts)
        return min(2 ** max(math.ceil(math.log2(wanted)), 0), 2 ** (steps.bit_length() - 1))

    @property
    def steps(self) -> int:
        """Tiles along the contraction in each part."""
        return -(-self.length // (self.depth * self.splits))

    @property
    def row_tile(self) -> int:
        """Rows of a tile of x: the least number for tensor cores, or more."""
        return max(16, 1 << (self.rows - 1).bit_length())

    @property
    def ragged(self) -> bool:
        """Whether the last tile along the contraction reaches beyond it."""
        return self.length != self.steps * self.splits * self.depth


def _problem(
    x: Array,
    packed: Array,
    scales: Array,
    global_scale: Array,
    contraction_last: bool,
    tiles: Tiles | None,
    interpret: bool,
) -> _Problem:
    experts, rows, length = x.shape
    columns = packed.shape[1 if contraction_last else 2]
    wanted = [(experts, length // 2, columns), (experts, length // BLOCK_SIZE, columns), (experts,)]
    if contraction_last:
        wanted = [(e, n, k) for e, k, n in wanted[:2]] + wanted[2:]
    found = [a.shape for a in (packed, scales, global_scale)]
    if length % BLOCK_SIZE or found != wanted:
        raise ValueError(
            f"packed, scales and global_scale of shapes {found} for x of shape {x.shape}: wanted {wanted} and a "
            f"contraction that is a multiple of {BLOCK_SIZE}; multiply by the dequantized weight instead"
        )
    if packed.dtype != jnp.uint8 or scales.dtype != jnp.uint8:
        raise ValueError(f"packed is {packed.dtype}, scales {scales.dtype}: wanted uint8; pass the bits of E4M3 scales")
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"x is {x.dtype}: wanted bfloat16, float16 or float32; cast it")
    limit = tiles_for(rows, contraction_last) if tiles is None else tiles
    return _Problem(experts, rows, columns, length, contraction_last, limit, interpret)


def _kernel(problem: _Problem, x_ref: Any, packed_ref: Any, scales_ref: Any, global_ref: Any, out: Any) -> None:
    """One program: a tile of columns, a part of the contraction."""
    tiles = problem.tiles
    part = pl.program_id(0) // problem.column_tiles
    column = (pl.program_id(0) % problem.column_tiles) * tiles.columns
    expert = pl.program_id(1)
    load, arrange = (_load_last, _arrange_last) if problem.contraction_last else (_load_first, _arrange_first)

    def weight(i: Array) -> tuple[Array, ...]:
        return load(problem, packed_ref, scales_ref, expert, part * problem.steps + i, column)

    def step(i: Array, total: Array) -> Array:
        values = arrange(problem, *weight(i))
        for rows in _load_rows(problem, x_ref, expert, part * problem.steps + i):
            total = total + triton.dot(rows, values)
        return total

    zero = jnp.zeros((problem.row_tile, tiles.columns), jnp.float32)
    result = lax.fori_loop(0, problem.steps, step, zero)
    if problem.splits == 1:
        result = result * (global_ref[expert] * (1 / PRODUCT_FACTOR))
    if not problem.contraction_last:
        result = result.reshape(problem.row_tile, -1, problem.groups).transpose(0, 2, 1).reshape(result.shape)
    shape = result.shape
    inside = lax.broadcasted_iota(jnp.int32, shape, 0) < problem.rows
    if problem.columns % tiles.columns:
        inside &= column + lax.broadcasted_iota(jnp.int32, shape, 1) < problem.columns
    # A start that is traced: JAX refuses a slice that it can see to be too long.
    place = out.at[expert, part, pl.ds(expert * 0, shape[0]), pl.ds(column, shape[1])]
    triton.store(place, result.astype(out.dtype), mask=inside)


# Where a thread's values come from. Places are arrays of two axes, `[..., g, q]` joined to one and the values that
# lie together in memory: Triton gives a thread one row of 32, whatever else it might prefer.


def _load_first(
    problem: _Problem, packed_ref: Any, scales_ref: Any, expert: Array, tile: Array, column: Array
) -> tuple[Array, ...]:
    """Codes `[g, q; columns]` of each of the 8 pairs in a block, and scales; thread q has block q of four."""
    width = problem.tiles.columns // problem.groups
    (group, part), value = _places(width, problem.groups, _PARTS)
    block, at = _PARTS * tile + part, column + group * width + value
    rows = [block * (BLOCK_SIZE // 2) + pair for pair in range(BLOCK_SIZE // 2)]
    codes = [_load(problem, packed_ref, expert, row, at, block) for row in rows]
    return *codes, _load(problem, scales_ref, expert, block, at, block)


def _load_last(
    problem: _Problem, packed_ref: Any, scales_ref: Any, expert: Array, tile: Array, column: Array
) -> tuple[Array, ...]:
    """Codes `[columns / 8, g, q; 16 pairs]` and scales `[columns / 8, g, q; 2]`; thread q has two blocks of eight."""
    shape = problem.tiles.columns // _GROUPS, _GROUPS, _PARTS
    (many, group, part), value = _places(BLOCK_SIZE, *shape)
    block = 2 * (_PARTS * tile + part)
    at = column + many * _GROUPS + group
    codes = _load(problem, packed_ref, expert, at, block * (BLOCK_SIZE // 2) + value, block + value * 2 // BLOCK_SIZE)
    (many, group, part), value = _places(2, *shape)
    block = 2 * (_PARTS * tile + part) + value
    return codes, _load(problem, scales_ref, expert, column + many * _GROUPS + group, block, block)


def _load_rows(problem: _Problem, x_ref: Any, expert: Array, tile: Array) -> list[Array]:
    """A tile of x as bfloat16 parts, values along the contraction in the order of the weight's; zero outside."""
    vectors = problem.depth // (_PARTS * _VECTOR)
    (vector, row, part), value = _places(_VECTOR, vectors, problem.row_tile, _PARTS)
    at = (tile * _PARTS + part) * (vectors * _VECTOR) + vector * _VECTOR + value
    mask = None
    if problem.rows != problem.row_tile:
        mask = row < problem.rows
    if problem.ragged:
        inside = at < problem.length
        mask = inside if mask is None else mask & inside
    place = x_ref.at[expert, row, at]
    rows = triton.load(place) if mask is None else triton.load(place, mask=mask, other=0)
    shape: tuple[int, ...]
    order: tuple[int, ...]
    if problem.contraction_last:  # block, second word of it, row, q, pair, pair, high nibble
        shape, order = (2, 2, problem.row_tile, _PARTS, 2, 2, 2), (2, 0, 4, 3, 5, 6, 1)
    else:  # half of the block, row, q, pair, second of two pairs, high nibble
        shape, order = (2, problem.row_tile, _PARTS, 2, 2, 2), (1, 0, 2, 3, 5, 4)
    return [p.reshape(shape).transpose(order).reshape(problem.row_tile, -1) for p in _bfloat16_parts(rows)]


def _arrange_first(problem: _Problem, *loaded: Array) -> Array:
    """Values of a tile, `[half of the block, q, pair, high nibble, second of two pairs; columns, g]`."""
    *codes, scales = loaded
    values = []
    for first, second in zip(codes[::2], codes[1::2], strict=True):
        values.append(jnp.stack(_decode(problem, first, second, scales), -1))
    halves = [jnp.stack(values[i : i + 2], -1) for i in (0, 2)]
    both = jnp.stack(halves, -1).reshape(problem.groups, _PARTS, -1, 2, 2, 2, 2)
    return both.transpose(6, 1, 5, 4, 3, 2, 0).reshape(problem.depth, problem.tiles.columns)


def _arrange_last(problem: _Problem, codes: Array, scales: Array) -> Array:
    """Values of a tile, `[block, pair, q, pair, high nibble, second word; columns / 8, g]`."""
    words = codes.reshape(-1, 2, 2, 4)
    first, second = (a.reshape(-1, 2, 4) for a in jnp.split(words, 2, 2))
    scales = jnp.broadcast_to(scales[..., None], first.shape)
    values = jnp.stack(_decode(problem, first, second, scales), -1)
    values = values.reshape(-1, _GROUPS, _PARTS, 2, 2, 2, 2, 2)
    return values.transpose(3, 4, 2, 5, 7, 6, 0, 1).reshape(problem.depth, problem.tiles.columns)


def _decode(problem: _Problem, first: Array, second: Array, scales: Array) -> tuple[Array, Array]:
    return (decode_pairs_plainly if problem.interpret else decode_pairs)(first, second, scales)


def _places(together: int, *shape: int) -> tuple[list[Array], Array]:
    """Indices of the first axis, which joins axes of the sizes `shape`, and of the second."""
    whole = math.prod(shape), together
    index = lax.broadcasted_iota(jnp.int32, whole, 0)
    indices = []
    for size in reversed(shape):
        indices.append(index & (size - 1))
        index = lax.shift_right_logical(index, jnp.full_like(index, size.bit_length() - 1))
    return indices[::-1], lax.broadcasted_iota(jnp.int32, whole, 1)


def _load(problem: _Problem, ref: Any, expert: Array, row: Array, column: Array, block: Array) -> Array:
    """Codes of the weight or its scales; zero outside."""
    mask = None
    if problem.columns % problem.tiles.columns:
        mask = (row if problem.contraction_last else column) < problem.columns
    if problem.ragged:
        inside = block < problem.length // BLOCK_SIZE
        mask = inside if mask is None else mask & inside
    place = ref.at[expert, row, column]
    return triton.load(place) if mask is None else triton.load(place, mask=mask, other=0)


def _bfloat16_parts(x: Array) -> list[Array]:
    """bfloat16 arrays whose sum is x; the first holds NaN and Inf."""
    parts = [x.astype(jnp.bfloat16)]
    rest = x.astype(jnp.float32)
    for _ in range({jnp.dtype(jnp.bfloat16): 0, jnp.dtype(jnp.float16): 1, jnp.dtype(jnp.float32): 2}[x.dtype]):
        taken = parts[-1].astype(jnp.float32)
        rest = jnp.where(jnp.abs(taken) < jnp.inf, rest - taken, 0)
        parts.append(rest.astype(jnp.bfloat16))
    return parts
