"""`x @ dequantize(w)` with the NVFP4 weight read from memory as it is packed, for a few rows of `x`, on Hopper.

A small batch is bounded by reading the weight, 4.5 bits a value here in place of 16, so decoding must keep up with the
memory: it takes 2.3 instructions a weight, and all the rest brings that to 4 to 6.5, the fewer the more a warp has to
do. An E2M1 code `s eem` whose bits lie in a bfloat16 at 15 and at 8 to 6 is 2^-126 times its value, subnormals
included, so two codes become two bfloat16 in a few masks and shifts of one word. Times 2^119 times the E4M3 scale, one
instruction for the two, they are `e2m1 * scale * 2^-7`: at most 6 significant bits, hence exact. The tensor cores sum
products of these and `x` in float32, the global scale multiplies the sum.
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

from jaxfp4.formats import BLOCK_SIZE, fp8, nvfp4
from jaxfp4.kernels.calls import call
from jaxfp4.kernels.decoding import HIGH, LOW, SCALES, decode_words

_PAIRS = BLOCK_SIZE // 2
_SCALE_FACTOR = 2.0**119
_SUM_FACTOR = 2.0**7


@dataclasses.dataclass(frozen=True)
class Tiles:
    """How the work is cut. All but `programs` are powers of two."""

    columns: int
    """Columns of the weight in a tile."""
    depth: int
    """Values along the contraction in a tile, at least 16."""
    warps: int
    stages: int
    """Tiles in flight."""
    programs: int
    """The contraction is split until there are at least so many programs; a second step sums the parts, in order."""


TILES: Mapping[int, Tiles] = {
    16: Tiles(columns=64, depth=64, warps=2, stages=3, programs=1024),
    32: Tiles(columns=128, depth=128, warps=4, stages=3, programs=256),
    64: Tiles(columns=128, depth=64, warps=4, stages=3, programs=256),
}
"""By the most rows that they are for.

Those for 16 rows were the fastest of 20 measured on an H200, at 8192 by 8192 and 8192 by 28672 (1.45 and 1.53 times
as fast as the bfloat16 product); the others have not been compared.
"""

TILES_CONTRACTION_LAST: Mapping[int, Tiles] = {
    **TILES,
    16: Tiles(columns=64, depth=128, warps=2, stages=1, programs=1024),
}
"""For weights whose contraction is their last axis: 1.2 times as fast as the bfloat16 product, of 10 measured."""

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
    factor = global_scale * _SUM_FACTOR
    blocks = packed.reshape(problem.packed_shape)
    constant = jnp.full((1,), _SCALE_FACTOR, jnp.float32)
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
    )(x, blocks, scales, factor, constant)
    if problem.splits == 1:
        return parts[:, 0]
    return (jnp.sum(parts, 1) * factor[:, None, None]).astype(out_dtype)


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
    def packed_shape(self) -> tuple[int, ...]:
        """Of the codes, with one axis for the pairs of a block."""
        blocks = self.length // BLOCK_SIZE
        if self.contraction_last:
            return (self.experts, self.columns, blocks, _PAIRS)
        return (self.experts, blocks, _PAIRS, self.columns)

    @property
    def column_tiles(self) -> int:
        return -(-self.columns // self.tiles.columns)

    @property
    def splits(self) -> int:
        """Into how many parts the contraction is cut: a power of two."""
        steps = -(-self.length // self.tiles.depth)
        wanted = self.tiles.programs / (self.column_tiles * self.experts)
        return min(2 ** max(math.ceil(math.log2(wanted)), 0), 2 ** (steps.bit_length() - 1))

    @property
    def steps(self) -> int:
        """Tiles along the contraction in each part."""
        return -(-self.length // (self.tiles.depth * self.splits))

    @property
    def row_tile(self) -> int:
        """Rows of a tile of x: the least number for tensor cores, or more."""
        return max(16, 1 << (self.rows - 1).bit_length())


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


def _kernel(
    problem: _Problem, x_ref: Any, packed_ref: Any, scales_ref: Any, factor_ref: Any, one_ref: Any, out: Any
) -> None:
    """One program: a tile of columns, a part of the contraction."""
    tiles = problem.tiles
    part = pl.program_id(0) // problem.column_tiles
    column = (pl.program_id(0) % problem.column_tiles) * tiles.columns
    expert = pl.program_id(1)
    scale_factor = one_ref[0]

    def step(i: Array, total: Array) -> Array:
        tile = part * problem.steps + i
        rows = _load_rows(problem, x_ref, expert, tile)
        codes, block_scales = _load_weight(problem, packed_ref, scales_ref, expert, tile, column)
        pairs = _decode(problem, codes, _scale_values(problem, block_scales, scale_factor))
        for piece in _bfloat16_parts(rows):
            for values, weight in zip(_even_and_odd(piece), pairs, strict=True):
                total = total + triton.dot(values, weight.T if problem.contraction_last else weight)
        return total

    result = lax.fori_loop(0, problem.steps, step, jnp.zeros((problem.row_tile, tiles.columns), jnp.float32))
    if problem.splits == 1:
        result = result * factor_ref[expert]
    shape = result.shape
    inside = lax.broadcasted_iota(jnp.int32, shape, 0) < problem.rows
    if problem.columns % tiles.columns:
        inside &= column + lax.broadcasted_iota(jnp.int32, shape, 1) < problem.columns
    place = out.at[expert, part, _first(shape[0], expert), pl.ds(column, shape[1])]
    triton.store(place, result.astype(out.dtype), mask=inside)


def _load_rows(problem: _Problem, x_ref: Any, expert: Array, tile: Array) -> Array:
    """A tile of x; zero outside."""
    depth = problem.tiles.depth
    shape = (problem.row_tile, depth)
    start = tile * depth
    mask = None
    if problem.rows != shape[0]:
        mask = lax.broadcasted_iota(jnp.int32, shape, 0) < problem.rows
    if _ragged(problem):
        inside = start + lax.broadcasted_iota(jnp.int32, shape, 1) < problem.length
        mask = inside if mask is None else mask & inside
    return _load(x_ref.at[expert, _first(shape[0], expert), pl.ds(start, depth)], mask)


def _load_weight(
    problem: _Problem, packed_ref: Any, scales_ref: Any, expert: Array, tile: Array, column: Array
) -> tuple[Array, Array]:
    """Tiles of the codes and the block scales; zero outside."""
    blocks, columns = problem.tiles.depth // BLOCK_SIZE, problem.tiles.columns
    along, across = pl.ds(tile * blocks, blocks), pl.ds(column, columns)
    shape, last = ((columns, blocks), 1) if problem.contraction_last else ((blocks, columns), 0)
    mask = None
    if problem.columns % columns:
        mask = column + lax.broadcasted_iota(jnp.int32, shape, 1 - last) < problem.columns
    if _ragged(problem):
        inside = tile * blocks + lax.broadcasted_iota(jnp.int32, shape, last) < problem.length // BLOCK_SIZE
        mask = inside if mask is None else mask & inside
    if problem.contraction_last:
        codes, scales = packed_ref.at[expert, across, along, :], scales_ref.at[expert, across, along]
    else:
        codes, scales = packed_ref.at[expert, along, :, across], scales_ref.at[expert, along, across]
    return _load(codes, None if mask is None else _over_pairs(problem, mask)), _load(scales, mask)


def _ragged(problem: _Problem) -> bool:
    """Whether the last tile along the contraction reaches beyond it."""
    return problem.length != problem.steps * problem.splits * problem.tiles.depth


def _first(size: int, traced: Array) -> Any:
    """The first entries, maybe more than there are: JAX refuses a slice that it can see to be too long."""
    return pl.ds(traced * 0, size)


def _load(ref: Any, mask: Array | None) -> Array:
    return triton.load(ref) if mask is None else triton.load(ref, mask=mask, other=0)


def _over_pairs(problem: _Problem, values: Array) -> Array:
    """Values of blocks repeated for each pair of codes."""
    axis = 2 if problem.contraction_last else 1
    shape = (*values.shape[:axis], _PAIRS, *values.shape[axis:])
    return jnp.broadcast_to(lax.expand_dims(values, [axis]), shape)


def _scale_values(problem: _Problem, codes: Array, factor: Array) -> Array:
    """bfloat16 `scale * 2^119`, or the scale itself where values are decoded to theirs, for each pair of codes.

    The factor is an operand of the kernel, not a constant, where columns lie together in memory: Triton then decodes in
    the layout in which the codes are loaded, 16 bytes a thread, and moves the values to where the product wants them.
    With a constant it loads the codes in the latter layout, which is as fast only if the contraction lies together.
    """
    if problem.interpret:
        return _over_pairs(problem, fp8.decode(codes).astype(jnp.bfloat16))
    scales = decode_words(SCALES, [codes])
    if problem.contraction_last:
        return _over_pairs(problem, scales * jnp.bfloat16(_SCALE_FACTOR))
    return _over_pairs(problem, (scales.astype(jnp.float32) * factor).astype(jnp.bfloat16))


def _decode(problem: _Problem, codes: Array, scales: Array) -> tuple[Array, Array]:
    """bfloat16 `e2m1 * scale * 2^-7` of the low and of the high nibbles, blocks and pairs joined."""
    if problem.interpret:  # inline assembly has no interpreter
        values = (
            nvfp4.decode_values(c) * (scales.astype(jnp.float32) / _SUM_FACTOR) for c in (codes & 0xF, codes >> 4)
        )
    else:
        values = (decode_words(text, [codes, scales]) for text in (LOW, HIGH))
    last = problem.contraction_last
    shape = (codes.shape[0], -1) if last else (-1, codes.shape[2])
    even, odd = (v.astype(jnp.bfloat16).reshape(shape) for v in values)
    return even, odd


def _even_and_odd(x: Array) -> tuple[Array, Array]:
    rows, depth = x.shape
    even, odd = jnp.split(x.reshape(rows, depth // 2, 2), 2, axis=2)
    return even.reshape(rows, depth // 2), odd.reshape(rows, depth // 2)


def _bfloat16_parts(x: Array) -> list[Array]:
    """bfloat16 arrays whose sum is x; the first holds NaN and Inf."""
    parts = [x.astype(jnp.bfloat16)]
    rest = x.astype(jnp.float32)
    for _ in range({jnp.dtype(jnp.bfloat16): 0, jnp.dtype(jnp.float16): 1, jnp.dtype(jnp.float32): 2}[x.dtype]):
        taken = parts[-1].astype(jnp.float32)
        rest = jnp.where(jnp.abs(taken) < jnp.inf, rest - taken, 0)
        parts.append(rest.astype(jnp.bfloat16))
    return parts
