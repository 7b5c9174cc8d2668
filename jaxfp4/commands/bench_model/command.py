"""`jaxfp4 bench model`: calibration beside the forward pass, peak memory, weak scaling, and digests on every mesh."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.text import Text

from jaxfp4.commands.bench_kernels.command import device_environment
from jaxfp4.commands.bench_model import decoders, layers, report
from jaxfp4.commands.bench_model.calibration import measure_calibration
from jaxfp4.commands.bench_model.decoders import DecoderSize
from jaxfp4.commands.bench_model.layers import Layers
from jaxfp4.commands.bench_model.memory import measure_memory
from jaxfp4.commands.bench_model.scaling import MeshTiming, device_counts, measure_digests, measure_scaling
from jaxfp4.commands.errors import CommandError
from jaxfp4.commands.output_files import check_output, write_json

VIRTUAL_DEVICES = 8
"""CPU devices, where there is no accelerator."""
ON_CPU = (
    "on virtual CPU devices, which share the cores of one machine: digests mean the same as anywhere, efficiencies of "
    "scaling nothing"
)


@dataclasses.dataclass(frozen=True)
class Size:
    """What is measured, and how often."""

    decoder: DecoderSize
    layers: Layers
    logical: Layers
    """The model of which digests are taken."""
    samples: int
    builds: int
    """Compilations of each function, half of them in the other order."""


SIZES: Mapping[str, Size] = {
    "full": Size(decoders.FULL, layers.FULL, layers.LOGICAL, samples=20, builds=2),
    "tiny": Size(decoders.TINY, layers.TINY, layers.TINY, samples=3, builds=2),
}
PARTS = ("memory", "digest", "calibration", "scaling")
"""In the order in which they run: memory first, as its peak is that of the process."""


@dataclasses.dataclass(frozen=True)
class ModelChoice:
    """What to measure; by default everything, the full size on an accelerator and the tiny one on a CPU."""

    parts: str | None = None
    size: str | None = None
    devices: int | None = None


def bench_model(console: Console, choice: ModelChoice, json_file: Path | None) -> int:
    """Prints tables of what is chosen and writes the same figures unrounded; the status is 1 if digests differ.

    A part that fails is said, makes the status 1 and leaves the others; the file is written after each part.

    Raises CommandError for unknown names, more devices than there are, and a file that cannot be.
    """
    start = time.perf_counter()
    check_output("--json", json_file)
    parts, size, devices = _parts(choice.parts), _size(choice.size), _devices(choice.devices)
    environment = device_environment()
    console.print(Text(", ".join(f"{name} {value}" for name, value in environment.items())), soft_wrap=True)
    if jax.default_backend() == "cpu":
        console.print(ON_CPU, soft_wrap=True)
    content: dict[str, Any] = {"environment": environment}
    failed = False
    for part in parts:
        try:
            content[part] = _MEASURE[part](console, size, devices)
        except CommandError:
            raise
        except Exception as error:  # whatever it is, the other parts are worth having
            reason = f"{type(error).__name__}: {error}".split("\n")[0]
            console.print(Text(f"{part} FAILED: {reason}"), soft_wrap=True)
            content[part], failed = {"error": reason}, True
        content["seconds"] = time.perf_counter() - start
        if json_file is not None:
            write_json(json_file, content)
    console.print(f"{content['seconds']:.0f} s")
    differs = not content.get("digest", {}).get("equal", True)
    return 1 if failed or differs else 0


def _memory(console: Console, size: Size, devices: int) -> dict[str, Any] | None:
    count = max(device_counts(devices))
    console.print(f"memory: quantize_params(donate=True), {size.decoder.parameters:,} parameters, tp={count}")
    result = measure_memory(size.decoder, count)
    if result is None:
        console.print("skipped: this platform does not say how much memory is in use")
        return None
    console.print(report.memory_table(result))
    return report.memory_as_json(result)


def _calibration(console: Console, size: Size, devices: int) -> dict[str, Any]:
    result = measure_calibration(size.decoder, size.samples, size.builds)
    console.print(
        f"calibration: {result.parameters:,} parameters in bfloat16 on one device, {result.batch} x {result.length} "
        f"tokens, recipe {result.recipe}, {result.observed} weights looked at; runs take turns, compilations in both "
        "orders from empty caches",
        soft_wrap=True,
    )
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        console.print("JAX keeps compiled programs in a folder: times to compile may be those of reading them")
    console.print(report.calibration_table(result))
    return report.calibration_as_json(result)


def _scaling(console: Console, size: Size, devices: int) -> dict[str, Any]:
    def say(mesh: MeshTiming) -> None:
        seconds = f"{mesh.timing.median:.4f} s, the first call {mesh.compile_seconds:.1f} s"
        console.print(f"scaling on tp={mesh.tp} ep={mesh.ep}: {seconds}")

    result = measure_scaling(size.layers, devices, size.samples, say)
    held = result.layers.bytes_per_device / 1e6
    console.print(
        f"weak scaling: quantize_params of {result.layers.weights} bfloat16 weights, {held:,.1f} MB on each device "
        f"whatever the mesh, recipe {layers.RECIPE}; efficiency is the time on one device over that on all",
        soft_wrap=True,
    )
    console.print(report.scaling_table(result))
    return report.scaling_as_json(result)


def _digest(console: Console, size: Size, devices: int) -> dict[str, Any]:
    result = measure_digests(devices, size.logical)
    console.print("one model with the same values everywhere:")
    console.print(report.digest_table(result))
    if not result.equal:
        console.print("digests DIFFER")
    return report.digest_as_json(result)


_MEASURE: Mapping[str, Callable[[Console, Size, int], dict[str, Any] | None]] = {
    "memory": _memory,
    "calibration": _calibration,
    "scaling": _scaling,
    "digest": _digest,
}


def _parts(text: str | None) -> tuple[str, ...]:
    if text is None:
        return PARTS
    named = [name.strip() for name in text.split(",")]
    for name in named:
        if name not in PARTS:
            raise CommandError(f"--parts {text}: found {name!r}; wanted some of {', '.join(PARTS)}")
    return tuple(part for part in PARTS if part in named)


def _size(name: str | None) -> Size:
    return SIZES[name or ("tiny" if jax.default_backend() == "cpu" else "full")]


def _devices(count: int | None) -> int:
    present = jax.device_count()
    if count is not None and count > present:
        raise CommandError(f"--devices {count}: found {present} {jax.default_backend()} device(s); wanted at most that")
    return present if count is None else count
