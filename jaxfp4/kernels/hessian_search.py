"""The search of `jaxfp4.algorithms.local_hessian` inside a kernel.

A block's quadratic form is 152 fused multiply-adds when a thread has all 16 differences and the Hessian is numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array, lax

from jaxfp4.formats import BLOCK_SIZE, exact
from jaxfp4.formats.minifloat import E2M1
from jaxfp4.formats.scale_codes import ALL_ZERO, LARGEST_CODE, LOST, OCTAVE
from jaxfp4.formats.squared_error import Grid
from jaxfp4.kernels.blocks import Launch, Values
from jaxfp4.kernels.quantize import Context, Tuning
from jaxfp4.kernels.rounding import Scales
from jaxfp4.kernels.search import Block, prepared_block

TUNING = Tuning(minor=Launch(32, 1), strided=Launch(32, 1))
_TRIANGLE = BLOCK_SIZE * (BLOCK_SIZE + 1) // 2
_UPWARDS = E2M1.magnitudes.tolist().index(3.0)
"""The largest code of values under more than twice the scale of max calibration."""
_SIGN = 1 << 31

_State = tuple[Any, Array, Array]
"""How many codes were tried, the best and its error."""


def local_hessian_scales(values: Values, context: Context) -> Scales:
    """`jaxfp4.algorithms.local_hessian.local_hessian_scales`; the context's table is `hessian_table`'s.

    Both compare float32 sums, of which the order differs.
    """
    search = _Search.of(values, context)
    infinite = jnp.full(search.first.shape, jnp.inf, jnp.float32)
    best = search.walk(search.first, -1, len(E2M1.magnitudes) - 1, search.clipped, (search.first, infinite))
    return search.block.stored(search.walk(search.first + 1, 1, _UPWARDS, search.lost, best)[0])


class _Search(NamedTuple):
    """For the code with the least error, from one downwards and then upwards."""

    context: Context
    block: Block
    magnitudes: list[Array]
    """Of the entries of blocks, in order."""
    signs: list[Array]
    """The bits of their signs."""
    strongest: Array
    """The magnitude whose loss alone would add most to the error."""
    strength: Array
    """What a square of its difference adds at least."""
    first: Array
    highest: Array

    @classmethod
    def of(cls, values: Values, context: Context) -> _Search:
        block, magnitudes = prepared_block(values, context)
        signs = _in_order(values.map(lambda bits: bits & jnp.uint32(_SIGN)))
        calibrated = block.calibrated.codes.astype(jnp.int32)
        highest = jnp.minimum(calibrated + ALL_ZERO, LARGEST_CODE)
        first = jnp.minimum(calibrated + OCTAVE, LARGEST_CODE)
        entries = _in_order(magnitudes)
        strongest, strength = _strongest(entries, context.table[_TRIANGLE : _TRIANGLE + BLOCK_SIZE])
        return cls(context, block, entries, signs, strongest, strength, first, highest)

    def walk(
        self, first: Array, sign: int, largest: int, bound: Callable[[Array], Array], best: tuple[Array, Array]
    ) -> tuple[Array, Array]:
        """The best code and its error, among a best one so far and those from `first` on, upwards or downwards.

        Ends when for all blocks the bound has passed the best error. No value has a code beyond `largest`.
        """

        def reachable(step: Array, error: Array) -> Array:
            code = first + sign * step
            inside = (code >= 1) & (code <= self.highest) & ~self.block.settled
            return inside & (bound(self._scale(code)) <= error)

        def proceed(state: _State) -> Array:
            step, _, error = state
            return jnp.max(jnp.where(reachable(step, error), 1, 0)) > 0

        def advance(state: _State) -> _State:
            step, chosen, least = state
            code = first + sign * step
            error = self._error(self._scale(code), largest)
            inside = (code >= 1) & (code <= self.highest)
            better = inside & (error <= least if sign < 0 else error < least)
            return step + 1, jnp.where(better, code, chosen), jnp.where(better, error, least)

        return lax.while_loop(proceed, advance, (jnp.int32(0), *best))[1:]

    def clipped(self, scale: Array) -> Array:
        """The least error if what is beyond the largest code is clipped."""
        beyond = jnp.maximum(self.strongest - E2M1.max * scale, 0.0)
        return self.strength * (beyond * beyond)

    def lost(self, scale: Array) -> Array:
        """The least error if what is too small rounds to zero."""
        limit = scale * LOST
        lost = [jnp.where(m < limit, m, 0.0) for m in self.magnitudes]
        together = self.context.table[_TRIANGLE + BLOCK_SIZE :]
        return _sum([(c * d) * d for c, d in zip(together, lost, strict=True)])

    def _scale(self, code: Array) -> Array:
        return self.block.scale(jnp.clip(code, 1, LARGEST_CODE), self.context)

    def _error(self, scale: Array, largest: int) -> Array:
        grid = Grid.of(scale).up_to(largest)
        differences = [
            exact.as_float(exact.as_bits(grid.error(m)) ^ s) for m, s in zip(self.magnitudes, self.signs, strict=True)
        ]
        return jnp.maximum(_quadratic_form(self.context.table, differences), 0.0)


def _strongest(magnitudes: list[Array], weights: Sequence[Array]) -> tuple[Array, Array]:
    """Of magnitudes the one with the largest weighted square, and its weight."""
    best = strongest = strength = jnp.zeros_like(magnitudes[0])
    for m, weight in zip(magnitudes, weights, strict=True):
        square = (weight * m) * m
        larger = square > best
        best, strongest = jnp.where(larger, square, best), jnp.where(larger, m, strongest)
        strength = jnp.where(larger, weight, strength)
    return strongest, strength


def _in_order(values: Values) -> list[Array]:
    return [entry for pair in zip(values.even, values.odd, strict=True) for entry in pair]


def _sum(terms: list[Array]) -> Array:
    """By halves, so that few additions wait for each other."""
    while len(terms) > 1:
        terms = [a + b for a, b in zip(terms[::2], terms[1::2], strict=True)]
    return terms[0]


def _quadratic_form(triangle: Sequence[Array], d: list[Array]) -> Array:
    """`d @ H @ d` from the lower triangle, row by row, twice what is not on the diagonal."""
    terms = []
    for i in range(BLOCK_SIZE):
        start = i * (i + 1) // 2
        row = triangle[start] * d[0]
        for j in range(1, i + 1):
            row = row + triangle[start + j] * d[j]
        terms.append(row * d[i])
    return _sum(terms)
