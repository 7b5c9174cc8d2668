"""What collecting statistics adds to a forward pass."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

import jaxfp4
from jaxfp4.algorithms.calibration import observed
from jaxfp4.commands.bench_kernels.timing import Timing
from jaxfp4.commands.bench_model.decoders import DecoderSize

TIME_WANTED, COMPILATION_WANTED = 1.1, 1.5
FORWARD, CALIBRATE, BOTH = "forward", "calibrate_fn", "outputs and statistics"


@dataclasses.dataclass(frozen=True)
class Program:
    """One compiled function: how long it takes to run, to trace and lower, and to compile."""

    run: Timing
    lower: Timing
    compile: Timing

    @property
    def build_seconds(self) -> float:
        """Until it can run."""
        return self.lower.median + self.compile.median


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """The forward pass beside calibration."""

    parameters: int
    batch: int
    length: int
    recipe: str
    observed: int
    """Weights whose activations are looked at."""
    programs: Mapping[str, Program]

    def time_ratio(self, name: str) -> float:
        """Time over that of the forward pass."""
        return self.programs[name].run.median / self.programs[FORWARD].run.median

    def build_ratio(self, name: str) -> float:
        """Time to trace, lower and compile over that of the forward pass."""
        return self.programs[name].build_seconds / self.programs[FORWARD].build_seconds


def measure_calibration(size: DecoderSize, samples: int, builds: int, recipe: str = "nvfp4") -> CalibrationResult:
    """Times the jitted forward pass, `make_calibrate_fn`, and one function that gives outputs and statistics.

    `make_calibrate_fn` leaves out what comes after the last statistic (here the output head); the third function does
    not, so that its ratio is what statistics cost. Runs take turns. Functions are built anew in both orders, from
    empty caches of JAX; one compilation before makes the compiler's own choices (such as of matrix products), which it
    keeps for the process, so that neither pays for the other.
    """
    apply_fn, params = size.function_and_parameters()
    tokens = size.tokens()
    plan = jaxfp4.plan(apply_fn, params, tokens, recipe=recipe)
    stats = plan.init_stats(params)
    arguments: dict[str, tuple[Any, ...]] = {
        FORWARD: (params, tokens),
        CALIBRATE: (params, stats, tokens),
        BOTH: (params, tokens),
    }
    makers: dict[str, Callable[[], Any]] = {
        FORWARD: lambda: jax.jit(lambda *given: apply_fn(*given)),
        CALIBRATE: lambda: jaxfp4.make_calibrate_fn(apply_fn, plan),
        BOTH: lambda: jax.jit(observed(apply_fn, plan)),
    }
    lowering, compiling, compiled = _build(makers, arguments, builds)
    running = _run(compiled, arguments, samples)
    programs = {
        name: Program(Timing.of(running[name]), Timing.of(lowering[name]), Timing.of(compiling[name]))
        for name in makers
    }
    return CalibrationResult(size.parameters, size.batch, size.length, recipe, len(plan.observed), programs)


def _build(
    makers: Mapping[str, Callable[[], Any]], arguments: Mapping[str, tuple[Any, ...]], builds: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], dict[str, Any]]:
    """Seconds to lower and to compile each function, in one order and then in the other, and the last programs."""
    compiled: dict[str, Any] = {}
    lowering: dict[str, list[float]] = {name: [] for name in makers}
    compiling: dict[str, list[float]] = {name: [] for name in makers}
    makers[BOTH]().lower(*arguments[BOTH]).compile()
    for i in range(builds):
        for name in makers if i % 2 == 0 else reversed(list(makers)):
            jax.clear_caches()
            start = time.perf_counter()
            lowered = makers[name]().lower(*arguments[name])
            middle = time.perf_counter()
            compiled[name] = lowered.compile()
            lowering[name].append(middle - start)
            compiling[name].append(time.perf_counter() - middle)
    return lowering, compiling, compiled


def _run(
    functions: Mapping[str, Any], arguments: Mapping[str, tuple[Any, ...]], samples: int
) -> dict[str, list[float]]:
    """Seconds of each run, the functions in turn; the first two rounds are not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(samples + 2):
        for name, function in functions.items():
            start = time.perf_counter()
            jax.block_until_ready(function(*arguments[name]))
            seconds[name].append(time.perf_counter() - start)
    return {name: found[2:] for name, found in seconds.items()}
