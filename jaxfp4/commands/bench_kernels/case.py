"""One operation on one weight: compiled, checked, and timed beside the others."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import math
import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxfp4.commands.bench_kernels.libraries import Library, Rival
from jaxfp4.commands.bench_kernels.operations import Arguments, Operation
from jaxfp4.commands.bench_kernels.parts import equal_share, parts_of
from jaxfp4.commands.bench_kernels.sizes import Size, weight
from jaxfp4.commands.bench_kernels.timing import Clock, Timing, in_sequence, in_turn

CACHED_BYTES = {"cpu": 64 << 20, "gpu": 256 << 20}
"""Inputs in turn hold more than this, so that none is still in a cache: four times the L2 of an H200."""
MOST_INPUTS = 8
LAUNCH_BYTES = 256 << 20
"""A launch on an accelerator reads this much or does `MOST_RUNS` runs, so that launches do not set the pace."""
MOST_RUNS = 4
FEWEST_CORES = 4
"""Below this, threads that compile only get in each other's way."""


@dataclasses.dataclass(frozen=True)
class RivalResult:
    """A function of another library, measured."""

    library: str
    function: str
    note: str
    equal: float | None = None
    """Least share of the entries of its result that equal ours."""
    same: bool = False
    """Whether that is enough to call the results the same."""
    timing: Timing | None = None
    error: str | None = None
    """Why it could not be measured."""


@dataclasses.dataclass(frozen=True)
class CaseResult:
    """An operation on a weight, measured; without times if ours is wrong or fails."""

    operation: Operation
    size: Size
    read: int = 0
    written: int = 0
    """Bytes that must move at least."""
    as_expected: float = 0.0
    """The least share of sampled entries that equal the numpy reference."""
    naive_equal: float | None = None
    ours: Timing | None = None
    copy: Timing | None = None
    """Of as many bytes, read and written."""
    naive: Timing | None = None
    rivals: tuple[RivalResult, ...] = ()
    error: str | None = None

    @property
    def correct(self) -> bool:
        """Whether ours ran and is as expected."""
        return self.error is None and self.as_expected >= self.operation.wanted

    @property
    def floor_share(self) -> float | None:
        """The copy's time over ours."""
        return None if self.ours is None or self.copy is None else self.copy.median / self.ours.median

    def ratio(self, other: Timing | None) -> float | None:
        """Another's time over ours."""
        return None if self.ours is None or other is None else other.median / self.ours.median


@dataclasses.dataclass(frozen=True)
class Compiled:
    """Programs of a case."""

    prepare: Callable[[Array], Arguments]
    ours: Callable[..., Any]
    """Takes `runs` argument tuples and gives as many results."""
    naive: Callable[..., Any]
    runs: int


class Bench:
    """Measures cases on JAX's default device."""

    def __init__(self, clock: Clock, libraries: Sequence[Library]) -> None:
        self.clock, self.libraries = clock, libraries
        self._copies: dict[int, Timing] = {}
        self._reads: dict[int, Timing] = {}

    def compile(self, cases: Sequence[tuple[Operation, Size]]) -> list[Compiled | str]:
        """The programs of all cases, on the machine's cores if it has several; a message for one that cannot be."""
        cores = os.cpu_count() or 1
        with concurrent.futures.ThreadPoolExecutor(cores if cores >= FEWEST_CORES else 1) as pool:
            return list(pool.map(lambda case: self._compiled(*case), cases))

    def measure(self, operation: Operation, size: Size, programs: Compiled | str) -> CaseResult:
        """Checks ours and, if it is as expected, times it and the others."""
        result = CaseResult(operation, size)
        if isinstance(programs, str):
            return dataclasses.replace(result, error=programs)
        given = [programs.prepare(weight(size, 0))]
        try:
            ours = jax.block_until_ready(programs.ours(*given * programs.runs)[0])
        except RuntimeError as error:
            return dataclasses.replace(result, error=_line(error))
        read = _nbytes(given[0][: len(given[0]) - operation.compared]) + (operation.reads - 1) * size.nbytes
        result = dataclasses.replace(
            result, read=read, written=_nbytes(ours), as_expected=operation.share_as_expected(given[0], ours)
        )
        if not result.correct:
            return result
        given += [programs.prepare(weight(size, seed)) for seed in range(1, self._count(size.nbytes))]
        parts = parts_of(ours)
        naive_equal = equal_share(parts, parts_of(programs.naive(*given[:1] * programs.runs)[0]))
        turns = in_turn(given, programs.runs)
        ours_timing = self.clock.time(programs.ours, turns, programs.runs)
        naive_timing = self.clock.time(programs.naive, turns, programs.runs)
        copy = self.copy(result.read + result.written)
        rivals = tuple(
            self._rival(library, rival, parts, given)
            for library in self.libraries
            for rival in library.rivals(operation.name)
        )
        return dataclasses.replace(
            result, naive_equal=naive_equal, ours=ours_timing, naive=naive_timing, copy=copy, rivals=rivals
        )

    def copy(self, moved: int) -> Timing:
        """Of an elementwise function that reads half of these bytes and writes the other half."""
        return self._streamed(self._copies, moved // 8, _copied)

    def read(self, moved: int) -> Timing:
        """Of a reduction that reads these bytes."""
        return self._streamed(self._reads, moved // 4, _read)

    def _streamed(self, known: dict[int, Timing], words: int, function: Callable[[Array], Array]) -> Timing:
        words = max(words, 1)
        if words not in known:
            arrays = [_numbers(words, i) for i in range(self._count(4 * words))]
            runs = self._runs(4 * words)
            turns = in_turn([(a,) for a in arrays], runs)
            known[words] = self.clock.time(jax.jit(in_sequence(function)), turns, runs)
        return known[words]

    def _compiled(self, operation: Operation, size: Size) -> Compiled | str:
        try:
            prepare = jax.jit(lambda x: operation.prepare(x, 0)).lower(_shape(size)).compile()
            shapes = jax.eval_shape(lambda x: operation.prepare(x, 0), _shape(size))
            runs = self._runs(size.nbytes)
            ours, naive = (
                jax.jit(in_sequence(function)).lower(*[shapes] * runs).compile()
                for function in (operation.ours, operation.naive)
            )
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            return _line(error)
        return Compiled(prepare, ours, naive, runs)

    def _rival(self, library: Library, rival: Rival, ours: dict[str, Array], given: Sequence[Arguments]) -> RivalResult:
        result = RivalResult(library.name, rival.function, rival.note)
        try:
            prepared = [rival.prepare(*arguments) for arguments in (given[:1] if rival.once else given)]
            start = time.perf_counter()
            theirs = library.wait(rival.call(*prepared[0]))
            seconds = time.perf_counter() - start
            equal = equal_share(ours, rival.parts(theirs))
            del theirs
            timing = Timing.of([seconds]) if rival.once else library.time(rival.call, prepared, self.clock)
        except Exception as error:  # whatever another library raises is its result
            return dataclasses.replace(result, error=_line(error))
        return dataclasses.replace(result, equal=equal, same=equal >= rival.wanted, timing=timing)

    def _count(self, nbytes: int) -> int:
        """How many inputs to take in turn."""
        cached = CACHED_BYTES["gpu" if self.clock.asynchronous else "cpu"]
        return max(2, min(MOST_INPUTS, math.ceil(cached / nbytes)))

    def _runs(self, nbytes: int) -> int:
        """How many runs to launch at a time."""
        return max(1, min(MOST_RUNS, math.ceil(LAUNCH_BYTES / nbytes))) if self.clock.asynchronous else 1


@functools.partial(jax.jit, static_argnums=0)
def _numbers(count: int, first: int) -> Array:
    return jnp.arange(count, dtype=jnp.uint32) + first


def _copied(x: Array) -> Array:
    return x ^ jnp.uint32(0x5A5A5A5A)


def _read(x: Array) -> Array:
    return jnp.max(x)


def _shape(size: Size) -> Any:
    return jax.eval_shape(functools.partial(weight, size, 0))


def _nbytes(tree: Any) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".split("\n")[0][:300]
