"""How long a call takes, without what launching it costs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax

BATCH_SECONDS = 0.01
"""Of calls behind one wait: a thousand times what the wait itself costs."""
MOST_CALLS = 400
FEWEST_SAMPLES, MOST_SAMPLES = 3, 40
HOST_BOUND = 0.9
"""Share of a batch's time spent on launching it from which the device must have waited for the host."""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of one call: the median over samples, and their quartiles."""

    median: float
    low: float
    high: float
    samples: int
    calls: int
    """Calls in each sample, over which its time is divided."""
    host_bound: bool = False
    """Whether launching took about as long as running, so that the device may be faster than this."""

    @classmethod
    def of(cls, samples: Sequence[float], calls: int = 1, *, host_bound: bool = False) -> Timing:
        """From the seconds of one call in each sample.

        >>> Timing.of([3.0, 1.0, 2.0]).median
        2.0
        """
        low, median, high = np.quantile(samples, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high, len(samples), calls, host_bound)


@dataclasses.dataclass(frozen=True)
class Clock:
    """How calls are timed on a platform."""

    asynchronous: bool
    """Whether calls queue up on a device, so that many share one wait; else each is waited for."""
    seconds: float
    """What one measurement may take, unless its fewest samples take longer."""

    def time(self, call: Callable[..., Any], arguments: Sequence[tuple[Any, ...]], runs: int = 1) -> Timing:
        """Of a JAX function that does `runs` runs a call, with the arguments in turn; the first call is not counted."""
        jax.block_until_ready(call(*arguments[0]))
        if not self.asynchronous:
            return self.repeat(lambda given: jax.block_until_ready(call(*given)), arguments)
        launching = []

        def batch(calls: int) -> float:
            start = time.perf_counter()
            result = None
            for i in range(calls):
                result = call(*arguments[i % len(arguments)])
            launching.append(time.perf_counter() - start)
            jax.block_until_ready(result)
            return time.perf_counter() - start

        timing = self.in_batches(batch, runs)
        whole = timing.median * timing.calls
        bound = float(np.median(launching[-timing.samples :])) > HOST_BOUND * whole
        return dataclasses.replace(timing, host_bound=bound)

    def repeat(self, call: Callable[[tuple[Any, ...]], Any], arguments: Sequence[tuple[Any, ...]]) -> Timing:
        """Of a call that waits for its result, with the arguments in turn."""
        samples: list[float] = []
        for given in itertools.cycle(arguments):
            start = time.perf_counter()
            call(given)
            samples.append(time.perf_counter() - start)
            if self._enough(samples, sum(samples)):
                break
        return Timing.of(samples)

    def in_batches(self, batch: Callable[[int], float], runs: int = 1) -> Timing:
        """Of a batch, a function of how many calls that gives its seconds; each call does `runs` runs."""
        estimate = batch(2) / 2
        calls = max(2, min(MOST_CALLS, math.ceil(BATCH_SECONDS / max(estimate, 1e-9))))
        samples: list[float] = []
        while not samples or not self._enough(samples, calls * runs * sum(samples)):
            samples.append(batch(calls) / (calls * runs))
        return Timing.of(samples, calls * runs)

    def _enough(self, samples: Sequence[float], spent: float) -> bool:
        return len(samples) >= MOST_SAMPLES or (len(samples) >= FEWEST_SAMPLES and spent >= self.seconds)


def in_sequence(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of several argument tuples that applies `function` to one after the other.

    One launch then does several runs. The barriers keep XLA from merging them.
    """

    def sequence(*argument_tuples: tuple[Any, ...]) -> list[Any]:
        results: list[Any] = []
        for arguments in argument_tuples:
            if results:
                arguments, _ = lax.optimization_barrier((arguments, jax.tree.leaves(results[-1])[0]))
            results.append(function(*arguments))
        return results

    return sequence


def in_turn(arguments: Sequence[Any], count: int) -> list[tuple[Any, ...]]:
    """The arguments in groups of `count`, in a circle, each as often as any other.

    >>> in_turn("abc", 2)
    [('a', 'b'), ('c', 'a'), ('b', 'c')]
    """
    groups = math.lcm(len(arguments), count) // count
    circle = itertools.cycle(arguments)
    return [tuple(itertools.islice(circle, count)) for _ in range(groups)]
