"""`jaxfp4 bench kernels`: checks results, then times ours beside a copy, plain jnp and other libraries."""

from __future__ import annotations

import dataclasses
import itertools
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track
from rich.text import Text

import jaxfp4
from jaxfp4.commands.bench_kernels import model_optimizer, qwix_library
from jaxfp4.commands.bench_kernels.case import Bench, CaseResult
from jaxfp4.commands.bench_kernels.libraries import Library, installed, versions
from jaxfp4.commands.bench_kernels.operations import OPERATIONS, Operation
from jaxfp4.commands.bench_kernels.report import case_as_json, cases_table, remarks, rivals_table
from jaxfp4.commands.bench_kernels.sizes import SIZES, Size
from jaxfp4.commands.bench_kernels.timing import Clock
from jaxfp4.commands.errors import CommandError
from jaxfp4.commands.output_files import check_output, write_json

LIBRARIES: Mapping[str, tuple[tuple[str, ...], Callable[[], Library]]] = {
    "modelopt": (model_optimizer.PACKAGES, model_optimizer.ModelOptimizer),
    "qwix": (qwix_library.PACKAGES, qwix_library.Qwix),
}
"""By name, the packages that have to be there and what makes it."""

QUICK = ("tiny", "tiny_experts")
CPU_SIZES, ACCELERATOR_SIZES = ("small", "small_experts"), ("8b", "1b", "70b", "experts")
"""The first has all operations by default; the others those that matter at every size."""
STREAM_BYTES = {True: 1 << 30, False: 1 << 26}
"""Of the arrays that show a device's bandwidth, on an accelerator and on a CPU."""
SECONDS = {"quick": 0.01, "cpu": 0.5, "accelerator": 0.08}
"""What one measurement may take."""

SEVERAL_DEVICES = (
    "several devices: under jit, where the compiler could split arrays, plain JAX runs and not the kernels; show JAX "
    "one device, as with CUDA_VISIBLE_DEVICES=0, to time the kernels"
)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What to measure."""

    operations: str | None = None
    """Names separated by commas; None for all."""
    sizes: str | None = None
    quick: bool = False
    time_limit: float | None = None
    """Seconds after which no other case is begun."""


def bench_kernels(
    console: Console,
    choice: Choice,
    json_file: Path | None,
    operations: Mapping[str, Operation] = OPERATIONS,
    libraries: Sequence[Library] | None = None,
) -> int:
    """Prints tables of what is chosen and writes the same figures unrounded; the status is 1 if a result is wrong.

    `operations` are those there are; `libraries` are by default those installed. Raises CommandError for unknown names
    and a file that cannot be.
    """
    start = time.perf_counter()
    check_output("--json", json_file)
    on_accelerator = jax.default_backend() != "cpu"
    cases = chosen_cases(choice, operations, on_accelerator)
    skipped: dict[str, str] = {}
    if libraries is None:
        libraries = _libraries(skipped)
    pace = "quick" if choice.quick else "accelerator" if on_accelerator else "cpu"
    bench = Bench(Clock(on_accelerator, SECONDS[pace]), libraries)
    for library in libraries:
        library.begin({operation.name for operation, _ in cases})
    programs = bench.compile(cases)
    compiled = time.perf_counter() - start
    results: list[CaseResult] = []
    for (operation, size), program in _tracked(zip(cases, programs, strict=True), len(cases)):
        if choice.time_limit is not None and time.perf_counter() - start > choice.time_limit:
            skipped[f"{operation.name} {size.name}"] = f"past the limit of {choice.time_limit:g} s"
            continue
        results.append(bench.measure(operation, size, program))
    environment = device_environment(libraries)
    streams = _streams(bench, on_accelerator, choice.quick)
    console.print(Text(", ".join(f"{name} {value}" for name, value in environment.items())), soft_wrap=True)
    rates = ", ".join(f"{name} {rate / 1e9:,.0f} GB/s" for name, rate in streams.items())
    console.print(f"bandwidth: {rates} (a copy counts bytes read and written)", soft_wrap=True)
    if on_accelerator and jax.device_count() > 1:
        console.print(SEVERAL_DEVICES, soft_wrap=True)
    console.print(cases_table(results))
    if any(result.rivals for result in results):
        console.print(rivals_table(results))
    for line in remarks(results):
        console.print(Text(line), soft_wrap=True)
    for name, reason in skipped.items():
        console.print(Text(f"skipped {name}: {reason}"), soft_wrap=True)
    wrong = [f"{r.operation.name} {r.size.name}" for r in results if not r.correct]
    if wrong:
        console.print(Text(f"wrong or failed: {', '.join(wrong)}"), soft_wrap=True)
    seconds = time.perf_counter() - start
    console.print(f"{seconds:.0f} s, {compiled:.0f} s of it until everything was compiled")
    if json_file is not None:
        content = {
            "environment": environment,
            "bytes_per_second": streams,
            "cases": [case_as_json(result) for result in results],
            "skipped": skipped,
            "seconds": seconds,
        }
        write_json(json_file, content)
    return 1 if wrong else 0


def chosen_cases(
    choice: Choice, operations: Mapping[str, Operation], on_accelerator: bool
) -> list[tuple[Operation, Size]]:
    """The operations on the sizes that they are defined for; those that matter everywhere first, then in order of size.

    By default the platform's sizes, or quick ones; on all but the first of them run only the operations that matter
    everywhere. Whatever is named runs on everything. CommandError for unknown names, and if nothing is left.
    """
    platform = ACCELERATOR_SIZES if on_accelerator else CPU_SIZES
    sizes = [SIZES[n] for n in _names("--sizes", choice.sizes, SIZES, QUICK if choice.quick else platform)]
    chosen = [operations[n] for n in _names("--operations", choice.operations, operations, tuple(operations))]
    complete = choice.sizes is not None or choice.operations is not None
    cases = [
        (operation, size)
        for size, operation in itertools.product(sizes, chosen)
        if operation.takes(size)
        and (complete or size == sizes[0] or operation.stacks or (operation.everywhere and not choice.quick))
    ]
    if not cases:
        raise CommandError(
            f"--operations {choice.operations} --sizes {choice.sizes}: none of them is defined for any of the sizes; "
            "name a stack of experts such as tiny_experts, or another operation"
        )
    return sorted(cases, key=lambda case: not case[0].everywhere)


def _names(option: str, text: str | None, known: Iterable[str], default: Sequence[str]) -> tuple[str, ...]:
    if text is None:
        return tuple(default)
    chosen = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in chosen:
        if name not in known:
            raise CommandError(f"{option} {text}: found {name!r}; wanted some of {', '.join(known)}")
    return chosen


def _libraries(skipped: dict[str, str]) -> list[Library]:
    """Those that are installed and can be imported."""
    found: list[Library] = []
    for name, (packages, make) in LIBRARIES.items():
        if not installed(packages):
            skipped[name] = f"wanted {' and '.join(packages)} installed"
            continue
        try:
            found.append(make())
        except (ImportError, AttributeError, RuntimeError) as error:
            skipped[name] = f"{type(error).__name__}: {error}".split("\n")[0]
    return found


def _streams(bench: Bench, on_accelerator: bool, quick: bool) -> dict[str, float]:
    """Bytes a second of a copy and of reading alone."""
    moved = 1 << 20 if quick else STREAM_BYTES[on_accelerator]
    return {"copy": moved / bench.copy(moved).median, "read": moved / bench.read(moved).median}


def device_environment(libraries: Sequence[Library] = ()) -> dict[str, str]:
    """The device, the machine and the versions of what takes part."""
    device = jax.devices()[0]
    own = {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": str(jax.device_count()),
        "cores": str(os.cpu_count()),
        "jaxfp4": jaxfp4.__version__,
        **versions(["jax", "jaxlib"]),
    }
    for library in libraries:
        own |= library.versions
    return own


def _tracked(cases: Iterable[Any], total: int) -> Any:
    return track(cases, "measuring", total=total, transient=True, console=Console(stderr=True))
