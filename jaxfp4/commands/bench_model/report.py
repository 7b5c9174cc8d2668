"""What was measured as tables and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

from rich.table import Table

from jaxfp4.commands.bench_kernels.report import markdown_table, shown_ratio, shown_time, timing_as_json
from jaxfp4.commands.bench_model.calibration import COMPILATION_WANTED, FORWARD, TIME_WANTED, CalibrationResult
from jaxfp4.commands.bench_model.memory import MemoryResult
from jaxfp4.commands.bench_model.scaling import EFFICIENCY_WANTED, DigestResult, ScalingResult


def calibration_table(result: CalibrationResult) -> Table:
    """Each function beside the forward pass."""
    table = markdown_table(
        ("function",),
        ("run", "of the forward", "wanted", "trace and lower", "compile", "both of the forward's", "wanted"),
    )
    for name, program in result.programs.items():
        baseline = name == FORWARD
        table.add_row(
            name,
            shown_time(program.run),
            "" if baseline else shown_ratio(result.time_ratio(name)),
            "" if baseline else f"at most {TIME_WANTED} x",
            shown_time(program.lower),
            shown_time(program.compile),
            "" if baseline else shown_ratio(result.build_ratio(name)),
            "" if baseline else f"at most {COMPILATION_WANTED} x",
        )
    return table


def memory_table(result: MemoryResult) -> Table:
    """Bytes on the fullest device."""
    table = markdown_table(("on the fullest device",), ("MB",))
    figures = {
        "parameters": result.parameters,
        "in use before": result.before,
        "peak before": result.peak_before,
        "peak after": result.peak,
        "in use after": result.after,
        "peak above what was in use before": result.added,
        "largest group of siblings": result.largest_group,
    }
    for name, size in figures.items():
        table.add_row(name, f"{size / 1e6:,.1f}")
    return table


def scaling_table(result: ScalingResult) -> Table:
    """Times and efficiencies, mesh by mesh."""
    table = markdown_table(
        ("mesh",), ("devices", "time", "GB/s a device", "efficiency", "wanted", "host, tiny weights", "first call")
    )
    for mesh in result.meshes:
        table.add_row(
            f"tp={mesh.tp} ep={mesh.ep}",
            str(mesh.devices),
            shown_time(mesh.timing),
            f"{result.layers.bytes_per_device / mesh.timing.median / 1e9:.0f}",
            f"{result.efficiency(mesh):.1%}",
            "" if mesh.devices == 1 else f"{EFFICIENCY_WANTED:.0%}",
            f"{shown_time(mesh.host)}, {1e6 * mesh.host.median / result.layers.weights:.0f} us a weight",
            f"{mesh.compile_seconds:.1f} s",
        )
    return table


def digest_table(result: DigestResult) -> Table:
    """One digest a place, and whether it is the first's."""
    table = markdown_table(("quantized on", "digest", ""), ())
    expected = next(iter(result.by_place.values()))
    for place, found in result.by_place.items():
        table.add_row(place, found, "equal" if found == expected else "DIFFERENT")
    return table


def calibration_as_json(result: CalibrationResult) -> dict[str, Any]:
    """Seconds and ratios, unrounded."""
    programs = {
        name: {
            "run": timing_as_json(program.run),
            "lower": timing_as_json(program.lower),
            "compile": timing_as_json(program.compile),
            "time_over_forward": result.time_ratio(name),
            "build_over_forward": result.build_ratio(name),
        }
        for name, program in result.programs.items()
    }
    return {**dataclasses.asdict(dataclasses.replace(result, programs={})), "programs": programs}


def memory_as_json(result: MemoryResult) -> dict[str, Any]:
    """Bytes."""
    return {**dataclasses.asdict(result), "added": result.added, "holds": result.holds}


def scaling_as_json(result: ScalingResult) -> dict[str, Any]:
    """Seconds and efficiencies, unrounded."""
    meshes = [
        {
            "tp": mesh.tp,
            "ep": mesh.ep,
            "devices": mesh.devices,
            "timing": timing_as_json(mesh.timing),
            "efficiency": result.efficiency(mesh),
            "host": timing_as_json(mesh.host),
            "first_call_seconds": mesh.compile_seconds,
        }
        for mesh in result.meshes
    ]
    layers = result.layers
    sizes = {**dataclasses.asdict(layers), "weights": layers.weights, "bytes_per_device": layers.bytes_per_device}
    return {"sizes": sizes, "wanted": EFFICIENCY_WANTED, "meshes": meshes}


def digest_as_json(result: DigestResult) -> dict[str, Any]:
    """Digests by place."""
    return {"by_place": result.by_place, "equal": result.equal}
