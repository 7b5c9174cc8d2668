"""Measured cases as tables and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table

from jaxfp4.commands.bench_kernels.case import CaseResult, RivalResult
from jaxfp4.commands.bench_kernels.timing import Timing


def cases_table(results: Sequence[CaseResult]) -> Table:
    """Ours beside the copy and the naive version."""
    table = markdown_table(
        ("operation", "size"), ("bytes moved", "time", "GB/s", "of the copy", "naive", "naive equal", "as expected")
    )
    for result in results:
        name, size = result.operation.name, result.size.name
        if result.ours is None:
            failed = (
                result.error or f"WRONG: {result.as_expected:.2%} of the sample, wanted {result.operation.wanted:.2%}"
            )
            table.add_row(name, size, "", failed)
            continue
        moved = result.read + result.written
        table.add_row(
            name,
            size,
            f"{moved / 1e6:.1f} MB",
            shown_time(result.ours),
            f"{moved / result.ours.median / 1e9:.0f}",
            "" if result.floor_share is None else f"{result.floor_share:.0%}",
            shown_ratio(result.ratio(result.naive)),
            _share(result.naive_equal),
            _share(result.as_expected),
        )
    return table


def rivals_table(results: Sequence[CaseResult]) -> Table:
    """Ours beside other libraries' functions."""
    table = markdown_table(("operation", "size", "function"), ("ours", "theirs", "ours is faster", "equal"))
    for result in results:
        for rival in result.rivals:
            equal = "failed" if rival.equal is None else _share(rival.equal) + ("" if rival.same else " DIFFERS")
            table.add_row(
                result.operation.name,
                result.size.name,
                f"{rival.library} {rival.function}",
                "" if result.ours is None else shown_time(result.ours),
                "" if rival.timing is None else shown_time(rival.timing),
                shown_ratio(result.ratio(rival.timing)),
                equal,
            )
    return table


def remarks(results: Sequence[CaseResult]) -> list[str]:
    """How the work of other libraries' functions differs from ours, and why some could not be measured, once each."""
    rivals = [rival for result in results for rival in result.rivals]
    lines = [f"{r.library} {r.function}: {r.error or r.note}" for r in rivals if r.error or r.note]
    return list(dict.fromkeys(lines))


def case_as_json(result: CaseResult) -> dict[str, Any]:
    """What was measured; null where nothing was."""
    return {
        "operation": result.operation.name,
        "size": result.size.name,
        "shape": list(result.size.shape),
        "axis": result.operation.axis,
        "correct": result.correct,
        "error": result.error,
        "as_expected": result.as_expected,
        "wanted": result.operation.wanted,
        "bytes_read": result.read,
        "bytes_written": result.written,
        "ours": timing_as_json(result.ours),
        "copy": timing_as_json(result.copy),
        "share_of_copy": result.floor_share,
        "naive": timing_as_json(result.naive),
        "naive_over_ours": result.ratio(result.naive),
        "naive_equal": result.naive_equal,
        "rivals": [_rival_as_json(result, rival) for rival in result.rivals],
    }


def _rival_as_json(result: CaseResult, rival: RivalResult) -> dict[str, Any]:
    return {
        "library": rival.library,
        "function": rival.function,
        "note": rival.note,
        "error": rival.error,
        "equal": rival.equal,
        "same": rival.same,
        "timing": timing_as_json(rival.timing),
        "over_ours": result.ratio(rival.timing),
    }


def timing_as_json(timing: Timing | None) -> dict[str, Any] | None:
    """Its fields; None for none."""
    return None if timing is None else dataclasses.asdict(timing)


def markdown_table(left: Sequence[str], right: Sequence[str]) -> Table:
    """A table whose columns are aligned left, then right."""
    table = Table(box=box.MARKDOWN)
    for header in left:
        table.add_column(header, no_wrap=True)
    for header in right:
        table.add_column(header, justify="right", no_wrap=True)
    return table


def shown_time(timing: Timing) -> str:
    """The median, and half the distance of the quartiles as a share of it."""
    factor, unit = next(f for f in ((1e6, "us"), (1e3, "ms"), (1, "s")) if timing.median * f[0] < 1000 or f[1] == "s")
    spread = (timing.high - timing.low) / 2 / timing.median
    return f"{timing.median * factor:.4g} {unit} ± {spread:.0%}" + (" (host)" if timing.host_bound else "")


def shown_ratio(ratio: float | None) -> str:
    """As in `1.03 x`; nothing for None."""
    return "" if ratio is None else f"{ratio:.2f} x"


def _share(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.5g} %"
