"""The weights of a checkpoint as a table, like layers and experts in one row."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from jaxfp4.checkpoints.verification.block_statistics import BlockStatistics, merged
from jaxfp4.checkpoints.verification.quantized_modules import expert_of, kind_of, layer_of
from jaxfp4.reports.checkpoint_report import CheckpointReport, WeightReport, decibels

_LEFT = ("module", "shape", "scheme")
_RIGHT = ("bits", "global scale", "amax", "input scale", "saturated", "dead", "entropy")
_NAME_WIDTH = 34


def checkpoint_table(report: CheckpointReport, *, every: bool = False) -> Table:
    """A row for each kind of weight, with ranges over layers and experts; with `every` one for each weight.

    `bits` are stored bits for each weight, `amax` is `2688 * global scale`, `saturated` and `dead` are shares of the
    blocks, `entropy` is that of the magnitudes of the codes in bits (at most 3). The last two columns are there if the
    original was compared: the signal-to-noise ratio of the row's weights together, and the least of them.
    """
    table = Table(title="weights", title_justify="left")
    table.add_column(_LEFT[0], overflow="fold", min_width=_NAME_WIDTH)
    for name in _LEFT[1:]:
        table.add_column(name)
    compared = report.not_compared is not None
    for name in [*_RIGHT, *(["SNR (dB)", "least"] if compared else [])]:
        table.add_column(name, justify="right")
    groups: dict[object, list[WeightReport]] = {}
    for weight in report.weights:
        key = weight.name if every else (kind_of(weight.name), weight.shape, weight.scheme)
        groups.setdefault(key, []).append(weight)
    for group in groups.values():
        table.add_row(*_row(group), *(_noise(group) if compared else ()))
    return table


def _row(group: Sequence[WeightReport]) -> list[str]:
    first = group[0]
    values, nbytes = sum(weight.values for weight in group), sum(weight.nbytes for weight in group)
    found = [weight.statistics for weight in group if weight.statistics is not None]
    statistics = functools.reduce(merged, found) if found else None
    return [
        _folded_name([weight.name for weight in group]),
        "x".join(map(str, first.shape)),
        first.scheme,
        f"{8 * nbytes / values:.2f}" if values else "",
        _range([weight.global_scale for weight in group]),
        _range([weight.amax for weight in group]),
        _range([weight.input_scale for weight in group]),
        *_shares(statistics),
    ]


def _shares(statistics: BlockStatistics | None) -> tuple[str, str, str]:
    if statistics is None:
        return "", "", ""
    saturated, dead = statistics.saturated / statistics.blocks, statistics.dead / statistics.blocks
    return f"{100 * saturated:.2f} %", f"{100 * dead:.2f} %", f"{statistics.code_entropy:.2f}"


def _noise(group: Sequence[WeightReport]) -> tuple[str, str]:
    pairs = [(w.signal, w.noise) for w in group if w.signal is not None and w.noise is not None]
    if not pairs:
        return "", ""
    together = decibels(sum(signal for signal, _ in pairs), sum(noise for _, noise in pairs))
    least = min((decibels(*pair) for pair in pairs), key=lambda ratio: -math.inf if math.isnan(ratio) else ratio)
    return f"{together:.2f}", f"{least:.2f}"


def _range(values: Sequence[float | None]) -> str:
    present = [value for value in values if value is not None]
    if not present:
        return ""
    least, most = f"{min(present):.3g}", f"{max(present):.3g}"
    return least if least == most else f"{least} to\n{most}"


def _folded_name(names: Sequence[str]) -> str:
    """The common name, with the numbers of layers and experts in ranges."""
    layers = {place[1] for name in names if (place := layer_of(name)) is not None}
    experts = {expert for name in names if (expert := expert_of(name)) is not None}
    name = kind_of(names[0])
    return name.replace("{layer}", ranges(layers)).replace("{expert}", ranges(experts))


def ranges(numbers: set[int]) -> str:
    """Numbers with runs of them shortened.

    >>> ranges({0, 1, 2, 5, 7, 8})
    '0-2,5,7-8'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def totals(report: CheckpointReport) -> list[str]:
    """Lines about the checkpoint as a whole."""
    quantized = report.quantized_values
    lines = [
        f"format {report.file_format}, producer {report.producer or 'unknown'}, key-value cache "
        f"{report.cache or 'not quantized'}",
        f"{report.nbytes:,} bytes for {report.values:,} parameters: {report.bits:.2f} bits each, "
        f"{report.compression:.2f} times smaller than in 16 bits",
        f"{quantized:,} parameters in NVFP4, {report.values - quantized:,} not",
    ]
    if report.not_compared:
        lines.append(f"{report.not_compared} NVFP4 weights have no counterpart in the original and were not compared")
    if report.changed:
        lines.append(
            f"{len(report.changed)} norms or biases differ from the original's, such as {report.changed[0]!r}: where "
            "AWQ or SmoothQuant scaled channels, the scales count as noise above"
        )
    return lines


def as_json(report: CheckpointReport) -> dict[str, Any]:
    """All figures, unrounded, one entry for each weight; what is no finite number is null."""
    return {
        "format": report.file_format,
        "producer": report.producer,
        "kv_cache": report.cache,
        "bytes": report.nbytes,
        "parameters": report.values,
        "quantized_parameters": report.quantized_values,
        "bits_per_parameter": _finite(report.bits),
        "compression": _finite(report.compression),
        "changed": list(report.changed),
        "weights": [_weight_json(weight) for weight in report.weights],
    }


def _weight_json(weight: WeightReport) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "name": weight.name,
        "shape": list(weight.shape),
        "scheme": weight.scheme,
        "bytes": weight.nbytes,
        "bits": _finite(weight.bits),
        "global_scale": _finite(weight.global_scale),
        "input_scale": _finite(weight.input_scale),
        "amax": _finite(weight.amax),
        "signal_to_noise_db": _finite(weight.signal_to_noise),
    }
    found = weight.statistics
    if found is not None and found.code_counts is not None:
        entry |= {
            "blocks": found.blocks,
            "saturated_blocks": found.saturated,
            "dead_blocks": found.dead,
            "subnormal_block_scales": found.subnormal,
            "nan_block_scales": found.nan,
            "code_counts": found.code_counts.tolist(),
            "code_entropy_bits": _finite(found.code_entropy),
            "scale_counts": found.scale_counts.tolist(),
        }
    return entry


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None
